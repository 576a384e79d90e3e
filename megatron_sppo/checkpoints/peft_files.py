"""A LoRA adapter as Hugging Face's PEFT keeps it: adapter_config.json and adapter_model.safetensors in a directory.

For each adapted linear layer X with weight [out, in] the tensors `base_model.model.X.lora_A.weight` [rank, in] and
`base_model.model.X.lora_B.weight` [out, rank]; the layer computes with weight + scaling * B @ A (Hu et al. 2021,
arXiv:2106.09685, section 4.1), scaling being alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732). PEFT has many more kinds; one that would be computed otherwise than this is refused.

Headers alone are read here, and no torch is needed, until a tensor is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.checkpoints.safetensors_file import LENGTH_BYTES, Entry, Shape, read_header, read_tensor
from megatron_sppo.errors import ConversionError, DataError, some_of
from megatron_sppo.json_files import read_json, sha256_of_json
from megatron_sppo.storage import damage, sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_HASH = "base_model_hash"
"""Key of the safetensors file's metadata: `model_hash` of the model that the adapter was trained on. PEFT and vLLM pass
over it; of an adapter from elsewhere it is not known."""

CONTENT_HASH = "content_sha256"
"""Key beside it, in adapters that are written here (`seal_adapter`): by it damage is found that no shape shows."""
NO_HASH = {CONTENT_HASH: "0" * 64}
"""Metadata of a file that is still being written."""

_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_OF_NO_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode"}
    | {"layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"}
    | {"megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"}
    | {"ensure_weight_tying", "task_type", "peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "bias"}
)
"""Keys of adapter_config.json that say where the adapter came from, or what is read by name below."""
_OF_TRAINED_START = ("gaussian", "eva", "orthogonal", "mica")
"""Starts that leave the base as it is; others (pissa, olora, corda, loftq, lora_ga) change its weights before training
begins."""
_EXPERTS = ".experts."
_NOT_LINEAR = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter's directory, opened and checked; tensors are read when asked for."""

    directory: Path
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    """As adapter_config.json has it: ends of module names, or one regular expression for whole names."""
    is_partial: bool
    """Whether some of the modules that target_modules cover are left out by layers_to_transform or exclude_modules."""
    header: bytes
    """Of the safetensors file, as it is."""
    factors: Mapping[str, tuple[Entry, Entry]]
    """{adapted module, without PEFT's prefix: (A, B)}, in the file's order."""
    base_hash: str | None
    """`model_hash` of its base; None: not known."""

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by."""
        return scaling_of(self.rank, self.alpha, use_rslora=self.use_rslora)

    @property
    def adapter_hash(self) -> str:
        """Identify what the adapter computes -> 64 hex digits; where it came from does not count."""
        return sha256_of_json(
            {
                "weights": sha256_of_file(self.directory / ADAPTER_WEIGHTS),
                "rank": self.rank,
                "alpha": self.alpha,
                "use_rslora": self.use_rslora,
            }
        )

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """Read one module's factors -> (A [rank, in], B [out, rank])."""
        first, second = self.factors[module]
        return read_tensor(first), read_tensor(second)

    def delta(self, module: str) -> Tensor:
        """Compute what is added to a module's weight: scaling * B @ A -> float32 [out, in]."""
        return weight_delta(*self.read(module), self.scaling)


