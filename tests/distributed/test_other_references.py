"""Further references: the right policy's numbers, in every layout, once, beside the data; and what is refused.

Truth is Hugging Face's float64 log-probabilities of both models and the papers' formulas written out. Each run is
examples/pretrain_sppo.py with its command line on real gloo ranks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.checkpoints.pretrained import load_pretrained
from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.indexed import Column
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import CP2, PP2, SP, TP2
from tests.distributed.test_pretrain import forget_after
from tests.distributed.truth import LOG_PROB_BOUND, outputs_and_log_prob
from tests.distributed.worlds import pretrain
from tests.models import tiny_llama

ETA = 3.0
FLAGS = f"--params-dtype float32 --lr 1e-3 --eta {ETA} --selection extremes --global-batch-size 16 --no-tensorboard"
"""Best and worst of 8 prompts: 16 responses, one step."""


class World:
    """Two models as Megatron checkpoints, a dataset, and log pi of every response under both by Hugging Face."""

    def __init__(self, root: Path) -> None:
        hf = [tiny_llama(root / f"hf{seed}", num_hidden_layers=2, seed=seed) for seed in (0, 1)]
        self.pi_t, self.other = (root / f"megatron{seed}" for seed in (0, 1))
        for directory, target in zip(hf, (self.pi_t, self.other), strict=True):
            import_checkpoint(directory, target)
        self.data = write_dataset(root / "data", hf[0])
        self.dataset = PreferenceDataset(self.data)
        self.log_pi_t, self.log_other = (self._log_probs(directory) for directory in hf)

    def _log_probs(self, hf: Path) -> np.ndarray:
        from transformers import AutoModelForCausalLM

        model = load_pretrained(AutoModelForCausalLM, hf, dtype=torch.float64, attn_implementation="eager")
        dataset, values = self.dataset, np.zeros((self.dataset.num_groups, self.dataset.num_responses))
        with torch.no_grad():
            for group, k in np.ndindex(values.shape):
                values[group, k] = outputs_and_log_prob(model, dataset.prompt(group), dataset.response(group, k))[1]
        return values

    def pairs(self, values: np.ndarray) -> np.ndarray:
        """Take best minus worst of each prompt -> [G]."""
        rate_GK = self.dataset.all_win_rates()
        groups = np.arange(len(values))
        return values[groups, rate_GK.argmax(axis=1)] - values[groups, rate_GK.argmin(axis=1)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("two"))


def train(
    world: World, root: Path, flags: str, *references: Path, ranks: int = 1, data: Path | None = None
) -> list[int]:
    """Run the script on data of its own -> exit codes; `root` gets `data` and `save`."""
    if data is None and not (root / "data").exists():
        shutil.copytree(world.data, root / "data")
    places = ["--load", world.pi_t, "--data", data or root / "data", "--save", root / "save"]
    further = ["--reference", *references] if references else []
    return run_ranks(pretrain, ranks, [*map(str, [*places, *further]), *FLAGS.split(), *flags.split()])


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "save" / "metrics.jsonl").read_text().splitlines()]


def manifests(root: Path) -> list[Path]:
    """Manifests of the references beside the data, pi_t's last."""
    return sorted((root / "data").glob("reference.*json"), key=lambda path: path.name == "reference.json")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--micro-batch-size 4"),
        (2, f"--micro-batch-size 4 {TP2} {SP} --no-packing"),
        (2, f"--packed-sequence-size 128 {PP2}"),
        (2, f"--packed-sequence-size 128 --share-prompts {CP2}"),
        (2, "--micro-batch-size 2 --use-distributed-optimizer"),
    ],
    ids=["one rank", "TP2 padded", "PP2 packed", "CP2 shared prompts", "DP2"],
)
def test_inpo_s_first_loss_is_its_formula_of_hugging_face_s_numbers_in_every_layout(
    world: World, ranks: int, flags: str, tmp_path: Path
) -> None:
    """Before the first step pi_theta is pi_t: h = (log pi_t,w/pi_t,l - log ref_w/ref_l) / 3, against eta / 2."""
    assert train(world, tmp_path, f"--objective inpo {flags}", world.other, ranks=ranks) == [0] * ranks
    h = (world.pairs(world.log_pi_t) - world.pairs(world.log_other)) / 3
    (first,) = metrics(tmp_path)
    assert first["loss"] == pytest.approx(((h - ETA / 2) ** 2).mean(), rel=1e-5)
    assert first["sppo/ref_drift_step0"] == 0
    other, of_pi_t = manifests(tmp_path)
    assert of_pi_t.name == "reference.json" and other.name.count(".") == 2
    for path, truth in ((other, world.log_other), (of_pi_t, world.log_pi_t)):
        values = Column(path.with_suffix(""), np.float32, remedy="").values.reshape(truth.shape)
        visited = ~np.isnan(values)
        assert visited.sum() == 16
        np.testing.assert_allclose(values[visited], truth[visited], rtol=0, atol=LOG_PROB_BOUND)


