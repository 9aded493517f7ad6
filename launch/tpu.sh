#!/usr/bin/env bash
# Training on a TPU VM, a pod slice or several slices:   launch/tpu.sh [--dry-run] SUBCOMMAND [COMMAND ...]
#
#   create           asks for the TPUs (a queued resource; it may wait for hours)
#   status           prints the state of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED
#   wait             waits until it is ACTIVE
#   install          copies the last commit of this checkout to every worker and installs it there
#   run COMMAND      starts the command on every worker in the background, and returns
#   workers          says of each worker whether the command runs there, and the last line of its log
#   logs             follows the log of one worker (~/world_distill.log there)
#   resume COMMAND   after a preemption: delete, create, wait, install, run; training goes on from its newest checkpoint
#   stop             SIGTERM on every worker, so that training saves and ends; SIGKILL after GRACE seconds
#   delete           gives the TPUs back, and with them everything on their disks
#
#   NAME, PROJECT, ZONE   of the TPUs: a name of your own, the Google Cloud project, the zone; needed by all
#   TYPE             accelerator type: v5litepod-16 (v5e, chips), v5p-16 (cores: 8 chips), v6e-16 (chips); create, resume
#   SLICES           slices of that type, joined by the data-centre network (1)
#   RUNTIME          software of the VM (v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e)
#   SPOT=1           cheaper, and may be taken away at any time; RESERVED=1: from your reservation
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT, LABELS (key=value,...)       as `gcloud` takes them; none: its defaults
#   INTERNAL=1       no external addresses; SSH goes through Identity-Aware Proxy (packages then need Cloud NAT)
#   EXTRAS           of setup.py to install (tpu,vlm)
#   SLICE, WORKER    whose log is followed (0, 0)
#   GRACE            seconds between SIGTERM and SIGKILL (120)
#   POLL             seconds between two looks at the state (30)
#
# SSH to several workers takes the key from an agent: `ssh-add ~/.ssh/google_compute_engine` first.

# shellcheck disable=SC2153,SC2016 # names in capitals come from the environment; '...' is expanded on the worker
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

queued=(gcloud compute tpus queued-resources)

# The place of every command, and the runtime that fits the type.
place() {
  need NAME PROJECT ZONE
  where=("--project=$PROJECT" "--zone=$ZONE")
}

runtime() {
  case ${RUNTIME:-$TYPE} in
    "${RUNTIME:-}") echo "$RUNTIME" ;;
    v5lite*) echo v2-alpha-tpuv5-lite ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    *) die "which RUNTIME does TYPE=$TYPE take? The default is known for v5litepod, v5p and v6e" ;;
  esac
}

# `gcloud ... ssh` (or scp) to all workers of all slices, or to one.
remote() { # VERB SLICE WORKER WORDS...
  local flags=("--node=$2" "--worker=$3")
  [[ ! ${INTERNAL:-} ]] || flags+=(--tunnel-through-iap)
  perform "${queued[@]}" "$1" "${@:4}" "${where[@]}" "${flags[@]}"
}

on_all() { # SCRIPT: runs it on every worker
  remote ssh all all "$NAME" "--command=$1"
}

