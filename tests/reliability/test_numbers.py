"""Numbers that cannot be right end or skip the step that they are in: nothing is updated, rank and responses named.

Faults are made in the ranks' memory by `unfit_numbers`: in the reference, the targets, activations and gradients, at
random steps, on random ranks, NaN or infinite, and gradients many times as large as before. Each world of ranks trains
16 steps with three of them under --on-bad-step skip, and stops at a fourth. Not proven: faults of a GPU's arithmetic.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_sppo.conversion.convert import import_checkpoint
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import CP2, OVERLAP, PP2, SHARDED, SP, TP2
from tests.distributed.test_pretrain import BASE, forget_after, metrics
from tests.models import MIXTURES, tiny_llama
from tests.reliability.tally import Tally
from tests.reliability.unfit_numbers import Unfit, train_with_faults

LAYOUTS = (
    (2, PP2),
    (2, SHARDED),
    (2, f"{CP2} --expert-model-parallel-size 2"),
    (2, TP2),
    (2, ""),
    (2, CP2),
    (2, f"{TP2} {SP}"),
    (2, f"{SHARDED} {OVERLAP} overlap_param_gather=true"),
    (2, f"{SHARDED} --params-dtype bfloat16"),
    (2, "--optimizer rmsprop --params-dtype bfloat16"),
    (4, f"{TP2} {PP2}"),
    (2, f"--expert-model-parallel-size 2 {SHARDED}"),
)
"""The first three are tried always."""
NUM_STEPS, STEPS_AN_EPOCH, STEP_OF_SPIKES = 16, 4, 13
PLACES = ("reference", "win_rate", "activation", "gradient", "spike")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a mixture of experts, and judged responses -> directories with `megatron` and `data`."""
    roots = {}
    for name, settings in (("dense", {"num_hidden_layers": 4}), ("mixture", MIXTURES["qwen3_moe"])):
        roots[name] = tmp_path_factory.mktemp(name)
        import_checkpoint(tiny_llama(roots[name] / "hf", **settings), roots[name] / "megatron")
        write_dataset(roots[name] / "data", roots[name] / "hf")
    return roots


def faults_of(chance: random.Random, world_size: int, pipeline: bool) -> list[Unfit]:
    """Choose three faults for the run that skips, and one, at a step of the first epoch, for the run that stops."""
    steps = [*sorted(chance.sample(range(1, STEP_OF_SPIKES), 2)), chance.randint(STEP_OF_SPIKES, NUM_STEPS)]
    faults = []
    for step in [*steps, chance.randint(1, STEPS_AN_EPOCH)]:
        place = chance.choice(PLACES if step >= STEP_OF_SPIKES else PLACES[:-1])
        last_stage = place in ("reference", "win_rate") and pipeline
        faults.append(
            Unfit(
                step=step,
                rank=world_size - 1 if last_stage else chance.randrange(world_size),
                place=place,
                value=1e6 if place == "spike" else chance.choice([float("nan"), float("inf"), float("-inf")]),
                pick=chance.randrange(1000),
            )
        )
    return faults


def assert_named(fault: Unfit, message: str, entries: list[dict[str, Any]]) -> None:
    """The line about a fault says what it is, and where: the rank of a gradient, otherwise one of its responses."""
    rows = [row for entry in entries for row in entry["rows"]]
    assert f"of step {fault.step} is " in message
    if fault.place == "gradient":
        assert f"not finite on rank {fault.rank} before" in message and f"rank {fault.rank} (" in message
    elif fault.place == "spike":
        assert "--spike-factor" in message
    else:
        assert any(row in message for row in rows)
    assert "responses " in message
    if fault.place == "reference":
        assert "log pi_t (the reference) of responses " in message


