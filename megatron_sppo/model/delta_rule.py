"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464), chunk by chunk, from a state that may be given.

A head's state M [K, V] turns keys into values. Token t forgets by exp(g_t), then corrects what its key reads by beta_t,
and is read by its query:  M = exp(g_t) M;  M += k_t (beta_t (v_t - M^T k_t))^T;  o_t = M^T q_t.
All in float32, as transformers has it (5.19, modeling_qwen3_next.py, torch_chunk_gated_delta_rule).
B = sequences, N = value heads, S = tokens, C = tokens of a chunk, K and V = channels of a key and of a value head.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_sppo.layer_parts import DELTA_CHUNK as CHUNK


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, rate: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the rule over sequences -> (float32 [B, N, S, V], the state after the last token [B, N, K, V]).

    Args:
        query: float32 [B, N, S, K], normalised and scaled; `key` likewise normalised.
        value: float32 [B, N, S, V].
        decay: g, at most 0: float32 [B, N, S].
        rate: beta, in (0, 1): float32 [B, N, S].
        state: before the first token; None: zero.
    """
    length = query.shape[2]
    rest = -length % CHUNK  # padding has rate and decay 0: it changes no state
    query, key, value = (pad(tensor, (0, 0, 0, rest)).unflatten(2, (-1, CHUNK)) for tensor in (query, key, value))
    decay, rate = (pad(tensor, (0, rest)).unflatten(2, (-1, CHUNK)) for tensor in (decay, rate))
    since_start = decay.cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = since_start.unsqueeze(-1) - since_start.unsqueeze(-2)
    between = between.masked_fill(future, -torch.inf).exp()
    keys = key * rate.unsqueeze(-1)
    # What each token of a chunk corrects depends on the corrections before it: a triangle of unknowns.
    triangle = keys @ key.mT * between
    known = torch.cat((value * rate.unsqueeze(-1), keys * since_start.exp().unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(triangle, known, upper=False, unitriangular=True)
    corrections, reads = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    within = query @ key.mT * between
    query = query * since_start.exp().unsqueeze(-1)
    key = key * (since_start[..., -1:] - since_start).exp().unsqueeze(-1)
    whole = since_start[..., -1].exp()[..., None, None]
    if state is None:
        state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    for chunk in range(query.shape[2]):
        new = corrections[:, :, chunk] - reads[:, :, chunk] @ state
        outputs.append(query[:, :, chunk] @ state + within[:, :, chunk] @ new)
        state = state * whole[:, :, chunk] + key[:, :, chunk].mT @ new
    return torch.cat(outputs, dim=2)[:, :, :length], state
