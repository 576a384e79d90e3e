"""Loss and gradient are the same however a global batch is packed: by tokens, and with prompts computed once.

Truth is Hugging Face's model under autograd and our own on one rank, as in `test_layouts.py`. The responses
have 1 to 23 tokens and their prompts 3 to 19, so a pack of 96 tokens holds about three in a row of them.
The pretraining script then runs on the same packs: its first log-ratios are 0 exactly, it resumes with other packs.
Not shown here: CUDA, Transformer Engine, FlexAttention's backward (torch has none for the CPU).
"""

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import CP2, CP4, EP2, FULL, PACKS, PP2, SELECTIVE, SHARED_PROMPTS, SP, TP2, VPP2
from tests.distributed.truth import BASE, LOG_PROB_BOUND, Truth, by_hub_names
from tests.distributed.worlds import pretrain
from tests.models import MIXTURES, tiny_llama

LARGE_PACKS = "--packed-sequence-size 160"
LAYOUTS = {
    "one rank, large packs": (1, LARGE_PACKS),
    "TP2 SP": (2, f"{PACKS} {TP2} {SP}"),
    "PP2": (2, f"{PACKS} {PP2}"),
    "PP2 VPP2, three packs": (2, f"{LARGE_PACKS} {VPP2}"),
    "PP2 VPP2, one micro-batch": (2, f"--micro-batch-size 16 {VPP2}"),
    "CP2": (2, f"{PACKS} {CP2}"),
    "DP2": (2, PACKS),
    "DP4": (4, "--packed-sequence-size 64"),
    "TP2 PP2": (4, f"{PACKS} {TP2} {PP2}"),
    "shared, one rank, large packs": (1, f"{LARGE_PACKS} --share-prompts"),
    "shared, recompute": (1, f"{SHARED_PROMPTS} {FULL}"),
    "shared, TP2 SP": (2, f"{SHARED_PROMPTS} {TP2} {SP}"),
    "shared, PP2": (2, f"{SHARED_PROMPTS} {PP2}"),
    "shared, DP2": (2, "--packed-sequence-size 48 --share-prompts"),
    "shared, CP2": (2, f"{SHARED_PROMPTS} {CP2}"),
    "shared, CP4 recompute": (4, f"{SHARED_PROMPTS} {CP4} {SELECTIVE}"),
    "shared, TP2 CP2 SP": (4, f"{SHARED_PROMPTS} {CP2} {TP2} {SP}"),
    "shared, CP2 PP2": (4, f"{SHARED_PROMPTS} {CP2} {PP2}"),
}
MIXTURE_LAYOUTS = {"EP2": (2, f"{PACKS} {EP2}"), "shared, EP2": (2, f"{SHARED_PROMPTS} {EP2}")}


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Truth]:
    """A dense model or a mixture; without and with shared prompts, whose global batches hold other responses."""

    @cache
    def find(*, is_mixture: bool, shares_prompts: bool) -> Truth:
        overrides = MIXTURES["qwen3_moe"] if is_mixture else {}
        hf = tiny_llama(tmp_path_factory.mktemp("model") / "hf", num_hidden_layers=4, **overrides)
        names = partial(by_hub_names, family="qwen3_moe") if is_mixture else dict
        return Truth.of(hf, one_rank=SHARED_PROMPTS if shares_prompts else PACKS, by_exported_names=names)

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_one_rank_and_of_hugging_face_under(
    layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    truth = truth_of(is_mixture=False, shares_prompts="--share-prompts" in flags)
    truth.assert_equal_under(world_size, flags, tmp_path)


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_a_mixtures_loss_and_gradient_equal_hugging_faces_under(
    layout: str, truth_of: Callable[..., Truth], tmp_path: Path
) -> None:
    world_size, flags = MIXTURE_LAYOUTS[layout]
    truth = truth_of(is_mixture=True, shares_prompts="--share-prompts" in flags)
    truth.assert_equal_under(world_size, flags, tmp_path)


def log_probs_by_flex_attention(megatron: str, data: str, argv: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Run the reference pass's first step with FlexAttention in the model -> its rows, sorted, and their log pi."""
    from megatron_sppo import config as configuration
    from megatron_sppo.model import layer_spec
    from megatron_sppo.model.attention import DocumentAttention, with_shared_prompts
    from megatron_sppo.training import checkpoint, inputs, parallel
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.forward_step import log_probs
    from megatron_sppo.training.policy import build_policy

    # As the Transformer Engine spec has it.
    layer_spec.DocumentAttention = with_shared_prompts(DocumentAttention, windows=[None] * 4)
    arguments = ["--load", megatron, "--data", data, "--save", "unused", *argv]
    config = configuration.parse(TrainingConfig, name="test", description="", argv=arguments)
    source, architecture, tokenizer = inputs.open_source(config)
    batches = inputs.list_batches(config, inputs.open_dataset(config, architecture, tokenizer), architecture)
    parallel.initialize(config.parallel, seed=1)
    policy = build_policy(architecture, config.model, config.parallel)
    checkpoint.load_weights(policy, source)
    plan = next(batches.steps(first=1, last=1))
    log_prob_N = log_probs(policy, plan)
    parallel.shut_down()
    order = np.argsort(plan.rows)
    return plan.rows[order], log_prob_N.numpy()[order]


def test_flex_attention_in_the_model_gives_hugging_faces_log_probabilities(
    truth_of: Callable[..., Truth],
) -> None:
    truth = truth_of(is_mixture=False, shares_prompts=True)
    flags = [*BASE, *SHARED_PROMPTS.split()]
    ((rows, log_probs),) = run_ranks(log_probs_by_flex_attention, 1, str(truth.megatron), str(truth.data), flags)
    np.testing.assert_allclose(log_probs, truth.hugging_face(rows)["log_prob"], rtol=0, atol=LOG_PROB_BOUND)


TRAINING = "--params-dtype float32 --lr 1e-3 --eta 100 --global-batch-size 8 --lr-warmup-fraction 0.25"


@pytest.fixture
def run(untied: Path, tmp_path: Path):
    """Start the pretraining script in a world of ranks, on data of its own -> exit codes."""
    data = write_dataset(tmp_path / "data", untied.parent / "hf")

    def start(save: str, flags: str, *, world_size: int = 1) -> list[int]:
        argv = ["--load", str(untied), "--data", str(data), "--save", str(tmp_path / save)]
        return run_ranks(pretrain, world_size, [*argv, *TRAINING.split(), *flags.split()])

    return start


def metrics(save: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in metrics(save)]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ""),
        (2, PP2),
        (2, CP2),
        (1, "--share-prompts"),
        (2, f"--share-prompts {TP2} {SP}"),
        (4, f"--share-prompts {PP2}"),
    ],
)
def test_log_ratio_is_zero_before_the_first_step(run, tmp_path: Path, world_size: int, flags: str) -> None:
    assert run("save", f"{PACKS} --train-iters 1 {flags}", world_size=world_size) == [0] * world_size
    (first,) = metrics(tmp_path / "save")
    assert first["sppo/ref_drift_step0"] == 0
    assert first["loss"] == pytest.approx(first["sppo/target_rms"] ** 2)
    assert 0 <= first["perf/padding_fraction"] < 1
    assert ("perf/shared_token_fraction" in first) == ("--share-prompts" in flags)


