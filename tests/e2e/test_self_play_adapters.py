"""Proves: self-play with LoRA adapters, for real: one engine of vLLM's samples with base and adapters for all stages,
training goes on with one, and what is exported computes, by `peft` on transformers' model, what Megatron computed; and
nothing else is exported.

Three iterations of a tiny random model: nothing is said here about how much is learnt.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

import torch
import transformers

from megatron_sppo.rollout.records import read_manifest
from tests.e2e.forked import Forked
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "run": {"iterations": 3, "max_prompts_per_iteration": 4},
    "rollout": {"num_responses": 2, "max_tokens": 8, "rollout_options": {"max_model_len": 256}},
    "scoring": {"judge": "rules:concise", "allow_no_signal": True},
    "evaluation": {"heldout_prompts": 2, "eval_num_responses": 1, "inspected_prompts": 2},
    "training": {"lora_rank": 4, "eta": 10, "lr": 1e-2, "lr_decay_style": "constant", "params_dtype": "float32"}
    | {"micro_batch_size": 2, "global_batch_size": 4},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_iterations_with_one_adapter_on_one_base_in_one_engine(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    shape = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    base = tiny_llama(tmp_path / "base", scale=0.1, **shape)
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    run = tmp_path / "run"
    flags = ["--config", tmp_path / "run.json", "--model", base, "--output", run]
    flags += ["--prompts", ROOT / "examples/data/prompts.jsonl"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    loop = Forked(ROOT / "tools/self_play.py", flags, environment)
    _, told = loop.communicate(timeout=3000)
    assert loop.poll() == 0, told[-3000:]

    assert not [*run.glob("iter_*/hf")]
    kept = (run / "logs/engine.log").read_text()
    assert kept.count("vLLM has started") == 1
    used = [line.partition(" (")[0] for line in kept.splitlines() if "vLLM computes with" in line]
    iterations = [1, 1, 2, 2, 3]  # of each adapter, to evaluate it and to go on from it; the last is evaluated alone
    assert [f"iter_{i}/adapter" in line for i, line in zip(iterations, used, strict=True)] == [True] * 5
    manifests = {name: read_manifest(run / name) for name in ("iter_1/rollouts", "iter_1/eval/rollouts")}
    manifests["iter_2/rollouts"] = read_manifest(run / "iter_2/rollouts")
    adapter = str(run / "iter_1/adapter")
    assert [manifest.adapter for manifest in manifests.values()] == [None, adapter, adapter]
    assert len({manifest.model_hash for manifest in manifests.values()}) == 1

    # What was computed by the engine that had sampled for others before is what the same command computes alone.
    # Started as users start it: here the command imports vLLM itself (all else is forked).
    stage = json.loads((run / "state.json").read_text())["stages"]["iter_2-rollouts"]["command"]
    again = [tmp_path / "again" if token == str(run / "iter_2/rollouts") else token for token in stage]
    subprocess.run([*map(str, again)], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "again").glob("shard-*")] == ["shard-00000.jsonl"]
    for path in (tmp_path / "again").glob("shard-*"):
        assert path.read_bytes() == (run / "iter_2/rollouts" / path.name).read_bytes()

    # What Megatron computed of each token, of the policy and of the one before it, against peft on transformers.
    for iteration in (1, 2):
        policies = []
        for number in (iteration, iteration - 1):
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            exported = run / f"iter_{number}/adapter"
            policies.append(peft.PeftModel.from_pretrained(model, exported).eval() if number else model.eval())
        prompts = {}
        for line in (run / f"iter_{iteration}/rollouts/shard-00000.jsonl").read_text().splitlines():
            prompts[json.loads(line)["prompt_id"]] = json.loads(line)["prompt_token_ids"]
        num_tokens, moved = 0, 0.0
        for line in (run / f"iter_{iteration}/token_log_ratios.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompt, ids = prompts[row["prompt_id"]], [token["id"] for token in row["tokens"]]
            for key, policy in zip(("log_prob", "reference_log_prob"), policies, strict=True):
                with torch.no_grad():
                    logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
                truth = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
                found = torch.tensor([token[key] for token in row["tokens"]], dtype=torch.float64)
                assert torch.allclose(found, truth, atol=2e-5)
            num_tokens += len(ids)
            moved += sum(abs(token["log_ratio"]) for token in row["tokens"])
        assert num_tokens > 20 and moved > 0.1
