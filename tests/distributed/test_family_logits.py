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
from tests.distributed.harness import run_ranks
from tests.families import FAMILIES, MIXTURES, family_model, hugging_face_logits, token_ids

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
        else:
            fits = fits and "expert_model_parallel_size" not in layout
        if fits:
            chosen.append(name)
    return chosen


def logits_under(jobs: list[tuple[str, str]], tokens_BS: torch.Tensor) -> list[Answer | None]:
    """Load each checkpoint in its layout and run it -> answers, None before the last pipeline stage."""
    return [_logits(checkpoint, LAYOUTS[layout], tokens_BS) for checkpoint, layout in jobs]


@torch.no_grad()
def _logits(checkpoint: str, settings: dict[str, Any], tokens_BS: torch.Tensor) -> Answer | None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_sppo.architecture import read_architecture
    from megatron_sppo.model import gpt
    from megatron_sppo.model.config import ModelConfig
    from megatron_sppo.training import parallel
    from megatron_sppo.training.checkpoint import load_weights
    from megatron_sppo.training.policy import build_policy
    from megatron_sppo.zigzag import zigzag_positions

    layout, (architecture, _) = parallel.ParallelConfig(**settings), read_architecture(Path(checkpoint))
    parallel.check_layout(layout, architecture, world_size=WORLD_SIZE)
    parallel.initialize(layout, seed=1)
    policy = build_policy(architecture, ModelConfig(params_dtype="float32", transformer_impl="torch"), layout)
    load_weights(policy, Path(checkpoint))
    length = tokens_BS.shape[1]
    positions = zigzag_positions(
        torch.tensor([0, length]), rank=parallel.context_parallel_rank(), size=layout.context_parallel_size
    )

    def step(_: object, model: Any) -> tuple[torch.Tensor, Any]:
        here = positions.expand(len(tokens_BS), -1)
        return gpt.forward(model, tokens_BS[:, positions], here), lambda output, non_loss_data: output

    answers = get_forward_backward_func()(
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
    logits = None
    if parallel.is_last_stage():
        logits = gather_from_tensor_model_parallel_region(answers[0])[..., : architecture.vocab_size].clone()
    parallel_state.destroy_model_parallel()
    return None if logits is None else (positions, logits)


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_come_back_and_logits_are_hugging_faces_under_every_layout(family: str, tmp_path: Path) -> None:
    tokens, jobs, expected = token_ids(), [], []
    for number, (model, overrides) in enumerate(MODELS.items()):
        hf, megatron = tmp_path / f"hf{number}", tmp_path / f"megatron{number}"
        family_model(hf, family, **overrides)
        checkpoint = import_checkpoint(hf, megatron)
        assert hashes(export_checkpoint(megatron, tmp_path / f"out{number}")) == hashes(hf)
        logits = hugging_face_logits(hf, tokens)
        for layout in layouts_of(family, model):
            jobs.append((str(checkpoint), layout))
            expected.append(logits)
    ranks = run_ranks(logits_under, WORLD_SIZE, jobs, tokens)
    for job, (_, layout) in enumerate(jobs):
        answers = [rank[job] for rank in ranks if rank[job] is not None]
        assert {position for positions, _ in answers for position in positions.tolist()} == set(range(tokens.shape[1]))
        for positions, logits in answers:
            difference = (logits - expected[job][:, positions]).abs().max().item()
            assert difference <= TOLERANCE, f"{layout}, {jobs[job][0]}: logits differ by {difference}"
