"""Proves: each mapping lays rows as Megatron-Core's modules read them (written out row by row), and undoes itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.binding import bind, hf_shapes, megatron_shapes
from megatron_sppo.conversion.families import FAMILIES, family_of, llama
from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import (
    Copy,
    FusedQKV,
    GateUp,
    PackedGateUp,
    PackedQKV,
    TensorMapping,
    VocabRows,
    to_megatron,
)
from megatron_sppo.errors import ConversionError
from megatron_sppo.layer_parts import DeltaNet, LatentAttention
from megatron_sppo.weight_counts import num_parameters


def architecture(**changes: object) -> Architecture:
    values: dict[str, object] = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 6,
        "ffn_hidden_size": 5,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 2,
        "vocab_size": 7,
        "max_position_embeddings": 16,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "share_embeddings_and_output_weights": False,
    }
    return Architecture(**{**values, **changes})  # type: ignore[arg-type]


EXPERTS = {"num_moe_experts": 3, "moe_router_topk": 2, "moe_ffn_hidden_size": 4}
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 8}


LATENTS = {
    "num_query_groups": 4,
    "kv_channels": 5,
    "latent_attention": LatentAttention(
        q_lora_rank=3, kv_lora_rank=4, qk_head_dim=3, qk_pos_emb_head_dim=2, v_head_dim=6
    ),
}


def experts_of(family: Family) -> dict[str, object]:
    """Describe small experts in the way of a family -> fields of Architecture; none of a dense family."""
    keys = family.experts
    if keys is None:
        return {}
    return EXPERTS | (SHARED_EXPERT if keys.shared_width or keys.shared_count else {})


def fused_of(
    mapping: TensorMapping, tensors: Sequence[torch.Tensor], shape: Architecture | None = None
) -> torch.Tensor:
    """Make the Megatron tensor of a mapping's parts, from the groups of rows that are read apart."""
    shape = shape or architecture()
    groups = mapping.read_apart(shape)
    assert [run for group in groups for run in group] == mapping.runs(shape)
    return torch.cat([to_megatron(dict(enumerate(tensors)), group) for group in groups])


def test_qkv_rows_lie_group_by_group_queries_first() -> None:
    """4 heads over 2 groups, head dimension 2: group 0 has heads 0 and 1, so q rows 0-3, k rows 0-1, v rows 0-1."""
    rows = {name: [f"{name}{i}" for i in range(n)] for name, n in (("q", 8), ("k", 4), ("v", 4))}
    order = [*rows["q"][0:4], *rows["k"][0:2], *rows["v"][0:2], *rows["q"][4:8], *rows["k"][2:4], *rows["v"][2:4]]
    code = {name: float(i) for i, name in enumerate(order)}
    tensors = [torch.tensor([[code[row]] * 6 for row in rows[name]]) for name in "qkv"]
    fused = fused_of(FusedQKV("m.{layer}.qkv", "h.{layer}.{qkv}"), tensors)
    assert fused[:, 0].tolist() == [float(i) for i in range(16)]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 4),
    head=st.integers(1, 5),
    hidden=st.integers(1, 5),
    bias=st.booleans(),
)
def test_qkv_and_gate_up_undo_themselves(groups: int, heads_per_group: int, head: int, hidden: int, bias: bool) -> None:
    shape = architecture(
        num_query_groups=groups, num_attention_heads=groups * heads_per_group, kv_channels=head, hidden_size=hidden
    )
    for mapping in (FusedQKV("m", "h.{qkv}", columns=() if bias else ("hidden",)), GateUp("m", "h.{gate_up}")):
        tensors = [torch.randn(size) for size in mapping.part_shapes(shape)]
        fused = fused_of(mapping, tensors, shape)
        assert tuple(fused.shape) == mapping.megatron_shape(shape)
        back = mapping.to_hf(fused, shape)
        assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))


def test_gate_rows_come_before_up_rows() -> None:
    gate, up = torch.zeros(5, 6), torch.ones(5, 6)
    fused = fused_of(GateUp("m", "h.{gate_up}"), [gate, up])
    assert fused[:, 0].tolist() == [0.0] * 5 + [1.0] * 5
    packed = PackedGateUp("m", "h")
    assert packed.part_shapes(architecture()) == ((10, 6),)
    assert torch.equal(fused_of(packed, [fused]), fused)
    assert torch.equal(*packed.to_hf(fused, architecture()), fused)


@pytest.mark.parametrize("mapping", [GateUp("m", "h.{gate_up}"), PackedGateUp("m", "h")])
def test_the_halves_of_a_gated_unit_are_read_apart(mapping: TensorMapping) -> None:
    """As Megatron-Core describes them (apply_swiglu_sharded_factory): one half may be another rank's to read."""
    groups = mapping.read_apart(architecture())
    assert [sum(run.rows for run in group) for group in groups] == [5, 5]


