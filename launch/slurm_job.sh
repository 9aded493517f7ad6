#!/usr/bin/env bash
# What launch/slurm.sh submits: runs COMMAND once per GPU, and queues the job again where the command asks for it.
#
#   SETUP        shell command that comes first; each process gets the environment that it leaves
#   PREEMPTED    exit codes after which the job goes back into the queue ('75 143')
#
# JAX finds coordinator, number and count of the processes in SLURM's own variables; none are set here.

set -eo pipefail # not -u: what SETUP calls, such as environment modules, may not be written for it

eval "${SETUP:-}"
code=0
srun --label --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" || code=$?
for again in ${PREEMPTED:-75 143}; do
  if [[ $code == "$again" ]]; then
    echo "ended with exit code $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  fi
done
exit "$code"
