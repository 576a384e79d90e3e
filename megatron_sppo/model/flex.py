"""Attention by FlexAttention: the kernel for rows that Transformer Engine has none for, and none other than a kernel.

Those are shared prompts, soft-capped scores, sinks, and windows under context parallelism. Compiled, it holds what any
flash attention holds; run uncompiled it would make all [heads, queries, keys] scores, as it does on the CPU, in tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from megatron_sppo.errors import ConfigError
from megatron_sppo.model.visibility import Row

_COMPILATIONS = 32
"""Most kernels of a process. A run makes up to 6: for the first row, for rows of any other length and for those of a
single block, with and without gradients. A process that runs several models makes as many for each."""

_LEAST_WIDTH = 16
"""Of a head (torch 2.11, _inductor/kernel/flex/flex_attention.py: "embedding dimension ... at least 16")."""
_KERNEL = {"BACKEND": "TRITON"}
"""Left to itself, torch takes its decoding kernel for rows of fewer than 128 tokens, and has none of our masks' kind
(2.11 on an H200: NoValidChoicesError)."""


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Row,
    *,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from this rank's tokens [S / C, B, Q, D] to the row's [S, B, G, D] -> [S / C, B, Q, D].

    Args:
        sinks: [Q], a further score of each head, without a value: the softmax over scores s and a sink z is that over s
            alone times sum exp(s) / (sum exp(s) + exp(z)), which is sigmoid(logsumexp(s) - z).

    Raises:
        ConfigError: there are more kinds of rows than kernels may be compiled for.
    """
    width = value.shape[-1]
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    query, key, value = (_wide_enough(tensor).permute(1, 2, 0, 3) for tensor in (query, key, value))
    plain: Any = flex_attention
    attend = _compiled() if query.is_cuda else plain
    found = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_capping(query.new_full((), softcap, dtype=torch.float32)),
        block_mask=row.block_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
        kernel_options=_KERNEL,
    )
    if sinks is None:
        context: Tensor = found
    else:
        context, further = found
        taken_BQS = torch.sigmoid(further.lse - sinks.float()[:, None])
        context = (context * taken_BQS[..., None]).to(query.dtype)
    return context[..., :width].permute(2, 0, 1, 3)


def _wide_enough(heads: Tensor) -> Tensor:
    """Widen heads by zeros to what the kernels take: they change no score, and values get zeros of their own."""
    return torch.nn.functional.pad(heads, (0, max(0, _LEAST_WIDTH - heads.shape[-1])))


def _soft_capping(softcap: Tensor) -> Callable[..., Tensor]:
    """Make the function s -> c tanh(s / c) of a score; c a tensor, for a Python number would be compiled in."""

    def score_mod(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def _compiled(backend: str = "inductor") -> Callable[..., Any]:
    """Compile -> flex_attention as a kernel for any number of tokens, or an error.

    `fullgraph` is what makes dynamo raise at its limit; without, it runs the function as it stands, all scores at once.
    Not `dynamic`: sizes that change become symbols anyway, and with it the scale would, which kernels want as a number.
    """
    kernel: Callable[..., Any] = torch.compile(flex_attention, backend=backend, fullgraph=True)

    def attend(*tensors: Tensor, **settings: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
                return kernel(*tensors, **settings)
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"FlexAttention has been compiled {_COMPILATIONS} times, each for another kind of micro-batch, and "
                "uncompiled it would hold the scores of all pairs of tokens. Use --no-share-prompts; "
                "TORCH_LOGS=recompiles says what differs."
            ) from error

    return attend
