"""What low-rank adapters are made of (LoRA, Hu et al. 2021, arXiv:2106.09685), and the file that says so.

A checkpoint with `adapter.json` holds adapters and no model; it names its base by a hash. Tensors keep the names and
the order of rows of Hugging Face's modules, stacked over layers (and experts) as Megatron-Core stacks weights, so that
PEFT's files are the same tensors under other names. Pure Python: no torch, no megatron.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_sppo.architecture import Architecture
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, write_json

FILE_NAME = "adapter.json"
SCHEMA_VERSION = 1
KEY_ROOT = "adapter."
"""Begins the keys of adapters in a distributed checkpoint."""
EXPERTS = "experts"
"""Target that stands for every matrix of a mixture's experts."""

_STACKED_EXPERTS = ("gpt_oss",)
"""Families whose experts lie in tensors of all experts of a layer, which no module of PEFT's is."""
_PACKED_FAMILIES = ("phi3",)
"""Families whose Hugging Face modules hold query, key and value, and gate and up, in one."""
_EXPERT_NAMES = {"mixtral": ("w1", "w3", "w2")}
"""Gate, up and down of an expert where they have other names than those of a dense layer."""


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One kind of linear module of Hugging Face's layers, and where Megatron-Core computes it."""

    name: str
    """Last part of its name in Hugging Face's model, such as q_proj."""
    linear: Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    """Megatron-Core's layer that holds it."""
    in_features: int
    parts: tuple[tuple[str, int], ...]
    """Its outputs in Hugging Face's order, (what, rows): several where one module computes what ranks divide apart."""
    is_expert: bool = False

    @property
    def out_features(self) -> int:
        """Rows of all parts."""
        return sum(rows for _, rows in self.parts)

    @property
    def is_column_parallel(self) -> bool:
        """Whether tensor-parallel ranks divide its outputs; otherwise its inputs."""
        return self.linear in ("linear_qkv", "linear_fc1")

    def key(self, matrix: str) -> str:
        """Name a matrix (lora_A; lora_B, or lora_B.PART of several) in a distributed checkpoint -> key."""
        return f"{KEY_ROOT}layers.{EXPERTS + '.' if self.is_expert else ''}{self.name}.{matrix}"

    def matrices(self, rank: int) -> dict[str, tuple[int, int]]:
        """List its matrices and their whole shapes -> {"lora_A": (rank, in), "lora_B" or "lora_B.PART": (rows, rank)}.

        PEFT's lora_B.weight is the parts of lora_B, one below the other.
        """
        several = len(self.parts) > 1
        b = {f"lora_B.{part}" if several else "lora_B": (rows, rank) for part, rows in self.parts}
        return {"lora_A": (rank, self.in_features), **b}


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What decides the adapters of a model."""

    rank: int
    alpha: float
    scaling: Literal["lora", "rslora"]
    """lora: alpha / rank. rslora: alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732), PEFT's `use_rslora`."""
    targets: tuple[str, ...]
    """Names of modules, all of one model (`resolve_targets`), in its order."""

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.scaling == "rslora" else self.rank)

    @property
    def flags(self) -> str:
        """The flags of training that ask for such adapters."""
        return (
            f"--lora-rank {self.rank} --lora-alpha {self.alpha:g} --lora-scaling {self.scaling} "
            f"--lora-targets {' '.join(self.targets)}"
        )


