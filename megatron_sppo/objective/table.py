"""The one table of objectives. Command lines read it, so that torch is imported by what computes, not here.

B = responses (sequences), P = pairs. Ratios are log pi_theta(y|x) - log pi_t(y|x), summed over tokens, nats, float32.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_sppo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_sppo.objective.loss import Targets


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an objective asks of the data and of the batching, and its loss."""

    name: str
    column: Literal["win_rate", "preference", "chosen"] | None = None
    """Column of `Targets` that stands for P(y > pi_t | x) in `sppo_loss`; None: the loss couples pairs (dpo, ipo)."""
    needs_pairs: bool = True
    """Trains on (winner, loser) pairs of a prompt, not on any number of its responses."""
    weight: float = 1.0
    """Factor on each response's square; see `loss`."""
    eta: float = 1.0
    """Nats per unit of preference. Not used by dpo and ipo."""
    beta: float = 1.0
    """1/nats. Used by dpo and ipo alone."""

    @property
    def rows_per_loss(self) -> int:
        """Responses that one value of the loss joins, which must share a micro-batch: 2 of a pair, otherwise 1."""
        return 2 if self.column is None else 1

    @property
    def nats_per_reward(self) -> float:
        """Nats of log-ratio that make one unit of reward: eta, or 1 / beta for dpo and ipo."""
        return 1 / self.beta if self.column is None else self.eta

    def loss(self, log_ratio: "Tensor", targets: "Targets") -> "Tensor":
        """Evaluate the objective on a batch, unreduced -> [B], or [P] where it couples pairs.

        The mean over all values of the global batch is the documented loss: sum them and count `numel()` of them.

        - sppo: the paper's square, of each response.
        - sppo_single: the same, of the preference over the pair's other response; its mean over responses is the
          official code's, ((r_w - t_w)^2 + (r_l - t_l)^2) / 2 a pair.
        - sppo_hard: of 1 and 0. TRL adds the two squares of a pair and does not halve, so each counts twice.
        - dpo, ipo: `log_ratio` holds pairs as consecutive rows, winner 2p and loser 2p + 1; one value per pair.
        """
        from megatron_sppo.objective.loss import dpo_loss, ipo_loss, sppo_loss

        if self.column is None:
            assert log_ratio.shape[0] % 2 == 0, f"{self.name} needs whole pairs, got {log_ratio.shape[0]} rows"
            of_pairs = {"dpo": dpo_loss, "ipo": ipo_loss}[self.name]
            return of_pairs(log_ratio[0::2], log_ratio[1::2], beta=self.beta)
        win_rate, log_z = self._win_rate(targets)
        return self.weight * sppo_loss(log_ratio, win_rate, eta=self.eta, log_z=log_z)

    def target(self, targets: "Targets") -> "Tensor | None":
        """Log-ratio that the loss drives each response to -> [B], nats; None where the objective couples pairs."""
        from megatron_sppo.objective.loss import sppo_target

        if self.column is None:
            return None
        win_rate, log_z = self._win_rate(targets)
        return sppo_target(win_rate, eta=self.eta, log_z=log_z)

    def _win_rate(self, targets: "Targets") -> "tuple[Tensor, Tensor | None]":
        """Choose the win rate of `sppo_loss` and its log Z: None, eta / 2, of all but win rates -> [B], [B] or None."""
        assert self.column is not None
        return getattr(targets, self.column), targets.log_z if self.column == "win_rate" else None


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="sppo", column="win_rate", needs_pairs=False),
        Objective(name="sppo_single", column="preference"),
        Objective(name="sppo_hard", column="chosen", weight=2.0),
        Objective(name="dpo"),
        Objective(name="ipo"),
    )
}


def find_objective(name: str, *, eta: float, beta: float) -> Objective:
    """Look an objective up -> its row of the table, at this strength. There is no fall-back.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown. Use --objective with one of: {', '.join(OBJECTIVES)}.")
    return dataclasses.replace(OBJECTIVES[name], eta=eta, beta=beta)
