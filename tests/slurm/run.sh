#!/usr/bin/env bash
# Runs examples/slurm/self_play.sbatch, as it is, on the two nodes of cluster.sh: two iterations of a tiny model, sampled by
# vLLM on the CPU under Ray, trained by two ranks over gloo, and evaluated on held-out prompts. On its way the job is
# stopped in training as before a time limit, preempted in rollouts and killed in training as by the loss of a node; it
# must queue itself again each time and end right. The same command on one node then has nothing left to do. Then
# pretrain_sppo.sbatch is stopped and preempted the same way. A job that is cancelled must stay so. Last,
# the lines of docs/cluster.md that are typed by hand on several nodes (by_hand.sh).
#
#   make a bare Debian ready:  apt-get install -y --no-install-recommends slurm-wlm munge
#   tests/slurm/run.sh DIR     as root; DIR is empty; about 40 minutes on two idle cores. What one run printed: log.txt.
#                              PATIENCE=3: waits three times as long for each step, on a busy machine.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
dir=$(realpath -m "$1")
run=$dir/run
mkdir -p "$dir"
python=${PYTHON:-$root/.venv/bin/python}
on() { "$here/cluster.sh" host n1 "$dir/slurm" "$@"; }
say() { echo "$(date +%T) --- $*"; }
fail() { say "FAILED: $*"; exit 1; }
state() { on scontrol show job "$1" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }
restarts() { on scontrol show job "$1" | grep -o 'Restarts=[0-9]*' | cut -d= -f2; }

wait_for() {  # wait_for SECONDS DESCRIPTION CONDITION...
  local deadline=$(( SECONDS + $1 * ${PATIENCE:-1} )) what=$2
  shift 2
  until "$@"; do
    (( SECONDS < deadline )) || fail "not in time: $what"
    [[ -z $watched ]] || ! is_over "$watched" || fail "the job ended $(state "$watched") before: $what"
    sleep 1
  done
  say "$what"
}
has_lines() { [[ -e $1 ]] && (( $(wc -l < "$1") >= $2 )); }
exists() { compgen -G "$1" > /dev/null; }
restarted() { (( $(restarts "$1") >= $2 )) && [[ $(state "$1") == PENDING ]]; }
watched=
go_now() {  # Slurm waits two minutes before it starts a job again, for what is left of it to end
  sleep 10
  on scontrol update "JobId=$1" StartTime=now
}
is_over() { [[ $(state "$1") != @(PENDING|RUNNING|COMPLETING|CONFIGURING|REQUEUED) ]]; }

"$here/cluster.sh" up "$dir/slurm"
trap '"$here/cluster.sh" down "$dir/slurm"' EXIT
on sinfo
on scontrol --version
cd "$root"
"$python" -m tests.slurm.prepare "$dir"
cat > "$dir/setup.sh" <<SETUP
export PATH=$(dirname "$python"):\$PATH PYTHONPATH=$root
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RAY_worker_niceness=0  # 15 is Ray's own, with which a worker hardly moves on a machine that others use
SETUP
export MEGATRON_SPPO_SETUP=$dir/setup.sh MEGATRON_SPPO=$root
# The nodes share the machine's processes, and `ray stop` ends every Ray process that it sees. The first process of a
# namespace must reap what is left to it, as bash does.
printf '#!/bin/bash\n"$@"\nexit $?\n' > "$dir/first.sh"
export MEGATRON_SPPO_PREFIX="unshare --mount --pid --fork --kill-child --mount-proc bash $dir/first.sh"
export MEGATRON_SPPO_RAY_OPTIONS="--num-cpus=1 --object-store-memory=100000000"

said() {  # said FILE: a job's own log, shortened, without this machine's directories
  say "what the job itself said"
  sed -e "s|$dir|DIR|g" -e "s|$root|CHECKOUT|g" -e "s|$(dirname "$(dirname "$python")")|VENV|g" "$1" \
    | grep -E '^[0-9:]+ |^megatron-sppo|^slurmstepd|^srun' | grep -v -E '%\|| prompts/s|\| loss | s a step, the median' | cut -c1-170
}
submit() { on sbatch --parsable --nodes 2 --gpus-per-node 1 --output "$dir/%x-%j.log" "$@"; }

