"""The losses, and the one table that says what each objective needs.

B = responses (sequences), P = pairs. Ratios are log pi_theta(y|x) - log pi_t(y|x), summed over tokens, nats, float32.
uclaml/SPPO and TRL call 1/eta `beta`.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_sppo.errors import ConfigError
from megatron_sppo.objective.names import find_objective
from megatron_sppo.objective.win_rate import at_least_float32


def sppo_loss(log_ratio: Tensor, win_rate: Tensor, *, eta: float, log_z: Tensor | float | None = None) -> Tensor:
    """Squared residual of the SPPO regression, per response and unreduced -> [B], float32.

    (r - (eta * w - log Z))^2, eq. 3.4; with log Z = eta / 2 it is eq. 3.6: (r - eta * (w - 1/2))^2.

    Args:
        log_ratio: [B], nats. Kept out of bf16: at 500 nats bf16 steps by 2.
        win_rate: [B], estimate of P(y > pi_t | x), in [0, 1].
        eta: nats per unit of preference; published runs use 1e3.
        log_z: nats, [B] or one number, from `log_partition`; None means eta / 2.
    """
    return (at_least_float32(log_ratio) - _win_rate_target(win_rate, eta=eta, log_z=log_z)).square()


def dpo_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, *, beta: float) -> Tensor:
    """Sigmoid DPO of each pair, -log sigmoid(beta * (r_w - r_l)) -> [P], float32. Rafailov et al. 2023, eq. 7."""
    return -F.logsigmoid(beta * (at_least_float32(log_ratio_w) - at_least_float32(log_ratio_l)))


def ipo_loss(log_ratio_w: Tensor, log_ratio_l: Tensor, *, beta: float) -> Tensor:
    """IPO of each pair, ((r_w - r_l) - 1 / (2 beta))^2 -> [P], float32. Azar et al. 2023, eq. 17."""
    return (at_least_float32(log_ratio_w) - at_least_float32(log_ratio_l) - 1 / (2 * beta)).square()


def regression_target(
    name: str,
    *,
    eta: float,
    win_rate: Tensor | None = None,
    log_z: Tensor | float | None = None,
    preference: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Log-ratio that an SPPO objective drives each response to -> [B], nats.

    - "sppo": eta * w - log Z (log Z None: eta / 2).
    - "sppo_single": eta * (P - 1/2), P = P(this response > its partner): +eta * (P_wl - 1/2) and -eta * (P_wl - 1/2).
    - "sppo_hard": +eta / 2 for the chosen response and -eta / 2 for the rejected one.

    Raises:
        ConfigError: the name is unknown, or the objective (dpo, ipo) has no target per response.
    """
    objective = find_objective(name)
    if objective.target == "win_rate":
        assert win_rate is not None, f"{name} needs win_rate"
        return _win_rate_target(win_rate, eta=eta, log_z=log_z)
    if objective.target == "preference":
        assert preference is not None, f"{name} needs preference"
        return eta * (at_least_float32(preference) - 0.5)
    if objective.target == "label":
        assert chosen is not None, f"{name} needs chosen"
        return eta * (chosen.float() - 0.5)
    raise ConfigError(
        f"objective {name} couples pairs and has no target per response. Use --objective sppo for targets."
    )


def objective_loss(
    name: str,
    log_ratio: Tensor,
    *,
    eta: float | None = None,
    beta: float | None = None,
    win_rate: Tensor | None = None,
    log_z: Tensor | float | None = None,
    preference: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Loss values of a batch under any objective, unreduced -> [B], or [P] where the objective couples pairs.

    The mean over all returned values of the global batch is the documented loss: sum them and count `numel()` of them.

    - sppo: the square of each response.
    - sppo_single: the same; its mean over responses is the official code's, ((r_w - t_w)^2 + (r_l - t_l)^2) / 2 a pair.
    - sppo_hard: TRL adds the two squares of a pair and does not halve, so each response carries twice its square.
    - dpo, ipo: `log_ratio` holds pairs as consecutive rows, winner 2p and loser 2p + 1; one value per pair.

    Raises:
        ConfigError: the name is unknown.
    """
    objective = find_objective(name)
    if objective.coupled:
        assert beta is not None and beta > 0, f"{name} needs beta"
        assert log_ratio.shape[0] % 2 == 0, f"{name} needs whole pairs, got {log_ratio.shape[0]} rows"
        pairwise = dpo_loss if name == "dpo" else ipo_loss
        return pairwise(log_ratio[0::2], log_ratio[1::2], beta=beta)
    assert eta is not None and eta > 0, f"{name} needs eta"
    target = regression_target(name, eta=eta, win_rate=win_rate, log_z=log_z, preference=preference, chosen=chosen)
    return objective.weight * (at_least_float32(log_ratio) - target).square()


def _win_rate_target(win_rate: Tensor, *, eta: float, log_z: Tensor | float | None) -> Tensor:
    win_rate = at_least_float32(win_rate)
    # eta * (w - 1/2), not eta * w - eta/2: at w = 1/2 the first is exactly 0 in float32 for every eta.
    return eta * (win_rate - 0.5) if log_z is None else eta * win_rate - log_z
