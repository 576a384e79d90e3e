"""examples/megatron_lm: Megatron-LM's pretrain(), flags and checkpoints train what examples/pretrain_sppo.py trains.

Both scripts start from the same imported checkpoint and dataset, in float32 through Transformer Engine's layers on the
emulated GPU; expected are the numbers of ours, which tests/gpu and tests/distributed hold against Hugging Face. Not
shown: Megatron-LM's fusions that need apex, its asynchronous saves, NCCL, speed.
"""

import importlib.util
import runpy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.reference_file import MANIFEST_NAME, read_reference
from megatron_sppo.json_files import read_json
from megatron_sppo.model_file import read_architecture
from tests.distributed.conftest import write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_pretrain import metrics
from tests.distributed.worlds import REPOSITORY, pretrain, run_script
from tests.models import tiny_llama

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron-core 0.16 has no megatron.training (0.19 has)",
)

SCRIPT = "examples/megatron_lm/pretrain_sppo.py"
BATCH = "--seq-length 64 --micro-batch-size 4 --global-batch-size 16 --eta 10 --lr 1e-3 --lr-decay-style constant"
OURS = "--params-dtype float32 --transformer-impl transformer_engine --no-packing --num-epochs 2 --no-tensorboard"
THEIRS = (
    "--train-iters 4 --save-interval 2 --clip-grad 1.0 --weight-decay 0 --adam-beta2 0.999 --num-workers 0 "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --log-interval 1 --tensorboard-log-interval 1"
)
# (model, ranks, flags)
LAYOUTS = {
    "TP2 SP": ("untied", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2 VPP2": ("tied", 2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "CP2, bfloat16": ("untied", 2, "--context-parallel-size 2 --bf16"),  # no kernel has it in float32
    "DP2, sharded optimizer": ("untied", 2, "--use-distributed-optimizer --overlap-grad-reduce"),
    "local layers": ("untied", 1, "--transformer-impl local --no-persist-layer-norm --no-bias-swiglu-fusion"),
}


def megatron_lm_flags(architecture: Architecture) -> list[str]:
    """Say in Megatron-LM's flags what an imported Llama is: docs/from-megatron-lm.md's table."""
    assert architecture.family == "llama" and architecture.rope_scaling is None
    flags = (
        f"--num-layers {architecture.num_layers} --hidden-size {architecture.hidden_size} "
        f"--ffn-hidden-size {architecture.ffn_hidden_size} --num-attention-heads {architecture.num_attention_heads} "
        f"--group-query-attention --num-query-groups {architecture.num_query_groups} "
        f"--kv-channels {architecture.kv_channels} --norm-epsilon {architecture.layernorm_epsilon} "
        f"--max-position-embeddings {architecture.max_position_embeddings} --position-embedding-type rope "
        f"--rotary-base {architecture.rotary_base:.0f} --normalization RMSNorm --swiglu --disable-bias-linear "
        f"--tokenizer-type NullTokenizer --vocab-size {architecture.vocab_size}"
    ).split()
    return (
        flags if architecture.share_embeddings_and_output_weights else [*flags, "--untie-embeddings-and-output-weights"]
    )


@pytest.fixture(scope="module")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a model, judged responses for it and a run of our own script, once each -> a directory with all three."""

    @cache
    def find(model: str) -> Path:
        root = tmp_path_factory.mktemp(model)
        hf = tiny_llama(root / "hf", num_hidden_layers=4, tie_word_embeddings=model == "tied")
        import_checkpoint(hf, root / "megatron")
        write_dataset(root / "data", hf)
        places = ["--data", root / "data", "--load", root / "megatron", "--save", root / "ours"]
        assert run_ranks(pretrain, 1, [*map(str, places), *BATCH.split(), *OURS.split()]) == [0]
        return root

    return find


@pytest.fixture(scope="module")
def untied(inputs_of: Callable[[str], Path]) -> Path:
    """Run Megatron-LM's script on the untied model, to ROOT/theirs -> its directory."""
    root = inputs_of("untied")
    assert run(root, root / "theirs") == [0]
    return root


def run(inputs: Path, save: Path, flags: str = "", *, ranks: int = 1) -> list[int]:
    """Run Megatron-LM's script, or go on with what is saved -> exit codes."""
    architecture, _ = read_architecture(inputs / "megatron/iter_0000000")
    places = ["--preference-data", inputs / "data", "--pretrained-checkpoint", inputs / "megatron", "--load", save]
    places += ["--save", save, "--tensorboard-dir", save / "tensorboard"]
    argv = [*map(str, places), *megatron_lm_flags(architecture), *BATCH.split(), *THEIRS.split(), *flags.split()]
    return run_ranks(run_script, ranks, SCRIPT, argv)


def logged(save: Path, name: str) -> dict[int, float]:
    """Read what Megatron-LM logged -> {step: value}."""
    events = EventAccumulator(str(save / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def stored(directory: Path) -> np.ndarray:
    values = read_reference(directory, read_json(directory / MANIFEST_NAME)["fingerprint"])
    assert values is not None and np.isfinite(values).all()
    return values


def check_against_ours(inputs: Path, save: Path, *, steps: int, rounding: float = 1e-5) -> None:
    """Hold a run's reference, its first loss and gradient norm, and its later losses against our script's in float32.

    With every log-ratio 0 the first loss knows no rounding. Of gradients that are nothing but rounding Adam makes steps
    of full size: later losses differ more.
    """
    np.testing.assert_allclose(stored(save), stored(inputs / "data"), rtol=rounding)
    wanted = {line["step"]: line for line in metrics(inputs / "ours")}
    loss = logged(save, "sppo loss")
    assert list(loss) == list(range(1, steps + 1))
    assert logged(save, "log-ratio")[1] == 0
    assert loss[1] == pytest.approx(wanted[1]["loss"], rel=1e-5)
    assert logged(save, "grad-norm")[1] == pytest.approx(wanted[1]["grad_norm"], rel=10 * rounding)
    for step in range(2, steps + 1):
        assert loss[step] == pytest.approx(wanted[step]["loss"], rel=100 * rounding), step


def test_both_scripts_train_the_same_and_megatron_lm_s_checkpoint_exports(untied: Path) -> None:
    """After four steps of at most lr a weight, weights differ by a tenth of one."""
    check_against_ours(untied, untied / "theirs", steps=4)
    theirs, ours, before = (
        load_file(export_checkpoint(untied / name, untied / f"hf_{name}", template=untied / "hf") / "model.safetensors")
        for name in ("theirs", "ours", "megatron")
    )
    apart, moved = (max(float((theirs[name] - other[name]).abs().max()) for name in theirs) for other in (ours, before))
    assert apart <= 1e-4 and moved >= 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_megatron_lm_s(layout: str, inputs_of: Callable[[str], Path], tmp_path: Path) -> None:
    model, ranks, flags = LAYOUTS[layout]
    assert run(inputs_of(model), tmp_path, f"{flags} --train-iters 2 --no-save-optim", ranks=ranks) == [0] * ranks
    check_against_ours(inputs_of(model), tmp_path, steps=2, rounding=2**-9 if "--bf16" in flags else 1e-5)


def test_a_run_goes_on_from_megatron_lm_s_own_checkpoint(untied: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(untied / "theirs", save)
    shutil.rmtree(save / "tensorboard")

    def forget_the_last() -> None:
        shutil.rmtree(save / "iter_0000004")
        (save / "latest_checkpointed_iteration.txt").write_text("2")

    forget_the_last()
    assert run(untied, save) == [0]
    whole = logged(untied / "theirs", "sppo loss")
    assert logged(save, "sppo loss") == {step: whole[step] for step in (3, 4)}
    # Without the values that it was trained against it cannot: the policy is another by now.
    forget_the_last()
    (save / MANIFEST_NAME).unlink()
    assert run(untied, save) == [2]


def test_the_reference_of_fp8_is_that_of_the_first_epoch(inputs_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Same micro-batches, same companions under one scale: while weights stand still every log-ratio is exactly 0.

    Micro-batches of three do not divide 32 responses: one of the next epoch comes along with others.
    """
    flags = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --lr 1e-12 --micro-batch-size 3 --global-batch-size 15"
    assert run(inputs_of("untied"), tmp_path, f"{flags} --train-iters 2 --no-save-optim") == [0]
    assert logged(tmp_path, "log-ratio") == {1: 0, 2: 0}
    gap = np.abs(stored(tmp_path) - stored(inputs_of("untied") / "data"))
    assert 0 < gap.mean() < 1  # nats a response of at most 24 tokens


@pytest.mark.parametrize(
    "flags", ["--hidden-dropout 0.1", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"]
)
def test_what_would_be_wrong_is_refused(flags: str, inputs_of: Callable[[str], Path], tmp_path: Path) -> None:
    assert run(inputs_of("untied"), tmp_path / "save", flags) == [2]
    assert not [*(tmp_path / "save").glob("iter_*"), *(tmp_path / "save").glob("reference.*")]


def three_calls(script: str) -> tuple[list[float], list[float]]:
    """Run the three calls on a plain GPTModel -> losses, and the same from its own logits."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_sppo.training import parallel
    from megatron_sppo.training.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0,
        attention_dropout=0,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=128, max_sequence_length=16).cuda()
    tokens = torch.randint(128, (2, 8)).cuda()
    position_ids = torch.arange(8).repeat(2, 1).cuda()
    rows_R = torch.arange(2 * 3, 2 * 7).cuda()  # as [S, B]: positions 3 to 6 of both predict their last four tokens
    given: dict[str, Any] = {
        "model": model,
        "tokens": tokens,
        "position_ids": position_ids,
        "batch": {"rows_R": rows_R, "labels_R": tokens.T[4:].reshape(-1)},
        "sequence_of_token_R": rows_R % 2,
        "num_sequences": 2,
        "reference_log_prob_B": torch.tensor([-20.0, -15.0]).cuda(),
        "win_rate_B": torch.tensor([0.75, 0.25]).cuda(),
    }
    found = runpy.run_path(script, init_globals=given)["loss_B"]
    log_prob_BSV = model(tokens, position_ids, None)[:, 3:7].double().log_softmax(-1)
    log_ratio_B = log_prob_BSV.gather(2, tokens[:, 4:, None]).sum((1, 2)) - given["reference_log_prob_B"]
    wanted = (log_ratio_B - 1000 * (given["win_rate_B"] - 0.5)).square()
    return found.detach().cpu().tolist(), wanted.detach().cpu().tolist()


def test_the_three_calls_of_the_documentation_are_equation_3_6(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/from-megatron-lm.md").read_text(encoding="utf-8")
    (tmp_path / "calls.py").write_text(text.split("```python\n")[1].split("```")[0])
    ((found, wanted),) = run_ranks(three_calls, 1, str(tmp_path / "calls.py"))
    assert found == pytest.approx(wanted, rel=1e-5)
