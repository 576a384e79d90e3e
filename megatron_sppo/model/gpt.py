"""The policy: Megatron-Core's GPTModel whose last stage returns log-probabilities instead of logits."""

from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.model.adapters import Adapters
from megatron_sppo.model.config import ModelConfig, padded_vocab_size
from megatron_sppo.model.group_routing import limit_groups
from megatron_sppo.model.layer_spec import layer_spec
from megatron_sppo.model.rope import LongSequences, RotaryTable, has_own_rope, long_sequences
from megatron_sppo.model.router_losses import (
    PackedDocuments,
    RouterLosses,
    attach_router_losses,
    sequence_of_tokens,
)
from megatron_sppo.model.transformer_engine import resolve_transformer_impl
from megatron_sppo.model.visibility import PackedRow, Row
from megatron_sppo.objective import linear_log_probs

# R = response tokens of the micro-batch, S = tokens, B = sequences, H = hidden size, V = vocabulary


class ResponseTokens(NamedTuple):
    """Which hidden states predict a response token, and which token: all that ever reaches the vocabulary."""

    rows_R: Tensor
    """int64, rows of the hidden states [S, B, H] flattened to [S * B, H]."""
    labels_R: Tensor
    """int64, the token that the row predicts."""
    rows_of_ranks: tuple[int, ...] | None = None
    """Under sequence parallelism, how many of the rows lie on each tensor-parallel rank; `rows_R` are in that order."""


