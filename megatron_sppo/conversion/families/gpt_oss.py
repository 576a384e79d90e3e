"""gpt-oss: biases everywhere, sinks, a window in every second layer, YaRN, and clamped experts, all of a layer in one.

The published weights of the experts are MXFP4, and read as the bfloat16 tensors that transformers makes of them.
"""

from megatron_sppo.checkpoints.mxfp4 import METHOD
from megatron_sppo.conversion.families import llama
from megatron_sppo.conversion.family import ExpertKeys, Family, WindowKeys
from megatron_sppo.conversion.mapping import Copy, ExpertStack

EXPERTS, HF_EXPERTS = "decoder.layers.{layer}.mlp.experts.experts", "model.layers.{layer}.mlp.experts"
ROUTER, HF_ROUTER = "decoder.layers.{layer}.mlp.router", "model.layers.{layer}.mlp.router"

MAPPINGS = (
    *(mapping for mapping in llama.MAPPINGS if ".mlp." not in mapping.megatron),
    Copy(
        "decoder.layers.{layer}.self_attention.core_attention.softmax_offset",
        "model.layers.{layer}.self_attn.sinks",
        ("heads",),
    ),
    Copy(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("hidden",),
    ),
    Copy(f"{ROUTER}.weight", f"{HF_ROUTER}.weight", ("experts", "hidden")),
    Copy(f"{ROUTER}.bias", f"{HF_ROUTER}.bias", ("experts",)),
    ExpertStack(
        f"{EXPERTS}.linear_fc1.weight", f"{HF_EXPERTS}.gate_up_proj", rows="expert_ffn", columns="hidden", gated=True
    ),
    ExpertStack(
        f"{EXPERTS}.linear_fc1.bias", f"{HF_EXPERTS}.gate_up_proj_bias", rows="expert_ffn", columns=None, gated=True
    ),
    ExpertStack(f"{EXPERTS}.linear_fc2.weight", f"{HF_EXPERTS}.down_proj", rows="hidden", columns="expert_ffn"),
    Copy(f"{EXPERTS}.linear_fc2.bias", f"{HF_EXPERTS}.down_proj_bias", ("experts", "hidden")),
)

FAMILY = Family(
    model_type="gpt_oss",
    architecture_class="GptOssForCausalLM",
    mappings=MAPPINGS,
    # Absent, these would mean gpt-oss-120b's values.
    required=("num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "swiglu_limit"),
    fixed={"attention_bias": (None, True), "hidden_act": (None, "silu"), "swiglu_alpha": (None, 1.702)},
    traits={
        "add_qkv_bias": True,
        "add_proj_bias": True,
        "add_mlp_bias": True,
        "softmax_type": "learnable",
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
    },
    numbers={"swiglu_limit": "activation_func_clamp_value"},
    windows=WindowKeys(every=2, layer_types=True),
    rotary_base=150000.0,
    rope_must_be_said=True,
    quantized=METHOD,
    experts=ExpertKeys(count=("num_local_experts", "num_experts"), width="intermediate_size"),
)
