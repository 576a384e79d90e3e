"""The module that stands for the extension: whose contracts it keeps, and what it refuses and counts."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import transformer_engine
import transformer_engine_torch as tex
from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm

from tests.cudaless.engine import CALLS
from tests.cudaless.engine.kernel import kernel
from tests.cudaless.engine.module import KERNELS

ROOTS = (Path(transformer_engine.__file__).parent, Path(megatron.core.__file__).parents[2])


def test_the_python_part_is_the_version_that_docstrings_name() -> None:
    assert transformer_engine.__version__ == "2.11.0"


@pytest.mark.parametrize("function", KERNELS, ids=lambda function: function.__name__)
def test_each_kernel_names_a_caller_that_calls_it(function: Callable[..., Any]) -> None:
    """`Caller: FILE NAME (version)`: the file is there, defines the name and calls the kernel, or passes it on."""
    path, names = re.search(r"Caller: (\S+\.py) ([\w.]+)", inspect.getdoc(function) or "").groups()  # type: ignore[union-attr]
    text = next((root / path).read_text() for root in ROOTS if (root / path).exists())
    assert all(re.search(rf"(def|class) {name}\b", text) for name in names.split("."))
    indirect = {"_common.py": "_get_normalization_func", "multi_tensor_apply.py": "op("}
    assert f"tex.{function.__name__}(" in text or indirect.get(Path(path).name, f"tex.{function.__name__}") in text


def test_what_is_not_emulated_can_be_imported_and_says_so_when_called() -> None:
    from transformer_engine_torch import gelu

    for function in (gelu, tex.layernorm_fwd):
        with pytest.raises(NotImplementedError, match="is not emulated"):
            function()


def test_a_kernel_counts_its_calls_and_gives_back_the_tensor_that_it_wrote() -> None:
    @kernel
    def doubled(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tensor.mul_(2), tensor + 1

    CALLS.clear()
    given = torch.ones(2).cuda()
    same, new = doubled(given)
    assert same is given and given.tolist() == [2.0, 2.0]
    assert new.device.type == "cuda" and new.tolist() == [3.0, 3.0]
    assert CALLS == {"doubled": 1}


def test_autograd_does_not_see_into_a_kernel() -> None:
    weight = torch.ones(16, 16).cuda().requires_grad_()
    output, *_ = general_gemm(weight, torch.ones(16, 16).cuda(), out_dtype=torch.float32)
    assert not output.requires_grad


def test_a_kernel_takes_no_tensor_of_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"generic_gemm: a CPU tensor \(16, 16\) of torch.float32.*illegal memory"):
        general_gemm(torch.ones(16, 16).cuda(), torch.ones(16, 16), out_dtype=torch.float32)
