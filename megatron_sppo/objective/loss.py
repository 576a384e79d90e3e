"""The losses, and what they are made from.

B = responses (sequences), P = pairs. Ratios are log pi_theta(y|x) - log pi_t(y|x), summed over tokens, nats, float32.
uclaml/SPPO and TRL call 1/eta `beta`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sppo.objective.win_rate import at_least_float32


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the losses of responses are made from: a column for each ingredient, [B]."""

    win_rate: Tensor
    """float32, estimate of P(y > pi_t | x)."""
    log_z: Tensor
    """float32, baseline of the response's prompt, nats."""
    preference: Tensor
    """float32, P(y > the pair's other response); NaN without pairs."""
    chosen: Tensor
    """bool: the winner of its pair; without pairs, a win rate above 1/2."""
    reference_log_prob: Tensor
    """float32, log pi_t(y|x), nats; NaN before the reference pass."""
    other_log_prob: Tensor | None = None
    """[B, R] float32, log pi_j(y|x) of each further reference, nats; None without."""

    def of(self, rows: Tensor) -> "Targets":
        """Pick rows by their numbers -> Targets of [len(rows)]."""
        return self.each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> "Targets":
        """Move every column -> Targets on `device`."""
        return self.each(lambda column: column.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        """Change every column alike -> Targets."""
        columns: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(column) for name, column in columns.items() if column is not None})


def sppo_loss(log_ratio: Tensor, win_rate: Tensor, *, eta: float, log_z: Tensor | float | None = None) -> Tensor:
    """Squared residual of the SPPO regression, per response and unreduced -> [B], float32.

    (r - (eta * w - log Z))^2, eq. 3.4; with log Z = eta / 2 it is eq. 3.6: (r - eta * (w - 1/2))^2.

    Args:
        log_ratio: [B], nats. Kept out of bf16: at 500 nats bf16 steps by 2.
        win_rate: [B], estimate of P(y > pi_t | x), in [0, 1].
        eta: nats per unit of preference; published runs use 1e3.
        log_z: nats, [B] or one number, from `log_partition`; None means eta / 2.
    """
    return (at_least_float32(log_ratio) - sppo_target(win_rate, eta=eta, log_z=log_z)).square()


def sppo_target(win_rate: Tensor, *, eta: float, log_z: Tensor | float | None = None) -> Tensor:
    """Log-ratio that `sppo_loss` drives each response to, eta * w - log Z -> [B], nats."""
    win_rate = at_least_float32(win_rate)
    # eta * (w - 1/2), not eta * w - eta/2: at w = 1/2 the first is exactly 0 in float32 for every eta.
    return eta * (win_rate - 0.5) if log_z is None else eta * win_rate - log_z


def dpo_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, *, beta: float) -> Tensor:
    """Sigmoid DPO of each pair, -log sigmoid(beta * (r_w - r_l)) -> [P], float32. Rafailov et al. 2023, eq. 7."""
    return -F.logsigmoid(beta * (at_least_float32(log_ratio_w) - at_least_float32(log_ratio_l)))


def ipo_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, *, beta: float) -> Tensor:
    """IPO of each pair, ((r_w - r_l) - 1 / (2 beta))^2 -> [P], float32. Azar et al. 2023, eq. 17."""
    return (at_least_float32(log_ratio_w) - at_least_float32(log_ratio_l) - 1 / (2 * beta)).square()


def mirror_descent_loss(
    log_ratio_w: Tensor, log_ratio_l: Tensor, *, eta: float, preference_gap: Tensor | float = 0.5
) -> Tensor:
    """Square of each pair's distance from a step of mirror descent, ((r_w - r_l) - eta * gap)^2 -> [P], float32.

    A step from a policy rho is pi(y) ~ rho(y) exp(eta P(y > opponent)), so that (r_w - r_l) = eta (P_w - P_l), ratios
    being log pi/rho. With that difference as `preference_gap` the loss is zero there. With 1/2, and winners that are
    drawn by P(y > y') from pairs of the opponent's answers, it is least there: INPO (Zhang et al. 2024,
    arXiv:2407.00617) and ONPO (Zhang et al. 2025, arXiv:2502.16852).

    Args:
        log_ratio_w, log_ratio_l: [P], nats, against rho.
        eta: nats per unit of preference. INPO's and MNPO's papers call 1/eta `eta`.
        preference_gap: P_w - P_l, [P] or one number.
    """
    return (at_least_float32(log_ratio_w) - at_least_float32(log_ratio_l) - eta * preference_gap).square()


def reverse_kl_penalty(log_ratio: Tensor) -> Tensor:
    """Square each log-ratio to a fixed policy mu -> [B], float32.

    On answers of pi_theta its gradient is twice that of KL(pi_theta || mu). Tang et al. 2025 (arXiv:2503.00030).
    """
    return at_least_float32(log_ratio).square()


def forward_kl_penalty(log_ratio: Tensor, *, largest: float = 10.0) -> Tensor:
    """Compute mu(y)/pi_theta(y) of a fixed policy mu -> [B], float32.

    On answers of pi_theta its gradient is that of KL(mu || pi_theta), by importance weights. Tang et al. 2025.

    Args:
        log_ratio: log pi_theta/mu, nats.
        largest: nats of mu/pi_theta that it stops at, with no gradient beyond; the authors' code uses 5 to 100.
    """
    return (-at_least_float32(log_ratio)).clamp(max=largest).exp()
