"""One way to load a Hugging Face model: all of its weights come from its files, or it is not used.

transformers fills a weight that the files lack, or hold in another shape, with random numbers and a report that nobody
reads; what is computed with it looks like any other result.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConversionError, some_of
from megatron_sppo.storage import damage

logger = logging.getLogger(__name__)

UNUSABLE = (KeyError, TypeError, AttributeError, ArithmeticError, ImportError, StrictDataclassError)
"""What transformers raises, beside OSError and ValueError, on a config.json or a tokenizer's file that makes no sense
to it, or asks for a package (of a quantisation, say) that is not there."""
_NAMED = 5
"""Tensors that a message names; the others are counted."""


def name_families() -> None:
    """Tell transformers of what it computes under another name, lest it ask to run the code that came with the files.

    Kimi-K2 is DeepSeek-V3's model; vLLM does the same (0.32, transformers_utils/config.py).
    """
    from transformers import CONFIG_MAPPING, DeepseekV3Config, conversion_mapping

    CONFIG_MAPPING.register("kimi_k2", DeepseekV3Config, exist_ok=True)
    # What fuses the files' experts goes by the name in config.json.
    fused = conversion_mapping.get_checkpoint_conversion_mapping("deepseek_v3")
    conversion_mapping.register_checkpoint_conversion_mapping("kimi_k2", fused, overwrite=True)


def load_pretrained(
    model_class: Any,
    directory: Path | str | None,
    *,
    needed: str = "",
    elsewhere: Collection[str] = (),
    **settings: Any,
) -> Any:
    """Load a model from safetensors on this machine -> the model, no weight of it made up.

    Tied weights and buffers that transformers computes are not expected in the files. Tensors that the model has no
    place for are left out, and named in a warning.

    Args:
        model_class: a class of transformers with `from_pretrained`, such as AutoModelForCausalLM.
        directory: None where `settings` hold config and state_dict.
        needed: names begin so of the weights that are looked at; the others may be made up, and must not be used.
        elsewhere: tensors of the files that somebody else reads, and no warning names.
        settings: more for `from_pretrained`.

    Raises:
        ConversionError: a weight is missing, or has another shape than config.json says; names them. Or transformers
            makes nothing of config.json.
        OSError, ValueError: as transformers, where there is no model.
    """
    name_families()
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)  # its report of many lines says what is said below
    try:
        model, info = model_class.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except SafetensorError as error:
        fact = f"{directory} has a damaged safetensors file ({error}). Fetch it again."
        said = (damage(path, "") for path in sorted(Path(directory or "").glob("*.safetensors")))
        raise ConversionError(next(filter(None, said), fact)) from None
    except UNUSABLE as error:
        raise ConversionError(
            f"transformers cannot load {directory or 'the checkpoint'} by its config.json "
            f"({type(error).__name__}: {one_line(error)}). Correct the config, or install what it asks for."
        ) from error
    finally:
        theirs.setLevel(level)
    missing = sorted(name for name in info["missing_keys"] if name.startswith(needed))
    mismatched = sorted(
        f"{name} ({_shape(found)} in the file, {_shape(wanted)} by config.json)"
        for name, found, wanted in info["mismatched_keys"]
        if name.startswith(needed)
    )
    unexpected = sorted(set(info["unexpected_keys"]).difference(elsewhere))
    faults = [
        *([f"lacks {some_of(missing, most=_NAMED)}"] if missing else []),
        *([f"holds in another shape {some_of(mismatched, most=_NAMED)}"] if mismatched else []),
        *(f"does not load: {' '.join(str(text).split())}" for text in info["error_msgs"]),
    ]
    if faults:
        foreign = f" It holds {some_of(unexpected, most=_NAMED)} instead." if unexpected and missing else ""
        kind = type(model).__name__
        raise ConversionError(
            f"{directory or 'the checkpoint'} {'; it '.join(faults)}, which a {kind} needs: transformers would fill in "
            f"random numbers.{foreign} Give a checkpoint that was saved as {kind}."
        )
    if unexpected and directory is not None:
        logger.warning(
            "%s holds %s, which a %s does not use.", directory, some_of(unexpected, most=_NAMED), type(model).__name__
        )
    return model


def _shape(shape: Any) -> str:
    return "x".join(str(size) for size in shape)
