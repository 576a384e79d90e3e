"""Proves which processors are told to be slow in bfloat16."""

from pathlib import Path

import pytest

from megatron_sppo.cpu import is_slow_in_bfloat16


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", False),
        ("Features\t: fp asimd\n", True),
        ("processor : 0\n", False),
    ],
)
def test_a_processor_is_slow_where_its_flags_have_no_bfloat16(text: str, slow: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    places = {"processor": tmp_path / "cpuinfo", "gpu_driver": tmp_path / "nvidiactl"}
    assert is_slow_in_bfloat16(**places) == slow
    places["gpu_driver"].touch()
    assert not is_slow_in_bfloat16(**places)


def test_an_unknown_system_is_not_called_slow(tmp_path: Path) -> None:
    assert not is_slow_in_bfloat16(processor=tmp_path / "none", gpu_driver=tmp_path / "none")
