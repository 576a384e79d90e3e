"""DeBERTa-v2's encoder, read at a few positions of each text: transformers' weights and formulas, less work.

The attention of arXiv:2006.03654 adds to q_i . k_j the products q_i . K[b(i - j)] and k_j . Q[b(i - j)] with
embeddings of the bucketed distance. Equal to transformers' DebertaV2Model (tests/unit/judge/test_deberta.py), and:
- K and Q, the projected distance embeddings, are made once: transformers projects them in every forward of every layer,
  a fifth of the work at one text a batch;
- only the distances that a text of this length has are multiplied;
- the last layer is computed at the wanted positions alone.

# P = texts in a batch, S = tokens, H = hidden size, h = heads, d = H / h, W = distance buckets, N = wanted positions
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from megatron_sppo.errors import ConfigError

_REQUIRED = {
    "relative_attention": True,
    "share_att_key": True,
    "position_biased_input": False,
    "conv_kernel_size": 0,
    "pos_att_type": {"c2p", "p2c"},
}
"""What deberta-v3 says in its config.json; the encoder does nothing else."""


class MarkerEncoder:
    """A loaded DebertaV2Model, for inference; its weights must not change any more."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        """Project the distance embeddings of every layer of a DebertaV2Model.

        Raises:
            ConfigError: the model is a variant of DeBERTa-v2 that this encoder does not compute.
        """
        check_config(model.config)
        self._network = model
        self._num_heads = model.config.num_attention_heads
        self._num_buckets = model.config.position_buckets
        self._max_distance = self._network.encoder.max_relative_positions
        self._last_length = 0
        self._last_buckets: tuple[Tensor, slice] = torch.empty(0), slice(0)
        embeddings = self._network.encoder.get_rel_embedding()[: 2 * self._num_buckets]
        attentions = [layer.attention.self for layer in self._network.encoder.layer]
        self._position_keys = [self._heads(one.key_proj(embeddings)[None])[0] for one in attentions]
        """[h, W, d] a layer."""
        self._position_queries = [self._heads(one.query_proj(embeddings)[None])[0] for one in attentions]

    def states(self, token_ids_PS: Tensor, mask_PS: Tensor | None, positions_PN: Tensor) -> Tensor:
        """Encode a batch -> [P, N, H] last hidden states at the positions.

        Args:
            mask_PS: 1 at tokens, 0 at padding; None where nothing is padded.
        """
        hidden_PSH = self._network.embeddings(input_ids=token_ids_PS, mask=mask_PS)
        padding_P11S = None if mask_PS is None else (mask_PS == 0)[:, None, None, :]
        num_layers = len(self._network.encoder.layer)
        for number in range(num_layers - 1):
            hidden_PSH = self._layer(number, hidden_PSH, padding_P11S)
        return self._layer(num_layers - 1, hidden_PSH, padding_P11S, positions_PN)

    def _layer(
        self, number: int, hidden_PSH: Tensor, padding_P11S: Tensor | None, positions_PN: Tensor | None = None
    ) -> Tensor:
        """Apply one layer -> [P, S, H], or [P, N, H] where positions are given."""
        layer = self._network.encoder.layer[number]
        attention = layer.attention.self
        wanted = hidden_PSH
        if positions_PN is not None:
            rows = torch.arange(len(hidden_PSH), device=hidden_PSH.device)[:, None]
            wanted = hidden_PSH[rows, positions_PN]
        query = self._heads(attention.query_proj(wanted))
        key, value = self._heads(attention.key_proj(hidden_PSH)), self._heads(attention.value_proj(hidden_PSH))
        # q . k, q . K and k . Q: three terms, so that scores are divided by sqrt(3 d).
        scale = 1 / math.sqrt(3 * query.shape[-1])
        bias = self._distance_scores(number, query, key, positions_PN).mul_(scale)
        if padding_P11S is not None:
            bias = bias.masked_fill_(padding_P11S, torch.finfo(bias.dtype).min)
        context = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        context = context.transpose(1, 2).reshape(wanted.shape)
        attended = layer.attention.output(context, wanted)
        return layer.output(layer.intermediate(attended), attended)

    def _distance_scores(self, number: int, query: Tensor, key: Tensor, positions_PN: Tensor | None) -> Tensor:
        """q_i . K[b(i - j)] + k_j . Q[b(i - j)] -> [P, h, S or N, S]."""
        num_pairs, num_heads, length, _ = key.shape
        buckets, used = self._buckets(length, key.device)
        keys, queries = self._position_keys[number][:, used], self._position_queries[number][:, used]
        from_query = query @ keys.transpose(-1, -2)
        if positions_PN is None:
            index = buckets.expand(num_pairs, num_heads, length, length)
            # The second product lies [W, S], so that the gathered scores need no transposition.
            return from_query.gather(-1, index).add_((queries @ key.transpose(-1, -2)).gather(-2, index))
        buckets_PNS = buckets[positions_PN]
        index = buckets_PNS[:, None].expand(-1, num_heads, -1, -1)
        from_key = torch.einsum("phsd,hpnsd->phns", key, queries[:, buckets_PNS])
        return from_query.gather(-1, index).add_(from_key)

    def _buckets(self, length: int, device: torch.device) -> tuple[Tensor, slice]:
        """Bucket the distances i - j of a text -> ([S, S] int64 into the used buckets, which buckets are used)."""
        if self._last_length != length:  # batches come sorted by length
            distances = torch.arange(1 - length, length)
            bucket = make_log_bucket_position(distances, self._num_buckets, self._max_distance).to(torch.int64)
            bucket = (bucket + self._num_buckets).clamp(0, 2 * self._num_buckets - 1)
            first, last = int(bucket[0]), int(bucket[-1])
            places = torch.arange(length, device=device)
            index = places[:, None] - places[None, :] + length - 1
            self._last_buckets = (bucket - first).to(device)[index], slice(first, last + 1)
            self._last_length = length
        return self._last_buckets

    def _heads(self, rows: Tensor) -> Tensor:
        """[P, S, H] -> [P, h, S, d]."""
        return rows.view(*rows.shape[:-1], self._num_heads, -1).transpose(1, 2)


def check_config(config: DebertaV2Config) -> None:
    """Refuse a variant of DeBERTa-v2 that MarkerEncoder does not compute.

    Raises:
        ConfigError: names the first setting that differs from deberta-v3's.
    """
    for name, required in _REQUIRED.items():
        value: Any = getattr(config, name, 0 if name == "conv_kernel_size" else None)
        if (set(value or ()) if isinstance(required, set) else value) != required:
            raise ConfigError(f"this PairRM's DeBERTa has {name} {value!r}, not {required!r}. Use a deberta-v3 PairRM.")
    if config.position_buckets < 1 or config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"this PairRM's DeBERTa has {config.position_buckets} position buckets and {config.num_attention_heads} "
            f"heads for a hidden size of {config.hidden_size}. Use a deberta-v3 PairRM."
        )