@pytest.mark.parametrize("objective", ["sppo", "dpo"])
def test_packs_give_the_losses_of_micro_batches_of_responses(run, tmp_path: Path, objective: str) -> None:
    """The same global batches in the same order, whichever way they are cut; dpo needs its pairs in one piece."""
    run("responses", f"--micro-batch-size 2 --objective {objective}")
    # The reference beside the data is of other packs, and would be refused.
    for path in (tmp_path / "data").glob("reference.*"):
        path.unlink()
    assert run("tokens", f"{PACKS} --objective {objective}", world_size=2) == [0, 0]
    assert losses(tmp_path / "tokens") == pytest.approx(losses(tmp_path / "responses"), rel=1e-4)


def test_pairs_share_their_prompt_on_one_rank_and_two(run, tmp_path: Path) -> None:
    flags = f"--objective dpo --selection top-bottom:2 {SHARED_PROMPTS}"
    assert run("one", flags) == [0]
    assert run("two", flags, world_size=2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_run_resumes_in_other_packs_and_another_layout(run, tmp_path: Path) -> None:
    """Packs are where and how, not what: the global batches stay. Sharing prompts changes these, and is refused."""
    save = tmp_path / "save"
    run("save", f"{SHARED_PROMPTS} --save-interval 2")
    expected = losses(save)
    assert len(expected) == 4
    for directory in save.glob("iter_*"):
        if int(directory.name.removeprefix("iter_")) > 2:
            shutil.rmtree(directory)
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert run("save", f"{PACKS} --save-interval 2") == [2]
    assert run("save", f"{SHARED_PROMPTS} --max-prompt-length 5 --save-interval 2") == [2]
    flags = "--packed-sequence-size 64 --share-prompts --save-interval 2"
    assert run("save", f"{flags} {TP2}", world_size=2) == [0, 0]
    assert losses(save) == pytest.approx(expected, rel=1e-5)


def test_a_reference_of_other_packs_or_prompts_is_refused(run, tmp_path: Path) -> None:
    assert run("one", f"{PACKS} --train-iters 1") == [0]
    for change in ("--share-prompts", "--max-prompt-length 5"):
        assert run("two", f"{PACKS} --train-iters 1 {change}") == [2]
        assert not (tmp_path / "two" / "metrics.jsonl").exists()
