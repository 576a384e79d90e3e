"""Fused attention and FlexAttention of the emulation against the formula in float64 and its autograd.

What it does not show: cuDNN rounds the weights of the softmax to the inputs' type before it multiplies by V.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd

WIDTH, VALUES = 16, 24


@dataclass(frozen=True)
class Case:
    layout: str = "sbhd"
    mask: str = "causal"
    window: tuple[int, int] = (-1, -1)
    heads: int = 4
    groups: int = 2
    queries: tuple[int, ...] = (9, 9)
    """Tokens of each sequence; in sbhd and bshd room is for the longest."""
    keys: tuple[int, ...] | None = None
    """As `queries`, if None."""
    padding: int = 0
    """Rows behind each sequence, thd only."""
    sees: Callable[[int, int, int, int], bool] = field(default=lambda q, k, Q, K: k <= q)
    """(query, key, queries, keys) -> whether that query sees that key."""


CASES = {
    "causal": Case(),
    "bshd": Case(layout="bshd"),
    "one group a head": Case(groups=4),
    "one group": Case(groups=1),
    "no mask": Case(mask="no_mask", keys=(7, 7), sees=lambda q, k, Q, K: True),
    "window": Case(window=(3, 0), sees=lambda q, k, Q, K: q - 3 <= k <= q),
    "window on both sides": Case(mask="no_mask", window=(2, 1), sees=lambda q, k, Q, K: q - 2 <= k <= q + 1),
    "bottom right": Case(
        mask="causal_bottom_right", queries=(4, 4), keys=(9, 9), sees=lambda q, k, Q, K: k <= q + K - Q
    ),
    "padded batch": Case(mask="padding_causal", queries=(9, 4)),
    "thd": Case(layout="thd", mask="padding_causal", queries=(5, 1, 12)),
    "thd, padding between": Case(layout="thd", mask="padding_causal", queries=(5, 0, 12), padding=3),
    "thd, window": Case(
        layout="thd", mask="padding_causal", queries=(5, 12), window=(3, 0), sees=lambda q, k, Q, K: q - 3 <= k <= q
    ),
    "thd, other keys": Case(
        layout="thd", mask="padding", queries=(5, 3), keys=(2, 8), padding=2, sees=lambda q, k, Q, K: True
    ),
}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cumulative(lengths: tuple[int, ...], padding: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(length + padding for length in lengths)], dtype=dtype)


class Call:
    """Tensors of a case as the kernel takes them, and each sequence's rows of them."""

    def __init__(self, case: Case) -> None:
        self.case, self.keys = case, case.keys or case.queries
        self.q = self._make(case.queries, case.heads, WIDTH, seed=0)
        self.k = self._make(self.keys, case.groups, WIDTH, seed=1)
        self.v = self._make(self.keys, case.groups, VALUES, seed=2)
        self.grad = self._make(case.queries, case.heads, VALUES, seed=3)
        self.lengths = cumulative(case.queries).cuda(), cumulative(self.keys).cuda()
        places = cumulative(case.queries, case.padding).cuda(), cumulative(self.keys, case.padding).cuda()
        self.places = places if case.padding else (None, None)
        self.longest = max(case.queries), max(self.keys)

    def _make(self, lengths: tuple[int, ...], heads: int, width: int, seed: int) -> Tensor:
        longest, count = max(lengths), len(lengths)
        rows = sum(lengths) + count * self.case.padding
        shape = {"sbhd": (longest, count), "bshd": (count, longest), "thd": (rows,)}[self.case.layout]
        return normal(*shape, heads, width, seed=seed).cuda()

    def rows(self, tensor: Tensor, lengths: tuple[int, ...], number: int) -> Tensor:
        """View one sequence of a CPU tensor -> [rows, heads, width]."""
        if self.case.layout == "thd":
            first = int(cumulative(lengths, self.case.padding)[number])
            return tensor[first : first + lengths[number]]
        whole = tensor[:, number] if self.case.layout == "sbhd" else tensor[number]
        return whole[: lengths[number]]

    def settings(self) -> dict[str, Any]:
        case, layout = self.case, self.case.layout
        return {
            "fused_attention_backend": FusedAttnBackend["F16_arbitrary_seqlen"],
            "attn_scale": 0.3,
            "qkv_layout": f"{layout}_{layout}_{layout}",
            "attn_mask_type": case.mask,
            "window_size": case.window,
            "cu_seqlens_q_padded": self.places[0],
            "cu_seqlens_kv_padded": self.places[1],
        }

    def forward(self, **changes: Any) -> tuple[Tensor, list[Tensor]]:
        longest = changes.pop("longest", self.longest)
        lengths = changes.pop("lengths", self.lengths)
        tensors = changes.pop("tensors", (self.q, self.k, self.v))
        return fused_attn_fwd(True, *longest, *lengths, *tensors, torch.bfloat16, **{**self.settings(), **changes})

    def backward(self, output: Tensor, aux: list[Tensor]) -> list[Tensor]:
        tensors = self.q, self.k, self.v, output, self.grad
        kind = TE_DType[torch.bfloat16]
        fixed = *self.longest, *self.lengths, *tensors, torch.bfloat16, kind, aux
        settings = self.settings()
        return fused_attn_bwd(*fixed, settings.pop("fused_attention_backend"), **settings)[:3]


