"""Latent attention: keys and values of all heads are made of one small vector a token (DeepSeek-V2, V3, Kimi-K2).

Megatron-Core's own (0.16.1 and 0.19.2, multi_latent_attention.py) wants a config of another class, norms its latent
vectors with the layers' epsilon where transformers has 1e-6, computes YaRN by itself, and knows no shared prompts. This
one has its place in the layer, its parameters' names and its keys in a checkpoint (those of its Transformer Engine
spec). What makes the latent vectors, and norms them, is torch's and held whole by every tensor-parallel rank.

S = tokens, B = sequences, N = heads of this tensor-parallel rank, R = rotated channels of a head.
"""

from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from megatron_sppo.architecture import Architecture
from megatron_sppo.model.normalization import RMSNorm

_EPSILON = 1e-6
"""Of the norms of latent vectors, whatever rms_norm_eps is (transformers 5.19, modeling_deepseek_v2.py and _v3.py)."""
_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class Parts(NamedTuple):
    """The classes of its modules, of one layer implementation."""

    column: Any
    """Column-parallel linear layer."""
    row: Any
    """Row-parallel linear layer."""
    core_attention: Any


class _Whole(torch.nn.Module):
    """Linear layer without bias, the same on every tensor-parallel rank: [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            config.init_method(self.weight)
        # As that of a norm: under sequence parallelism each rank saw other tokens, and finalize_model_grads adds up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)


class MultiLatentAttention(MegatronModule):
    """What a layer's `self_attention` is: [S, B, H] to [S, B, H], causal within each document."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        architecture: Architecture,
        parts: Parts,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        """Build it for one layer.

        Args:
            layer_number: of the whole model, from 1.
        """
        super().__init__(config)
        assert architecture.latent_attention is not None
        self.layer_number, self.shape = layer_number, architecture.latent_attention
        # The factor of cosine and sine, of queries and of keys: here all of it on the queries.
        scaling, heads = architecture.rope_scaling, config.num_attention_heads
        self.rotary_factor = 1.0 if scaling is None else scaling.attention_factor**2
        self.recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        shape, hidden = self.shape, config.hidden_size
        if shape.q_lora_rank is None:
            self.linear_q_proj = self._divided(parts.column, hidden, heads * shape.query_head_dim, "q_proj")
        else:
            self.linear_q_down_proj = _Whole(hidden, shape.q_lora_rank, config)
            self.q_layernorm = RMSNorm(config, shape.q_lora_rank, eps=_EPSILON)
            self.linear_q_up_proj = self._divided(
                parts.column, shape.q_lora_rank, heads * shape.query_head_dim, "q_up_proj"
            )
        self.linear_kv_down_proj = _Whole(hidden, shape.kv_down_channels, config)
        self.kv_layernorm = RMSNorm(config, shape.kv_lora_rank, eps=_EPSILON)
        self.linear_kv_up_proj = self._divided(
            parts.column, shape.kv_lora_rank, heads * shape.kv_up_head_dim, "kv_up_proj"
        )
        self.core_attention = parts.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=architecture.latent_softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_proj = parts.row(
            heads * shape.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
        )

    def _divided(self, column: Any, inputs: int, outputs: int, buffer: str) -> Any:
        """Make a linear layer to all heads, which tensor-parallel ranks divide."""
        return column(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=buffer,
        )

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Any = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Attend -> ([S, B, H], no bias). A given mask is ignored: padding lies at the end."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            context: Tensor = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=AttnMaskType.causal,
                packed_seq_params=packed_seq_params,
            )
            return context

        query, key, value = self._heads(hidden, rotary_pos_emb, packed_seq_params)
        width = value.shape[-1]
        # No kernel, torch's for the CPU and Transformer Engine's, refuses heads of one width; of two widths many do.
        value = pad(value, (0, query.shape[-1] - width))
        if self.recomputes and self.training:
            context = checkpoint(attend, query, key, value, **_AGAIN)
        else:
            context = attend(query, key, value)
        context = context.unflatten(-1, (-1, query.shape[-1]))[..., :width].flatten(-2)
        output, _ = self.linear_proj(context if packed_seq_params is None else context.unsqueeze(1))
        return output, None

    def _heads(self, hidden: Tensor, table: Tensor, packed: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate -> query and key [S, B, N, D], value [S, B, N, V]; without B when packed.

        Args:
            table: angles of the rotated channels [S, 1, 1, R], of all context-parallel ranks when packed.
        """
        shape = self.shape
        if shape.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        latent, rotated = self.linear_kv_down_proj(hidden).split((shape.kv_lora_rank, shape.qk_pos_emb_head_dim), -1)
        both, _ = self.linear_kv_up_proj(self.kv_layernorm(latent.contiguous()))
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            rotated = gather_from_sequence_parallel_region(rotated, group=group)
        else:
            rotated = copy_to_tensor_model_parallel_region(rotated, group=group)
        if packed is not None:
            query, both, rotated = (tensor.squeeze(1) for tensor in (query, both, rotated))
        query, both = query.unflatten(-1, (-1, shape.query_head_dim)), both.unflatten(-1, (-1, shape.kv_up_head_dim))
        plain, turned = query.split((shape.qk_head_dim, shape.qk_pos_emb_head_dim), -1)
        turned = self._rotate(turned, table, packed)
        query = torch.cat((plain, turned if self.rotary_factor == 1.0 else turned * self.rotary_factor), dim=-1)
        plain, value = both.split((shape.qk_head_dim, shape.v_head_dim), -1)
        turned = self._rotate(rotated.unsqueeze(-2), table, packed)
        key = torch.cat((plain, turned.expand(*plain.shape[:-1], -1)), dim=-1)
        return query, key, value

    def _rotate(self, channels: Tensor, table: Tensor, packed: Any) -> Tensor:
        """Turn [S, B, N, R] by the table's angles; neighbours come out half of the channels apart."""
        if self.shape.rotary_interleaved:
            channels = torch.cat((channels[..., 0::2], channels[..., 1::2]), dim=-1)
        turned: Tensor = apply_rotary_pos_emb(
            channels,
            table,
            config=self.config,
            cu_seqlens=None if packed is None else packed.cu_seqlens_q,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        return turned

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe its tensors, those that every rank holds as such -> {key: ShardedTensor}."""
        whole = {
            f"{name}.weight": module.weight
            for name, module in self.named_children()
            if isinstance(module, _Whole) or name.endswith("_layernorm")
        }
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(whole, prefix, {}, sharded_offsets)
        for name, module in self.named_children():
            if f"{name}.weight" not in whole:
                sharded |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        return sharded