say "self_play.sbatch"
job=$(submit examples/slurm/self_play.sbatch "$dir/run.yaml" "$dir/model" "$dir/prompts.jsonl" "$run")
watched=$job
wait_for 900 "training of iteration 1 is at step 5" has_lines "$run/iter_1/checkpoint/metrics.jsonl" 5
say "SIGTERM to the batch script, as --signal=B:TERM@180 does before the time limit"
on scancel --batch --signal=TERM "$job"
wait_for 240 "queued again" restarted "$job" 1
go_now "$job"

wait_for 900 "rollouts of iteration 2 have begun" exists "$run/iter_2/rollouts/*"
say "a job of a partition that preempts"
other=$(submit --partition high --job-name preemptor --time 5 --wrap "sleep 5")
wait_for 240 "queued again" restarted "$job" 2
wait_for 120 "the other job is over" is_over "$other"
go_now "$job"

wait_for 900 "training of iteration 2 is at step 5" has_lines "$run/iter_2/checkpoint/metrics.jsonl" 5
say "scontrol requeue: SIGKILL in the end, as when a node is lost"
on scontrol requeue "$job"
wait_for 240 "queued again" restarted "$job" 3
go_now "$job"
watched=
wait_for 1200 "the job is over" is_over "$job"
[[ $(state "$job") == COMPLETED ]] || fail "the job ended $(state "$job")"
on scontrol show job "$job" | grep -E 'JobState|Restarts|ExitCode|NumNodes'

say "what came of it"
"$python" -m tests.slurm.check "$run" "$dir"
said "$dir/megatron-sppo-$job.log"

say "the same command on one node"
again=$(submit --nodes 1 examples/slurm/self_play.sbatch "$dir/run.yaml" "$dir/model" "$dir/prompts.jsonl" "$run")
wait_for 120 "the job is over" is_over "$again"
[[ $(state "$again") == COMPLETED ]] || fail "the job ended $(state "$again")"
grep -o 'is finished: nothing is left to do' "$dir/megatron-sppo-$again.log"

say "pretrain_sppo.sbatch, with SBATCH_SIGNAL=B:TERM@240: 180 s are for the checkpoint"
export SBATCH_SIGNAL=B:TERM@240
cat > "$dir/train.yaml" <<'YAML'
{lr: 1.0e-4, eta: 10, params_dtype: float32, micro_batch_size: 2, global_batch_size: 4, num_epochs: 60, lr_decay_iters: 1020,
 save_interval: 50}
YAML
train=$(submit examples/slurm/pretrain_sppo.sbatch "$dir/train.yaml" "$run/base" "$run/iter_1/dataset" "$dir/trained")
wait_for 300 "step 20" has_lines "$dir/trained/metrics.jsonl" 20
grep 'grace_seconds: 180' "$dir/trained/config.yaml"
say "SIGTERM to the batch script"
on scancel --batch --signal=TERM "$train"
wait_for 240 "queued again" restarted "$train" 1
go_now "$train"
wait_for 300 "step 100" has_lines "$dir/trained/metrics.jsonl" 100
say "a job of a partition that preempts: its ranks get SIGTERM, the script does not"
other=$(submit --partition high --job-name preemptor --time 5 --wrap "sleep 5")
wait_for 240 "queued again" restarted "$train" 2
wait_for 120 "the other job is over" is_over "$other"
go_now "$train"
wait_for 300 "step 200" has_lines "$dir/trained/metrics.jsonl" 200
say "scancel: it stays cancelled"
on scancel "$train"
wait_for 120 "the job is over" is_over "$train"
sleep 5
[[ $(state "$train") == CANCELLED ]] || fail "the job ended $(state "$train")"
on scontrol show job "$train" | grep -E 'JobState|Restarts|ExitCode|NumNodes'
"$python" - "$dir/trained/metrics.jsonl" <<'PYTHON'
import json, sys
steps = [json.loads(line)["step"] for line in open(sys.argv[1])]
assert steps == list(range(1, len(steps) + 1)), "a step is missing or stands twice"
print(f"{len(steps)} steps, each once")
PYTHON
said "$dir/megatron-sppo-$train.log"

source "$here/by_hand.sh"
say "all is well"
