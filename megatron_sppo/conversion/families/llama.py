"""Llama 2, 3 and 3.1, SmolLM2, and what else says `model_type: llama`."""

from megatron_sppo.conversion.family import Family
from megatron_sppo.conversion.mapping import Copy, FusedQKV, GateUp, VocabRows

ATTENTION_BIASES = ("add_qkv_bias", "add_proj_bias")
"""What `attention_bias` says in most families."""

BIASES = (
    FusedQKV(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        "model.layers.{layer}.self_attn.{qkv}_proj.bias",
        columns=(),
        only="add_qkv_bias",
    ),
    Copy(
        "decoder.layers.{layer}.self_attention.linear_proj.bias",
        "model.layers.{layer}.self_attn.o_proj.bias",
        ("hidden",),
        only="add_proj_bias",
    ),
    GateUp(
        "decoder.layers.{layer}.mlp.linear_fc1.bias",
        "model.layers.{layer}.mlp.{gate_up}_proj.bias",
        columns=(),
        only="add_mlp_bias",
    ),
    Copy(
        "decoder.layers.{layer}.mlp.linear_fc2.bias",
        "model.layers.{layer}.mlp.down_proj.bias",
        ("hidden",),
        only="add_mlp_bias",
    ),
)

MAPPINGS = (
    VocabRows("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    FusedQKV(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight", "model.layers.{layer}.self_attn.{qkv}_proj.weight"
    ),
    Copy(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        ("hidden", "query"),
    ),
    GateUp("decoder.layers.{layer}.mlp.linear_fc1.weight", "model.layers.{layer}.mlp.{gate_up}_proj.weight"),
    Copy(
        "decoder.layers.{layer}.mlp.linear_fc2.weight", "model.layers.{layer}.mlp.down_proj.weight", ("hidden", "ffn")
    ),
    *BIASES,
    # Megatron-Core saves both layer specs under the names of Transformer Engine's fused layers.
    Copy(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        "model.layers.{layer}.input_layernorm.weight",
        ("hidden",),
    ),
    Copy(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("hidden",),
    ),
    Copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    VocabRows("output_layer.weight", "lm_head.weight", untied_only=True),
)

FAMILY = Family(
    model_type="llama",
    architecture_class="LlamaForCausalLM",
    mappings=MAPPINGS,
    fixed={"hidden_act": (None, "silu")},
    switches={"attention_bias": ATTENTION_BIASES, "mlp_bias": ("add_mlp_bias",)},
    ignored=(".self_attn.rotary_emb.inv_freq",),
)