def test_a_step_with_unfit_numbers_is_not_taken(tally: Tally, models: dict[str, Path], tmp_path: Path) -> None:
    for number in tally.cases("numbers", 3, 27):
        world_size, flags = LAYOUTS[number % len(LAYOUTS)]
        model = models["mixture" if "expert" in flags else "dense"]
        root = tmp_path / str(number)
        root.mkdir()
        shutil.copytree(model / "data", root / "data")
        places = ["--load", str(model / "megatron"), "--data", str(root / "data"), *BASE.split(), *flags.split()]
        *skipped, stopped = faults = faults_of(random.Random(number), world_size, PP2 in flags)
        skips = "--on-bad-step skip --spike-factor 1000 --num-epochs 4 --no-tensorboard"
        runs = [
            ([*places, "--save", str(root / "skips"), *skips.split()], skipped),
            ([*places, "--save", str(root / "stops"), "--no-tensorboard"], [stopped]),
        ]
        ranks = run_ranks(train_with_faults, world_size, runs)
        lines = [json.loads(line) for line in (root / "skips" / "metrics.jsonl").read_text().splitlines()]
        order = [json.loads(line)["step"] for line in (root / "skips" / "responses.jsonl").read_text().splitlines()]
        stderr = ranks[0][1].splitlines()
        for place, fault in enumerate(faults):
            name = f"{number}: {fault} under {flags or 'data parallelism'}"
            with tally.case("numbers", name):
                entries = [steps[place] for _, _, steps in ranks]
                assert {entry["step"] for entry in entries} == {fault.step}
                if fault is stopped:
                    assert [codes for codes, _, _ in ranks] == [[0, 2]] * world_size, stderr[-3:]
                    assert_named(fault, stderr[-1], entries)
                    assert not list((root / "stops").glob("iter_*"))
                    continue
                assert all(entry["kept"] for entry in entries)
                (message,) = [line for line in stderr if "left out: " in line and f"of step {fault.step} is " in line]
                assert_named(fault, message, entries)
                line = lines[fault.step - 1]
                assert line["step"] == fault.step and line["sppo/skipped_steps"] == place + 1
        assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
        assert order == [step for step in range(1, NUM_STEPS + 1) for _ in range(8)]
        assert lines[-1]["sppo/skipped_steps"] == len(skipped)


@pytest.mark.counts("numbers")
def test_a_run_that_skipped_goes_on_bit_exactly_and_knows_what_a_spike_is(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Taken back to step 12, the second run has but two steps of its own before the spike of step 15."""
    shutil.copytree(models["dense"] / "data", tmp_path / "data")
    places = ["--load", str(models["dense"] / "megatron"), "--data", str(tmp_path / "data")]
    flags = "--on-bad-step skip --spike-factor 1000 --num-epochs 4 --no-tensorboard --save-interval 12"
    argv = [*places, "--save", str(tmp_path / "save"), *BASE.split(), *flags.split()]
    spike = Unfit(step=15, rank=1, place="spike", value=1e6, pick=0)
    unfit = Unfit(step=5, rank=0, place="reference", value=float("nan"), pick=3)
    assert [codes for codes, _, _ in run_ranks(train_with_faults, 2, [(argv, [unfit, spike])])] == [[0], [0]]
    expected = metrics(tmp_path / "save")
    forget_after(tmp_path / "save", 12)
    assert [codes for codes, _, _ in run_ranks(train_with_faults, 2, [(argv, [spike])])] == [[0], [0]]
    for line, again in zip(expected, metrics(tmp_path / "save"), strict=True):
        assert {k: v for k, v in again.items() if not k.startswith("perf/")} == {
            k: v for k, v in line.items() if not k.startswith("perf/")
        }
    assert [line["sppo/skipped_steps"] for line in expected] == [0] * 4 + [1] * 10 + [2] * 2
    assert "grad_norm" not in expected[4] and "grad_norm" in expected[14]


@pytest.mark.counts("numbers")
def test_a_model_that_gives_no_numbers_is_refused_in_the_reference_pass(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A weight of the final norm that is NaN makes every logit NaN; nothing is written."""
    model = tmp_path / "hf"
    shutil.copytree(models["dense"] / "hf", model)
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    import_checkpoint(model, tmp_path / "megatron")
    shutil.copytree(models["dense"] / "data", tmp_path / "data")
    places = ["--load", str(tmp_path / "megatron"), "--data", str(tmp_path / "data"), "--save", str(tmp_path / "save")]
    ((codes, stderr, _),) = run_ranks(train_with_faults, 1, [([*places, *BASE.split()], [])])
    line = stderr.splitlines()[-1]
    assert (
        codes == [2] and "error: the reference has no finite number for 8 of 8 responses of a step; by rank 0 (" in line
    )
    assert "micro-batch 1 of 4: " in line and not list((tmp_path / "data").glob("reference*"))
