"""A mixture's routes, kept by row and used again: what benchmarks/router_replay.py runs in its ranks.

Megatron-Core's `RouterReplay` (0.16.1, 0.19.2) keeps the routes of one micro-batch for each layer; these stand in its
place in the routers, and know the rows.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 16, 4
SETTINGS = "--params-dtype bfloat16 --eta 30 --global-batch-size 16 --lr 2e-4 --clip-grad 1.0"
REFERENCE = "--micro-batch-size 4"

# T = tokens of a row, L = layers, k = experts of a token
RoutesOfRows = dict[int, Tensor]
"""{row: [L, T, k] int64}."""


class Routes:
    """Stands where Megatron-Core's RouterReplay does, in each router of a policy on one pipeline stage."""

    def __init__(self, policy: Any) -> None:
        self.seen: list[Tensor] = []
        self._given: deque[Tensor] = deque()
        for layer in policy.stages[0].decoder.layers:
            layer.mlp.router.router_replay = self

    def get_replay_topk(
        self, scores: Tensor, topk: int, groups: Any, group_topk: Any, own: Any
    ) -> tuple[Tensor, Tensor]:
        """Choose a token's experts: those that are given, in order of the calls, or the router's own."""
        if self._given:
            chosen = self._given.popleft()
            return scores.gather(1, chosen), chosen
        values, chosen = own(scores, topk, num_groups=groups, group_topk=group_topk)
        self.seen.append(chosen.detach())
        return values, chosen

    def give(self, plan: Any, routes: RoutesOfRows, *, rank: int, num_ranks: int) -> None:
        """Have the next pass over a step use these."""
        assert not self._given
        for batch in plan.micro_batches:
            rows = torch.cat([routes[row] for row in batch.rows.tolist()], dim=1)
            padding = torch.arange(TOP_K).expand(NUM_LAYERS, batch.tokens.shape[1] - rows.shape[1], TOP_K)
            self._given.extend(torch.cat([rows, padding], dim=1).chunk(num_ranks, dim=1)[rank])

    def take(self, plan: Any) -> RoutesOfRows:
        """Take what the routers chose in the last pass over a step, on one rank."""
        found: RoutesOfRows = {}
        for number, batch in enumerate(plan.micro_batches):
            layers = torch.stack(self.seen[number * NUM_LAYERS : (number + 1) * NUM_LAYERS])
            lengths = batch.lengths.tolist()
            parts = layers[:, : sum(lengths)].split(lengths, dim=1)
            found |= dict(zip(batch.rows.tolist(), parts, strict=True))
        self.seen.clear()
        return found


def share_changed(one: RoutesOfRows, other: RoutesOfRows) -> float:
    """Count the tokens of a layer whose set of experts differs -> share of all."""
    differ = [(one[row].sort(-1).values != other[row].sort(-1).values).any(-1) for row in one]
    return float(torch.cat([part.flatten() for part in differ]).float().mean())


def one_pass(megatron: str, data: str, flags: str, routes: str | None, seen: str | None) -> np.ndarray:
    """Compute log pi of the first step's responses -> [N], in the order of their rows.

    Args:
        routes: file of the routes to use; None: the model's own.
        seen: file for the routes that were used.
    """
    from megatron_sppo.training import checkpoint, parallel
    from megatron_sppo.training.forward_step import log_probs
    from tests.distributed.worlds import _begin

    _, source, batches, policy = _begin(_argv(megatron, data, flags))
    checkpoint.load_weights(policy, source)
    replay, plan = Routes(policy), next(batches.steps(first=1, last=1))
    if routes is not None:
        group = torch.distributed
        replay.give(plan, torch.load(routes), rank=group.get_rank(), num_ranks=group.get_world_size())
    found = log_probs(policy, plan).numpy()[np.argsort(plan.rows)]
    if seen is not None:
        torch.save(replay.take(plan), seen)
    parallel.shut_down()
    return found


def train(megatron: str, data: str, steps: int, replays: bool) -> dict[str, Any]:
    """Train, with the reference pass's routes in every step or with the model's own -> losses, and how routes moved."""
    from megatron_sppo.training import checkpoint, parallel
    from megatron_sppo.training.forward_step import gradient_step, log_probs, objective_terms
    from megatron_sppo.training.optimizer import build_optimizer
    from tests.distributed.worlds import _begin

    config, source, batches, policy = _begin(_argv(megatron, data, REFERENCE))
    checkpoint.load_weights(policy, source)
    optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
    replay = Routes(policy)
    reference, routes = np.zeros((batches.num_groups, 4), np.float32), RoutesOfRows()
    for plan in batches.steps(first=1, last=batches.steps_per_epoch):
        reference[plan.group, plan.response] = log_probs(policy, plan).numpy()
        routes |= replay.take(plan)

    def passed(plan: Any, log_prob: Tensor) -> float:
        replay.seen.clear()
        return float(objective_terms(plan, log_prob, objective=config.objective).mean())

    losses = []
    for plan in batches.steps(first=1, last=steps, reference_GK=reference):
        if replays:
            replay.give(plan, routes, rank=0, num_ranks=1)
        losses.append(passed(plan, gradient_step(policy, optimizer, plan, objective=config.objective)[0]))
        optimizer.step()
    after: dict[str, list[float]] = {"own": [], "given": [], "apart": []}
    own: RoutesOfRows = {}
    for plan in batches.steps(first=1, last=batches.steps_per_epoch, reference_GK=reference):
        freely = log_probs(policy, plan)
        own |= replay.take(plan)
        replay.give(plan, routes, rank=0, num_ranks=1)
        given = log_probs(policy, plan)
        after["own"].append(passed(plan, freely))
        after["given"].append(passed(plan, given))
        after["apart"] += (freely - given).square().tolist()
    parallel.shut_down()
    return {
        "first": float(np.mean(losses[: batches.steps_per_epoch])),
        "own": float(np.mean(after["own"])),
        "given": float(np.mean(after["given"])),
        "apart": float(np.sqrt(np.mean(after["apart"]))),
        "changed": share_changed(routes, own),
    }


def _argv(megatron: str, data: str, flags: str) -> list[str]:
    return ["--load", megatron, "--data", data, "--save", "nowhere", *SETTINGS.split(), *flags.split()]
