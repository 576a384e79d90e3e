"""Rules that only move rows, as runs of rows: what lets a conversion copy bytes instead of making tensors.

A rule that is not listed here is computed by its own `to_megatron` and `to_hf`; so is a subclass of one that is, for it
may compute what its parent copies.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_sppo.architecture import Architecture
from megatron_sppo.conversion.rules import Copy, FusedQKV, GateUp, PackedQKV, Rule, VocabRows, dimension


class Segment(NamedTuple):
    """Consecutive rows of one Hugging Face tensor."""

    part: int
    """Which of the rule's parts."""
    start: int
    rows: int


def segments(rule: Rule, architecture: Architecture) -> list[Segment] | None:
    """List the runs of rows that the Megatron tensor is made of, in its order -> segments, or None: it is computed."""
    runs = _RUNS.get(type(rule))
    return None if runs is None else runs([shape[0] for shape in rule.part_shapes(architecture)], architecture)


def _in_turn(rows: list[int], architecture: Architecture) -> list[Segment]:
    return [Segment(part, 0, count) for part, count in enumerate(rows)]


def _by_group(rows: list[int], architecture: Architecture) -> list[Segment]:
    groups = architecture.num_query_groups
    return [
        Segment(part, group * (count // groups), count // groups)
        for group in range(groups)
        for part, count in enumerate(rows)
    ]


def _packed_by_group(rows: list[int], architecture: Architecture) -> list[Segment]:
    counts = [dimension(architecture, name) for name in ("query", "key", "key")]
    starts = [0, counts[0], counts[0] + counts[1]]
    return [Segment(0, starts[run.part] + run.start, run.rows) for run in _by_group(counts, architecture)]


_RUNS: dict[type[Rule], Callable[[list[int], Architecture], list[Segment]]] = {
    Copy: _in_turn,
    VocabRows: _in_turn,
    GateUp: _in_turn,
    FusedQKV: _by_group,
    PackedQKV: _packed_by_group,
}
