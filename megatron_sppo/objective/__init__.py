"""The paper, and nothing else, in pure torch: win rates, targets, losses, the head, games and diagnostics."""

from megatron_sppo.objective.game import duality_gap
from megatron_sppo.objective.log_ratio import linear_log_probs, sequence_sums
from megatron_sppo.objective.loss import OBJECTIVES, dpo_loss, ipo_loss, objective_loss, regression_target, sppo_loss
from megatron_sppo.objective.win_rate import log_partition, preference_matrix, win_rates

__all__ = [
    "OBJECTIVES",
    "dpo_loss",
    "duality_gap",
    "ipo_loss",
    "linear_log_probs",
    "log_partition",
    "objective_loss",
    "preference_matrix",
    "regression_target",
    "sequence_sums",
    "sppo_loss",
    "win_rates",
]
