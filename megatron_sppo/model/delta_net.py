"""Gated delta net: what mixes the tokens of a layer in place of attention (Qwen3-Next, Qwen3.5).

Megatron-Core's own (0.16.1 and 0.19.2, ssm/gated_delta_net) needs flash-linear-attention's kernels, knows no shared
prompts, in 0.16 neither packed sequences nor context parallelism, and keeps one less than the weight of the norm, which
no bfloat16 turns back into the same bytes. This one has its place in the layer, and tensors and names of its own: the
rows of `in_proj` and of the convolution lie key head by key head, so that ranks divide them as they are.

S = tokens of a tensor- and context-parallel rank's products, T = tokens of the row, B = sequences, G = key heads here
(of all tensor- and context-parallel ranks: an equal share), R = value heads of a key head, K and V = their channels.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from torch.utils.checkpoint import checkpoint

from megatron_sppo.layer_parts import DeltaNet
from megatron_sppo.model.attention import gather_row
from megatron_sppo.model.delta_rule import gated_delta_rule
from megatron_sppo.model.visibility import PackedRow, Row, undivided_row

_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class _HeadNorm(torch.nn.Module):
    """RMSNorm of each value head, times silu(gate): rounded as Qwen3NextRMSNormGated."""

    def __init__(self, channels: int, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))

    def forward(self, values: Tensor, gate: Tensor) -> Tensor:
        """Normalise the last dimension -> same shape, of the gate's type. Backward sums over tensor-parallel ranks."""
        # Every rank holds the weight and uses it for its own heads.
        group = parallel_state.get_tensor_model_parallel_group()
        weight = copy_to_tensor_model_parallel_region(self.weight, group=group)
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        return (weight * (values * scale).to(gate.dtype) * silu(gate.float())).to(gate.dtype)


