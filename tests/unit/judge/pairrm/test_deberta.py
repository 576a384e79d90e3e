"""The encoder against transformers' own DebertaV2Model: the same states at the wanted positions, whatever the length.

Weights are random and large enough for every token and every distance to matter.
"""

import copy

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.pairrm.deberta import MarkerEncoder, check_config


def config_of(**changes) -> DebertaV2Config:
    settings = {
        "vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80,
        "max_position_embeddings": 40, "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": True,
        "max_relative_positions": -1, "position_buckets": 12, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pad_token_id": 0,
    }  # fmt: skip
    return DebertaV2Config(**settings | changes)


def model_of(config: DebertaV2Config) -> DebertaV2Model:
    torch.manual_seed(3)
    model = DebertaV2Model(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(12)
    return model


@pytest.fixture(scope="module")
def model() -> DebertaV2Model:
    return model_of(config_of())


# 5: no bucket holds two distances. 11: the last exact bucket. 30: logarithmic ones. 70: beyond max_position_embeddings.
@pytest.mark.parametrize("length", [3, 5, 11, 30, 70])
@pytest.mark.parametrize("padding", [0, 4])
def test_states_are_those_of_transformers(model: DebertaV2Model, length: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 90, (2, length + padding), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length:] = 0
    positions = torch.tensor([[0, length // 2, length - 1], [1, 1, length - 1]])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = hidden[torch.arange(2)[:, None], positions]
    states = MarkerEncoder(model).states(ids, mask if padding else None, positions)
    assert expected.std() > 0.1
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_distances_count(model: DebertaV2Model) -> None:
    """The comparison above would show nothing if the position embeddings did not matter."""
    other = copy.deepcopy(model)
    other.encoder.rel_embeddings.weight.mul_(-1)
    ids, positions = torch.arange(1, 31)[None], torch.tensor([[1, 9, 20]])
    states = [MarkerEncoder(one).states(ids, None, positions) for one in (model, other)]
    assert (states[0] - states[1]).abs().max() > 0.1


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("relative_attention", False),
        ("share_att_key", False),
        ("position_biased_input", True),
        ("conv_kernel_size", 3),
        ("pos_att_type", ["c2p"]),
        ("position_buckets", -1),
    ],
)
def test_another_kind_of_deberta_is_refused_by_name(setting: str, value: object) -> None:
    check_config(config_of())
    with pytest.raises(ConfigError, match=setting.replace("_", ".")):
        check_config(config_of(**{setting: value}))
