"""Whether ranks that must hold the same values do: silent corruption of one rank's memory or messages.

Data- and context-parallel ranks hold the same weights, tensor-parallel ranks the same norms and routers. Without the
distributed optimizer data-parallel ranks also hold the same masters and moments. What one rank alone holds (shards of
the distributed optimizer, activations) cannot be compared: a fault there reaches all replicas alike with the next
weights.
"""

import dataclasses
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megatron_sppo.errors import MachineError, some_of
from megatron_sppo.training import parallel
from megatron_sppo.training.bad_steps import GuardedOptimizer
from megatron_sppo.training.policy import Policy, named_weights

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class _Together:
    """Values that all ranks of a group hold alike."""

    group: torch.distributed.ProcessGroup
    names: tuple[str, ...]
    sums: Tensor
    """[names] int64, on the device: each one's bit patterns, added as integers. One flipped bit always changes it."""


class ReplicaCheck:
    """Compares checksums between the ranks that must agree."""

    def __init__(self, policy: Policy, optimizer: GuardedOptimizer, *, every: int) -> None:
        """Remember what is to be compared.

        Args:
            every: steps between checks; 0: never.
        """
        self._policy, self._optimizer, self._every = policy, optimizer, every

    def is_due(self, step: int) -> bool:
        """Tell whether a step is one of those to be checked."""
        return self._every > 0 and step % self._every == 0

    def before_save(self, step: int) -> None:
        """Check what is to be saved, if anything is ever checked: as `check`."""
        if self._every > 0:
            self._policy.gather_weights()
            self.check(step)

    def check(self, step: int) -> None:
        """Compare everything now: one pass over the values, one small all-reduce for each group. Collective.

        Raises:
            MachineError: names what differs, and on which rank where most of three or more agree.
        """
        differing = [(together, _differing(together)) for together in self._gathered()]
        found = torch.stack([positions.any() for _, positions in differing]).any().int()
        if not int(parallel.sum_over_world(found)):
            return
        clauses = [
            clause
            for together, positions in differing
            for clause in _describe(together, positions.nonzero().flatten().tolist())
        ]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, clauses)
        unique = list(dict.fromkeys(clause for clauses in everyone for clause in clauses))
        raise MachineError(
            f"in step {step} ranks that must hold the same values do not: {some_of(unique)}. A machine remembers, "
            "computes or sends wrongly, and nothing was saved since. Take it out of the job, and run the same command "
            "again: it goes on from the checkpoint before."
        )

    @torch.no_grad()
    def _gathered(self) -> list[_Together]:
        """Add up the bits of what this rank holds, by the ranks that hold the same."""
        values: dict[torch.distributed.ProcessGroup, list[tuple[str, Tensor]]] = {}
        for stage in self._policy.stages:
            for name, parameter in named_weights(stage):
                held = values.setdefault(parallel.holders_of(parameter), [])
                held.append((name, parameter))
                held += [(f"{kind} of {name}", state) for kind, state in self._replicated_state(parameter)]
        return [
            _Together(group, tuple(name for name, _ in held), torch.stack([_bit_sum(value) for _, value in held]))
            for group, held in values.items()
        ]

    def _replicated_state(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        if any(chunk.ddp_config.use_distributed_optimizer for chunk in self._policy.chunks):
            return
        master = getattr(parameter, "main_param", None)
        if master is not None:
            yield "float32 master", master
        held = parameter if master is None else master
        for part in self._optimizer.chained_optimizers:
            for kind, value in part.optimizer.state.get(held, {}).items() if part.optimizer is not None else ():
                if isinstance(value, Tensor) and value.device == parameter.device and value.numel() > 1:
                    yield kind, value


def _bit_sum(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(_BITS[value.element_size()]).sum(dtype=torch.int64)


def _differing(together: _Together) -> Tensor:
    """Compare a group's sums -> [names] bool, where the ranks differ. Collective over the group."""
    both = torch.cat([together.sums, -together.sums])
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MIN, group=together.group)
    smallest, negated_largest = both.chunk(2)
    return smallest != -negated_largest


def _describe(together: _Together, positions: list[int]) -> Iterator[str]:
    """Name the ranks that differ -> a clause for each value. Collective over the group, where it has any."""
    if not positions:
        return
    ours = (torch.distributed.get_rank(), socket.gethostname(), together.sums[positions].tolist())
    everyone: list[Any] = [None] * torch.distributed.get_world_size(together.group)
    torch.distributed.all_gather_object(everyone, ours, group=together.group)
    for place, position in enumerate(positions):
        counts = Counter(sums[place] for _, _, sums in everyone)
        usual, number = counts.most_common(1)[0]
        is_majority = 2 * number > len(everyone)
        odd = [f"{rank} ({host})" for rank, host, sums in everyone if not is_majority or sums[place] != usual]
        others = [str(rank) for rank, _, sums in everyone if is_majority and sums[place] == usual]
        against = f" is other than on rank {some_of(others)}" if others else " (one of them is wrong)"
        yield f"{together.names[position]} on rank {some_of(odd)}{against}"
