"""Steps that must not be taken: numbers that are not finite, and spikes. Found before the update, by all ranks alike.

Megatron-Core's `step` computes the gradient's norm, clips, and updates. `GuardedOptimizer` asks in between; by then the
CPU has waited for the norm anyway, and all that the ranks told each other of the step is there.
"""

import dataclasses
import functools
import logging
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_sppo.data.microbatch import MicroBatch
from megatron_sppo.errors import DataError, MachineError, some_of
from megatron_sppo.training import parallel
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.safety_config import SafetyConfig
from megatron_sppo.training.step_plan import StepPlan
from megatron_sppo.training.telling import Told

logger = logging.getLogger(__name__)

WINDOW = 50
"""Steps that a spike is held against."""
FEWEST = 10
"""Steps before which nothing is called a spike."""
_NUM_LARGEST = 4
"""Responses that are named of a spike: those with the largest terms."""
_MOST_ROWS = 8

# N = responses of the global batch


class GuardedOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Megatron-Core's optimizer, which may be told not to update when the gradient's norm is known."""

    _is_fit: Callable[[float], bool] | None = None
    _norm = math.nan

    def step_if(self, is_fit: Callable[[float], bool]) -> float:
        """Do as `step` where `is_fit(gradient norm)`; otherwise weights, masters and moments stay -> the norm.

        Args:
            is_fit: asked once, by every rank; all must answer alike.
        """
        self._is_fit = is_fit
        try:
            self.step()
        finally:
            self._is_fit = None
        return self._norm

    def get_grad_norm(self) -> float:
        """Compute the norm as Megatron-Core does -> float."""
        self._norm = float(super().get_grad_norm())
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """Update, unless told not to -> whether it did (megatron-core 0.16.1 and 0.19.2, `ChainedOptimizer.step`)."""
        if self._is_fit is not None and not self._is_fit(self._norm):
            return False
        return bool(super().step_with_ready_grads())


class GradientWatch:
    """Notes whether this rank's own gradient is finite, before ranks add up theirs and all have what one had.

    One pass over the gradient on the device, for which nobody waits.
    """

    def __init__(self, policy: Policy) -> None:
        self._sums: list[Tensor] = []
        for chunk in policy.chunks:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                group.start_grad_sync = functools.partial(self._look_and_start, group, group.start_grad_sync)

    def _look_and_start(self, group: Any, start: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        if group.grad_reduce_handle is None:  # otherwise it is under way, and others' gradients are in it
            # A sum is finite if its terms are, but for overflow; unlike isfinite it takes no memory.
            self._sums += [bucket.grad_data.sum() for bucket in group.buckets]
        return start(*arguments, **settings)

    def pop(self) -> Tensor:
        """Tell of the gradient since the last call -> [1] float64 on the device, 1 if it was not finite."""
        sums, self._sums = self._sums, []
        if not sums:
            return torch.zeros(1, dtype=torch.float64, device=parallel.device())
        return (~torch.stack(sums).isfinite()).any().double().reshape(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a step must not be taken."""

    what: str
    """One clause: what it is, its value, and what it is held against."""
    positions: np.ndarray
    """Responses of the global batch that have it, by their places; empty where that is not known."""
    ranks: Sequence[int] = ()
    """Ranks that have it, where that is known and the responses are not."""
    log_prob_N: Tensor


