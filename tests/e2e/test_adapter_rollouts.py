"""Proves, with vLLM itself on the CPU: rollouts with a PEFT adapter are those of `peft` on transformers' model, and
what our worker extension tells of adapters is true to the bit, fused, on one rank and on two.

A GPU, and a mixture's experts, were not tried.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

import torch
import transformers
from safetensors.torch import load_file

from megatron_sppo.checkpoints.peft_files import open_peft_adapter
from megatron_sppo.rollout.adapter_proof import find_fault, read_held
from megatron_sppo.rollout.probes import compute_probes
from megatron_sppo.rollout.records import read_manifest, read_rollouts
from megatron_sppo.rollout.weight_sums import weight_sum
from tests.adapters import random_adapter
from tests.e2e.forked import run_forked
from tests.models import tiny_llama

SHAPE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TELL = """
import json, sys
import vllm
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapters, ranks, max_rank = json.loads(sys.argv[1])
    llm = vllm.LLM(
        model=model, tensor_parallel_size=ranks, enforce_eager=True, max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=2**26, disable_log_stats=True, enable_lora=True, max_lora_rank=max_rank,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        worker_extension_cls="megatron_sppo.rollout.served_weights.ServedWeights",
    )
    told = []
    for number, adapter in enumerate(adapters, start=1):
        llm.llm_engine.add_lora(LoRARequest(adapter, number, adapter))
        told.append(llm.collective_rpc("sppo_adapters"))
    print("TOLD", json.dumps(told), flush=True)
    llm.llm_engine.engine_core.shutdown()
"""


def run(program: Path | str, *arguments: object, **environment: str) -> str:
    done = run_forked(program, arguments, {**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_tell_the_matrices_that_lie_in_their_slots(tmp_path: Path, ranks: int) -> None:
    """Rank 3 in buffers for 8, bfloat16, one key/value head that two ranks copy, biases; the second takes the slot."""
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    base = tiny_llama(tmp_path / "base", scale=0.2, **{**SHAPE, **qwen, "num_key_value_heads": ranks % 2 + 1})
    adapters = [
        random_adapter(tmp_path / "one", base, rank=3, alpha=5),
        random_adapter(tmp_path / "two", base, rank=3, alpha=5, seed=1, targets=("q_proj", "v_proj", "down_proj")),
    ]
    arguments = json.dumps([str(base), [str(adapter) for adapter in adapters], ranks, 8])
    (script := tmp_path / "tell.py").write_text(TELL)
    shown = run(script, arguments, **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if ranks == 1 else {}))
    (line,) = [line for line in shown.splitlines() if line.startswith("TOLD ")]
    for adapter, told in zip(adapters, json.loads(line.removeprefix("TOLD ")), strict=True):
        held = read_held(told)
        expected = {}
        for name, matrix in load_file(adapter / "adapter_model.safetensors").items():
            kept = matrix.to(torch.bfloat16)
            kept = kept * (5 / 3) if "lora_B" in name else kept
            expected[name.removeprefix("base_model.model.").removesuffix(".weight")] = weight_sum(kept)
        (sums,) = held.by_id.values()
        assert {name: value for name, (value, _) in sums.items()} == expected
        opened = open_peft_adapter(adapter)
        probes = compute_probes(base, adapter=opened)
        assert find_fault(opened, probes, log_probs=probes.log_probs, others={}, held=held) is None


def test_rollouts_with_an_adapter_are_peft_s(tmp_path: Path) -> None:
    """Greedy: every token of every answer, and the manifest names base and adapter."""
    peft = pytest.importorskip("peft")
    base = tiny_llama(tmp_path / "base", scale=0.1, **SHAPE)
    adapter = random_adapter(tmp_path / "adapter", base, scale=0.1, use_rslora=True)
    prompts = tmp_path / "prompts.jsonl"
    texts = ["What is a river?", "Count to three.", "Say nothing at all.", "Where do the swallows go?"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = ["--prompts", prompts, "--num-responses", "1", "--max-tokens", "12", "--temperature", "0"]
    flags += ["--model", base, "--adapter", adapter, "--output", tmp_path / "adapted", "--allow-no-signal"]
    run("megatron_sppo", "rollouts", *flags)
    manifest = read_manifest(tmp_path / "adapted")
    assert manifest.adapter == str(adapter)
    assert manifest.adapter_hash == open_peft_adapter(adapter).adapter_hash
    for is_adapted in (False, True):
        policy = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        policy = (peft.PeftModel.from_pretrained(policy, adapter) if is_adapted else policy).eval()
        same = []
        for group in read_rollouts(tmp_path / "adapted"):
            tokens = torch.tensor([group.prompt_token_ids])
            with torch.no_grad():
                out = policy.generate(input_ids=tokens, max_new_tokens=12, do_sample=False, eos_token_id=[2])
            same.append(tuple(out[0, tokens.shape[1] :].tolist()) == group.responses[0].token_ids)
        assert all(same) is is_adapted
