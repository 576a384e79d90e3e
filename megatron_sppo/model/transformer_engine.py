"""Whether Transformer Engine's layers can be built on this machine, found out by importing what builds them."""

import functools
import importlib
import importlib.util
import logging
import os
from importlib.metadata import version

import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig

logger = logging.getLogger(__name__)

_BUILD = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
_REBUILD = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps transformer-engine-torch"


def transformer_engine_fault() -> str | None:
    """Say why Transformer Engine cannot be used here -> None, or what is missing (and what installs it).

    That the package is there proves nothing. It swallows the ImportError of its torch part and is left without
    `.pytorch` (Transformer Engine 2.11, __init__.py); Megatron-Core then puts a MagicMock in its place (HAVE_TE in
    extensions/transformer_engine.py), which fails when a layer is built, or later.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device (torch.cuda.is_available() is False)"
    return _import_fault()


def resolve_transformer_impl(config: ModelConfig) -> str:
    """Decide between the layer implementations -> "transformer_engine" or "torch".

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be used; the message says what is missing.
    """
    if config.transformer_impl == "torch":
        return "torch"
    fault = transformer_engine_fault()
    if fault is None:
        return "transformer_engine"
    if config.transformer_impl == "transformer_engine":
        raise ConfigError(
            f"transformer_impl is transformer_engine, but {fault}. Fix that, or use --transformer-impl torch."
        )
    return "torch"


def check_machine(config: ModelConfig) -> None:
    """Refuse what this machine cannot compute, and say what it lacks; a config for another can still be read.

    Raises:
        ConfigError: FP8 or Transformer Engine is asked for and cannot be used.
    """
    if resolve_transformer_impl(config) == "transformer_engine":
        return
    fault = transformer_engine_fault() or "transformer_impl is torch"
    if config.fp8 != "none":
        raise ConfigError(f"fp8 needs Transformer Engine, and {fault}. Fix that, or use --fp8 none.")
    if config.transformer_impl == "auto" and torch.cuda.is_available():
        logger.warning("the layers are torch's, several times slower than Transformer Engine's: %s", fault)


@functools.cache
def _import_fault() -> str | None:
    """Import Transformer Engine's torch part, then Megatron-Core's module that wraps it -> what is wrong, or None."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed ({_BUILD})"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "transformer_engine":
            return f"this Transformer Engine is not whole: {error} ({_BUILD})"
        return f"Transformer Engine imports {package}, which is not installed (pip install {package})"
    except FileNotFoundError as error:
        return f"Transformer Engine has no extension for torch: {_line(error)} ({_BUILD})"
    except (ImportError, OSError) as error:
        return f"Transformer Engine does not load beside torch {torch.__version__}: {_line(error)} ({_REBUILD})"
    except (AssertionError, RuntimeError) as error:  # its own checks of what pip installed
        return f"Transformer Engine refuses to load: {_line(error)} ({_BUILD})"
    if not importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE:
        return (
            f"megatron-core {version('megatron-core')} does not find in this Transformer Engine what it uses "
            "(pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12')"
        )
    return None


def _line(error: BaseException) -> str:
    """Word an error in one line, without the paths before a library's name."""
    return " ".join(os.path.basename(word) if word.startswith("/") else word for word in str(error).split())[:120]
