"""Bradley-Terry strengths of players from how often each beats each other.

P = players; `...` = any leading shape, usually resamples. Model: P(p beats q) = sigmoid(s_p - s_q), Bradley and Terry
1952; that a maximum exists, and is unique up to a constant, is Ford 1957's condition.
"""

import torch
from torch import Tensor

from megatron_sppo.errors import DataError

_MOST_STEPS = 2000
_LARGEST_STEP = 1.0
"""Nats: a Newton step is shortened to it, so that none overshoots where the sigmoid is flat."""
_GRADIENT_TOLERANCE = 1e-12
"""Of wins per comparison."""


def bradley_terry(wins: Tensor, *, anchor: int) -> Tensor:
    """Fit strengths by maximum likelihood -> [..., P] float64 in nats, the anchor's 0; NaN where no maximum exists.

    Maximises sum_pq wins_pq log sigmoid(s_p - s_q) (Hunter 2004), concave, by Newton's steps. Wins may be fractions: of
    a mean preference of 0.7, 0.7 are one's and 0.3 the other's.
    No maximum exists where the players fall into two sets, and no one of the second ever beats one of the first: the
    strengths would go to infinity.

    Args:
        wins: [..., P, P], how often p beat q, at least 0; the diagonal is ignored.
        anchor: the player whose strength is 0.

    Raises:
        DataError: a number below 0 or none, or no such player.
    """
    num_players = wins.shape[-1]
    if not bool((wins >= 0).all()) or not 0 <= anchor < num_players:
        raise DataError(
            f"wins of {num_players} players with the least {float(wins.min()):g}, anchor {anchor}: there are no "
            "strengths. Give numbers of at least 0, and an anchor from 0 on."
        )
    off_diagonal = 1 - torch.eye(num_players, dtype=torch.float64)
    shares = wins.double() * off_diagonal
    shares = shares / shares.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    games = shares + shares.transpose(-1, -2)
    others = [player for player in range(num_players) if player != anchor]
    strength = torch.zeros(shares.shape[:-1], dtype=torch.float64)
    exists = _is_connected(shares)
    for _ in range(_MOST_STEPS if others else 0):
        expected = torch.sigmoid(strength.unsqueeze(-1) - strength.unsqueeze(-2))
        gradient = (shares - games * expected).sum(dim=-1)
        weight = games * expected * (1 - expected)
        laplacian = torch.diag_embed(weight.sum(dim=-1)) - weight
        # Rows without a maximum are left where they are: their Laplacian may be singular.
        matrix = torch.where(exists[..., None, None], laplacian, torch.eye(num_players, dtype=torch.float64))
        step = torch.zeros_like(strength)
        step[..., others] = torch.linalg.solve(matrix[..., others, :][..., others], gradient[..., others])
        step = step * exists[..., None]
        length = step.abs().amax(dim=-1, keepdim=True)
        strength = strength + step * (_LARGEST_STEP / length.clamp_min(_LARGEST_STEP))
        if float((gradient.abs() * exists[..., None]).amax()) < _GRADIENT_TOLERANCE:
            break
    return torch.where(exists[..., None], strength, torch.nan)


def _is_connected(wins: Tensor) -> Tensor:
    """Look whether every player has beaten every other, if by way of third ones -> [...] bool."""
    reach = (wins > 0).double() + torch.eye(wins.shape[-1], dtype=torch.float64)
    for _ in range(max(1, wins.shape[-1].bit_length())):
        reach = ((reach @ reach) > 0).double()
    return (reach > 0).all(dim=-1).all(dim=-1)