DELTA_NET = DeltaNet(
    linear_attention_freq=(1, 0),
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=3,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=4,
)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.experts is None])
def test_names_and_shapes_are_those_of_transformers_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    net: dict[str, Any] = {}
    if FAMILIES[name].delta_net:
        net = dataclasses.asdict(DELTA_NET) | {"layer_types": ["linear_attention", "full_attention"]}
    config = transformers.AutoConfig.for_model(
        name, **net, vocab_size=7, hidden_size=8, intermediate_size=5, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = architecture(family=name, hidden_size=8, delta_net=DELTA_NET if net else None, **FAMILIES[name].traits)
    assert hf_shapes(bind(FAMILIES[name], ours)) == theirs


def test_packed_rows_are_all_queries_then_all_keys_then_all_values() -> None:
    """Phi-3's qkv_proj holds the rows that FusedQKV takes from three tensors, one after the other."""
    shape = architecture()
    tensors = [torch.randn(size) for size in FusedQKV("m", "h.{qkv}").part_shapes(shape)]
    packed = PackedQKV("m", "h")
    assert packed.part_shapes(shape) == ((16, 6),)
    fused = fused_of(packed, [torch.cat(tensors)], shape)
    assert torch.equal(fused, fused_of(FusedQKV("m", "h.{qkv}"), tensors, shape))
    assert torch.equal(*packed.to_hf(fused, shape), torch.cat(tensors))


def test_megatron_keys_stack_the_layers_first() -> None:
    shapes = megatron_shapes(bind(FAMILIES["llama"], architecture()), architecture())
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (2, 16, 6)
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (2, 10, 6)
    assert shapes["decoder.final_layernorm.weight"] == (6,)
    assert shapes["output_layer.weight"] == shapes["embedding.word_embeddings.weight"] == (7, 6)
    assert len(shapes) == 9


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_megatron_keys_stack_the_experts_after_the_layers(family: str) -> None:
    """The keys and axes that megatron-core's SequentialMLP and TEGroupedMLP give (transformer/moe/experts.py)."""
    model = architecture(family=family, qk_layernorm=family == "qwen3_moe", **EXPERTS)
    shapes = megatron_shapes(bind(FAMILIES[family], model), model)
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (2, 3, 8, 6)
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == (2, 3, 6, 4)
    assert shapes["decoder.layers.mlp.router.weight"] == (2, 3, 6)
    assert shapes["decoder.layers.pre_mlp_layernorm.weight"] == (2, 6)
    assert not any("mlp.linear_fc" in key for key in shapes)


def test_layers_of_two_kinds_are_not_stacked_and_their_experts_are() -> None:
    """Megatron-Core's keys where `moe_layer_freq` is a list (transformer_block.py, sharded_state_dict)."""
    model = architecture(family="qwen2_moe", moe_layer_freq=(1, 0), add_qkv_bias=True, **EXPERTS, **SHARED_EXPERT)
    shapes = megatron_shapes(bind(FAMILIES["qwen2_moe"], model), model)
    assert shapes["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"] == (3, 8, 6)
    assert shapes["decoder.layers.0.mlp.shared_experts.linear_fc1.weight"] == (16, 6)
    assert shapes["decoder.layers.0.pre_mlp_layernorm.weight"] == (6,)
    assert shapes["decoder.layers.1.mlp.linear_fc1.weight"] == (10, 6)
    assert shapes["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] == (6,)
    assert not any("decoder.layers.0.mlp.linear_fc" in key or "decoder.layers.1.mlp.experts" in key for key in shapes)
    assert {key.split(".")[2] for key in shapes if key.startswith("decoder.layers")} == {"0", "1"}


def test_an_experts_place_is_its_layer_and_its_number() -> None:
    model = architecture(family="mixtral", **EXPERTS)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    (binding,) = [binding for binding in bind(FAMILIES["mixtral"], model) if name in binding.hf_shapes]
    assert binding.index == (1, 2)
    assert binding.hf_shapes == {name.replace("w3", "w1"): (4, 6), name: (4, 6)}
    assert binding.megatron_name == "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"


def test_a_tied_model_has_no_output_layer() -> None:
    tied = architecture(share_embeddings_and_output_weights=True)
    bindings = bind(FAMILIES["llama"], tied)
    assert "output_layer.weight" not in megatron_shapes(bindings, tied)
    assert "lm_head.weight" not in hf_shapes(bindings)


@pytest.mark.parametrize("families", FAMILIES)
def test_the_number_of_values_is_the_architectures(families: str) -> None:
    family = FAMILIES[families]
    model = architecture(
        family=families,
        **family.traits,
        **experts_of(family),
        **(LATENTS if family.latent_attention else {}),
    )
    bindings = bind(family, model)
    expected = num_parameters(model)
    assert sum(torch.Size(shape).numel() for shape in hf_shapes(bindings).values()) == expected
    assert sum(torch.Size(shape).numel() for shape in megatron_shapes(bindings, model).values()) == expected


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (VocabRows("other.weight", "lm_head.weight"), "lm_head.weight"),
        (Copy("decoder.final_layernorm.weight", "model.other.weight", ("hidden",)), "decoder.final_layernorm.weight"),
    ],
)
def test_a_tensor_that_two_mappings_claim_is_named(extra: Copy, name: str) -> None:
    family = dataclasses.replace(llama.FAMILY, mappings=(*llama.MAPPINGS, extra))
    with pytest.raises(ConversionError, match=name):
        bind(family, architecture())


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConversionError, match=r"'gpt2'.*llama"):
        family_of("gpt2", place="config.json")
