#!/usr/bin/env bash
# Training on TPUs of a GKE cluster, by XPK:   launch/gke_xpk.sh [--dry-run] SUBCOMMAND [COMMAND ...]
#
#   cluster          creates a cluster with SLICES slices of TYPE, if you have none (XPK adds node pools to an old one)
#   image            builds launch/Dockerfile from this checkout as IMAGE, and pushes it
#   create COMMAND   starts the command on every host of SLICES slices, from IMAGE
#   list             lists the cluster's workloads and how they are
#   logs             follows the log of one host
#   delete           deletes the workload
#   cluster-delete   deletes the cluster with all that runs on it
#
#   PROJECT, ZONE, CLUSTER   needed by all but image; the zone is where the TPUs are
#   NAME             of the workload: small letters, digits and hyphens; create, logs, delete
#   TYPE             v5litepod-16 (v5e, chips), v5p-16 (cores: 8 chips), v6e-16 (chips); cluster, create
#   SLICES           of that type (1)
#   IMAGE            REGION-docker.pkg.dev/PROJECT/REPOSITORY/world-distill:TAG; image, create
#   SPOT=1           cheaper, and may be taken away at any time; RESERVATION: its name; neither: on demand; cluster
#   RESTARTS         times that a workload starts again after preemptions (100); it goes on from its newest checkpoint
#   PREEMPTED        exit codes of a command that saved and wants to be started again (75,143)
#   GRACE            seconds between SIGTERM and SIGKILL (120)
#   LOCATION         of the cluster, for logs (the region of ZONE, as XPK places it)
#   SLICE, WORKER    whose log is followed (0, 0)
#
# Install XPK (`pip install xpk`), Docker, kubectl and gcloud's gke-gcloud-auth-plugin first.

# shellcheck disable=SC2153 # the names in capitals come from the environment
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

place() {
  need PROJECT ZONE CLUSTER "$@"
  where=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
}

cluster() {
  place TYPE
  local capacity=--on-demand
  [[ ! ${RESERVATION:-} ]] || capacity=--reservation=$RESERVATION
  [[ ! ${SPOT:-} ]] || capacity=--spot
  perform xpk cluster create "${where[@]}" "--tpu-type=$TYPE" "--num-slices=${SLICES:-1}" "$capacity"
}

image() {
  need IMAGE
  local root=${BASH_SOURCE[0]%/*}/..
  perform docker build --platform=linux/amd64 "--file=$root/launch/Dockerfile" "--tag=$IMAGE" "$root"
  perform docker push "$IMAGE"
}

create() {
  place NAME TYPE IMAGE
  perform xpk workload create "${where[@]}" "--workload=$NAME" "--tpu-type=$TYPE" "--num-slices=${SLICES:-1}" \
    "--docker-image=$IMAGE" "--max-restarts=${RESTARTS:-100}" "--restart-on-exit-codes=${PREEMPTED:-75,143}" \
    "--termination-grace-period-seconds=${GRACE:-120}" "--command=$(quote "$@")"
}

list() {
  place
  perform xpk workload list "${where[@]}"
}

# A slice is a job of the workload's JobSet, a host an index of that job.
logs() {
  place NAME
  local jobset=jobset.sigs.k8s.io index=batch.kubernetes.io/job-completion-index
  perform gcloud container clusters get-credentials "$CLUSTER" "--project=$PROJECT" "--location=${LOCATION:-${ZONE%-*}}"
  perform kubectl logs --follow --tail=200 \
    "--selector=$jobset/jobset-name=$NAME,$jobset/job-index=${SLICE:-0},$index=${WORKER:-0}"
}

delete() {
  place NAME
  perform xpk workload delete "${where[@]}" "--workload=$NAME"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
subcommand=${1:---help}
shift || true
case $subcommand in
  -h | --help) usage ;;
  cluster | image | list | logs | delete)
    no_more "$@"
    "$subcommand"
    ;;
  cluster-delete)
    no_more "$@"
    place
    perform xpk cluster delete "${where[@]}"
    ;;
  create)
    [[ $# -gt 0 ]] || die "create needs the command to start, such as: world-distill train --config ..."
    create "$@"
    ;;
  *) die "unknown subcommand '$subcommand'; --help lists them" ;;
esac
