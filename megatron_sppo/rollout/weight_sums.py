"""One number for a weight, that any cut of it adds up to: what a server holds can be compared with files, to the bit.

The sum of a matrix M is sum_rc a[r] * bits(M[r, c]) * b[c] modulo 2^32, with a and b odd numbers that look random, and
again with other a and b: 64 bits together. Rows and columns that a rank holds give its share, so no tensor is gathered.
One element that differs always changes it: odd factors lose nothing modulo 2^32.

Computed on the server's devices as well (`served_weights`), so this file imports nothing of the package.
"""

from collections.abc import Iterable
from typing import Any

Sums = dict[str, tuple[int, int]]
"""Name of a weight in the files -> (its sum, how many numbers were summed)."""

_MODULUS = 1 << 32
_BLOCK_NUMBERS = {"cpu": 1 << 18}
"""Numbers that are widened at once: few enough for a core's cache."""
_MANY_NUMBERS = 1 << 25
_EXPONENT = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}
_WIDTH = 32


def can_be_summed(weight: Any) -> bool:
    """Tell whether a weight is of a type that `weight_sum` takes; quantized ones are not."""
    return str(weight.dtype).removeprefix("torch.") in _EXPONENT.get(weight.element_size(), {})


def weight_sum(weight: Any, *, first_row: int = 0, first_column: int = 0) -> int:
    """Sum a weight, or the part of it that begins at a row and a column -> int in [0, 2**64).

    Zeros count alike whatever their sign, and so do numbers too small for full precision: reading a weight out of a
    packed layer by a product with the identity cannot keep them apart.

    Args:
        weight: torch tensor [R, C] or [R], of float32, bfloat16 or float16, on any device.
    """
    import torch

    rows = weight.detach().reshape(weight.shape[0], -1) if weight.dim() else weight.detach().reshape(1, 1)
    count, width = rows.shape
    size, device = weight.element_size(), weight.device
    exponent = _EXPONENT[size][str(weight.dtype).removeprefix("torch.")]
    bits_type = {2: torch.int16, 4: torch.int32}[size]
    by_column = [_factors(width, first_column, kind, device) for kind in ("column", "column again")]
    by_row = [_factors(count, first_row, kind, device) for kind in ("row", "row again")]
    step = max(1, _BLOCK_NUMBERS.get(device.type, _MANY_NUMBERS) // max(width, 1))
    totals = [0, 0]
    for start in range(0, count, step):
        bits = rows[start : start + step].contiguous().view(bits_type).to(torch.int32)
        bits = bits * (bits & exponent).ne(0)
        for index in (0, 1):
            by_rows = (bits * by_column[index]).sum(1, dtype=torch.int32)
            totals[index] += int((by_rows * by_row[index][start : start + step]).sum(dtype=torch.int32))
    return totals[0] % _MODULUS << _WIDTH | totals[1] % _MODULUS


def added(shares: Iterable[Sums]) -> Sums:
    """Put the shares of several ranks together -> sums of whole weights."""
    total: Sums = {}
    for share in shares:
        for name, (value, count) in share.items():
            before, counted = total.get(name, (0, 0))
            total[name] = (_plus(before, value), counted + count)
    return total


def _plus(one: int, other: int) -> int:
    high = (one >> _WIDTH) + (other >> _WIDTH)
    return high % _MODULUS << _WIDTH | (one + other) % _MODULUS


def _factors(count: int, first: int, kind: str, device: Any) -> Any:
    """Make odd numbers out of positions (splitmix64's mixing, wrapping) -> int32 [count]."""
    import torch

    mixed = torch.arange(first, first + count, dtype=torch.int64, device=device)
    mixed = (mixed + _KINDS.index(kind) * (1 << 60)) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ (mixed >> 31)).to(torch.int32) | 1


_KINDS = ("row", "column", "row again", "column again")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
