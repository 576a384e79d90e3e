#!/usr/bin/env bash
# Run a node's part of a Ray cluster. Ray gives a node 30 seconds to start, which a busy one may not keep, and `ray
# symmetric-run` then ends without an error. So it is started again, on every node but the first, for as long as the first
# one's Ray answers: the stage would wait for the node in vain. On the first, a command that never began is an error.
#
#   ray_node.sh HOST:PORT ray symmetric-run --address HOST:PORT ... -- python when_all_nodes.py ...      as a task of srun

set -uo pipefail
address=$1
shift
answers() { timeout 10 bash -c 'exec 3<> "/dev/tcp/$1/$2"' _ "${address%:*}" "${address##*:}" 2> /dev/null; }

export MEGATRON_SPPO_BEGUN
MEGATRON_SPPO_BEGUN=$(mktemp -u)
stopped=
trap 'stopped=1' TERM
while true; do
  "$@"
  status=$?
  if [[ ${SLURM_NODEID:-0} == 0 ]]; then
    if [[ $status == 0 && ! -e $MEGATRON_SPPO_BEGUN ]]; then
      echo "ray_node.sh: error: Ray did not start on $(hostname), as is said above. Submit the same job again." >&2
      status=1
    fi
    rm -f "$MEGATRON_SPPO_BEGUN"
    exit "$status"
  fi
  if [[ -n $stopped ]] || ! answers; then exit "$status"; fi
  echo "$(date +%T) $(hostname): Ray has ended here, and not on the first node: it is started again" >&2
done
