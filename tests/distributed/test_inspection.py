"""tools/inspect_log_ratio.py: every token's log-probability is Hugging Face's, in several layouts; sums are training's.

A run of four steps leaves the checkpoint of step 3; the log-ratios that step 4 found in training are then those of that
checkpoint against the start, and the reference sidecar holds the start's sums. Real gloo ranks, float32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import Column
from tests.distributed.conftest import NUM_PROMPTS, NUM_RESPONSES, write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import CP2, PADDED, PP2, SP, TP2, VPP2
from tests.distributed.worlds import pretrain, run_script
from tests.models import tiny_llama

FLAGS = "--params-dtype float32 --global-batch-size 8 --micro-batch-size 2"
SUM_BOUND = 1e-4
"""Nats. At most 24 tokens, each within 1e-6, and one rounding of a sum of 128 nats to float32."""


@pytest.fixture(scope="module")
def trained(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with `data` and the training's `save`."""
    root = tmp_path_factory.mktemp("trained")
    data = write_dataset(root / "data", untied.parent / "hf")
    argv = f"--load {untied} --data {data} --save {root / 'save'} {FLAGS} --lr 1e-3 --eta 10 --save-interval 3"
    assert run_ranks(pretrain, 1, argv.split()) == [0]
    return root


def inspected(trained: Path, untied: Path, output: Path, world_size: int, flags: str) -> list[dict[str, Any]]:
    places = f"--load {trained / 'save/iter_0000003'} --reference {untied} --data {trained / 'data'} --output {output}"
    argv = f"{places} --num-prompts {NUM_PROMPTS} {FLAGS} {flags}".split()
    assert run_ranks(run_script, world_size, "tools/inspect_log_ratio.py", argv) == [0] * world_size
    return [json.loads(line) for line in output.read_text().splitlines()]


@torch.no_grad()
def token_log_probs(hf: Path, dataset: PreferenceDataset, group: int, response: int) -> np.ndarray:
    """Compute log pi of each response token by Hugging Face's model -> [T]."""
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, hf, dtype=torch.float32)
    prompt, answer = dataset.prompt(group), dataset.response(group, response)
    tokens = torch.tensor([[*prompt, *answer]], dtype=torch.long)
    log_p = model(tokens).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return log_p.gather(1, tokens[0, len(prompt) :, None]).squeeze(1).numpy()


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(1, PADDED), (2, f"{TP2} {SP}"), (2, VPP2), (4, f"{CP2} {PP2}"), (4, f"{CP2} {PADDED}")],
)
def test_every_token_is_hugging_faces_and_sums_are_those_of_training(
    trained: Path, untied: Path, tmp_path: Path, world_size: int, flags: str
) -> None:
    lines = inspected(trained, untied, tmp_path / "tokens.jsonl", world_size, flags)
    dataset = PreferenceDataset(trained / "data")
    assert {(line["group"], line["response"]) for line in lines} == set(np.ndindex(NUM_PROMPTS, NUM_RESPONSES))
    texts = dataset.lines_of(range(NUM_PROMPTS))
    for line in lines:
        place = line["group"], line["response"]
        assert [token["id"] for token in line["tokens"]] == dataset.response(*place).tolist()
        assert line["prompt_id"] == texts[line["group"]]["prompt_id"]
        assert line["win_rate"] == pytest.approx(dataset.win_rates(line["group"])[line["response"]])
        for token in line["tokens"]:
            assert token["log_ratio"] == pytest.approx(token["log_prob"] - token["reference_log_prob"], abs=1e-12)

    sidecar = Column(trained / "data" / "reference", np.float32, remedy="").values
    found = {(line["group"], line["response"]): line for line in lines}
    for (group, k), line in found.items():
        log_prob = sum(token["reference_log_prob"] for token in line["tokens"])
        assert log_prob == pytest.approx(sidecar[group * NUM_RESPONSES + k], abs=SUM_BOUND)
    rows = [json.loads(row) for row in (trained / "save/responses.jsonl").read_text().splitlines()]
    fourth = [row for row in rows if row["step"] == 4]
    assert len(fourth) == 8 and max(abs(row["log_ratio"]) for row in fourth) > 0.1
    for row in fourth:
        line = found[row["group"], row["response"]]
        assert line["log_ratio"] == pytest.approx(row["log_ratio"], abs=SUM_BOUND)

    new = export_checkpoint(trained / "save/iter_0000003", tmp_path / "hf")
    for hf, name in ((new, "log_prob"), (untied.parent / "hf", "reference_log_prob")):
        expected = token_log_probs(hf, dataset, 3, 2)
        np.testing.assert_allclose([token[name] for token in found[3, 2]["tokens"]], expected, rtol=0, atol=1e-5)


def test_checkpoints_of_different_models_are_refused(trained: Path, untied: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_llama(tmp_path / "hf"), tmp_path / "other")
    argv = f"--load {untied} --reference {tmp_path / 'other'} --data {trained / 'data'} --output {tmp_path / 'out'}"
    assert run_ranks(run_script, 1, "tools/inspect_log_ratio.py", argv.split()) == [2]
    assert not (tmp_path / "out").exists()