class Referee:
    """Judges steps by what all ranks know of them, and counts those that were left out, in `progress`."""

    def __init__(self, config: SafetyConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._judged: dict[str, float] = {}

    def find_fault(self, log_prob_N: Tensor, term_N: Tensor, *, grad_norm: float, told: Told) -> Fault | None:
        """Judge the step that has been computed -> what is wrong with it, or None. The same on every rank.

        Args:
            log_prob_N, term_N: as the ranks that computed them told all others (`gradient_step`), float64.

        Raises:
            MachineError: ranks did not judge the steps before alike.
        """
        self._check_agreement(told.num_skipped)
        step, loss = self._progress.step + 1, float(term_N.mean())
        unfit = (~term_N.isfinite()).nonzero().flatten().numpy()
        if len(unfit):
            return Fault(what=f"the loss of step {step} is {loss}", positions=unfit, log_prob_N=log_prob_N)
        if not math.isfinite(grad_norm):
            unfit_ranks = some_of([str(rank) for rank in told.unfit_gradients]) or "none"
            return Fault(
                what=f"the gradient norm of step {step} is {grad_norm} (not finite on rank {unfit_ranks} before the "
                "ranks added theirs up)",
                positions=np.empty(0, np.int64),
                ranks=told.unfit_gradients,
                log_prob_N=log_prob_N,
            )
        self._judged = {"loss": loss, "gradient norm": grad_norm}
        for name, value in self._judged.items():
            if (what := self._spike(name, value)) is not None:
                positions = term_N.abs().argsort(descending=True)[:_NUM_LARGEST].numpy()
                return Fault(what=what, positions=positions, log_prob_N=log_prob_N)
        return None

    def _spike(self, name: str, value: float) -> str | None:
        """Hold a value of the step against those before -> what is wrong with it, or None."""
        factor, before = self._config.spike_factor, self._progress.recent.get(name, [])
        if factor is None or len(before) < FEWEST or abs(value) <= factor * (usual := median(before)):
            return None
        return (
            f"the {name} of step {self._progress.step + 1} is {value:.6g}, the median of the last {len(before)} steps "
            f"{usual:.6g}, and more than {factor:g} times as much is a spike (--spike-factor)"
        )

    def _check_agreement(self, num_skipped: Sequence[int]) -> None:
        usual = median(num_skipped)
        if others := [str(rank) for rank, number in enumerate(num_skipped) if number != usual]:
            raise MachineError(
                f"rank {some_of(others)} judged a step before step {self._progress.step + 1} otherwise than the others "
                f"({dict(enumerate(num_skipped))} steps left out, by rank): it computes wrongly. Take its machine out "
                "of the job, and run the same command again."
            )

    def take(self) -> None:
        """Note that the step that was judged last was taken."""
        self._progress.num_skipped_in_a_row = 0
        if self._config.spike_factor is not None:
            for name, value in self._judged.items():
                self._progress.recent[name] = [*self._progress.recent.get(name, []), abs(value)][-WINDOW:]

    def reject(self, plan: StepPlan, fault: Fault) -> None:
        """Say what is wrong with a step that was not taken, and stop or count it. Collective.

        Raises:
            DataError: the policy is to stop, or too many were left out one after another.
        """
        place = _place_of(plan, fault)
        if self._config.on_bad_step == "stop":
            raise DataError(
                f"{fault.what}{place}. Weights and optimizer are as before it, and nothing was saved. Use "
                "--on-bad-step skip to leave such steps out, or lower --lr, or leave these rows out, and run the same "
                "command again."
            )
        progress = self._progress
        progress.num_skipped += 1
        progress.num_skipped_in_a_row += 1
        if progress.num_skipped_in_a_row >= self._config.max_bad_steps:
            raise DataError(
                f"{fault.what}{place}. It is the last of {progress.num_skipped_in_a_row} bad steps in a row "
                "(--max-bad-steps), so it is not the data alone. Lower --lr, or begin anew from --load with another "
                "--save."
            )
        if parallel.is_rank_zero():
            logger.warning(
                "left out: %s%s. Weights and optimizer stay; %d steps were left out so far",
                fault.what,
                place,
                progress.num_skipped,
            )


def check_reference(plan: StepPlan, log_prob_N: Tensor, *, stops: bool) -> None:
    """Look whether the reference has a number for each response of a step. Collective where it has not.

    Args:
        log_prob_N: log pi_t of the global batch, the same on every rank.
        stops: otherwise it is said, and the steps that need such a number will be bad and left out.

    Raises:
        DataError: names the responses that it has none for.
    """
    unfit = (~log_prob_N.isfinite()).nonzero().flatten().numpy()
    if not len(unfit):
        return
    fault = Fault(what="", positions=unfit, log_prob_N=log_prob_N)
    place = _place_of(plan, fault)
    fact = f"the reference has no finite number for {len(unfit)} of {len(plan.rows)} responses of a step{place}"
    if stops:
        raise DataError(
            f"{fact}. Look at the weights of --load (megatron-sppo convert verify), leave these rows out, or use "
            "--on-bad-step skip."
        )
    if parallel.is_rank_zero():
        logger.warning("%s: steps with them will be left out", fact)


def _place_of(plan: StepPlan, fault: Fault) -> str:
    """Name ranks, micro-batches and responses of a fault -> text behind it. Collective."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), list(_own_places(plan, fault))))
    found = [
        (is_cause, f"rank {rank} ({host}), {place}")
        for rank, (host, places) in enumerate(everyone)
        for is_cause, place in places
    ]
    clauses = [clause for is_cause, clause in found if is_cause] or [clause for _, clause in found]
    if not clauses:
        return f"; its responses (prompt group/response) are {_names(plan, plan.rows)}"
    return f"; by {some_of(clauses)} (prompt group/response)"


def _own_places(plan: StepPlan, fault: Fault) -> Iterator[tuple[bool, str]]:
    """Name what this rank has of a fault -> for each micro-batch, whether it shows the cause, and a clause."""
    of_rank = torch.distributed.get_rank() in fault.ranks
    rows = plan.rows[fault.positions]
    for number, batch in enumerate(plan.micro_batches if of_rank or parallel.reports_results() else (), start=1):
        mine = batch.rows.numpy()
        found = np.isin(mine, rows) | of_rank
        cause = ""
        for name, values in _ingredients(plan, batch, fault.log_prob_N).items():
            unfit = ~values.isfinite().reshape(len(mine), -1).all(dim=1).numpy()
            if (unfit & found).any():
                cause, found = f"{name} of ", unfit & found
                break
        if found.any():
            place = f"micro-batch {number} of {len(plan.micro_batches)}"
            yield cause != "", f"{place}: {cause}responses {_names(plan, mine[found])}"


def _ingredients(plan: StepPlan, batch: MicroBatch, log_prob_N: Tensor) -> dict[str, Tensor]:
    """List what a micro-batch's terms are made from, as this rank has it -> {name: [B, ...]}."""
    targets = batch.targets
    others = {} if targets.other_log_prob is None else {"log pi of a further reference": targets.other_log_prob}
    return {
        "log pi_t (the reference)": targets.reference_log_prob,
        **others,
        "the win rate": targets.win_rate,
        "log Z": targets.log_z,
        "log pi_theta": log_prob_N[torch.from_numpy(plan.positions(batch.rows.numpy()))],
    }


def _names(plan: StepPlan, rows: np.ndarray) -> str:
    names = [f"{plan.group[position]}/{plan.response[position]}" for position in plan.positions(rows)]
    return some_of(names, most=_MOST_ROWS)
