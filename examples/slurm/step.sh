#!/usr/bin/env bash
# srun, but SIGTERM to this reaches the tasks, which may save before they end: step.sh [srun's options] COMMAND ...
#
# srun itself answers SIGTERM by killing its tasks ("forcing job termination"). So it runs in a session of its own, out of
# reach of signals to this one's group, and the tasks get theirs from Slurm. It does not outlive this script.

set -uo pipefail
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM  # job steps alone, not the batch script
setsid setpriv --pdeathsig TERM srun "$@" &
step=$!
while true; do
  wait "$step"
  status=$?
  kill -0 "$step" 2> /dev/null || exit "$status"  # else it was the signal that ended the waiting
done
