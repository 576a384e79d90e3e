"""Where a judge's model lies, its tokenizer, and who it is by its files: for PairRM, reward and preference models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.file_digests import sha256_of_files
from megatron_sppo.checkpoints.pretrained import UNUSABLE
from megatron_sppo.command_line import one_line
from megatron_sppo.errors import ConfigError
from megatron_sppo.json_files import sha256_of_json
from megatron_sppo.judge.protocol import JudgeIdentity
from megatron_sppo.storage import damage

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""Of a chat model, without its authors' code and copies in other formats."""

_REMEDY = "Give a local directory: --judge {spec}:DIR."


def default_dtype(device: str) -> str:
    """Choose a judge's precision where nobody has -> "float32" on a CPU, "bfloat16" on a GPU."""
    return "float32" if device == "cpu" else "bfloat16"


def local_directory(name: str, *, spec: str, patterns: tuple[str, ...] = _FILES) -> Path:
    """Find a checkpoint: a directory, else a hub id in the cache or, unless HF_HUB_OFFLINE is set, on the hub.

    Raises:
        ConfigError: there is none, or it is an adapter, or has one beside it that may or may not be meant.
    """
    directory = _local_directory(name, patterns, spec=spec)
    if (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"{directory} holds adapter_config.json: a LoRA adapter, which is not applied here. Merge it into its base "
            "(PEFT's merge_and_unload) and give that directory, or remove it if the weights are merged."
        )
    return directory


def refuse_missing_directory(name: str, *, spec: str) -> None:
    """Refuse what can only be a directory and is none; what may be a name of the hub is not asked for.

    Raises:
        ConfigError: names it.
    """
    if (name.count("/") > 1 or name.startswith((".", "/", "~"))) and not Path(name).is_dir():
        raise ConfigError(f"{name} is not a directory. {_REMEDY.format(spec=spec)}")


def _local_directory(name: str, patterns: tuple[str, ...], *, spec: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    refuse_missing_directory(name, spec=spec)
    remedy = _REMEDY.format(spec=spec)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ConfigError(
            f"{name} is neither a directory nor a model in the cache, and the hub did not give it{offline}: "
            f"{type(error).__name__}. {remedy}"
        ) from None


def identity_of_files(directory: Path, *, name: str, spec: str, **deciding: object) -> JudgeIdentity:
    """Name a model by all files of its directory and what else decides its logits, unloaded -> JudgeIdentity."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    digests = dict(zip((path.name for path in files), sha256_of_files(files), strict=True))
    return JudgeIdentity(name=name, fingerprint=sha256_of_json({spec: digests, **deciding}))


def load_tokenizer(directory: Path, *, remedy: str) -> Any:
    """Load a directory's tokenizer -> transformers' PreTrainedTokenizerBase.

    Raises:
        ConfigError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, *UNUSABLE) as error:
        fact = f"{directory} holds no readable tokenizer ({one_line(error)}). {remedy}"
        raise ConfigError(damage(directory / "tokenizer.json", fact)) from None
