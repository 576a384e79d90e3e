"""Every family goes HF -> Megatron -> HF byte for byte, and its logits are Hugging Face's in every layout.

The models are made, written and run by transformers (eager attention, float32); Megatron-Core loads what we imported
in real gloo ranks. Prompts are five windows long. Not shown here: CUDA, Transformer Engine, bfloat16, and gradients,
which test_layouts.py, test_moe_layouts.py and test_family_gradients.py hold against autograd.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.verification.verify import verify
from tests.distributed.harness import run_ranks
from tests.families import BIASED_EXPERTS, FAMILIES, MIXTURES, family_model, hugging_face_logits, token_ids

TOLERANCE = 1e-5
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
# Three layers over two stages: two and one.
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2}
# With experts, tensor parallelism needs sequence parallelism; elsewhere it is one more thing that must not matter.
SEQUENCE: dict[str, Any] = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": TP2,
    "TP2 SP": {**TP2, **SEQUENCE},
    "PP2": PP2,
    "TP2 PP2 SP": {**TP2, **PP2, **SEQUENCE},
    "CP2": {"context_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "EP2 TP2 SP": {"expert_model_parallel_size": 2, **TP2, **SEQUENCE},
}
WORLD_SIZE = 4
ONE_KEY_VALUE_HEAD, TWO_KEY_VALUE_HEADS = "one key/value head, untied", "two key/value heads, tied"
MODELS: dict[str, dict[str, Any]] = {
    ONE_KEY_VALUE_HEAD: {"num_key_value_heads": 1, "tie_word_embeddings": False},
    TWO_KEY_VALUE_HEADS: {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


Answer = tuple[torch.Tensor, torch.Tensor]
"""Positions of this rank, and the logits there, [B, positions, V]."""


def layouts_of(family: str, model: str) -> list[str]:
    """A single key/value head cannot be divided; experts are divided only where there are some."""
    chosen = []
    for name, layout in LAYOUTS.items():
        tensor = "tensor_model_parallel_size" in layout
        fits = not (tensor and model == ONE_KEY_VALUE_HEAD)
        if family in MIXTURES:
            fits = fits and tensor == ("sequence_parallel" in layout)
            # Tensor-parallel ranks would split the experts, whose biases Megatron-Core would add once a rank.
            whole = family not in BIASED_EXPERTS or "expert_model_parallel_size" in layout
            fits = fits and (whole or not tensor)
        else:
            fits = fits and "expert_model_parallel_size" not in layout
        if fits:
            chosen.append(name)
    return chosen


def logits_under(checkpoints: dict[str, list[str]], tokens_BS: torch.Tensor) -> dict[tuple[str, str], Answer]:
    """Load checkpoints in each layout and run them -> {(layout, checkpoint): answer}, on ranks of the last stage."""
    from megatron.core import parallel_state

    from megatron_sppo.training import parallel

    answers: dict[tuple[str, str], Answer] = {}
    for name, directories in checkpoints.items():
        layout = parallel.ParallelConfig(**LAYOUTS[name])
        parallel.initialize(layout, seed=1)
        for directory in directories:
            answer = _logits(Path(directory), layout, tokens_BS)
            if answer is not None:
                answers[name, directory] = answer
        parallel_state.destroy_model_parallel()
    return answers


def _logits(checkpoint: Path, layout: Any, tokens_BS: torch.Tensor) -> Answer | None:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_sppo.model import gpt
    from megatron_sppo.model.config import ModelConfig
    from megatron_sppo.model.zigzag import zigzag_positions
    from megatron_sppo.model_file import read_architecture
    from megatron_sppo.training import parallel
    from megatron_sppo.training.checkpoint import load_weights
    from megatron_sppo.training.layout import check_layout
    from megatron_sppo.training.policy import build_policy

    architecture, _ = read_architecture(checkpoint)
    check_layout(layout, architecture, world_size=WORLD_SIZE)
    policy = build_policy(architecture, ModelConfig(params_dtype="float32", transformer_impl="torch"), layout)
    load_weights(policy, checkpoint)
    length = tokens_BS.shape[1]
    positions = zigzag_positions(
        torch.tensor([0, length]), rank=parallel.context_parallel_rank(), size=layout.context_parallel_size
    )

    def step(_: object, model: Any) -> tuple[torch.Tensor, Any]:
        here = positions.expand(len(tokens_BS), -1)
        return gpt.forward(model, tokens_BS[:, positions], here), lambda output, non_loss_data: output.detach()

    logits = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=policy.chunks[0],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=len(tokens_BS),
        decoder_seq_length=length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel.is_last_stage():
        return None
    return positions, gather_from_tensor_model_parallel_region(logits[0])[..., : architecture.vocab_size].clone()


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The models that this run's tests name, as Hugging Face ("hf") and Megatron ("megatron") directories."""
    made = {}
    for family, model in named_in(request.session, request.path):
        root = tmp_path_factory.mktemp("model")
        family_model(root / "hf", family, **MODELS[model])
        import_checkpoint(root / "hf", root / "megatron")
        made[family, model] = root
    return made


def named_in(session: pytest.Session, path: Path) -> list[tuple[str, str]]:
    """List the models that the tests of a module which are to run name -> (family, model)."""
    cases = [item.callspec.params for item in session.items if item.path == path]
    return list(dict.fromkeys((case["family"], case.get("model", TWO_KEY_VALUE_HEADS)) for case in cases))


@pytest.fixture(scope="module")
def answers(models: dict[tuple[str, str], Path]) -> list[dict[tuple[str, str], Answer]]:
    """Run all of them in all of their layouts, half of them in a world of ranks -> one dict a rank (`logits_under`)."""
    answers: list[dict[tuple[str, str], Answer]] = [{} for _ in range(WORLD_SIZE)]
    for chosen in {model for _, model in models}:
        checkpoints: dict[str, list[str]] = {name: [] for name in LAYOUTS}
        for (family, model), root in models.items():
            for layout in layouts_of(family, model) if model == chosen else ():
                checkpoints[layout].append(str(root / "megatron/iter_0000000"))
        for found, rank in zip(
            answers, run_ranks(logits_under, WORLD_SIZE, checkpoints, token_ids(), timeout=900.0), strict=True
        ):
            found |= rank
    return answers


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_comes_back_the_same(
    family: str, model: str, models: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    root = models[family, model]
    assert hashes(export_checkpoint(root / "megatron", tmp_path / "out")) == hashes(root / "hf")


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "phi3", "mistral, window"])
def test_verify_finds_no_fault(family: str, models: dict[tuple[str, str], Path]) -> None:
    root = models[family, TWO_KEY_VALUE_HEADS]
    report = verify(root / "hf", root / "megatron")
    assert report["faults"] == []
    assert report["logits"]["max_abs"] <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_hugging_faces_under_every_layout(
    family: str, model: str, models: dict[tuple[str, str], Path], answers: list[dict[tuple[str, str], Answer]]
) -> None:
    root, tokens = models[family, model], token_ids()
    expected = hugging_face_logits(root / "hf", tokens)
    assert expected.std() > 0.3
    layouts = layouts_of(family, model)
    for layout in layouts:
        found = [rank.get((layout, str(root / "megatron/iter_0000000"))) for rank in answers]
        parts = [answer for answer in found if answer is not None]
        assert {position for positions, _ in parts for position in positions.tolist()} == set(range(tokens.shape[1]))
        for positions, logits in parts:
            difference = (logits - expected[:, positions]).abs().max().item()
            assert difference <= TOLERANCE, f"{layout}: logits differ by {difference}"
    assert len(layouts) >= 3
