"""One table per model family; FAMILIES lists them by `model_type`."""

from megatron_sppo.conversion.families import (
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gemma3_text,
    glm4_moe,
    gpt_oss,
    kimi_k2,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
)
from megatron_sppo.conversion.family import Family
from megatron_sppo.errors import ConversionError

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        llama,
        mistral,
        ministral,
        ministral3,
        qwen2,
        qwen3,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        qwen3_next,
        qwen3_5_text,
        qwen3_5_moe_text,
        glm4_moe,
        deepseek_v2,
        deepseek_v3,
        kimi_k2,
        gemma2,
        gemma3_text,
        gpt_oss,
        olmo2,
        olmo3,
        phi3,
    )
}


def family_of(model_type: object, *, place: str) -> Family:
    """Find the table of a model family.

    Raises:
        ConversionError: there is none; the message names those that there are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"{place} says model_type {model_type!r}, which cannot be converted. Use a model of: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
