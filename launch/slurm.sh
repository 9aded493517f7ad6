#!/usr/bin/env bash
# Training on GPU nodes under SLURM:   launch/slurm.sh [--dry-run] COMMAND ...
#
# Submits a job with one process per GPU, and prints its number. Before the time limit, and when SLURM preempts the job,
# the processes get SIGTERM: training saves and ends, and the job goes back into the queue, to continue from its newest
# checkpoint. Look at it with `squeue --me` and `tail -F LOGS/NAME-NUMBER.out`, end it with `scancel NUMBER`.
#
#   GPUS         of a node; needed
#   NODES        (1)
#   TIME         limit of one run, hours:minutes:seconds (24:00:00); training as a whole may take longer
#   NAME         of the job (world-distill)
#   PARTITION, ACCOUNT, QOS, CONSTRAINT, MEMORY       as `sbatch` takes them; none: the cluster's defaults
#   CPUS         cores of a process (8)
#   SETUP        shell command that prepares the environment, such as '. .venv/bin/activate' or 'module load cuda'
#   LOGS         folder of the log (logs); one file a job, in which each line begins with the process's number
#   GRACE        seconds before the time limit at which SIGTERM comes (300)
#   PREEMPTED    exit codes of a command that saved and wants to be started again ('75 143')

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "${BASH_SOURCE[0]%/*}/lib.sh"

if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
case ${1:---help} in
  -h | --help)
    usage
    exit
    ;;
  -*) die "unknown flag '$1'; settings come from the environment (--help)" ;;
esac
need GPUS

flags=(
  "--job-name=${NAME:-world-distill}"
  "--nodes=${NODES:-1}"
  "--ntasks-per-node=$GPUS"
  "--gpus-per-node=$GPUS" # all visible to each process, as NCCL needs them; JAX takes the one of its SLURM_LOCALID
  "--cpus-per-task=${CPUS:-8}"
  "--time=${TIME:-24:00:00}"
  "--signal=TERM@${GRACE:-300}" # to the processes, not to the batch script
  --requeue
  --open-mode=append
  "--output=${LOGS:-logs}/%x-%j.out"
)
[[ ! ${PARTITION:-} ]] || flags+=("--partition=$PARTITION")
[[ ! ${ACCOUNT:-} ]] || flags+=("--account=$ACCOUNT")
[[ ! ${QOS:-} ]] || flags+=("--qos=$QOS")
[[ ! ${CONSTRAINT:-} ]] || flags+=("--constraint=$CONSTRAINT")
[[ ! ${MEMORY:-} ]] || flags+=("--mem=$MEMORY")

export SETUP=${SETUP:-} PREEMPTED=${PREEMPTED:-75 143} # sbatch hands the environment on
perform mkdir -p "${LOGS:-logs}" # without it, SLURM drops the job silently
perform sbatch "${flags[@]}" "${BASH_SOURCE[0]%/*}/slurm_job.sh" "$@"
