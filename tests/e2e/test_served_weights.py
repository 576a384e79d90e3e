"""Proves: what our extension of vLLM's worker tells of the weights is true to the bit, for each way in which vLLM keeps
them: fused with and without biases, tied and packed, beside experts, on two ranks of which each holds a part.

The engines are real and on the CPU, where weights are packed; a GPU, where they are not, was not tried.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.weight_sums import added
from tests.e2e.forked import run_forked
from tests.models import MIXTURES, tiny_llama

SHAPE: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"hidden_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "mixtral": MIXTURES["mixtral"],
    "two ranks": {"num_key_value_heads": 1, "vocab_size": 259},
}
TELL = """
import json, sys
import vllm

if __name__ == "__main__":
    for line in sys.stdin:
        model, other, ranks = json.loads(line)
        llm = vllm.LLM(
            model=model, tensor_parallel_size=ranks, enforce_eager=True, max_model_len=128, max_num_seqs=4,
            kv_cache_memory_bytes=2**26, disable_log_stats=True,
            worker_extension_cls="megatron_sppo.rollout.served_weights.ServedWeights",
        )
        before = llm.collective_rpc("sppo_weights")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
        mended = llm.collective_rpc("sppo_mend")
        after = llm.collective_rpc("sppo_weights")
        print("TOLD", json.dumps([before, mended, after]), flush=True)
        llm.llm_engine.engine_core.shutdown()
        del llm
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """Model directories, and what an engine told that was started with the first and loaded the second."""
    root = tmp_path_factory.mktemp("models")
    pairs = {
        name: tuple(
            tiny_llama(root / f"{name.replace(' ', '_')}_{seed}", seed=seed, scale=0.2, **{**SHAPE, **settings})
            for seed in (0, 1)
        )
        for name, settings in MODELS.items()
    }
    found = {}
    for several in (False, True):  # one process cannot hold engines of one rank and of two
        chosen = {name: pair for name, pair in pairs.items() if (name == "two ranks") is several}
        lines = "".join(json.dumps([str(one), str(other), 1 + several]) + "\n" for one, other in chosen.values())
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(several)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        script = root / "tell.py"
        script.write_text(TELL)
        (root / "lines").write_text(lines)
        done = run_forked(script, environment=environment, stdin=root / "lines")
        assert done.returncode == 0, done.stderr[-3000:]
        replies = [json.loads(line.removeprefix("TOLD ")) for line in done.stdout.splitlines() if line[:5] == "TOLD "]
        for name, reply in zip(chosen, replies, strict=True):
            found[name] = (*pairs[name], reply)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_that_an_engine_holds_is_told_to_the_bit(
    told: dict[str, tuple[Path, Path, Any]], name: str
) -> None:
    start, other, (before, _, after) = told[name]
    for directory, ranks in ((start, before), (other, after)):
        policy = Policy(directory=directory, model_hash="0" * 64, room=128)
        sums = added({name: (int(value, 16), count) for name, (value, count) in rank["sums"].items()} for rank in ranks)
        dtypes = {key: kind for rank in ranks for key, kind in rank["dtypes"].items()}
        truth = policy.sums(dtypes)
        assert sums == truth
        untold = set(policy.files.entries) - {policy.named(own) for own in sums}
        assert all(".experts." in own for own in untold)
        assert bool(untold) == (name == "mixtral")
    assert len(before) == (2 if name == "two ranks" else 1)