class GatedDeltaNet(MegatronModule):
    """What a layer's `self_attention` is: [S, B, H] to [S, B, H], causal within each document."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        shape: DeltaNet,
        column: Any,
        row: Any,
        **_: object,
    ) -> None:
        """Build it for one layer.

        Args:
            layer_number: of the whole model, from 1.
            shape: the whole model's heads.
            column: column-parallel linear layer, with the norm before it where that is fused.
            row: row-parallel linear layer.
        """
        super().__init__(config)
        self.layer_number, self.shape = layer_number, shape
        ranks = config.tensor_model_parallel_size
        shared: dict[str, Any] = {"config": config, "bias": False, "is_expert": False}
        self.in_proj = column(
            config.hidden_size,
            shape.projected_channels,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **shared,
        )
        channels = shape.mixed_channels // ranks
        self.conv1d_weight = self._divided((channels, 1, shape.linear_conv_kernel_dim))
        heads = (shape.linear_num_value_heads // ranks,)
        self.A_log, self.dt_bias = self._divided(heads), self._divided(heads)
        self.head_norm = _HeadNorm(shape.linear_value_head_dim, config)
        self.out_proj = row(
            shape.value_channels,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **shared,
        )

    def _divided(self, sizes: tuple[int, ...]) -> torch.nn.Parameter:
        """Make a parameter of this tensor-parallel rank's heads."""
        parameter = torch.nn.Parameter(torch.zeros(sizes, dtype=self.config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def forward(self, hidden: Tensor, *, packed_seq_params: Any = None, **_: object) -> tuple[Tensor, None]:
        """Mix the tokens -> ([S, B, H], no bias). Padding at a row's end changes nothing before it.

        Collectives on the context-parallel group: two gathers forward, of projected tokens and of what the heads make
        of them; two scatters of sums backward. Each of its ranks runs the rule over whole rows for a part of the heads.
        """
        size = self.config.context_parallel_size
        projected, _ = self.in_proj(hidden)
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        if packed_seq_params is None:
            row = undivided_row(len(projected) * size, rank=rank, size=size, device=hidden.device)
        else:
            assert isinstance(packed_seq_params, PackedRow)
            row = packed_seq_params.row
        heads = self.shape.rows_of_key_head
        projected = projected.unflatten(-1, (-1, sum(heads.values())))
        own = _share(projected.shape[2], rank, size)
        inputs = gather_row(projected, row, size=size)[:, :, own].contiguous()  # what is kept is no view of all heads
        mixed, gate, rate, decay = inputs.split(
            (heads["query"] + heads["key"] + heads["value"], heads["gate"], heads["rate"], heads["decay"]), dim=-1
        )
        # Computed again in the backward pass: a token of a head would keep some 10 KiB of the rule's own tensors.
        values = checkpoint(self._mix, mixed, rate.flatten(2), decay.flatten(2), row, own, **_AGAIN)
        gate = gate.reshape(values.shape)
        outputs = self.head_norm(values, gate).flatten(2)
        answer, _ = self.out_proj(_back_to_tokens(outputs, row, rank=rank, size=size))
        return answer, None

    def _mix(self, mixed: Tensor, rate: Tensor, decay: Tensor, row: Row, own: slice) -> Tensor:
        """Run convolution and delta rule, document by document -> float32 [T, B, G R, V].

        A document that continues another goes on from that one's last tokens and last state.

        Args:
            mixed: [T, B, G, channels of a key head's query, key and value].
            rate: [T, B, G R], before the sigmoid; `decay` likewise, before the softplus.
            own: which of this tensor-parallel rank's key heads these are.
        """
        per_head = self.shape.linear_num_value_heads // self.shape.linear_num_key_heads
        values_here = slice(own.start * per_head, own.stop * per_head)
        kernel = self.conv1d_weight.unflatten(0, (-1, mixed.shape[-1]))[own].flatten(0, 1)
        # The whole row's rates and decays: [B, G R, T].
        rate = rate.sigmoid().float().permute(1, 2, 0)
        steps = softplus(decay.float() + self.dt_bias[values_here])
        decay = (-self.A_log[values_here].float().exp() * steps).permute(1, 2, 0)
        channels = mixed.flatten(2).permute(1, 2, 0)
        continued = {parent for _, parent in row.ranges}
        tails, states = dict[int, Tensor](), dict[int, Tensor]()
        outputs = []
        for number, (here, parent) in enumerate(row.ranges):
            if here.start == here.stop:
                continue
            width = kernel.shape[-1] - 1
            before = tails[parent] if parent >= 0 else channels.new_zeros(*channels.shape[:2], width)
            seen = torch.cat((before, channels[:, :, here]), dim=-1)
            query, key, value = self._heads(silu(conv1d(seen, kernel, groups=len(kernel))))
            output, state = gated_delta_rule(
                query, key, value, decay=decay[:, :, here], rate=rate[:, :, here], state=states.get(parent)
            )
            if number in continued:
                tails[number], states[number] = seen[..., seen.shape[-1] - width :], state
            outputs.append(output)
        return torch.cat(outputs, dim=2).permute(2, 0, 1, 3)

    def _heads(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divide [B, channels, S] into heads -> float32 query and key, normalised, [B, G R, S, K], value [.., V]."""
        heads, per_head = self.shape.rows_of_key_head, self.shape.linear_num_value_heads
        per_head //= self.shape.linear_num_key_heads
        parts = (heads["query"], heads["key"], heads["value"])
        query, key, value = channels.float().unflatten(1, (-1, sum(parts))).split(parts, dim=2)
        query, key = (tensor.mT for tensor in (query, key))
        query, key = (tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + 1e-6) for tensor in (query, key))
        query = query * self.shape.linear_key_head_dim**-0.5
        query, key = (tensor.repeat_interleave(per_head, dim=1) for tensor in (query, key))
        return query, key, value.unflatten(2, (per_head, -1)).flatten(1, 2).mT

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe its tensors, the divided ones by heads -> {key: ShardedTensor}."""
        divided = dict(self.named_parameters(recurse=False))
        own = divided | {"head_norm.weight": self.head_norm.weight}
        axes = dict.fromkeys(divided, 0)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)
        for name in ("in_proj", "out_proj"):
            module = getattr(self, name)
            sharded |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        return sharded


def _share(heads: int, rank: int, size: int) -> slice:
    """Choose the key heads of a context-parallel rank."""
    return slice(rank * heads // size, (rank + 1) * heads // size)


def _back_to_tokens(outputs: Tensor, row: Row, *, rank: int, size: int) -> Tensor:
    """Give each context-parallel rank all heads of its own tokens -> [S, B, channels]; from [T, B, channels of a part].

    Collective on that group.
    """
    if size == 1:
        return outputs
    group = parallel_state.get_context_parallel_group()
    parts = gather_from_sequence_parallel_region(outputs.unsqueeze(0).contiguous(), group=group)
    return parts[:, row.held(rank)].permute(1, 2, 0, 3).flatten(2)