@dataclass(frozen=True, kw_only=True)
class BaseName:
    """The model that adapters were trained on."""

    weights_hash: str
    """12 hex digits over its weights in `params_dtype`, the same in every layout (training/policy.py)."""
    params_dtype: str


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The content of `adapter.json`."""

    settings: AdapterSettings
    base: BaseName


def linear_modules(architecture: Architecture) -> tuple[AdaptedModule, ...]:
    """List the linear modules of every layer -> in the order of a layer's computation; a mixture's router is none.

    Those of attention alone where layers are of two kinds, or where a shared expert has modules of the experts' names:
    an adapter is the same in every layer and has one shape. And where Hugging Face's experts are no modules.

    Raises:
        ConfigError: layers have attention or a gated delta net, or latent attention.
    """
    if architecture.delta_net is not None:
        raise ConfigError(
            f"adapters are alike in all layers, and layers of this model ({architecture.family}) have attention or a "
            "gated delta net. Train its weights: leave --lora-rank out."
        )
    if architecture.latent_attention is not None:
        raise ConfigError(
            f"adapters are not placed on latent attention, which this model ({architecture.family}) has in every "
            "layer. Train its weights: leave --lora-rank out."
        )
    hidden, query, key = architecture.hidden_size, architecture.query_channels, architecture.key_channels
    packed = architecture.family in _PACKED_FAMILIES
    qkv = (("q", query), ("k", key), ("v", key))
    modules = [AdaptedModule(name="qkv_proj", linear="linear_qkv", in_features=hidden, parts=qkv)]
    if not packed:
        modules = [
            AdaptedModule(name=f"{letter}_proj", linear="linear_qkv", in_features=hidden, parts=((letter, rows),))
            for letter, rows in qkv
        ]
    modules.append(AdaptedModule(name="o_proj", linear="linear_proj", in_features=query, parts=(("o", hidden),)))
    has_shared = architecture.moe_shared_expert_intermediate_size is not None
    if len(architecture.layer_kinds()) > 1 or has_shared or architecture.family in _STACKED_EXPERTS:
        return tuple(modules)
    is_expert = architecture.num_moe_experts is not None
    width = (architecture.moe_ffn_hidden_size or 0) if is_expert else architecture.ffn_hidden_size
    gate, up, down = ("gate_proj", "up_proj", "down_proj")
    if is_expert:
        gate, up, down = _EXPERT_NAMES.get(architecture.family, (gate, up, down))
    inner: list[tuple[str, tuple[tuple[str, int], ...]]] = [(gate, (("gate", width),)), (up, (("up", width),))]
    if packed:
        inner = [("gate_up_proj", (("gate", width), ("up", width)))]
    modules += [
        AdaptedModule(name=name, linear="linear_fc1", in_features=hidden, parts=parts, is_expert=is_expert)
        for name, parts in inner
    ]
    modules.append(
        AdaptedModule(name=down, linear="linear_fc2", in_features=width, parts=(("down", hidden),), is_expert=is_expert)
    )
    return tuple(modules)


def resolve_targets(targets: Sequence[str], architecture: Architecture) -> tuple[str, ...]:
    """Spell out which modules are adapted -> names in the order of `linear_modules`; none given means all.

    Raises:
        ConfigError: a name is none of the model's, or as `linear_modules`.
    """
    modules = linear_modules(architecture)
    known = [module.name for module in modules]
    has_experts = any(module.is_expert for module in modules)
    if unknown := [name for name in targets if name not in known and not (name == EXPERTS and has_experts)]:
        raise ConfigError(
            f"lora_targets names {unknown[0]!r}, which is no linear module of a layer of this model "
            f"({architecture.family}). Use --lora-targets with some of: "
            f"{' '.join([*known, *([EXPERTS] if has_experts else [])])}."
        )
    return tuple(
        module.name
        for module in modules
        if not targets or module.name in targets or (module.is_expert and EXPERTS in targets)
    )


def adapted_modules(architecture: Architecture, targets: Sequence[str]) -> tuple[AdaptedModule, ...]:
    """Describe the modules that `targets` (resolved) name -> in the order of `linear_modules`."""
    return tuple(module for module in linear_modules(architecture) if module.name in targets)


def is_adapter(directory: Path) -> bool:
    """Tell whether a directory (an `iter_*` one) holds adapters in place of a model."""
    return Path(directory, FILE_NAME).is_file()


def write_adapter(directory: Path, content: AdapterFile) -> None:
    """Write `adapter.json`."""
    values = {"schema_version": SCHEMA_VERSION, **asdict(content.settings), "base": asdict(content.base)}
    write_json(Path(directory, FILE_NAME), {**values, "targets": list(content.settings.targets)})


def read_adapter(directory: Path) -> AdapterFile:
    """Read `adapter.json`.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = Path(directory, FILE_NAME)
    content = read_json(path)
    fault = DataError(f"{path} does not describe adapters of schema_version {SCHEMA_VERSION}. Use another checkpoint.")
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise fault
    settings, base = {name: content.get(name) for name in _names(AdapterSettings)}, content.get("base")
    if set(content) != {"schema_version", "base", *settings} or not isinstance(base, dict):
        raise fault
    if not _is_sound(settings) or set(base) != _names(BaseName) or not all(isinstance(v, str) for v in base.values()):
        raise fault
    read: dict[str, Any] = {**settings, "targets": tuple(content["targets"])}
    return AdapterFile(settings=AdapterSettings(**read), base=BaseName(**base))


def _names(content: type[Any]) -> set[str]:
    return {field.name for field in fields(content)}


def _is_sound(settings: dict[str, Any]) -> bool:
    rank, alpha, targets = settings["rank"], settings["alpha"], settings["targets"]
    return (
        isinstance(rank, int)
        and not isinstance(rank, bool)
        and rank > 0
        and isinstance(alpha, (int, float))
        and not isinstance(alpha, bool)
        and 0 < alpha <= sys.float_info.max
        and settings["scaling"] in ("lora", "rslora")
        and isinstance(targets, list)
        and bool(targets)
        and all(isinstance(name, str) for name in targets)
    )
