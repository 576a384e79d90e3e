"""Proves: the whole loop for real, once: SmolLM2 answers by vLLM on the CPU, two torchrun ranks train it, and what
comes out of the iteration is sampled by vLLM again and read by transformers.

Two updates at a tiny scale: nothing is said here about how much is learnt. That is `make demo`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (there is no CPU wheel for this Python)", allow_module_level=True)

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
run: {iterations: 1, max_prompts_per_iteration: 4, training_processes: 2}
rollout: {num_responses: 2, max_tokens: 16, rollout_options: {max_model_len: 128}}
scoring: {judge: rules:concise}
evaluation: {heldout_prompts: 3, eval_num_responses: 1}
training: {eta: 10, lr: 1.0e-5, lr_decay_style: constant, micro_batch_size: 2, global_batch_size: 4}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_iteration_with_vllm_and_two_training_ranks_gives_a_model_that_answers(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    flags = ["--config", tmp_path / "run.yaml", "--model", smollm2_dir, "--output", tmp_path / "run"]
    flags += ["--prompts", ROOT / "examples/data/prompts.jsonl"]
    command = [sys.executable, str(ROOT / "tools/self_play.py"), *map(str, flags)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]

    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "iter_1/checkpoint/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2  # 4 prompts x 2 answers, 4 a step
    assert metrics[0]["sppo/ref_drift_step0"] == 0
    answers = (run / "iter_1/eval/rollouts/shard-00000.jsonl").read_text().splitlines()
    assert len(answers) == 3 and all(json.loads(line)["responses"][0]["token_ids"] for line in answers)
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(run / "iter_1/hf").state_dict()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert all(trained[name].dtype == base[name].dtype for name in base)
