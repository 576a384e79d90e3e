"""Numbers that cannot be right, made in ranks that train: at a step, on one rank, in one place of the computation."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.distributed.worlds import pretrain


@dataclass(frozen=True)
class Unfit:
    """One fault, made in the middle of a step."""

    step: int
    rank: int
    place: str
    """reference, win_rate: of one response, in this rank's memory; activation: of one micro-batch; gradient: of one
    parameter; spike: the gradient of all parameters, as many times as `value`."""
    value: float
    pick: int
    """Which response, micro-batch or parameter: taken modulo their number."""


def train_with_faults(runs: list[tuple[list[str], list[Unfit]]]) -> tuple[list[int], str, list[dict[str, Any]]]:
    """Do runs of the script one after another, the last of which may end with an error -> (exit codes, stderr, steps).

    A step's entry says which it was, which responses the fault was in, and whether weights, masters, moments and counts
    of steps had the same bits after it.
    """
    codes: list[int] = []
    steps: list[dict[str, Any]] = []
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        for argv, faults in runs:
            with _made(faults, steps):
                codes.append(pretrain(argv))
    return codes, stderr.getvalue(), steps


@contextlib.contextmanager
def _made(faults: list[Unfit], steps: list[dict[str, Any]]) -> Iterator[None]:
    from megatron_sppo.training import loop

    original = loop._step
    by_step = {fault.step: fault for fault in faults}

    def step_with_fault(policy: Any, optimizer: Any, plan: Any, said: Any, *, step: int, **rest: Any) -> Any:
        fault = by_step.get(step)
        if fault is None:
            return original(policy, optimizer, plan, said, step=step, **rest)
        before = [tensor.clone() for tensor in _state(policy, optimizer)]
        entry: dict[str, Any] = {"step": step, "kept": None, "rows": []}
        steps.append(entry)
        with contextlib.ExitStack() as undo:
            if torch.distributed.get_rank() == fault.rank:
                entry["rows"] = _make(fault, policy, plan, undo)
            answer = original(policy, optimizer, plan, said, step=step, **rest)
        after = _state(policy, optimizer)
        entry["kept"] = len(before) == len(after) and all(map(torch.equal, before, after))
        return answer

    loop._step = step_with_fault
    try:
        yield
    finally:
        loop._step = original


def _state(policy: Any, optimizer: Any) -> list[torch.Tensor]:
    """All that an update changes: weights as the next forward has them, float32 masters, moments, their counts."""
    policy.gather_weights()
    found = [parameter.detach() for chunk in policy.chunks for parameter in chunk.parameters()]
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                found.append(parameter.detach())
                found += [torch.as_tensor(value) for _, value in sorted(part.optimizer.state[parameter].items())]
    return found


def _make(fault: Unfit, policy: Any, plan: Any, undo: contextlib.ExitStack) -> list[str]:
    """Make a fault until `undo` -> the responses that it is in, as group/response; none where it is in no response."""
    trained = [
        p for chunk in policy.chunks for name, p in chunk.named_parameters() if ".layernorm" in name or "linear" in name
    ]
    batch = plan.micro_batches[fault.pick % len(plan.micro_batches)]
    names = {row: f"{g}/{k}" for row, g, k in zip(plan.rows.tolist(), plan.group, plan.response, strict=True)}
    if fault.place in ("reference", "win_rate"):
        column = batch.targets.reference_log_prob if fault.place == "reference" else batch.targets.win_rate
        column[fault.pick % len(column)] = fault.value
        return [names[batch.rows.tolist()[fault.pick % len(column)]]]
    if fault.place == "activation":
        layer, calls = policy.stages[0].decoder.layers[0], iter(range(10**6))

        def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
            if next(calls) != fault.pick % len(plan.micro_batches):
                return output
            hidden, *rest = output
            return hidden * fault.value, *rest

        undo.callback(layer.register_forward_hook(spoil).remove)
        return [names[row] for row in batch.rows.tolist()]
    chosen = trained if fault.place == "spike" else [trained[fault.pick % len(trained)]]
    for parameter in chosen:
        undo.callback(parameter.register_hook(lambda gradient: gradient * fault.value).remove)
    return []
