#!/usr/bin/env bash
# Run a node's part of a Ray cluster, and on every node but the first again for as long as the first one's Ray answers: Ray
# gives a node 30 seconds to start, which a busy one may not keep, then ends without an error, and the stage would wait for
# it in vain.
#
#   ray_node.sh HOST:PORT ray symmetric-run --address HOST:PORT ... -- COMMAND      as a task of srun

set -uo pipefail
address=$1
shift
answers() { timeout 10 bash -c 'exec 3<> "/dev/tcp/$1/$2"' _ "${address%:*}" "${address##*:}" 2> /dev/null; }

stopped=
trap 'stopped=1' TERM
while true; do
  "$@"
  status=$?
  if [[ -n $stopped || ${SLURM_NODEID:-0} == 0 ]] || ! answers; then exit "$status"; fi
  echo "$(date +%T) $(hostname): Ray has ended here, and not on the first node: it is started again" >&2
done
