"""What one optimizer step does: descriptions of its global batch, and tensors of one rank's part of it."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_sppo.data.microbatch import MicroBatch
from megatron_sppo.objective import Targets

# N = responses of the global batch


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step: the whole global batch by description, this rank's part of it by tensors."""

    rows: np.ndarray
    """[N] int64, rows of the training index."""
    group: np.ndarray
    """[N] prompt group of each row."""
    response: np.ndarray
    """[N] which of the group's K responses."""
    targets: Targets
    """[N]."""
    num_response_tokens: Tensor
    """[N] int64."""
    num_tokens: int
    """Real tokens of the global batch: each response with its prompt."""
    num_computed_tokens: int
    """Those that pass through the model: fewer where responses share a prompt."""
    attended_positions: int
    """Positions that all positions see, n (n + 1) / 2 of n tokens, for FLOPs; of a shared prompt once."""
    micro_batches: list[MicroBatch]
    """This data-parallel rank's share."""
    padding_fraction: float
    """Share of this rank's computed tokens that are padding."""

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Find where given rows of the training index stand in the global batch -> int64, of the shape of `rows`."""
        order = np.argsort(self.rows)
        return order[np.searchsorted(self.rows, rows, sorter=order)]
