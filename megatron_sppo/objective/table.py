"""The one table of objectives. Command lines read it, so that torch is imported by what computes, not here.

B = responses (sequences), P = pairs, R = further references. Ratios are log pi_theta(y|x) - log pi_t(y|x), summed over
tokens, nats, float32. Papers: DPO Rafailov et al. 2023, IPO Azar et al. 2023, INPO Zhang et al. 2024
(arXiv:2407.00617), ONPO Zhang et al. 2025 (arXiv:2502.16852), MNPO Wu et al. 2025 (arXiv:2509.23102), RSPO Tang et al.
2025 (arXiv:2503.00030), Nash-MD Munos et al. 2023 (arXiv:2312.00886).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_sppo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_sppo.objective.loss import Targets


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an objective asks of the data, the batching and further references, and its loss."""

    name: str
    column: Literal["win_rate", "preference", "chosen"] | None = None
    """Column of `Targets` that stands for P(y > pi_t | x) in `sppo_loss`; None: the loss couples pairs."""
    needs_pairs: bool = True
    """Trains on (winner, loser) pairs of a prompt, not on any number of its responses."""
    weight: float = 1.0
    """Factor on each response's square; see `loss`."""
    num_references: tuple[int, int | None] = (0, 0)
    """Fewest and most policies beside pi_t that the loss looks at; None: any number."""
    anchors: bool = False
    """The further reference is one that penalties pull to (rspo); otherwise pi_t and the others are mixed."""
    default_weight: Callable[[int], float] | None = None
    """Weight of each of so many further references, where none are given; None: they must be given."""
    eta: float = 1.0
    """Nats per unit of preference. Not used by dpo and ipo."""
    beta: float = 1.0
    """1/nats. Used by dpo and ipo alone."""
    reference_weights: tuple[float, ...] = ()
    """Weight of each further reference in the mixture; pi_t has the rest of 1. Empty: `default_weight`."""
    reverse_kl_weight: float = 0.5
    forward_kl_weight: float = 0.0
    """Of the penalties to the further reference, where it anchors."""

    @property
    def rows_per_loss(self) -> int:
        """Responses that one value of the loss joins, which must share a micro-batch: 2 of a pair, otherwise 1."""
        return 2 if self.column is None else 1

    @property
    def strength(self) -> str:
        """The one of eta and beta that the loss reads, and its value, for people."""
        return f"beta {self.beta:g}" if self.name in _STRENGTH_IS_BETA else f"eta {self.eta:g}"

    @property
    def nats_per_reward(self) -> float:
        """Nats of log-ratio that make one unit of reward: eta, or 1 / beta for dpo and ipo."""
        return 1 / self.beta if self.name in _STRENGTH_IS_BETA else self.eta

    def reads(self, setting: str) -> bool:
        """Whether the loss looks at one of `eta`, `beta`, `reverse_kl_weight` and `forward_kl_weight`."""
        if setting.endswith("_kl_weight"):
            return self.anchors
        return (self.name in _STRENGTH_IS_BETA) == (setting == "beta")

    def loss(self, log_ratio: "Tensor", targets: "Targets") -> "Tensor":
        """Evaluate the objective on a batch, unreduced -> [B], or [P] where it couples pairs.

        The mean over all values of the global batch is the documented loss: sum them and count `numel()` of them.

        - sppo: the paper's square, of each response.
        - sppo_single: the same, of the preference over the pair's other response; its mean over responses is the
          official code's, ((r_w - t_w)^2 + (r_l - t_l)^2) / 2 a pair.
        - sppo_hard: of 1 and 0. TRL adds the two squares of a pair and does not halve, so each counts twice.
        - rspo: sppo's square and penalties to a fixed policy, twice each, as the authors' code adds those of a pair.
        - dpo, ipo, inpo, onpo, mnpo, nash_md: `log_ratio` holds pairs as consecutive rows, winner 2p and loser 2p + 1;
          one value per pair. Ratios are against the mixture of pi_t and the further references.

        Args:
            log_ratio: log pi_theta/pi_t.
        """
        from megatron_sppo.objective import loss as losses

        if self.column is None:
            assert log_ratio.shape[0] % 2 == 0, f"{self.name} needs whole pairs, got {log_ratio.shape[0]} rows"
            ratio = self._against_mixture(log_ratio, targets)
            ratio_w, ratio_l = ratio[0::2], ratio[1::2]
            if self.name in _STRENGTH_IS_BETA:
                return {"dpo": losses.dpo_loss, "ipo": losses.ipo_loss}[self.name](ratio_w, ratio_l, beta=self.beta)
            gap = targets.win_rate[0::2] - targets.win_rate[1::2] if self.name == "nash_md" else 0.5
            return losses.mirror_descent_loss(ratio_w, ratio_l, eta=self.eta, preference_gap=gap)
        win_rate, log_z = self._win_rate(targets)
        squares = self.weight * losses.sppo_loss(log_ratio, win_rate, eta=self.eta, log_z=log_z)
        if not self.anchors:
            return squares
        assert targets.other_log_prob is not None
        to_anchor = log_ratio + (targets.reference_log_prob - targets.other_log_prob[:, 0])
        for weight, penalty in (
            (self.reverse_kl_weight, losses.reverse_kl_penalty),
            (self.forward_kl_weight, losses.forward_kl_penalty),
        ):
            if weight:
                squares = squares + 2 * weight * penalty(to_anchor)
        return squares

    def target(self, targets: "Targets") -> "Tensor | None":
        """Log-ratio that the loss drives each response to -> [B], nats; None where the objective couples pairs.

        Of rspo, the one of its square alone.
        """
        from megatron_sppo.objective.loss import sppo_target

        if self.column is None:
            return None
        win_rate, log_z = self._win_rate(targets)
        return sppo_target(win_rate, eta=self.eta, log_z=log_z)

    def mixture_weights(self, num_references: int) -> tuple[float, ...]:
        """Weigh so many further references -> their weights; pi_t has the rest of 1.

        Raises:
            ConfigError: the objective takes other numbers of references or of weights, or more than 1 in all.
        """
        least, most = self.num_references
        if num_references < least or (most is not None and num_references > most):
            wanted = str(least) if most == least else f"at least {least}"
            remedy = "Leave --reference out" if most == 0 else f"Use --reference with {wanted} checkpoint directories"
            raise ConfigError(
                f"objective {self.name} takes {wanted} further references, got {num_references}. {remedy}."
            )
        if self.anchors or not num_references:
            if self.reference_weights:
                raise ConfigError(
                    f"reference_weights are of a mixture of references, and objective {self.name} has none here. "
                    "Leave --reference-weights out."
                )
            return ()
        weights = self.reference_weights
        if not weights and self.default_weight is not None:
            weights = (self.default_weight(num_references),) * num_references
        if len(weights) != num_references or min(weights) < 0 or not sum(weights) <= 1 + 1e-9:  # NaN is not
            raise ConfigError(
                f"{len(weights)} reference_weights, {sum(weights):.6g} in all, are given with {num_references} "
                "further references. Use --reference-weights with as many numbers, at most 1 in all; pi_t has the rest."
            )
        return weights

    def _against_mixture(self, log_ratio: "Tensor", targets: "Targets") -> "Tensor":
        """Turn log pi_theta/pi_t into log pi_theta/rho, rho ~ pi_t^(1 - sum w_j) prod pi_j^w_j, but for its norm."""
        if targets.other_log_prob is None:
            assert not self.num_references[0], f"{self.name} needs the log-probabilities of a further reference"
            return log_ratio
        others = targets.other_log_prob.unbind(dim=1)
        # Not by a matrix of weights: making one would have the CPU wait for a GPU, and a product may be taken in TF32.
        for weight, log_prob in zip(self.mixture_weights(len(others)), others, strict=True):
            log_ratio = log_ratio + weight * (targets.reference_log_prob - log_prob)
        return log_ratio

    def _win_rate(self, targets: "Targets") -> "tuple[Tensor, Tensor | None]":
        """Choose the win rate of `sppo_loss` and its log Z: None, eta / 2, of all but win rates -> [B], [B] or None."""
        assert self.column is not None
        return getattr(targets, self.column), targets.log_z if self.column == "win_rate" else None


