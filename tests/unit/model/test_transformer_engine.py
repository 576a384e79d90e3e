"""A Transformer Engine that is there but cannot be used is found out, and what it lacks is said with its command.

Packages of that name are written as Transformer Engine 2.11 lays itself out: its __init__ swallows an ImportError of
its torch part, so importing the package proves nothing. What a whole one computes is for tests/gpu.
"""

import logging
import sys
from pathlib import Path

import megatron.core.extensions.transformer_engine  # noqa: F401  (before a package of the engine's name is there)
import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.model import transformer_engine
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.transformer_engine import check_machine, resolve_transformer_impl

INIT = "try:\n    from . import pytorch\nexcept (ImportError, FileNotFoundError):\n    pass\n"
BUILD = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
# What the torch part does when it is imported, and what is to be said of it.
FAULTS = {
    "onnxscript": ("import onnxscript_of_no_machine.rewriter", "pip install onnxscript_of_no_machine"),
    "no torch part": (None, BUILD),
    "no extension": ("raise FileNotFoundError('Could not find shared object file for torch lib.')", BUILD),
    "other torch": ("raise ImportError('/a/b/te.so: undefined symbol: _ZN3c10')", "te.so: undefined symbol"),
    "no CUDA library": ("raise OSError('libcublas.so.13: cannot open shared object file')", "libcublas.so.13"),
    "versions differ": ("assert False, 'package version mismatch'", "package version mismatch"),
}


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(transformer_engine, "_import_fault", transformer_engine._import_fault.__wrapped__)


def write_engine(directory: Path, torch_part: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    package = directory / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    if torch_part is not None:
        (package / "pytorch.py").write_text(torch_part + "\n")
    monkeypatch.syspath_prepend(str(directory))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_engine_is_not_chosen_and_says_what_it_lacks(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch_part, words = FAULTS[fault]
    write_engine(tmp_path, torch_part, monkeypatch)
    assert resolve_transformer_impl(ModelConfig()) == "torch"
    with caplog.at_level(logging.WARNING):
        check_machine(ModelConfig())
    assert words in caplog.text and "pip install" in caplog.text
    for config in (ModelConfig(transformer_impl="transformer_engine"), ModelConfig(fp8="hybrid")):
        with pytest.raises(ConfigError) as refused:
            check_machine(config)
        assert words in str(refused.value) and "pip install" in str(refused.value) and "\n" not in str(refused.value)


def test_an_engine_that_megatron_core_mocks_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_engine(tmp_path, "", monkeypatch)
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", False)
    with pytest.raises(ConfigError, match="megatron-core .* does not find"):
        resolve_transformer_impl(ModelConfig(transformer_impl="transformer_engine"))
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    assert resolve_transformer_impl(ModelConfig()) == "transformer_engine"


def test_without_cuda_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_engine(tmp_path, "", monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_transformer_impl(ModelConfig()) == "torch"
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve_transformer_impl(ModelConfig(transformer_impl="transformer_engine"))
    assert "transformer_engine" not in sys.modules