def scaling_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Choose what B @ A is multiplied by -> alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def weight_delta(factor_a: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
    """Compute scaling * B @ A, the product in float32 and then scaled, as PEFT merges -> float32 [out, in]."""
    return (factor_b.float() @ factor_a.float()) * scaling


def is_peft_adapter(directory: Path) -> bool:
    """Tell whether a directory says that it is an adapter; nothing of it is checked."""
    return Path(directory, ADAPTER_CONFIG).is_file()


def open_peft_adapter(directory: Path) -> PeftAdapter:
    """Open an adapter's directory and check that it is plain LoRA, and whole.

    Raises:
        ConversionError: it is no adapter, of another kind of PEFT's, damaged, or its tensors contradict its config.
    """
    directory = Path(directory)
    config = _read_config(directory)
    _check_kind(directory / ADAPTER_CONFIG, config)
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = sorted([*directory.glob("adapter_model.bin"), *directory.glob("adapter_model.pt")])
        if pickled:
            raise ConversionError(
                f"{directory} holds its weights as pickle only ({pickled[0].name}), which can run code and is not "
                f"read. Save it again with PEFT: save_pretrained(DIR, safe_serialization=True)."
            )
        raise ConversionError(f"{directory} has no {ADAPTER_WEIGHTS}. Fetch the adapter again.")
    header, entries = read_header(path)
    sealed = _metadata(header, CONTENT_HASH)
    if sealed is not None and sealed != _content_hash(directory):
        raise ConversionError(
            f"{path} and {ADAPTER_CONFIG} are not what was written ({CONTENT_HASH} differs): one of them is damaged or "
            "edited. Export or fetch the adapter again."
        )
    rank = _whole(config, "r", directory)
    factors = _paired(path, entries, rank)
    targets = config.get("target_modules")
    if not _names_modules(targets):
        raise ConversionError(
            f"{directory / ADAPTER_CONFIG}: target_modules is {targets!r}, which names no modules. "
            "Save the adapter again with PEFT."
        )
    adapter = PeftAdapter(
        directory=directory,
        rank=rank,
        alpha=_number(config, "lora_alpha", directory),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        is_partial=config.get("layers_to_transform") not in (None, []) or bool(config.get("exclude_modules")),
        header=header,
        factors=factors,
        base_hash=base_hash_of(header),
    )
    if idle := [name for name in _listed(adapter) if not any(_ends(module, name) for module in factors)]:
        raise ConversionError(
            f"{directory / ADAPTER_CONFIG} names the target {idle[0]}, and {ADAPTER_WEIGHTS} has no tensors of it "
            f"(it adapts {some_of(_short_names(factors))}). Save the adapter again with PEFT."
        )
    return adapter


def seal_adapter(directory: Path) -> None:
    """Write into a new adapter's weights, whose header holds `NO_HASH` for it, the hash of both of its files."""
    with open(directory / ADAPTER_WEIGHTS, "r+b") as file:
        start = int.from_bytes(file.read(LENGTH_BYTES), "little")
        place = file.read(start).index(NO_HASH[CONTENT_HASH].encode())
        found = _content_hash(directory)
        file.seek(LENGTH_BYTES + place)
        file.write(found.encode())


def _content_hash(directory: Path) -> str:
    """Hash all that an adapter's two files say, but for this hash itself -> 64 hex digits."""
    with open(directory / ADAPTER_WEIGHTS, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")))
        tensors = hashlib.file_digest(file, "sha256").hexdigest()
    del header["__metadata__"][CONTENT_HASH]
    return sha256_of_json({"config": read_json(directory / ADAPTER_CONFIG), "header": header, "tensors": tensors})


def check_fits(adapter: PeftAdapter, weights: Mapping[str, Shape], *, base: Path, base_hash: str | None = None) -> None:
    """Hold an adapter against the model that it is to be put on.

    Args:
        weights: {name: shape} of the model's weights, by Hugging Face's names.
        base: the model, for messages.
        base_hash: its `model_hash`; None: not known.

    Raises:
        ConversionError: it adapts what the model does not have, has factors of other shapes, lacks those of a layer, or
            says itself that it was trained on another model.
    """
    other = f"It belongs to another base than {base}: use the adapter's own"
    if adapter.base_hash is not None and base_hash is not None and adapter.base_hash != base_hash:
        raise ConversionError(
            f"{adapter.directory} was trained on a model with hash {adapter.base_hash[:12]}..., and {base} has "
            f"{base_hash[:12]}.... {other}."
        )
    for module, (first, second) in adapter.factors.items():
        shape = weights.get(f"{module}.weight")
        if shape is None:
            raise ConversionError(f"{adapter.directory} adapts {module}, which {base} does not have. {other}.")
        if len(shape) != 2 or f"{module}.weight".endswith(_NOT_LINEAR):
            raise ConversionError(
                f"{adapter.directory} adapts {module}, which is no linear layer within a decoder layer. "
                "Use an adapter without it: leave it out of PEFT's target_modules."
            )
        if (found := (second.shape[0], first.shape[1])) != shape:
            raise ConversionError(
                f"{adapter.directory} adapts {module} as a weight of shape {list(found)}, which {base} has as "
                f"{list(shape)}. {other}."
            )
    wanted = [name.removesuffix(".weight") for name, shape in weights.items() if _is_target(adapter, name, shape)]
    if missing := [module for module in wanted if module not in adapter.factors]:
        raise ConversionError(
            f"{adapter.directory} lacks the tensors of {some_of(missing, most=2)}, which its target_modules cover and "
            f"{base} has. Save the adapter again, whole."
        )


def adapter_config(
    *, rank: int, alpha: float, use_rslora: bool, target_modules: list[str] | str, base_model: str | None
) -> dict[str, Any]:
    """Spell adapter_config.json as PEFT 0.21 and vLLM 0.32 read it -> its content.

    Args:
        target_modules: ends of module names, or one regular expression for whole names.
    """
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def tensor_names(module: str) -> tuple[str, str]:
    """Name a module's factors in the safetensors file -> (A's name, B's name)."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def module_of(tensor_name: str) -> str:
    """Name the module that a factor in the safetensors file adapts."""
    return tensor_name.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        kind = "is not a directory" if not directory.is_dir() else f"has no {ADAPTER_CONFIG}"
        model = " but a whole model" if (directory / CONFIG_FILE).is_file() else ""
        raise ConversionError(f"{directory} {kind}, so it is no PEFT adapter{model}. Check the path.")
    try:
        config = read_json(path)
    except DataError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(config, dict):
        raise ConversionError(damage(path, f"{path} holds no JSON object. It is damaged: fetch the adapter again."))
    return config


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is computed otherwise than as weight + scaling * B @ A, by name."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{path} says peft_type {kind!r}. Only LoRA adapters can be used: train one with LoRA.")
    if config.get("bias", "none") != "none":
        raise ConversionError(
            f'{path} says bias {config["bias"]!r}: it changes biases of the base. Train with PEFT\'s bias="none".'
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _OF_TRAINED_START:
        raise ConversionError(
            f"{path} says init_lora_weights {start!r}, by which PEFT changes the base's weights before it trains. "
            "Convert it to plain LoRA with PEFT: save_pretrained(path_initial_model_for_weight_conversion=DIR)."
        )
    strange = sorted(key for key, value in config.items() if key not in _OF_NO_EFFECT and value)
    if strange:
        shown = json.dumps(config[strange[0]])[:80]
        named = {"use_dora": "which is DoRA", "modules_to_save": "whole layers beside the adapter"}
        what = f", {named[strange[0]]}" if strange[0] in named else ""
        raise ConversionError(
            f"{path} says {strange[0]} {shown}{what}: it is more than plain LoRA of one rank. "
            "Train it without, or merge it with PEFT (merge_and_unload) and use the merged model."
        )


def _paired(path: Path, entries: Mapping[str, Entry], rank: int) -> dict[str, tuple[Entry, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ConversionError(
                f"{path} holds {name}, which is no factor of a linear layer (lora_A or lora_B). "
                "Use a plain LoRA adapter of linear layers."
            )
        found.setdefault(match["module"], {})[match["factor"]] = entry
    if not found:
        raise ConversionError(f"{path} holds no tensors. Save the adapter again.")
    pairs = {}
    for module, factors in found.items():
        if missing := [name for name in "AB" if name not in factors]:
            raise ConversionError(f"{path} lacks lora_{missing[0]} of {module}. Fetch the adapter again.")
        first, second = factors["A"], factors["B"]
        if len(first.shape) != 2 or len(second.shape) != 2 or (first.shape[0], second.shape[1]) != (rank, rank):
            raise ConversionError(
                f"{path} holds lora_A {list(first.shape)} and lora_B {list(second.shape)} of {module}, where "
                f"{ADAPTER_CONFIG} says rank r = {rank}. Save the adapter again: config and weights are of two."
            )
        pairs[module] = (first, second)
    return pairs


def base_hash_of(header: bytes) -> str | None:
    """Read which base an adapter's weights name in their header -> `model_hash`; None: none."""
    return _metadata(header, BASE_HASH)


def _metadata(header: bytes, key: str) -> str | None:
    metadata = json.loads(header).get("__metadata__")
    value = metadata.get(key) if isinstance(metadata, dict) else None
    return value if isinstance(value, str) and value else None


def _listed(adapter: PeftAdapter) -> tuple[str, ...]:
    return () if isinstance(adapter.target_modules, str) else adapter.target_modules


def _is_target(adapter: PeftAdapter, name: str, shape: Shape) -> bool:
    """Tell whether target_modules cover a weight, so that its factors may not be missing.

    Of experts, which PEFT adapts or leaves alone by the version of transformers, all or none.
    """
    module = name.removesuffix(".weight")
    if module == name or len(shape) != 2 or name.endswith(_NOT_LINEAR) or adapter.is_partial:
        return False
    if _EXPERTS in module and not any(_EXPERTS in other for other in adapter.factors):
        return False
    if isinstance(adapter.target_modules, str):
        return re.fullmatch(adapter.target_modules, module) is not None
    return any(_ends(module, target) for target in adapter.target_modules)


def _names_modules(targets: Any) -> bool:
    if isinstance(targets, str):
        with contextlib.suppress(re.error):
            return bool(targets and re.compile(targets))
        return False
    return isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets)


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _short_names(modules: Mapping[str, Any]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})


def _whole(config: Mapping[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConversionError(
        f"{directory / ADAPTER_CONFIG}: {key} is {value!r}, not a positive whole number. Save the adapter again."
    )


def _number(config: Mapping[str, Any], key: str, directory: Path) -> float:
    value = config.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise ConversionError(
        f"{directory / ADAPTER_CONFIG}: {key} is {value!r}, not a positive number. Save the adapter again."
    )