class PolicyModel(GPTModel):
    """GPTModel with the parameter-free log-probability head. Without `labels` it returns logits, as GPTModel does."""

    true_vocab_size: int
    head_chunk_size: int | None
    logit_softcap: float | None
    router_losses: tuple[RouterLosses, ...] = ()
    adapters: Adapters
    """Where there are any (`adapters.attach_adapters`)."""
    long_sequences: LongSequences | None = None
    """Of a model whose frequencies depend on a sequence's length (longrope)."""

    def _preprocess(self, *, position_ids: Tensor, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Embed, and look up the rotary table -> GPTModel's tuple, with a line of the table for each token of a tree.

        Overrides GPTModel._preprocess, which both supported versions call with keywords, the table second in what it
        returns. Megatron-Core counts positions from 0 in each document of `cu_seqlens`, and a response goes on from its
        prompt's end.
        Given as many lines as the row has tokens, it takes them as they are (rope_utils.py, _apply_rotary_pos_emb_thd).
        """
        embedded, rotary, *rest = super()._preprocess(
            position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.long_sequences is not None:
            rotary = self.long_sequences.lines(
                rotary,
                packed_seq_params,
                num_rows=position_ids.shape[0],
                num_tokens=position_ids.shape[1] * self.pg_collection.cp.size(),
            )
        elif isinstance(packed_seq_params, PackedRow) and packed_seq_params.shares_prompts:
            rotary = rotary[packed_seq_params.row.keys.position]
        return embedded, rotary, *rest

    def _postprocess(self, hidden_states: Tensor, *, labels: ResponseTokens | None = None, **kwargs: Any) -> Tensor:
        """Compute log pi of the response tokens -> [R] float32 on the last stage, hidden states elsewhere.

        Overrides GPTModel._postprocess, which both supported versions (megatron-core 0.16.1 and 0.19.2, gpt_model.py)
        call with keywords and which passes `labels` through untouched.
        """
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
            if not self.post_process or self.logit_softcap is None:
                return output
            return torch.tanh(output / self.logit_softcap) * self.logit_softcap
        rows_R, rows_of_ranks = labels.rows_R, None
        if self.config.sequence_parallel:
            # Each rank has S / TP positions: it looks up its own rows, and the head sends those alone.
            rows_of_ranks, rank = labels.rows_of_ranks, self.pg_collection.tp.rank()
            assert rows_of_ranks is not None, "sequence parallelism wants its rows in the order of ranks"
            rows_R = rows_R.split(list(rows_of_ranks))[rank] - rank * hidden_states.shape[0] * hidden_states.shape[1]
        hidden_RH = hidden_states.flatten(0, 1)[rows_R]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return linear_log_probs(
            hidden_RH,
            weight,
            labels.labels_R,
            tp_group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
            chunk_size=self.head_chunk_size,
            vocab_size=self.true_vocab_size,
            logit_softcap=self.logit_softcap,
            weight_gradient=_main_grad(weight),
            rows_of_ranks=rows_of_ranks,
        )


class _MainGrad:
    """Megatron's float32 gradient buffer, by the contract of its own fused layers (tensor_parallel/layers.py)."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    @property
    def total(self) -> Tensor:
        """[V / TP, H], float32: gradients of earlier micro-batches, and of a tied embedding."""
        main_grad: Tensor = self._weight.main_grad
        return main_grad

    def added(self) -> Tensor | None:
        """Tell DDP's hook not to add what autograd gives it -> that gradient: none, or memory nobody reads.

        DDP wants a gradient to be there (overlap_grad_reduce asserts it), on the device whose thread runs the hooks.
        A weight that is also this stage's embedding (`zero_out_wgrad`) gets the embedding's, which DDP does add.
        """
        self._weight.grad_added_to_main_grad = True
        return None if getattr(self._weight, "zero_out_wgrad", False) else torch.empty_like(self._weight)


def _main_grad(weight: Tensor) -> _MainGrad | None:
    """Find where Megatron's DDP sums the weight's gradient; None without DDP (and under FSDP, which has no buffer)."""
    main_grad = getattr(weight, "main_grad", None)
    wrapped = hasattr(weight, "grad_added_to_main_grad") and main_grad is not None and main_grad.dtype == torch.float32
    return _MainGrad(weight) if wrapped else None


def build_stage(
    architecture: Architecture,
    transformer_config: TransformerConfig,
    config: ModelConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> PolicyModel:
    """Build one pipeline stage (or virtual stage) of the policy with random weights -> PolicyModel."""
    transformer_config.moe_router_enable_expert_bias = architecture.moe_router_enable_expert_bias
    model = PolicyModel(
        config=transformer_config,
        transformer_layer_spec=layer_spec(
            architecture, transformer_config, resolve_transformer_impl(config), vp_stage=vp_stage
        ),
        vocab_size=padded_vocab_size(architecture.vocab_size, transformer_config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rotary_percent=architecture.rotary_percent,
        vp_stage=vp_stage,
    )
    model.true_vocab_size = architecture.vocab_size
    model.head_chunk_size = config.head_chunk_size
    model.logit_softcap = architecture.logit_softcap
    if has_own_rope(architecture):
        model.rotary_pos_emb = RotaryTable(architecture, model.rotary_pos_emb)
        model.long_sequences = long_sequences(architecture)
    if architecture.groups_by_best_expert:
        assert architecture.moe_router_num_groups is not None and architecture.moe_router_group_topk is not None
        limit_groups(
            model,
            num_groups=architecture.moe_router_num_groups,
            chosen_groups=architecture.moe_router_group_topk,
        )
    if architecture.moe_router_enable_expert_bias:
        _keep_expert_biases(model)
    if pre_process and architecture.scale_embeddings:
        _scale_embeddings(model, architecture.hidden_size**0.5)
    if config.has_router_losses:
        model.router_losses = attach_router_losses(
            model, aux_loss_coeff=config.moe_aux_loss_coeff, z_loss_coeff=config.moe_z_loss_coeff
        )
    return model


def _keep_expert_biases(model: PolicyModel) -> None:
    """Keep Megatron-Core's load balancing from the routers' biases: they are part of the model that is aligned.

    Once a router is built these two flags ask for nothing but counts of tokens (router.py, _apply_expert_bias) and the
    update by them (finalize_model_grads.py, _update_router_expert_bias).
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.enable_expert_bias = False
    model.config.moe_router_enable_expert_bias = False


def _scale_embeddings(model: PolicyModel, factor: float) -> None:
    """Multiply what the embedding returns by a factor of the weights' type as Gemma2TextScaledWordEmbedding does.

    A hook, for GPTModel builds the embedding itself. Sequence parallelism has given each rank its tokens by then.
    """
    rounded = torch.tensor(factor, dtype=model.config.params_dtype, device="cpu").item()
    model.embedding.register_forward_hook(lambda module, inputs, output: output * rounded)


def forward(
    model: Any,
    tokens_BS: Tensor,
    position_ids_BS: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    parents: Tensor | None = None,
    max_seqlen: int = 0,
    lengths_B: Tensor | None = None,
    response: ResponseTokens | None = None,
) -> Tensor:
    """Run one stage, wrapped or not -> [R] log-probabilities, logits [B, S, V / TP], or the next stage's input.

    Args:
        cu_seqlens: int32, boundaries of the documents of a packed micro-batch (B = 1), the last equal to S.
        parents: int32, for each document the number of the one that it continues, or -1; where prompts are shared.
        max_seqlen: length of the longest sequence, in tokens.
        lengths_B: int64, tokens of each sequence; the losses of a mixture's routers need them.
        response: without it the last stage returns logits.
    """
    packed = None
    stage = get_attr_wrapped_model(model, "router_losses", return_model_obj=True)
    if stage.long_sequences is not None:
        stage.long_sequences.note(lengths_B)
    if cu_seqlens is not None:
        groups = stage.pg_collection
        rank, size = groups.cp.rank(), groups.cp.size()
        row = Row(cu_seqlens, parents, num_tokens=tokens_BS.shape[1] * size, rank=rank, size=size)
        packed = PackedDocuments(
            qkv_format="thd",
            cu_seqlens_q=row.shares,
            cu_seqlens_kv=row.shares,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            row=row,
        )
        if stage.router_losses and lengths_B is not None:
            packed.lengths = lengths_B
            packed.sequence_of_token = sequence_of_tokens(
                cu_seqlens,
                lengths_B,
                num_tokens=tokens_BS.shape[1],
                context_group=groups.cp,
                sequence_group=groups.tp if stage.config.sequence_parallel else None,
            )
    return model(
        input_ids=tokens_BS,
        position_ids=position_ids_BS,
        attention_mask=None,
        packed_seq_params=packed,
        labels=response,
    )
