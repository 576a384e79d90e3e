"""Rotary frequencies against transformers' bit for bit, and rotated models against Hugging Face's, padded and packed.

Frequencies of models without scaling are Megatron-Core's own, of the others ours. A longrope model takes the factors
of each sequence's own length, as transformers does when it runs that sequence by itself. Not shown here: layouts
(tests/distributed), the fused rotation of Transformer Engine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings import RotaryEmbedding
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sppo.conversion.convert import import_checkpoint
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConfigError
from megatron_sppo.layer_parts import RopeScaling
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import forward
from megatron_sppo.model.rope import inverse_frequencies
from megatron_sppo.model.transformer_config import transformer_config
from megatron_sppo.model_file import read_architecture
from megatron_sppo.training import parallel
from megatron_sppo.training.checkpoint import load_weights
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import build_policy
from tests.families import LONGROPE, family_model, hugging_face_logits, token_ids
from tests.models import llama_config

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {
    "Llama-2-7B": (128, 1e4),
    "Llama-3-8B": (128, 5e5),
    "Mistral-7B-v0.3, Qwen2.5": (128, 1e6),
    "Phi-4": (128, 2.5e5),
}
SCALED: dict[str, tuple[int, float, dict[str, Any]]] = {
    "Llama-3.1-8B, 70B, 405B and 3.3-70B": (128, 5e5, {**LLAMA3, "factor": 8.0}),
    "Llama-3.2-1B": (64, 5e5, {**LLAMA3, "factor": 32.0}),
    "another llama3": (128, 1e4, {**LLAMA3, "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0}),
    "Qwen2.5 and Qwen3 with YaRN": (128, 1e6, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "gpt-oss": (64, 1.5e5, {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
    "DeepSeek's temperature": (
        64,
        1e4,
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.0},
    ),
    "YaRN, its own temperature": (64, 1e4, {"factor": 8.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}),
    "linear": (64, 1e4, {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (64, 1e4, {"rope_type": "dynamic", "factor": 2.3}),
    "longrope": (8, 1e4, {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2], "long_factor": [1.5, 2, 4, 8]}),
}
LENGTHS = (10, 40, 24, 31)


@pytest.mark.parametrize(("head", "base"), PLAIN.values(), ids=PLAIN)
def test_frequencies_without_scaling_are_those_of_transformers(head: int, base: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(head_dim=head, rope_parameters={"rope_theta": base, "rope_type": "default"})
    ours = RotaryEmbedding(head, 1.0, rotary_base=base, use_cpu_initialization=True)
    assert torch.equal(ours.inv_freq, LlamaRotaryEmbedding(config).inv_freq)
    assert torch.equal(inverse_frequencies(head, base, None), ours.inv_freq)


@pytest.mark.parametrize(("head", "base", "settings"), SCALED.values(), ids=SCALED)
def test_scaled_frequencies_and_factors_are_those_of_transformers(
    head: int, base: float, settings: dict[str, Any]
) -> None:
    scaling = {"rope_theta": base, "rope_type": "yarn", **settings}
    config = llama_config(head_dim=head, max_position_embeddings=131072, rope_parameters=scaling)
    if scaling["rope_type"] in ("yarn", "longrope"):
        scaling.setdefault("original_max_position_embeddings", 4096)
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](transformers.AutoConfig.for_model(**config))
    read = architecture_from_hf(config).rope_scaling
    assert read is not None
    assert torch.equal(inverse_frequencies(head, base, read), theirs)
    assert read.attention_factor == factor
    if scaling["rope_type"] == "longrope":
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](transformers.AutoConfig.for_model(**config), seq_len=4097)
        assert torch.equal(inverse_frequencies(head, base, read, long=True), long)


@pytest.fixture
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shut_down()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("family", ["phi3, longrope of a half", "qwen3, yarn"])
def test_each_sequence_is_rotated_as_hugging_face_rotates_it_alone(family: str, tmp_path: Path) -> None:
    hf = family_model(tmp_path / "hf", family)
    checkpoint = import_checkpoint(hf, tmp_path / "megatron")
    architecture, _ = read_architecture(checkpoint)
    model = ModelConfig(params_dtype="float32", transformer_impl="torch")
    policy = build_policy(architecture, model, ParallelConfig())
    load_weights(policy, checkpoint)
    tokens = token_ids(len(LENGTHS), max(LENGTHS))
    lengths = torch.tensor(LENGTHS)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    row = torch.cat([tokens[index, :length] for index, length in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        padded = forward(policy.chunks[0], tokens, torch.arange(tokens.shape[1]).expand_as(tokens), lengths_B=lengths)
        packed = forward(
            policy.chunks[0], row, positions, cu_seqlens=bounds, max_seqlen=max(LENGTHS), lengths_B=lengths
        )
    for index, length in enumerate(LENGTHS):
        expected = hugging_face_logits(hf, tokens[index : index + 1, :length])[0]
        for ours in (padded[index, :length], packed[0, bounds[index] : bounds[index + 1]]):
            assert (ours[:, : architecture.vocab_size] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_a_model_that_is_built_on_the_meta_device_has_real_frequencies(kind: str) -> None:
    """As `verify --layerwise` builds it: weights come layer by layer, tables are computed once."""
    settings = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "linear": {},
        "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64},
    }[kind]
    scaling = RopeScaling(rope_type=kind, factor=4.0, **settings)
    with torch.device("meta"):
        found = inverse_frequencies(16, 1e4, scaling)
    assert torch.equal(found, inverse_frequencies(16, 1e4, scaling))


def test_longrope_keeps_to_the_rotation_that_takes_a_table_for_each_sequence() -> None:
    architecture = architecture_from_hf({**llama_config(), "model_type": "phi3", **LONGROPE})
    assert not transformer_config(architecture, ModelConfig()).apply_rope_fusion
    with pytest.raises(ConfigError, match="apply_rope_fusion=true"):
        transformer_config(architecture, ModelConfig(transformer_config=("apply_rope_fusion=true",)))
