"""Routers that choose experts from the groups whose best expert is best (DeepSeek-V2, arXiv:2405.04434, 2.2.2).

Megatron-Core (0.16.1 and 0.19.2, moe_utils.py, group_limited_topk) judges a group by the sum of its best
moe_router_topk // moe_router_group_topk experts, which is what DeepSeek-V3 does, and not V2.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

# T = tokens, E = experts, G = groups


class GroupLimitedRouting:
    """Stands before a router's own choice, which it lets see the experts of the chosen groups only."""

    def __init__(self, router: Any, *, num_groups: int, chosen_groups: int) -> None:
        """Put itself in the place of the router's `routing`, which both supported versions call so."""
        self._num_groups, self._chosen_groups = num_groups, chosen_groups
        self._mcore_routing = router.routing
        router.routing = self.routing

    def routing(self, logits: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Choose experts -> (weights [T, E], chosen [T, E]).

        A weight is the expert's part of the softmax over all experts. The router's is one of the softmax over those of
        the chosen groups: it is multiplied by what these have of the whole.

        Args:
            logits: [..., E], of T tokens.
        """
        scores = logits.float().softmax(-1)
        best = scores.unflatten(-1, (self._num_groups, -1)).amax(-1).topk(self._chosen_groups).indices
        groups = torch.zeros(*scores.shape[:-1], self._num_groups, dtype=torch.bool, device=scores.device)
        kept = groups.scatter(-1, best, True).repeat_interleave(scores.shape[-1] // self._num_groups, dim=-1)
        weights, chosen = self._mcore_routing(logits.masked_fill(~kept, -torch.inf), *arguments, **keywords)
        part = scores.masked_fill(~kept, 0.0).sum(-1).flatten()[:, None]
        return (weights * part).to(weights.dtype), chosen


def limit_groups(model: GPTModel, *, num_groups: int, chosen_groups: int) -> None:
    """Let all routers of a stage choose from `chosen_groups` of `num_groups` groups of neighbours."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            GroupLimitedRouting(module, num_groups=num_groups, chosen_groups=chosen_groups)