def formula(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int, int, int], bool]) -> tuple[Tensor, Tensor]:
    """One sequence -> (output [rows, H, values], log-sum-exp [H, rows])."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    size = len(q), len(k)
    seen = torch.tensor([[sees(i, j, *size) for j in range(size[1])] for i in range(size[0])])
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("name", CASES)
def test_output_statistics_and_gradients_are_the_formula_s(name: str) -> None:
    """Within 2^-7 of the norm: a rounding to bfloat16 takes 2^-9 at most, and gradients start from an output that was
    rounded. A token that sees itself alone has a gradient of 0. In thd rows of no sequence are 0."""
    call = Call(CASES[name])
    output, aux = call.forward()
    gradients = call.backward(output, aux)
    assert aux[0].dtype == torch.float32 and aux[0].shape[-1] == 1
    found = [tensor.cpu().double() for tensor in (output, *gradients)]
    for number in range(len(call.case.queries)):
        lengths = call.case.queries, call.keys, call.keys
        if not lengths[0][number]:
            continue
        given = [
            call.rows(tensor.cpu(), length, number).double().requires_grad_()
            for tensor, length in zip((call.q, call.k, call.v), lengths, strict=True)
        ]
        wanted, stats = formula(*given, call.case.sees)
        wanted.backward(call.rows(call.grad.cpu(), lengths[0], number).double())
        lse = aux[0].cpu().double()
        lse = call.rows(lse, lengths[0], number)[..., 0].T if call.case.layout == "thd" else lse[number, :, :, 0]
        torch.testing.assert_close(lse[:, : lengths[0][number]], stats.detach(), rtol=1e-5, atol=1e-5)
        exact = [wanted.detach(), *(tensor.grad for tensor in given)]
        for mine, true, length in zip(found, exact, (lengths[0], *lengths), strict=True):
            rows = call.rows(mine, length, number)
            assert float((rows - true).norm()) <= 2**-7 * float(true.norm()) + 1e-5
            rows.zero_()
    if call.case.layout == "thd":
        assert all(not tensor.any() for tensor in found)


def test_backward_takes_the_statistics_of_keys_that_are_elsewhere() -> None:
    """Two halves of the keys, each differentiated alone with the log-sum-exp and the output of both: context
    parallelism's way. Their gradients are the parts of the whole's."""
    call = Call(Case(mask="no_mask", queries=(6,), keys=(8,), sees=lambda q, k, Q, K: True))
    output, aux = call.forward()
    whole = call.backward(output, aux)
    halves = []
    for first in (0, 4):
        part = Call(Case(mask="no_mask", queries=(6,), keys=(4,)))
        part.q, part.grad = call.q, call.grad
        part.k, part.v = (tensor[first : first + 4].contiguous() for tensor in (call.k, call.v))
        halves.append([tensor.cpu().double() for tensor in part.backward(output, aux)])
    joined = [halves[0][0] + halves[1][0], *(torch.cat([halves[0][i], halves[1][i]]) for i in (1, 2))]
    for found, wanted in zip(joined, whole, strict=True):
        torch.testing.assert_close(found, wanted.cpu().double(), rtol=2**-7, atol=2**-7)


THD = Case(layout="thd", mask="padding_causal", queries=(5, 12))
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int64": ("cu_seqlens_q is torch.int64", {"lengths": (cumulative((5, 12), dtype=torch.int64).cuda(),) * 2}),
    "longer than max_seqlen": ("a sequence of 12 tokens, and max_seqlen is 11", {"longest": (11, 12)}),
    "more tokens than rows": ("leave a tensor of 17 rows", {"lengths": (cumulative((6, 12)).cuda(),) * 2}),
    "float32": (
        "cuDNN takes one 16-bit type",
        {"tensors": [normal(17, 4, WIDTH, seed=0, dtype=torch.float32).cuda()] * 3},
    ),
    "CPU lengths": ("illegal memory access", {"lengths": (cumulative((5, 12)),) * 2}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cudnn_refuses_is_refused(name: str) -> None:
    message, changes = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        Call(THD).forward(**changes)


def test_transformer_engine_s_module_takes_the_fused_kernel() -> None:
    """DotProductAttention chooses it by itself for bfloat16 in packed rows, and refuses float32 there."""
    call = Call(Case(layout="thd", mask="padding_causal", queries=(5, 12)))
    call.v = normal(17, 2, WIDTH, seed=2).cuda()
    attention = te.DotProductAttention(
        4, WIDTH, num_gqa_groups=2, qkv_format="thd", attn_mask_type="padding_causal", softmax_scale=0.3
    )
    settings = {"cu_seqlens_q": call.lengths[0], "cu_seqlens_kv": call.lengths[1]}
    found = attention(call.q, call.k, call.v, **settings, max_seqlen_q=12, max_seqlen_kv=12)
    wanted, _ = call.forward(tensors=(call.q, call.k, call.v))
    assert torch.equal(found.cpu(), wanted.cpu().flatten(1))


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0) + 0.1 * head


def test_flex_attention_is_the_formula_of_its_predicate() -> None:
    """Documents, a window, groups, a soft cap and a bias by head. The query of document 2 sees nothing: 0."""
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    on_gpu = document.cuda()

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        near = (key <= query) & (query - key < 3)
        return near & (on_gpu[query] == on_gpu[key]) & (on_gpu[query] != 2)

    mask = create_block_mask(sees, None, None, 8, 8, device="cuda")
    given = [normal(2, heads, 8, WIDTH, seed=heads, dtype=torch.float32).cuda() for heads in (4, 2, 2)]
    given[2] = given[2] * 2
    given = [tensor.requires_grad_() for tensor in given]
    grad = normal(2, 4, 8, WIDTH, seed=9, dtype=torch.float32)
    found, lse = flex_attention(*given, score_mod=capped, block_mask=mask, scale=0.5, enable_gqa=True, return_lse=True)
    found.backward(grad.cuda())
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    q, (k, v) = exact[0], (tensor.repeat_interleave(2, 1) for tensor in exact[1:])
    scores = 2 * torch.tanh(q @ k.transpose(2, 3) * 0.5 / 2) + 0.1 * torch.arange(4)[:, None, None]
    i, j = torch.arange(8)[:, None], torch.arange(8)
    seen = (j <= i) & (i - j < 3) & (document[:, None] == document) & (document[:, None] != 2)
    weights = torch.exp(scores) * seen
    total = weights.sum(-1, keepdim=True)
    wanted = weights / total.clamp_min(1e-30) @ v
    wanted.backward(grad.double())
    torch.testing.assert_close(found.detach().cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.detach().cpu().double(), total[..., 0].log().detach(), rtol=1e-5, atol=1e-5)
    for mine, true in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.grad.cpu().double(), true.grad, rtol=1e-4, atol=1e-5)


def test_flex_attention_takes_more_keys_than_queries_and_a_mask_of_those_sizes_only() -> None:
    q, k = normal(1, 2, 4, WIDTH, seed=0).cuda(), normal(1, 2, 8, WIDTH, seed=1).cuda()
    mask = create_block_mask(lambda b, h, i, j: j <= i + 4, None, None, 4, 8, device="cuda")
    found = flex_attention(q, k, k, block_mask=mask)
    exact_q, exact_k = q.cpu().double(), k.cpu().double()
    hidden = torch.arange(8) > torch.arange(4)[:, None] + 4
    scores = (exact_q @ exact_k.transpose(2, 3) / WIDTH**0.5).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(found.cpu().double(), scores.softmax(-1) @ exact_k, rtol=2**-8, atol=2**-8)
    with pytest.raises(ValueError, match="made for"):
        flex_attention(k, k, k, block_mask=mask)
    with pytest.raises(ValueError, match="enable_gqa"):
        flex_attention(q, k[:, :1], k[:, :1], block_mask=mask)
