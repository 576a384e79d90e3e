"""Which tokens of a micro-batch each context-parallel rank computes."""

import dataclasses

import torch

from megatron_sppo.data.microbatch import MicroBatch
from megatron_sppo.model.zigzag import zigzag_positions


def columns_of_rank(batch: MicroBatch, *, rank: int, size: int) -> MicroBatch:
    """Keep one context-parallel rank's tokens of a micro-batch (zigzag) -> MicroBatch with S / size columns.

    A row of shared prompts is cut as one document: a response sees a prompt wherever ranks hold the two.
    `cu_seqlens` and `max_seqlen` still describe the whole row, as Transformer Engine wants them. A response token goes
    to the rank that holds the position before it, so every rank has partial sums of every sequence.
    """
    num_columns, num_batch_rows = batch.tokens.shape[1], batch.tokens.shape[0]
    bounds = batch.cu_seqlens
    if bounds is None or batch.parents is not None:
        bounds = torch.tensor([0, num_columns])
    position = zigzag_positions(bounds, rank=rank, size=size)
    column_of = torch.full((num_columns,), -1, dtype=torch.int64)
    column_of[position] = torch.arange(len(position))
    column = column_of[batch.response_rows // num_batch_rows]
    here = column >= 0
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:, position],
        position_ids=batch.position_ids[:, position],
        response_rows=column[here] * num_batch_rows + batch.response_rows[here] % num_batch_rows,
        sequence_index=batch.sequence_index[here],
        labels_R=batch.labels_R[here],
    )
