"""Which layouts a change is tested under: few, but among them every pair of choices that can meet.

A layout is one value of each axis, such as {"tensor": 2, "pipeline": "2x2", "recompute": "full"}. Faults come from two
choices that meet, seldom from three: a cover of all pairs finds nearly all that the whole product would. Layouts that
were chosen by hand run beside it in `make test-full`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Layout = dict[str, Any]
Axes = Mapping[str, Sequence[Any]]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

# What training is told of a layout, word by word; what is chosen by hand is made of these.
TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
SP = "--sequence-parallel"
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
VPP2 = f"{PP2} --virtual-pipeline-model-parallel-size 2"
PP2_OF_THREE = f"{PP2} --decoder-last-pipeline-num-layers 2"
"""Three layers over two stages."""
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
EP2, EP4 = "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
SHARDED = "--use-distributed-optimizer"
OVERLAP = "--ddp-config overlap_grad_reduce=true bucket_size=4096"
SELECTIVE, FULL = "--recompute-granularity selective", "--recompute-granularity full"
FOURS = "--micro-batch-size 4"
PADDED = "--no-packing"
PACKS = "--packed-sequence-size 96"
SHARED_PROMPTS = f"{PACKS} --share-prompts"

LARGEST_WORLD = 4


def pairs(layout: Layout, *, of: Collection[str] | None = None) -> Iterator[Pair]:
    """Yield every two (axis, value) of a layout, one of them in the axes `of` where these are given."""
    for one, other in combinations(layout.items(), 2):
        if of is None or one[0] in of or other[0] in of:
            yield one, other


def possible(axes: Axes, can_be: Callable[[Layout], bool]) -> list[Layout]:
    """List the product of the axes, without the layouts that cannot be."""
    layouts = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    return [layout for layout in layouts if can_be(layout)]


def pairwise_cover(axes: Axes, can_be: Callable[[Layout], bool], *, of: Collection[str] | None = None) -> list[Layout]:
    """Choose layouts that hold every pair of values of two axes which any possible layout holds.

    Greedy and without chance: the layout with the most pairs that are not covered yet, the first of equals.

    Args:
        of: only pairs in which one of these axes is; None takes all.
    """
    layouts = possible(axes, can_be)
    number: dict[Pair, int] = {}
    masks = [sum(1 << number.setdefault(pair, len(number)) for pair in pairs(layout, of=of)) for layout in layouts]
    missing = (1 << len(number)) - 1
    chosen = []
    while missing:
        best = max(range(len(layouts)), key=lambda index: (masks[index] & missing).bit_count())
        chosen.append(layouts[best])
        missing &= ~masks[best]
    return chosen


def world_size(layout: Layout) -> int:
    """Multiply the ranks of all axes; experts lie across ranks that are there already."""
    stages = int(str(layout["pipeline"]).partition("x")[0])
    return stages * int(layout["tensor"]) * int(layout["context"]) * int(layout["data"])


def flags(layout: Layout) -> str:
    """Spell a layout for the training command."""
    stages, _, chunks = str(layout["pipeline"]).partition("x")
    sizes = {
        "tensor-model-parallel-size": layout["tensor"],
        "pipeline-model-parallel-size": int(stages),
        "virtual-pipeline-model-parallel-size": int(chunks or 1),
        "context-parallel-size": layout["context"],
        "expert-model-parallel-size": layout.get("expert", 1),
    }
    words = [f"--micro-batch-size {layout['micro-batch']}"]
    words += [f"--{name} {size}" for name, size in sizes.items() if size > 1]
    words += ["--sequence-parallel"] * layout["sequence"] + ["--no-packing"] * layout["padded"]
    if layout["recompute"] != "none":
        words.append(f"--recompute-granularity {layout['recompute']}")
    words += ["--use-distributed-optimizer"] * layout["sharded"]
    words += ["--ddp-config overlap_grad_reduce=true bucket_size=4096"] * layout["overlapped"]
    return " ".join(words)


def name(layout: Layout) -> str:
    """Name a layout by what it has -> such as "GQA TP2 PP2x2 SP recompute full"."""
    sizes = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP", "data": "DP"}
    words = [str(layout["model"])]
    words += [f"{short}{layout[axis]}" for axis, short in sizes.items() if str(layout.get(axis, 1)) != "1"]
    words += ["SP"] * layout["sequence"] + ["padded"] * layout["padded"]
    words += [f"recompute {layout['recompute']}"] * (layout["recompute"] != "none")
    words += ["sharded"] * layout["sharded"] + ["overlapped"] * layout["overlapped"] + [f"of {layout['micro-batch']}"]
    return " ".join(words)


OF_BOTH: Axes = {
    "sequence": (False, True),
    "padded": (False, True),
    "recompute": ("none", "selective", "full"),
    "sharded": (False, True),
    "overlapped": (False, True),
    "micro-batch": (4, 2, 1),
}
DENSE: Axes = {
    "model": ("GQA", "tied", "MQA"),
    "tensor": (1, 2, 4),
    "pipeline": ("1", "2", "2x2", "4"),  # stages x chunks
    "context": (1, 2, 4),
    "data": (1, 2, 4),
    **OF_BOTH,
}


def dense_can_be(layout: Layout) -> bool:
    """Sequences are split over tensor-parallel ranks; one key/value head cannot be."""
    may_be_split = layout["model"] != "MQA" if layout["tensor"] > 1 else not layout["sequence"]
    return may_be_split and world_size(layout) in (1, 2, LARGEST_WORLD)


OF_MIXTURES = ("model", "expert")
"""What a mixture has of its own: pairs of other axes are covered by dense models."""
MIXTURE: Axes = {
    "model": ("qwen3_moe", "mixtral"),
    "expert": (1, 2, 4),
    "tensor": (1, 2),
    "pipeline": ("1", "2", "2x2"),
    "context": (1, 2),
    "data": (1, 2, 4),
    **OF_BOTH,
}


def mixture_can_be(layout: Layout) -> bool:
    """Experts lie across the tensor-, context- and data-parallel ranks of a stage; TP wants sequence parallelism."""
    if world_size(layout) not in (1, 2, LARGEST_WORLD):
        return False
    ranks_of_a_stage = layout["tensor"] * layout["context"] * layout["data"]
    return layout["sequence"] == (layout["tensor"] > 1) and ranks_of_a_stage % layout["expert"] == 0
