"""What a reference pass visits, keeps and refuses; what is said at start of the noise that unchanged weights have.

In place of a model stands a function of the row. The numbers themselves are in tests/distributed and tests/cudaless, a
pass that is killed in tests/e2e/test_reference_signals.py.
"""

import dataclasses
import itertools
import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training import parallel, reference, reference_store
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import (
    BatchConfig,
    ObjectiveConfig,
    OptimizationConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.reference import say_what_it_carries
from megatron_sppo.training.step_plan import StepPlan
from megatron_sppo.training.stopping import StopRequest
from tests.unit.data.make import groups, write


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    return PreferenceDataset(write(tmp_path_factory.mktemp("reference") / "d", groups(num_groups=8)))


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, {}, "do not begin at 0.*Use --fp8-recipe tensorwise"),
        ({"fp8": "hybrid"}, {"num_epochs": 3}, r"--reference-per-epoch \(3 reference passes\), or --num-epochs 1"),
        ({"fp8": "hybrid"}, {}, ""),
        ({"fp8": "hybrid"}, {"num_epochs": 3, "reference_per_epoch": True}, ""),
        ({"fp8": "hybrid"}, {"num_epochs": 3, "train_iters": 2}, ""),  # the second epoch begins with step 3
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, {"num_epochs": 3}, ""),  # scales within a token
        ({}, {"num_epochs": 3}, ""),
    ],
    ids=str,
)
def test_noise_in_the_reference_is_said_with_its_remedy(
    model: dict, batch: dict, words: str, dataset: PreferenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainingConfig(
        load=Path("pi_t"),
        data=Path("data"),
        save=Path("save"),
        batch=BatchConfig(global_batch_size=16, **batch),
        optimization=OptimizationConfig(lr=1e-3),
        model=ModelConfig(**model),
    )
    batches = Batches(dataset, config, max_length=64)
    with caplog.at_level(logging.WARNING):
        say_what_it_carries(batches, config)
    assert len(caplog.messages) == bool(words)
    assert re.search(words, caplog.text)


class Pass:
    """A run's reference pass over 32 responses, eight a step; log pi of row n is -n - 1, and which steps are computed.

    Each life is another Pass on the same directory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: Path, *, stops_after: int | None = None, **batch: Any):
        self.visited: list[list[int]] = []
        self.weights, self.loads, self.stops_after = "pi_t", 0, stops_after
        self.stop = StopRequest()
        self.config = TrainingConfig(
            load=Path("pi_t"),
            data=data,
            save=data / "save",
            objective=ObjectiveConfig(objective=batch.pop("objective", "sppo")),
            batch=BatchConfig(global_batch_size=8, **batch),
            optimization=OptimizationConfig(lr=1e-3),
            run=RunConfig(reference_piece_seconds=1e-9),
        )
        self.dataset = PreferenceDataset(data)
        self.batches = Batches(self.dataset, self.config, max_length=64)
        monkeypatch.setattr(reference, "log_probs_and_sum", self._log_probs)
        monkeypatch.setattr(reference, "weights_hash", lambda _: self.weights)

    def _log_probs(self, _policy: Any, plan: StepPlan, said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.visited.append(plan.rows.tolist())
        if len(self.visited) == self.stops_after:
            said = said + 1
        return -torch.from_numpy(plan.rows).double() - 1, said

    @property
    def progress(self) -> Progress:
        return Progress(reference=reference.fingerprint(POLICY, self.dataset, self.batches, self.config))

    def begin(self) -> np.ndarray:
        names = self.progress.reference
        return reference.load_or_compute(POLICY, self.dataset, self.batches, names, config=self.config, stop=self.stop)

    def resume(self, step: int, *, load: str = "pi_t") -> np.ndarray:
        progress = self.progress
        progress.step, self.weights = step, "pi_theta"

        def load_pi_t() -> None:
            self.weights, self.loads = load, self.loads + 1

        return reference.read_for_resume(
            POLICY, self.dataset, self.batches, progress, config=self.config, stop=self.stop, load_pi_t=load_pi_t
        )


POLICY: Any = type("Policy", (), {"stages": (), "adapters": None})
"""Nothing is asked of it here but its hash, and whether it has adapters."""


def test_what_precision_log_pi_was_computed_in_is_named(
    monkeypatch: pytest.MonkeyPatch, dataset: PreferenceDataset
) -> None:
    """Names of runs without it are those of files from before it was named."""
    run = Pass(monkeypatch, dataset.directory)

    def names(**model: Any) -> dict[str, Any]:
        config = dataclasses.replace(run.config, model=ModelConfig(**model))
        return reference.fingerprint(POLICY, run.dataset, run.batches, config)

    assert "first_last_layers_bf16" not in names() | names(fp8="hybrid")
    several = [names(), names(params_dtype="float32"), names(fp8="hybrid"), names(fp8="hybrid", fp8_recipe="delayed")]
    several.append(names(fp8="hybrid", first_last_layers_bf16=True))
    assert all(one != other for one, other in itertools.combinations(several, 2))


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    handler = signal.getsignal(signal.SIGTERM)
    parallel.initialize(ParallelConfig(), seed=1)
    yield write(tmp_path / "d", groups(num_groups=8))
    parallel.shut_down()
    signal.signal(signal.SIGTERM, handler)


def computed(values: np.ndarray) -> list[int]:
    return np.flatnonzero(~np.isnan(values.reshape(-1))).tolist()


def test_only_what_the_run_visits_is_computed_and_a_longer_run_adds_the_rest(monkeypatch, data: Path) -> None:
    """Two steps of four; then three, and all: each step once in all, the first values to the bit."""
    first = Pass(monkeypatch, data, train_iters=2)
    values = first.begin()
    assert first.visited == [first.batches.rows_of(step).tolist() for step in (1, 2)]
    assert computed(values) == sorted(row for step in first.visited for row in step)
    assert np.array_equal(values.reshape(-1)[computed(values)], -np.array(computed(values), dtype=np.float32) - 1)
    longer = Pass(monkeypatch, data, train_iters=3)
    assert longer.visited == [] and len(computed(longer.begin())) == 24
    assert longer.visited == [longer.batches.rows_of(3).tolist()]
    whole = Pass(monkeypatch, data, num_epochs=5)
    assert computed(whole.begin()) == list(range(32))
    assert whole.visited == [whole.batches.rows_of(4).tolist()]
    again = Pass(monkeypatch, data, train_iters=1)
    assert computed(again.begin()) == list(range(32)) and again.visited == []
    assert not list(data.glob("reference.pieces*"))


def test_a_resumed_run_that_is_to_be_longer_has_pi_t_compute_what_it_did_not_look_at(monkeypatch, data: Path) -> None:
    Pass(monkeypatch, data, train_iters=2).begin()
    same = Pass(monkeypatch, data, train_iters=2)
    same.resume(1)
    assert (same.visited, same.loads) == ([], 0)
    longer = Pass(monkeypatch, data, train_iters=3)
    assert len(computed(longer.resume(2))) == 24
    assert longer.visited == [longer.batches.rows_of(3).tolist()] and longer.loads == 1
    with pytest.raises(ConfigError, match="log pi of the responses of 1 steps.*--load pi_t is not the policy"):
        Pass(monkeypatch, data, train_iters=4).resume(3, load="another")
    for path in data.glob("reference.*"):
        path.unlink()
    with pytest.raises(DataError, match="has no reference log-probabilities"):
        Pass(monkeypatch, data, train_iters=4).resume(3)


def test_a_pass_that_was_asked_to_stop_goes_on_after_its_last_step(monkeypatch, data: Path) -> None:
    stopped = Pass(monkeypatch, data, stops_after=3)
    with pytest.raises(SystemExit) as leaving:
        stopped.begin()
    assert leaving.value.code == 143 and not (data / "reference.json").exists()
    parallel.initialize(ParallelConfig(), seed=1)
    other = Pass(monkeypatch, data, seq_length=64)  # of another fingerprint: those pieces are not its own
    other.begin()
    assert len(other.visited) == 4
    for path in data.glob("reference.*"):
        if path.is_file():
            path.unlink()
    second = Pass(monkeypatch, data)
    values = second.begin()
    assert second.visited == [second.batches.rows_of(4).tolist()]
    assert np.array_equal(values.reshape(-1), -np.arange(32, dtype=np.float32) - 1)
    assert not list(data.glob("reference.pieces*"))


def test_a_reference_whose_extension_was_cut_off_while_it_was_published_is_all_there(monkeypatch, data: Path) -> None:
    """Cut off where the old files are gone: its pieces hold the old values and the new ones."""
    Pass(monkeypatch, data, train_iters=2).begin()
    longer = Pass(monkeypatch, data, train_iters=4)

    def die(directory: Path, *_: Any, **__: Any) -> None:
        (directory / "reference.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference.reference_file, "write_reference", die)
        with pytest.raises(KeyboardInterrupt):
            longer.resume(2)
    after = Pass(monkeypatch, data, train_iters=4)
    assert computed(after.resume(2)) == list(range(32)) and (after.visited, after.loads) == ([], 0)


def test_a_reference_is_found_after_the_dataset_became_read_only_and_the_other_way_round(monkeypatch, data) -> None:
    """And is extended where it may be written, its first values to the bit."""

    def set_writable(writable: bool) -> None:
        monkeypatch.setattr(reference_store.os, "access", lambda path, _: writable or Path(path) != data)

    for first in (True, False):
        set_writable(first)
        begun = Pass(monkeypatch, data, train_iters=2).begin()
        place = data if first else data / "save"
        assert (place / "reference.json").exists() and (data / "reference.json").exists() == first
        set_writable(not first)
        for again in (Pass(monkeypatch, data, train_iters=2), Pass(monkeypatch, data, train_iters=2)):
            assert again.begin().tobytes() == again.resume(1).tobytes() == begun.tobytes() and again.visited == []
        longer = Pass(monkeypatch, data, train_iters=3)
        values = longer.resume(2)
        assert (data / "save/reference.json").exists() and longer.visited == [longer.batches.rows_of(3).tolist()]
        assert np.array_equal(values[~np.isnan(begun)], begun[~np.isnan(begun)])
        set_writable(first)
        assert Pass(monkeypatch, data, train_iters=3).resume(2).tobytes() == values.tobytes()
        for path in [*data.glob("reference.*"), *data.glob("save/reference.*")]:
            path.unlink()


def test_another_s_reference_beside_data_that_are_read_only_is_in_nobody_s_way(monkeypatch, data: Path) -> None:
    """Where a new one would be written it is refused, as before."""
    Pass(monkeypatch, data, max_prompt_length=99).begin()
    with pytest.raises(DataError, match="max_prompt_length 99 there, None here"):
        Pass(monkeypatch, data).begin()
    with monkeypatch.context() as patch:
        patch.setattr(reference_store.os, "access", lambda path, _: Path(path) != data)
        assert len(computed(Pass(monkeypatch, data).begin())) == 32
    assert len(computed(Pass(monkeypatch, data).resume(1))) == 32  # its own, though the data can be written again


def test_a_response_of_several_pairs_keeps_the_first_value_however_often_the_pass_began(monkeypatch, data) -> None:
    """All pairs of four responses: each response thrice. Stopped after one step, or not: equal to the bit."""
    flags: dict[str, Any] = {"objective": "dpo", "selection": "all", "micro_batch_size": 2}
    whole = Pass(monkeypatch, data, **flags).begin()
    for path in data.glob("reference.*"):
        path.unlink()
    with pytest.raises(SystemExit):
        Pass(monkeypatch, data, stops_after=1, **flags).begin()
    parallel.initialize(ParallelConfig(), seed=1)
    assert Pass(monkeypatch, data, **flags).begin().tobytes() == whole.tobytes()
