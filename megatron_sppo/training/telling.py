"""What the ranks tell each other in a step, beside the numbers that they add up anyway."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sppo.command_line import launch
from megatron_sppo.training import parallel


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one rank says."""

    seconds: float
    """That it computed in the step before; 0 in a process's first."""
    num_skipped: int
    """Steps of the run that it left out so far."""
    stops: bool
    """It was asked to stop."""
    writes: bool
    """It is still writing a checkpoint in the background."""
    refused: bool
    """It could not write the lines of a step."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What all of them said, by rank where it is a list."""

    seconds: list[float]
    num_skipped: list[int]
    unfit_gradients: list[int]
    """Ranks whose own gradient was not finite, before they added theirs up."""
    stops: bool
    writes: bool
    refused: bool


def tell(values: Sequence[Tensor], said: Said, *, is_unfit: Tensor) -> Callable[[], tuple[tuple[Tensor, ...], Told]]:
    """Add up all that ranks say of a step, by one all-reduce and one copy -> a function that returns the sums, waiting.

    What they say in words stands at each one's place. Collective.

    Args:
        values: float64 vectors on the device to be added up.
        is_unfit: [1] float64 on the device, 1 where this rank's gradient is not finite (`GradientWatch.pop`).
    """
    place = launch()
    size = place.world_size
    ours = torch.zeros(2 * size + 3, dtype=torch.float64)
    ours[place.rank], ours[size + place.rank] = said.seconds, said.num_skipped
    ours[-3], ours[-2], ours[-1] = said.stops, said.writes, said.refused
    before, after = (torch.zeros(n, dtype=torch.float64, device=is_unfit.device) for n in _around(place.rank, size))
    parts = [*values, parallel.to_device(ours), torch.cat([before, is_unfit, after])]
    read = parallel.sum_to_cpu(torch.cat(parts))

    def answer() -> tuple[tuple[Tensor, ...], Told]:
        *totals, words, unfit = read().split([len(part) for part in parts])
        seconds, num_skipped, (stops, writes, refused) = (part.tolist() for part in words.split([size, size, 3]))
        told = Told(
            seconds=seconds,
            num_skipped=[int(number) for number in num_skipped],
            unfit_gradients=unfit.nonzero().flatten().tolist(),
            stops=stops > 0,
            writes=writes > 0,
            refused=refused > 0,
        )
        return tuple(totals), told

    return answer


def _around(rank: int, size: int) -> tuple[int, int]:
    return rank, size - rank - 1