_STRENGTH_IS_BETA = ("dpo", "ipo")

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(name="sppo", column="win_rate", needs_pairs=False),
        Objective(name="sppo_single", column="preference"),
        Objective(name="sppo_hard", column="chosen", weight=2.0),
        Objective(name="rspo", column="win_rate", needs_pairs=False, num_references=(1, 1), anchors=True),
        Objective(name="dpo", num_references=(0, None)),
        Objective(name="ipo", num_references=(0, None)),
        # tau / eta of the paper's experiments: rho = pi_t^(1 - tau/eta) pi_ref^(tau/eta).
        Objective(name="inpo", num_references=(1, 1), default_weight=lambda _: 1 / 3),
        # The auxiliary policy alone.
        Objective(name="onpo", num_references=(1, 1), default_weight=lambda _: 1.0),
        # All opponents alike, pi_t among them.
        Objective(name="mnpo", num_references=(0, None), default_weight=lambda number: 1 / (number + 1)),
        # eta tau of the paper in our INPO's place, so that the two differ in what the judge's number is used for.
        Objective(name="nash_md", num_references=(1, 1), default_weight=lambda _: 1 / 3),
    )
}


def find_objective(name: str, *, eta: float, beta: float, **settings: Any) -> Objective:
    """Look an objective up -> its row of the table, at this strength. There is no fall-back.

    Args:
        settings: `reference_weights`, `reverse_kl_weight` and `forward_kl_weight` of the row.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown. Use --objective with one of: {', '.join(OBJECTIVES)}.")
    return dataclasses.replace(OBJECTIVES[name], eta=eta, beta=beta, **settings)
