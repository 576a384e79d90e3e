"""The paper, and nothing else, in pure torch: win rates, targets, losses, the head, games and diagnostics."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sppo.objective.game import duality_gap
    from megatron_sppo.objective.hodge import hodge_split
    from megatron_sppo.objective.log_ratio import linear_log_probs, sequence_sums
    from megatron_sppo.objective.loss import (
        Targets,
        dpo_loss,
        forward_kl_penalty,
        ipo_loss,
        mirror_descent_loss,
        reverse_kl_penalty,
        sppo_loss,
    )
    from megatron_sppo.objective.strengths import bradley_terry
    from megatron_sppo.objective.table import OBJECTIVES
    from megatron_sppo.objective.win_rate import log_partition, preference_matrix, win_rates

__all__ = [
    "OBJECTIVES",
    "Targets",
    "bradley_terry",
    "dpo_loss",
    "duality_gap",
    "forward_kl_penalty",
    "hodge_split",
    "ipo_loss",
    "linear_log_probs",
    "log_partition",
    "mirror_descent_loss",
    "preference_matrix",
    "reverse_kl_penalty",
    "sequence_sums",
    "sppo_loss",
    "win_rates",
]

_MODULES = ("table", "win_rate", "loss", "log_ratio", "game", "strengths", "hodge")


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: command lines read `names` and `table`, which need no torch."""
    if name in __all__:
        for module in (importlib.import_module(f"{__name__}.{module}") for module in _MODULES):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
