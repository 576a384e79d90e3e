"""Files of models that see images too: their text decoder, told from all else by the names of its tensors.

Such a config.json has the decoder's own as `text_config`, and the files name its tensors behind a further word. Here
they get the names that the decoder has when it stands alone; all others keep theirs, and are carried along. Adapters of
such a decoder name its modules in the same ways.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.checkpoints.safetensors_file import Shape
from megatron_sppo.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A kind of model around a text decoder."""

    text: tuple[str, ...]
    """`model_type` of its decoders; the first is meant where text_config does not say one."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What keys of text_config mean that published files leave out: transformers' values (5.19)."""
    tied: bool = False
    """What the absence of tie_word_embeddings means."""


WRAPPERS = {
    "gemma3": Wrapper(
        text=("gemma3_text",),
        absent={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        tied=True,
    ),
    "mistral3": Wrapper(text=("mistral", "ministral", "ministral3")),
    "qwen3_5": Wrapper(text=("qwen3_5_text",)),
    "qwen3_5_moe": Wrapper(text=("qwen3_5_moe_text",)),
}
"""By `model_type` of config.json."""

_FORMS = (
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
"""Beginnings of the decoder's names when it is alone -> in the files, as transformers 5 writes them and as before."""
CARRIED = (
    *("model.visual.", "model.vision_tower.", "model.multi_modal_projector."),
    *("visual.", "vision_tower.", "multi_modal_projector."),
)
"""Beginnings of what belongs to images."""
_OLDER = ("visual.", "vision_tower.", "multi_modal_projector.")


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json describes a decoder and more."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS


def refuse_sampling_with_adapters(config: Mapping[str, Any], *, place: str, remedy: str) -> None:
    """Refuse engines with adapters on a decoder within another model: that they are in use could not be proven.

    Raises:
        ConversionError: config.json is of such a model.
    """
    if is_wrapped(config):
        raise ConversionError(
            f"{place} is of a model that sees images too ({config['model_type']}), with whose adapters nothing is "
            f"sampled here: vLLM names such modules otherwise than files do, and its proof has not been tried. {remedy}"
        )


def adapter_form(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Say how PEFT names the modules of such a model in transformers 5 -> {beginning when alone: PEFT's}, or {}."""
    return _FORMS[0] if is_wrapped(config) else {}


def form_of(config: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, str]:
    """Find in which form names are of a decoder within such a model -> {beginning when alone: theirs}, or {}: alone."""
    known = list(names) if is_wrapped(config) else []
    return next((form for form in _FORMS if any(name.startswith(form["model."]) for name in known)), {})


def own_names(config: Mapping[str, Any], names: Iterable[str]) -> Callable[[str], str]:
    """Find the names that a decoder's tensors or modules have when it is alone -> function of the name in files."""
    return functools.partial(_renamed, beginnings={theirs: own for own, theirs in form_of(config, names).items()})


def of_decoder(adapter: PeftAdapter, config: Mapping[str, Any]) -> PeftAdapter:
    """Give an adapter's modules the names that they have when the decoder is alone -> PeftAdapter."""
    own = own_names(config, adapter.factors)
    return dataclasses.replace(adapter, factors={own(name): pair for name, pair in adapter.factors.items()})


def shapes_as_named_by(adapter: PeftAdapter, alone: HFCheckpoint, config: Mapping[str, Any]) -> dict[str, Shape]:
    """List a model's shapes under the names that an adapter has for it -> {name: shape}.

    Args:
        alone: the model, `unwrapped`.
    """
    form = form_of(config, adapter.factors)
    return {name_in(form, name): shape for name, shape in alone.shapes.items()}


def name_in(form: Mapping[str, str], name: str) -> str:
    """Name a decoder's tensor or module, or one of what belongs to images, in a form; {} leaves names as they are."""
    if not form or not name.startswith(CARRIED):
        return _renamed(name, form)
    bare = name.removeprefix("model.")
    return f"model.{bare}" if form is _FORMS[0] else bare


def decoder_config(config: Mapping[str, Any], *, place: str) -> Mapping[str, Any]:
    """Take the decoder's part of config.json -> the config as of the decoder alone.

    Args:
        place: how errors name the config.

    Raises:
        ConversionError: it has none, or of a decoder that does not belong there.
    """
    if not is_wrapped(config):
        return config
    wrapper, text = WRAPPERS[config["model_type"]], config.get("text_config")
    if not isinstance(text, dict):
        raise ConversionError(f"{place} has no text_config. The config is damaged: fetch the model again.")
    kind = text.get("model_type", wrapper.text[0])
    if kind not in wrapper.text:
        raise ConversionError(
            f"{place} says text_config.model_type {kind!r}; of {config['model_type']} models those with "
            f"{' or '.join(wrapper.text)} can be converted. Use another model."
        )
    said = [one["tie_word_embeddings"] for one in (config, text) if one.get("tie_word_embeddings") is not None]
    if len(said) == 2 and said[0] != said[1]:
        raise ConversionError(
            f"{place} says tie_word_embeddings true and false, at its top and in text_config. Remove the wrong one."
        )
    own = {key: value for key, value in text.items() if key != "architectures"}
    tied = {"tie_word_embeddings": (said or [wrapper.tied])[0]}
    above = {key: config[key] for key in ("quantization_config",) if config.get(key) is not None}
    return {**wrapper.absent, **above, **own, **tied, "model_type": kind}


def unwrapped(found: HFCheckpoint, config: Mapping[str, Any]) -> HFCheckpoint:
    """Give the decoder's tensors the names that they have when it is alone -> HFCheckpoint.

    Raises:
        ConversionError: there is no decoder's tensor, or they are named in two ways.
    """
    if not is_wrapped(config):
        return found
    forms = [form for form in _FORMS if any(name.startswith(form["model."]) for name in found.entries)]
    if len(forms) != 1:
        raise ConversionError(
            f"{found.directory} holds {'two decoders' if forms else 'no decoder'}: of a {config['model_type']} model "
            f"the decoder's tensors are named {' or '.join(form['model.'] + '...' for form in _FORMS)}. "
            "Fetch the model again."
        )
    own = own_names(config, found.entries)
    entries = {own(name): entry for name, entry in found.entries.items()}
    if len(entries) != len(found.entries):
        raise ConversionError(f"{found.directory} names tensors of its decoder twice. Fetch the model again.")
    return dataclasses.replace(found, entries=entries)


def names_in_files(config: Mapping[str, Any], carried: Iterable[str]) -> Callable[[str], str]:
    """Find how the files name the decoder's tensors -> function of the name that it has alone.

    Args:
        carried: names of the tensors beside the decoder, which are named in one of the two ways, too.

    Raises:
        ConversionError: there are none, and the files would be of half a model.
    """
    if not is_wrapped(config):
        return lambda name: name
    beside = [name for name in carried if name.startswith(CARRIED)]
    if not beside:
        raise ConversionError(
            f"the checkpoint has no tensors but its decoder's, and config.json describes a {config['model_type']} "
            "model. Give a --template of the text model alone."
        )
    form = _FORMS[any(name.startswith(_OLDER) for name in beside)]
    return functools.partial(_renamed, beginnings=form)


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    begins = next((one for one in beginnings if name.startswith(one)), None)
    return name if begins is None else beginnings[begins] + name.removeprefix(begins)
