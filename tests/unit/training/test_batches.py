"""Which responses a step holds, whatever the layout; what a layout that does not fit is told.

The number of data-parallel ranks and this one's place are set by hand: the arithmetic of any world runs in one process.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training import parallel
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import (
    BatchConfig,
    ObjectiveConfig,
    OptimizationConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_sppo.training.step_plan import StepPlan
from tests.unit.data.make import groups, write

PATHS = {"load": Path("pi_t"), "data": Path("data"), "save": Path("save")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 prompts of 1 to 8 tokens with four responses of 1 to 11 each."""
    return PreferenceDataset(write(tmp_path_factory.mktemp("batches") / "d", groups(num_groups=24)))


def config(*, objective: str = "sppo", layout: dict[str, Any] | None = None, **batch: Any) -> TrainingConfig:
    return TrainingConfig(
        **PATHS,
        objective=ObjectiveConfig(objective=objective),
        batch=BatchConfig(global_batch_size=16, **batch),
        optimization=OptimizationConfig(lr=1e-3),
        model=ModelConfig(params_dtype="float32"),
        parallel=ParallelConfig(**layout or {}),
    )


def plans(monkeypatch, dataset, settings: TrainingConfig, *, num_ranks: int) -> list[list[StepPlan]]:
    """Every step of an epoch as each data-parallel rank sees it -> plans[step][rank]."""
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: num_ranks)
    monkeypatch.setattr(parallel, "context_parallel_rank", lambda: 0)
    ranks = []
    for rank in range(num_ranks):
        monkeypatch.setattr(parallel, "data_parallel_rank", lambda rank=rank: rank)
        batches = Batches(dataset, settings, max_length=64, crossover_length=100.0)
        ranks.append(list(batches.steps(first=1, last=batches.steps_per_epoch)))
    return [list(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(
    ("flags", "num_tokens"),
    [
        ({"micro_batch_size": 2}, None),
        ({"packed_sequence_size": 40}, 40),
        ({"packed_sequence_size": 40, "share_prompts": True}, 40),
        ({"packed_sequence_size": 45, "objective": "dpo", "selection": "top-bottom:2"}, 45),
        ({"packed_sequence_size": 45, "objective": "dpo", "selection": "all", "share_prompts": True}, 45),
    ],
)
def test_global_batches_do_not_depend_on_the_ranks_that_share_them(monkeypatch, dataset, flags, num_tokens) -> None:
    settings, expected = config(**flags), None
    for num_ranks in (1, 2, 4, 8):
        steps = plans(monkeypatch, dataset, settings, num_ranks=num_ranks)
        rows = [step[0].rows.tolist() for step in steps]
        expected = expected or rows
        assert rows == expected
        for step in steps:
            assert all(plan.rows.tolist() == step[0].rows.tolist() for plan in step)
            assert len({len(plan.micro_batches) for plan in step}) == 1
            shared_out = [row for plan in step for batch in plan.micro_batches for row in batch.rows.tolist()]
            for rows in (batch.rows.numpy() for plan in step for batch in plan.micro_batches):
                assert np.array_equal(step[0].rows[step[0].positions(rows)], rows)
            assert sorted(shared_out) == sorted(step[0].rows.tolist())
            sizes = [batch.num_tokens for plan in step for batch in plan.micro_batches]
            assert num_tokens is None or max(sizes) <= num_tokens
            assert sum(sizes) == step[0].num_computed_tokens <= step[0].num_tokens
            for plan in step:
                real = sum(batch.num_tokens for batch in plan.micro_batches)
                computed = sum(batch.tokens.numel() for batch in plan.micro_batches)
                assert plan.padding_fraction == pytest.approx(1 - real / computed)
    assert sorted(np.concatenate(expected).tolist()) == list(range(sum(len(step) for step in expected)))


class OfAllRows(np.ndarray):
    """A column of the training index, which a step may pick from and not compute with as a whole."""

    def __getitem__(self, rows: Any) -> Any:
        return np.asarray(self)[rows]

    def __array_ufunc__(self, ufunc: np.ufunc, *_: Any, **__: Any) -> Any:
        raise AssertionError(ufunc)

    def __array_function__(self, function: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(function)


NUM_ROWS = 24 * 4
"""Of the dataset above, under the selection of all responses."""


@pytest.mark.parametrize(
    "flags",
    [{"micro_batch_size": 2}, {"packed_sequence_size": 40}, {"packed_sequence_size": 40, "share_prompts": True}],
)
def test_a_step_computes_with_its_own_rows_alone(monkeypatch, dataset, flags) -> None:
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 2)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 1)
    monkeypatch.setattr(parallel, "context_parallel_rank", lambda: 0)
    batches = Batches(dataset, config(**flags), max_length=64)
    next(batches.steps(first=1, last=1))  # lists the epoch's rows
    columns = ("group", "response", "prompt_lengths", "response_lengths")
    guarded = {name: getattr(batches.index, name).view(OfAllRows) for name in columns}
    lengths, batches.index = batches.index.lengths.view(OfAllRows), dataclasses.replace(batches.index, **guarded)
    with pytest.raises(AssertionError, match="add"):
        batches.index.prompt_lengths + batches.index.response_lengths  # what a guarded column does not let pass
    batches.index.__dict__["lengths"] = lengths  # as kept since the first step
    assert batches.index.num_rows == NUM_ROWS
    assert len(list(batches.steps(first=2, last=6))) == 5


def test_responses_of_a_prompt_meet_in_one_global_batch_where_it_is_shared(monkeypatch, dataset) -> None:
    """16 responses are four whole prompts, each laid down once; shuffled by responses they would be of many more."""
    for shared in True, False:
        settings = config(packed_sequence_size=64, share_prompts=shared)
        steps = plans(monkeypatch, dataset, settings, num_ranks=1)
        assert len(steps) == 6
        num_prompts = [len(set(plan.group.tolist())) for (plan,) in steps]
        assert (max(num_prompts) == 4) == shared
        for (plan,) in steps:
            prompts = sum(int(dataset.prompt_lengths[group]) for group in set(plan.group.tolist()))
            once = prompts + int(plan.num_response_tokens.sum())
            assert (plan.num_computed_tokens == once) == shared


def test_pipeline_stages_see_one_shape_a_step(monkeypatch, dataset) -> None:
    for flags in {"packed_sequence_size": 40}, {"packed_sequence_size": 40, "share_prompts": True}:
        settings = config(layout={"pipeline_model_parallel_size": 2}, **flags)
        for step in plans(monkeypatch, dataset, settings, num_ranks=2):
            for plan in step:
                assert len({tuple(batch.tokens.shape) for batch in plan.micro_batches}) == 1


def test_padding_of_documents_and_of_the_row_is_counted_under_context_parallelism(monkeypatch, dataset) -> None:
    """Two ranks cut each document into four chunks: lengths in fours, and half of the row on each rank."""
    settings = config(layout={"context_parallel_size": 2}, packed_sequence_size=47)
    for (plan,) in plans(monkeypatch, dataset, settings, num_ranks=1):
        for batch in plan.micro_batches:
            padded = sum(-(-n // 4) * 4 for n in batch.lengths.tolist())
            assert batch.tokens.shape == (1, padded // 2) and padded <= 44  # 47, rounded down
        computed = sum(2 * batch.tokens.numel() for batch in plan.micro_batches)
        assert plan.padding_fraction == pytest.approx(1 - plan.num_tokens / computed)


def test_a_pack_that_does_not_hold_the_longest_response_or_pair_is_refused_with_the_size_that_does(dataset) -> None:
    lengths = dataset.prompt_lengths[:, None] + dataset.response_lengths
    longest = int(lengths.max())
    Batches(dataset, config(packed_sequence_size=longest), max_length=64)
    with pytest.raises(
        ConfigError, match=rf"does not hold the longest prompt and response.*--packed-sequence-size {longest},"
    ):
        Batches(dataset, config(packed_sequence_size=longest - 1), max_length=64)
    # Two sequence-parallel ranks want an even number of tokens, so an odd budget is one less.
    halved = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    odd = longest if longest % 2 else longest - 1
    with pytest.raises(ConfigError, match=rf"--packed-sequence-size {longest + longest % 2},"):
        Batches(dataset, config(packed_sequence_size=odd, layout=halved), max_length=64)
    index = Batches(dataset, config(objective="dpo", packed_sequence_size=64), max_length=64).index
    pair = int(index.lengths.reshape(-1, 2).sum(axis=1).max())
    with pytest.raises(ConfigError, match=rf"the longest pair, {pair} tokens .*--packed-sequence-size {pair},"):
        Batches(dataset, config(objective="dpo", packed_sequence_size=pair - 1), max_length=64)
    once = int((index.lengths.reshape(-1, 2).sum(axis=1) - index.prompt_lengths[::2]).max())
    Batches(dataset, config(objective="dpo", packed_sequence_size=once, share_prompts=True), max_length=64)
    with pytest.raises(ConfigError, match=rf"--packed-sequence-size {once},"):
        Batches(dataset, config(objective="dpo", packed_sequence_size=once - 1, share_prompts=True), max_length=64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"packed_sequence_size": 0}, "packed_sequence_size is 0; it must be a number in"),
        ({"packed_sequence_size": 64, "packing": False}, "packed_sequence_size needs packing. Use --packing"),
        ({"share_prompts": True}, "Use for example --packed-sequence-size 8192."),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**flags)


def test_packs_of_tokens_ask_nothing_of_the_number_of_responses() -> None:
    """16 responses over three ranks, and pairs with micro_batch_size at 1: both are refused without packs of tokens."""
    config(packed_sequence_size=64, objective="dpo").check_batch(data_parallel_size=3)
    with pytest.raises(ConfigError, match="Use --global-batch-size 18"):
        config(micro_batch_size=2).check_batch(data_parallel_size=3)
    with pytest.raises(ConfigError, match="Use --micro-batch-size 2"):
        config(objective="dpo")


def test_the_order_of_tensors_follows_the_plan(monkeypatch, dataset) -> None:
    """Whatever packs they lie in, targets stand beside their responses."""
    ((plan,), *_) = plans(monkeypatch, dataset, config(packed_sequence_size=40, share_prompts=True), num_ranks=1)
    expected = {int(row): float(rate) for row, rate in zip(plan.rows, plan.targets.win_rate, strict=True)}
    for batch in plan.micro_batches:
        assert torch.equal(batch.targets.win_rate, torch.tensor([expected[int(row)] for row in batch.rows]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6),
        ({"num_epochs": 3}, 18),
        ({"train_iters": 2}, 2),
        ({"train_iters": 20}, 20),
        ({"train_iters": 20, "num_epochs": 2}, 12),
        ({"train_iters": 7, "num_epochs": 2}, 7),
    ],
    ids=str,
)
def test_steps_are_those_asked_for_and_the_data_repeats(dataset, settings, expected, caplog) -> None:
    """24 prompts of 4 responses are 6 steps of 16. With both settings the first ends the run, and it is said which."""
    with caplog.at_level("INFO"):
        batches = Batches(dataset, config(micro_batch_size=2, **settings), max_length=64)
    assert batches.train_iters == expected
    if len(settings) == 2:
        ends = "train_iters" if expected == settings["train_iters"] else "num_epochs"
        assert f"num_epochs 2 is 12 steps: {ends} ends the run" in caplog.text


@pytest.mark.parametrize(("objective", "strength"), [("sppo", "eta 1000"), ("inpo", "eta 1000"), ("ipo", "beta 0.1")])
def test_the_strength_that_the_objective_reads_is_said(dataset, objective, strength, caplog) -> None:
    with caplog.at_level("INFO"):
        Batches(dataset, config(micro_batch_size=2, objective=objective), max_length=64)
    assert f"{objective} at {strength}: " in caplog.text


def test_fewer_responses_than_a_global_batch_are_said(dataset, caplog) -> None:
    settings = dataclasses.replace(config(micro_batch_size=2), batch=BatchConfig(global_batch_size=128))
    Batches(dataset, settings, max_length=64)
    assert "a step has all 96 responses that there are, fewer than global_batch_size (128)" in caplog.text


def test_each_epoch_reads_its_own_reference_where_there_is_one(monkeypatch, dataset) -> None:
    """96 responses in steps of 16: six steps an epoch. The number says epoch, prompt and response."""
    settings = config(num_epochs=2)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    batches = Batches(dataset, settings, max_length=64)
    assert (batches.num_epochs, batches.first_step(1)) == (2, 7)
    one_GK = 10.0 * np.arange(24)[:, None] + np.arange(4)
    both = np.concatenate([one_GK, 1000 + one_GK]).astype(np.float32)
    for reference_GK, added in ((one_GK.astype(np.float32), 0), (both, 1000)):
        for step, plan in enumerate(batches.steps(first=6, last=7, reference_GK=reference_GK), start=6):
            wanted = 10.0 * plan.group + plan.response + (added if step == 7 else 0)
            np.testing.assert_array_equal(plan.targets.reference_log_prob.numpy(), wanted)
            for micro_batch in plan.micro_batches:
                own = wanted[np.argsort(plan.rows)[np.searchsorted(np.sort(plan.rows), micro_batch.rows.numpy())]]
                np.testing.assert_array_equal(micro_batch.targets.reference_log_prob.numpy(), own)


def test_a_thread_that_asks_for_another_epoch_does_not_change_what_is_listed(monkeypatch, dataset) -> None:
    """Another thread asks in the worst instant: after this one's order is kept, before it is returned."""
    batches = Batches(dataset, config(), max_length=64)
    expected = {epoch: batches._order(epoch).copy() for epoch in (0, 1)}
    assert not np.array_equal(expected[0], expected[1])
    asks = True

    class Overtaken(Batches):
        def __setattr__(self, name: str, value: Any) -> None:
            nonlocal asks
            super().__setattr__(name, value)
            if name == "_last_order" and asks:
                asks = False
                assert np.array_equal(self._order(1), expected[1])

    batches.__class__ = Overtaken
    assert np.array_equal(batches._order(0), expected[0]) and not asks
