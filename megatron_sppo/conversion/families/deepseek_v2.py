"""DeepSeek-V2, V2.5 and V2-Lite: latent attention; experts weighed by a softmax over all of them; shared ones."""

import dataclasses

from megatron_sppo.conversion.families import deepseek_v3

assert deepseek_v3.FAMILY.experts is not None

FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    model_type="deepseek_v2",
    architecture_class="DeepseekV2ForCausalLM",
    mappings=deepseek_v3.LATENT_ATTENTION_AND_EXPERTS,
    fixed={
        **deepseek_v3.FIXED,
        "mlp_bias": (None, False),
        "scoring_func": (None, "softmax"),
        # transformers overlooks it, and never makes the weights of chosen experts add up to 1; vLLM goes by it.
        "norm_topk_prob": (None, False),
    },
    traits={},
    further_layers=None,
    experts=dataclasses.replace(
        deepseek_v3.FAMILY.experts,
        count=("n_routed_experts", "num_experts"),
        normalised_by_default=False,
        grouped_by=("topk_method", "group_limited_greedy", "greedy"),
    ),
)
