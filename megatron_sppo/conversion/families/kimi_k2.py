"""Kimi-K2: DeepSeek-V3's model under another name. Code that comes with the published files is not run."""

import dataclasses

from megatron_sppo.conversion.families import deepseek_v3

FAMILY = dataclasses.replace(deepseek_v3.FAMILY, model_type="kimi_k2")
