"""Auxiliary losses of a mixture's routers, sequence by sequence: the same in every layout, packing and micro-batching.

For a sequence of T tokens, E experts of which k are chosen a token, router logits z_ti and s = softmax(z), or
s = sigmoid(z) / sum_i sigmoid(z_ti) of routers that score by it (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20):

    load balancing   E / (k T^2) * sum_i (sum_t chosen_ti) (sum_t s_ti)      1 where the experts share evenly
    z                1 / T * sum_t logsumexp_i(z_ti)^2                       Zoph et al. 2022 (arXiv:2202.08906), eq. 5

The first is DeepSeek-V2's and Megatron's `seq_aux_loss`; over a whole micro-batch, as `aux_loss` has it, it would
depend on which sequences share one. What is minimised is the mean of the objective (over sequences or pairs), plus the
coefficients times the mean of these over sequences, summed over layers. A micro-batch adds the sum over its sequences:
the gradient is divided by the number of sequences at the end (`forward_step`), so nothing else scales it.
Megatron-Core's own auxiliary losses multiply by the number of tokens there instead, and stay off.

B = sequences of a micro-batch, t = tokens on this rank (padding too), E = experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn.functional import normalize

from megatron_sppo.model.visibility import PackedRow
from megatron_sppo.model.zigzag import zigzag_positions

METRICS = ("moe/load_balancing_loss", "moe/z_loss")


@dataclass(kw_only=True)
class PackedDocuments(PackedRow):
    """Megatron-Core's description of a packed row, and which sequence each token of this rank belongs to.

    It reaches a layer beside its input also when activations are recomputed, whatever ran in between.
    """

    sequence_of_token: Tensor | None = None
    """[t] int64, B for padding."""
    lengths: Tensor | None = None
    """[B] int64, tokens of the whole sequence."""


class RouterLosses:
    """The losses of one layer's router: attached to its output where gradients are computed, and added up to report."""

    def __init__(self, router: Any, *, aux_loss_coeff: float, z_loss_coeff: float) -> None:
        self.coefficients = (aux_loss_coeff, z_loss_coeff)
        self._sums: Tensor | None = None
        """[2] float32, over the sequences so far, this rank's part: load balancing, z."""
        self._topk, self._group = router.topk, router.tp_cp_group
        self._score_function = router.score_function
        self._mcore_routing: Callable[..., tuple[Tensor, Tensor]] = router.routing
        self._documents: PackedDocuments | None = None

    def note_documents(self, _layer: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        """Remember what the layer is called with: a forward pre-hook."""
        self._documents = keywords["packed_seq_params"]

    def pop_sums(self) -> Tensor | float:
        """Take the sums of both losses since the last call -> [2], by `METRICS`; 0 where there were none."""
        sums, self._sums = self._sums, None
        return 0.0 if sums is None else sums

    def routing(self, logits: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Route as mcore does -> (probabilities [t, E] that carry the losses' gradient, chosen experts [t, E])."""
        probabilities, chosen = self._mcore_routing(logits, *arguments, **keywords)
        if not torch.is_grad_enabled():  # the reference pass, and the pass whose activations are recomputed
            return probabilities, chosen
        documents = self._documents
        assert documents is not None and documents.sequence_of_token is not None and documents.lengths is not None
        losses = router_losses(
            logits.flatten(0, 1),
            chosen,
            documents.sequence_of_token,
            documents.lengths,
            topk=self._topk,
            score_function=self._score_function,
            group=self._group,
        )
        sums = torch.stack([loss.detach() for loss in losses])
        self._sums = sums if self._sums is None else self._sums + sums
        weighted = sum(c * loss for c, loss in zip(self.coefficients, losses, strict=True))
        return MoEAuxLossAutoScaler.apply(probabilities, weighted), chosen


def router_losses(
    logits: Tensor,
    chosen: Tensor,
    sequence_of_token: Tensor,
    lengths: Tensor,
    *,
    topk: int,
    score_function: str = "softmax",
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Sum both losses over the sequences -> (load balancing, z), this rank's part of each; they add up over `group`.

    Collectives on `group`: one sum all-reduce of [B, E] counts, which carry no gradient.

    Args:
        logits: [t, E].
        chosen: [t, E] bool, the experts that each token goes to.
        sequence_of_token: [t], B for padding.
        lengths: [B], tokens of each sequence on all ranks together.
        score_function: softmax or sigmoid.
        group: ranks that share out the tokens of these sequences.
    """
    num_sequences, num_experts = len(lengths), logits.shape[1]
    logits, lengths = logits.float(), lengths.float()
    empty = logits.new_zeros(num_sequences + 1, num_experts)
    counts = empty.index_add(0, sequence_of_token, chosen.float())[:num_sequences]
    if group is not None and group.size() > 1 and num_sequences:
        counts = counts.contiguous()
        dist.all_reduce(counts, group=group)
    scores_of_token = logits.softmax(1) if score_function == "softmax" else normalize(logits.sigmoid(), p=1, dim=1)
    scores = empty.index_add(0, sequence_of_token, scores_of_token)[:num_sequences]
    balance_B = num_experts / topk * (counts * scores).sum(1) / lengths.square()
    squares = logits.logsumexp(1).square()
    z_B = squares.new_zeros(num_sequences + 1).index_add(0, sequence_of_token, squares)[:num_sequences] / lengths
    return balance_B.sum(), z_B.sum()


def attach_router_losses(model: GPTModel, *, aux_loss_coeff: float, z_loss_coeff: float) -> tuple[RouterLosses, ...]:
    """Give every router of a stage its losses -> RouterLosses of each layer that has experts."""
    attached = []
    for layer in model.decoder.layers:
        if not hasattr(layer.mlp, "router"):
            continue  # a dense layer
        losses = RouterLosses(layer.mlp.router, aux_loss_coeff=aux_loss_coeff, z_loss_coeff=z_loss_coeff)
        layer.register_forward_pre_hook(losses.note_documents, with_kwargs=True)
        layer.mlp.router.routing = losses.routing
        attached.append(losses)
    return tuple(attached)


def sequence_of_tokens(
    cu_seqlens: Tensor,
    lengths: Tensor,
    *,
    num_tokens: int,
    context_group: dist.ProcessGroup,
    sequence_group: dist.ProcessGroup | None,
) -> Tensor:
    """Say which sequence each of this rank's tokens belongs to -> [t] int64; B for padding, within documents too.

    Args:
        cu_seqlens: boundaries of the documents of the whole row, in its order; documents from B on are padding.
        lengths: [B], tokens of each sequence without padding.
        num_tokens: of this rank's row, before sequence parallelism.
        sequence_group: ranks that each hold a slice of what context parallelism leaves (sequence parallelism).
    """
    if context_group.size() > 1:
        position = zigzag_positions(cu_seqlens, rank=context_group.rank(), size=context_group.size())
        position = position.to(cu_seqlens.device)
    else:
        position = torch.arange(num_tokens, device=cu_seqlens.device)
    if sequence_group is not None:
        position = position.chunk(sequence_group.size())[sequence_group.rank()]
    document = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    ends = torch.cat([cu_seqlens[: len(lengths)] + lengths, cu_seqlens.new_zeros(1)])
    sequence = document.clamp(max=len(lengths))
    return torch.where(position < ends[sequence], sequence, len(lengths))