def test_rspo_is_pulled_to_its_reference_and_several_are_mixed_by_their_weights(world: World, tmp_path: Path) -> None:
    weighted = "--objective mnpo --micro-batch-size 4 --reference-weights 0.5 0.25"
    assert train(world, tmp_path / "mnpo", weighted, world.other, world.pi_t) == [0]
    h = (world.pairs(world.log_pi_t) - world.pairs(world.log_other)) / 2
    assert metrics(tmp_path / "mnpo")[0]["loss"] == pytest.approx(((h - ETA / 2) ** 2).mean(), rel=1e-5)
    # pi_t was a further reference too: its numbers are written for both uses.
    *_, of_pi_t = paths = manifests(tmp_path / "mnpo")
    assert len(paths) == 3 and len({path.with_suffix(".bin").read_bytes() for path in paths}) == 2
    assert of_pi_t.name == "reference.json"
    assert train(world, tmp_path / "rspo", "--objective rspo --forward-kl-weight 0.1", world.other) == [0]
    rate_GK, groups = world.dataset.all_win_rates(), np.arange(8)
    squares = []
    for k in (rate_GK.argmax(axis=1), rate_GK.argmin(axis=1)):
        apart = (world.log_pi_t - world.log_other)[groups, k]
        penalty = 0.5 * apart**2 + 0.1 * np.exp(np.minimum(-apart, 10))
        squares.append((ETA * (rate_GK[groups, k] - 0.5)) ** 2 + 2 * penalty)
    assert metrics(tmp_path / "rspo")[0]["loss"] == pytest.approx(np.mean(squares), rel=1e-5)


def test_a_resumed_run_reads_what_it_began_with_and_a_longer_one_has_the_policy_compute_the_rest(
    world: World, tmp_path: Path
) -> None:
    """Steps of eight responses. The whole run's numbers come back to the bit, in two lives and in another layout's."""
    flags = "--objective inpo --global-batch-size 8 --micro-batch-size 2 --save-interval 1 --lr-decay-iters 4"
    assert train(world, tmp_path / "whole", f"{flags} --train-iters 2", world.other) == [0]
    assert train(world, tmp_path / "two", f"{flags} --train-iters 1", world.other) == [0]
    shutil.copytree(world.other, tmp_path / "moved")
    assert train(world, tmp_path / "two", f"{flags} --train-iters 2", world.pi_t) == [2]  # not the policy that it was
    assert train(world, tmp_path / "two", f"{flags} --train-iters 2") == [2]
    assert train(world, tmp_path / "two", f"{flags} --train-iters 2", tmp_path / "moved") == [0]
    whole, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "two"))
    assert whole == two and len(whole) == 2
    forget_after(tmp_path / "whole" / "save", 1)
    shutil.rmtree(tmp_path / "moved")
    gone = tmp_path / "moved"  # what was computed is there: the checkpoint is not asked for
    assert train(world, tmp_path / "whole", f"{flags} --train-iters 2 {TP2}", gone, ranks=2) == [0, 0]
    assert [line["loss"] for line in metrics(tmp_path / "whole")] == pytest.approx(two, rel=1e-5)


def test_runs_of_other_references_share_a_dataset(world: World, tmp_path: Path) -> None:
    """What one run computed, another with the same policy finds: its files are as they were."""
    shutil.copytree(world.data, tmp_path / "data")
    written = []
    for objective in ("inpo", "nash_md", "onpo"):
        flags = f"--objective {objective} --micro-batch-size 4"
        assert train(world, tmp_path / objective, flags, world.other, data=tmp_path / "data") == [0]
        written.append({path: path.stat().st_mtime_ns for path in manifests(tmp_path)})
    assert written[0] == written[1] == written[2] and len(written[0]) == 2


@pytest.mark.parametrize(
    ("flags", "number"),
    [("--objective inpo", 0), ("--objective sppo", 1), ("--objective mnpo --reference-weights 0.9 0.9", 2)],
)
def test_references_that_do_not_fit_are_refused_before_anything_is_written(
    world: World, flags: str, number: int, tmp_path: Path
) -> None:
    assert train(world, tmp_path, f"--micro-batch-size 4 {flags}", *[world.other] * number) == [2]
    assert not (tmp_path / "save").exists()


def test_a_reference_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    import_checkpoint(tiny_llama(tmp_path / "hf", num_hidden_layers=4), tmp_path / "deep")
    assert train(world, tmp_path, "--micro-batch-size 4 --objective inpo", tmp_path / "deep") == [2]
    assert train(world, tmp_path, "--micro-batch-size 4 --objective inpo", tmp_path / "nothing") == [2]
    # The same shapes, and every token's number is another text's.
    hf = tiny_llama(tmp_path / "other_tokens", num_hidden_layers=2)
    text = json.loads((hf / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (hf / "tokenizer.json").write_text(json.dumps(text))
    import_checkpoint(hf, tmp_path / "renumbered")
    assert train(world, tmp_path, "--micro-batch-size 4 --objective inpo", tmp_path / "renumbered") == [2]
    assert not (tmp_path / "save").exists()