create() {
  need TYPE
  local flags=("--accelerator-type=$TYPE")
  flags+=("--runtime-version=$(runtime)")
  if [[ ${SLICES:-1} -gt 1 ]]; then
    flags+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    flags+=("--node-id=$NAME")
  fi
  [[ ! ${SPOT:-} ]] || flags+=(--spot)
  [[ ! ${RESERVED:-} ]] || flags+=(--reserved)
  [[ ! ${INTERNAL:-} ]] || flags+=(--internal-ips)
  [[ ! ${NETWORK:-} ]] || flags+=("--network=$NETWORK")
  [[ ! ${SUBNETWORK:-} ]] || flags+=("--subnetwork=$SUBNETWORK")
  [[ ! ${SERVICE_ACCOUNT:-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  [[ ! ${LABELS:-} ]] || flags+=("--labels=$LABELS")
  perform "${queued[@]}" create "$NAME" "${where[@]}" "${flags[@]}"
}

status() {
  perform "${queued[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)"
}

wait_until_active() {
  local state
  if [[ $dry_run ]]; then
    status
    return
  fi
  while state=$(status) && [[ $state != ACTIVE ]]; do
    case $state in
      FAILED | SUSPENDING | SUSPENDED | DELETING) die "$NAME is $state: resume asks for it anew" ;;
    esac
    echo "$NAME is $state"
    sleep "${POLL:-30}"
  done
  [[ $state == ACTIVE ]] || die "the state of $NAME cannot be read"
}

# The image has an old Python; uv brings a newer one.
install() {
  local archive
  archive=${TMPDIR:-/tmp}/world_distill-$NAME.tar.gz
  [[ $dry_run || -z $(git -C "${BASH_SOURCE[0]%/*}" status --porcelain) ]] || echo "uncommitted changes stay here" >&2
  perform git -C "${BASH_SOURCE[0]%/*}/.." archive --format=tar.gz "--output=$archive" HEAD
  remote scp all all "$archive" "$NAME:world_distill.tar.gz"
  on_all "set -e; mkdir -p ~/world_distill; cd ~/world_distill; tar -xzf ~/world_distill.tar.gz; \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv; \
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv; \
python3 -m uv pip install --quiet --python .venv -e '.[${EXTRAS:-tpu,vlm}]'; \
.venv/bin/world-distill --help > /dev/null; echo \"installed on \$(hostname)\""
}

# The command and the shell that writes its exit code are a process group of their own, which outlives the SSH connection.
look='group=$(cat ~/world_distill.pid 2> /dev/null || echo none)'
look+='; alive() { ps -eo pgid=,stat= | grep -q "^ *$group  *[^Z]"; };'

start() {
  local wrapper='"$@"; echo "ended with exit code $?"'
  on_all "set -e; cd ~/world_distill; $look \
if alive; then echo \"a command is running on \$(hostname): stop it first\" >&2; exit 1; fi; \
PATH=~/world_distill/.venv/bin:\$PATH setsid nohup $(quote bash -c "$wrapper" run "$@") \
>> ~/world_distill.log 2>&1 < /dev/null & echo \$! > ~/world_distill.pid"
}

workers() {
  on_all "$look if alive; then state='running'; else state='not running'; fi; \
echo \"\$(hostname): \$state: \$(tail -n 1 ~/world_distill.log 2> /dev/null)\""
}

logs() {
  remote ssh "${SLICE:-0}" "${WORKER:-0}" "$NAME" "--command=tail -n 200 -F ~/world_distill.log"
}

# SIGTERM goes to the command alone: it still needs the processes that it has started.
stop() {
  on_all "$look alive || exit 0; pkill -TERM -P \$group; \
for i in \$(seq ${GRACE:-120}); do alive || exit 0; sleep 1; done; kill -KILL -- -\$group || true"
}

delete() { # [--quiet]: without it, gcloud asks before it deletes
  perform "${queued[@]}" delete "$NAME" "${where[@]}" --force "$@"
}

resume() {
  need TYPE
  runtime > /dev/null # a TYPE that cannot be created is found before anything is deleted
  local state=
  [[ $dry_run ]] || state=$(status) || state=GONE
  [[ $state != ACTIVE ]] || die "$NAME is ACTIVE: run starts the command again, delete gives the TPUs back"
  [[ $state == GONE ]] || delete --quiet
  create
  wait_until_active
  install
  start "$@"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
subcommand=${1:---help}
shift || true
case $subcommand in
  -h | --help) usage ;;
  create | status | install | workers | logs | stop | delete)
    no_more "$@"
    place
    "$subcommand"
    ;;
  wait)
    no_more "$@"
    place
    wait_until_active
    ;;
  run | resume)
    [[ $# -gt 0 ]] || die "$subcommand needs the command to start, such as: world-distill train --config ..."
    place
    if [[ $subcommand == run ]]; then start "$@"; else resume "$@"; fi
    ;;
  *) die "unknown subcommand '$subcommand'; --help lists them" ;;
esac
