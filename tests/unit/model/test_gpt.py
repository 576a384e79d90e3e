"""Proves what the last stage sends to its head's tensor-parallel ranks: the rows that predict a response, no others.

One rank of a simulated world: collectives move nothing, but each operator's tensor is seen. That the values and
gradients are right is tests/distributed/test_layouts.py's to show.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.simulation import simulated_rank
from megatron_sppo.model import gpt
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import build_policy
from tests.unit.planning.models import TINY


class Collectives(TorchDispatchMode):
    """Bytes that each kind of collective is given."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes[func.overloadpacket.__name__] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_batch_rows", [1, 2])
@pytest.mark.parametrize("axes", [{}, {"context_parallel_size": 2}], ids=["", "CP2"])
def test_sequence_parallel_ranks_send_response_rows_alone(axes, num_batch_rows, tied):
    """TP2 SP, 64 positions a rank, 5 response rows on rank 0 and 2 on rank 1; bfloat16 there, float32 back.

    All 128 positions would be 18 times as much. The softmax adds a maximum of 4 and two sums of 4 bytes a row.
    """
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, **axes)
    rows_R, counts = torch.tensor([3, 4, 5, 60, 61, 64 * num_batch_rows, 64 * num_batch_rows + 9]), (5, 2)
    response = gpt.ResponseTokens(rows_R, torch.zeros_like(rows_R), counts)
    architecture = TINY if not tied else TINY.__class__(**{**vars(TINY), "share_embeddings_and_output_weights": True})
    with simulated_rank(layout, rank=1, world_size=2 * layout.context_parallel_size):
        stage = build_policy(architecture, ModelConfig(params_dtype="bfloat16"), layout).stages[0]
        hidden = torch.randn(64, num_batch_rows, architecture.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with Collectives() as seen:
            log_prob = stage._postprocess(hidden_states=hidden, labels=response)
            log_prob.sum().backward()
    row = architecture.hidden_size
    assert seen.bytes == {"broadcast_": 2 * 7 * row, "reduce_": 4 * 7 * row, "allreduce_": (4 + 8) * 7}
    assert log_prob.shape == (7,)
    touched = hidden.grad.flatten(0, 1).abs().sum(1).nonzero()[:, 0]
    assert set(touched.tolist()) <= {0, 9}  # rank 1's rows, counted from its own first position
