"""cuDNN's fused attention, forward and backward, in sbhd, bshd and thd, through its log-sum-exp.

B = sequences, T = tokens of all, S = rows of one sequence's place, H = heads, G = groups of keys and values, D = head
size. Products and softmax are in float32 here; cuDNN rounds the weights to the inputs' type before it multiplies by V.
That packed results start as zeros, and others as they come, is pytorch/csrc/extensions/attention.cpp (2.11.0).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.cudaless.engine.constants import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from tests.cudaless.engine.kernel import kernel, require_int32


def get_fused_attn_backend(
    is_training: bool,
    q_dtype: DType,
    kv_dtype: DType,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    dropout: float,
    num_heads: int,
    num_groups: int,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    head_dim_v: int,
    window_size_left: int,
    window_size_right: int,
    return_max_logit: bool = False,
    cuda_graph: bool = False,
) -> NVTE_Fused_Attn_Backend:
    """Say whether cuDNN 9.13 on a Hopper has a kernel for this: the one of any length, or none.

    Caller: pytorch/attention/dot_product_attention/utils.py get_attention_backend (2.11.0).
    """
    unknown = q_dtype not in (DType.kFloat16, DType.kBFloat16) or q_dtype != kv_dtype or bias_type or softmax_type
    uneven = head_dim_qk % 8 or head_dim_v % 8 or max(head_dim_qk, head_dim_v) > 256 or num_heads % num_groups
    unpadded = "T" in _form(qkv_layout) and "PADDING" not in NVTE_Mask_Type(attn_mask_type).name
    if unknown or uneven or unpadded or dropout:
        return NVTE_Fused_Attn_Backend.NVTE_No_Backend
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def _form(layout: NVTE_QKV_Layout) -> str:
    """-> SBHD, BSHD or THD; q, k and v come apart whether or not they share memory."""
    return NVTE_QKV_Layout(layout).name.removeprefix("NVTE_").split("_")[0].replace("3", "")


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a call: which rows are its queries and its keys."""

    form: str
    number: int
    queries: slice
    keys: slice

    def rows(self, tensor: Tensor, span: slice) -> Tensor:
        """View a sequence's rows -> [heads, rows, D]."""
        if self.form == "THD":
            return tensor[span].transpose(0, 1)
        if self.form == "SBHD":
            return tensor[span, self.number].transpose(0, 1)
        return tensor[self.number, span].transpose(0, 1)

    def stats(self, lse: Tensor) -> Tensor:
        """View a sequence's log-sum-exp -> [H, queries, 1]."""
        return lse[self.queries].transpose(0, 1) if self.form == "THD" else lse[self.number, :, self.queries]


def _sequences(
    form: str,
    mask: NVTE_Mask_Type,
    lengths: tuple[Tensor, Tensor],
    places: tuple[Tensor | None, Tensor | None],
    tensors: tuple[Tensor, Tensor],
    longest: tuple[int, int],
) -> list[_Sequence]:
    """Cut a call into its sequences.

    Args:
        lengths: cumulative, without padding, of queries and of keys.
        places: where each begins, if padding lies between; thd only.
        longest: what the caller says that no sequence exceeds.

    Raises:
        RuntimeError: cumulative lengths that are not int32, a sequence that is longer than said or leaves its tensor.
    """
    require_int32(cu_seqlens_q=lengths[0], cu_seqlens_kv=lengths[1])
    require_int32(cu_seqlens_q_padded=places[0], cu_seqlens_kv_padded=places[1])
    sides = []
    for cumulative, starts, tensor, limit in zip(lengths, places, tensors, longest, strict=True):
        sizes = cumulative.diff().tolist()
        if form == "THD":
            firsts = (cumulative if starts is None else starts).tolist()
        else:
            firsts = [0] * len(sizes)
            if "PADDING" not in mask.name:
                sizes = [tensor.shape[0 if form == "SBHD" else 1]] * len(sizes)
        if sizes and max(sizes) > limit:
            raise RuntimeError(f"attention: a sequence of {max(sizes)} tokens, and max_seqlen is {limit}")
        room = tensor.shape[1 if form == "BSHD" else 0]
        if any(first + size > room for first, size in zip(firsts, sizes, strict=False)):
            raise RuntimeError(f"attention: sequences leave a tensor of {room} rows")
        sides.append([slice(first, first + size) for first, size in zip(firsts, sizes, strict=False)])
    pairs = enumerate(zip(*sides, strict=True))
    return [_Sequence(form, i, q, k) for i, (q, k) in pairs if q.stop > q.start and k.stop > k.start]


def _hidden(mask: NVTE_Mask_Type, window: tuple[int, int], queries: int, keys: int) -> Tensor:
    """Say which keys a query does not see -> [queries, keys] bool. A negative side of the window has no end."""
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    if "BOTTOM_RIGHT" in mask.name:
        query = query + keys - queries
    left, right = window
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if "CAUSAL" in mask.name:
        hidden |= key > query
    if left >= 0:
        hidden |= key < query - left
    if right >= 0:
        hidden |= key > query + right
    return hidden


def _scores(query: Tensor, key: Tensor, scale: float, hidden: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)


def _for_each_head(tensor: Tensor, heads: int) -> Tensor:
    """Repeat keys or values for the heads of their group, [G, rows, D] -> [H, rows, D] float32."""
    return tensor.float().repeat_interleave(heads // len(tensor), 0)


def _require_one_type(*tensors: Tensor) -> None:
    types = {tensor.dtype for tensor in tensors}
    if len(types) > 1 or not types <= {torch.bfloat16, torch.float16}:
        raise RuntimeError(
            f"attention of {', '.join(str(tensor.dtype) for tensor in tensors)}; cuDNN takes one 16-bit type"
        )


@kernel
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    *rest: Any,
) -> list[Tensor]:
    """Attend -> [output, log-sum-exp, the random state that backward wants back].

    Caller: pytorch/cpp_extensions/fused_attn.py fused_attn_fwd (2.11.0). Output has the queries' shape with V's head
    size; in thd rows of no sequence are 0. Log-sum-exp is float32, [B, H, S, 1], in thd [T, H, 1], and is not written
    where no query is.

    Args:
        rest: pages, quantisers, bias, softmax offset: none here; then the random generator and flags.
    """
    *absent, _generator, _elements, return_max_logit, _cuda_graph = rest
    assert not dropout and not return_max_logit and all(each is None for each in absent), "no path asks for it"
    _require_one_type(Q, K, V)
    mask, form, heads = NVTE_Mask_Type(attn_mask_type), _form(qkv_layout), Q.shape[-2]
    shape = (*Q.shape[:-1], V.shape[-1])
    out = torch.full(shape, 0.0 if form == "THD" else torch.nan, dtype=Q.dtype)
    places = {"THD": (len(Q), heads), "SBHD": (Q.shape[1], heads, len(Q)), "BSHD": (len(Q), heads, Q.shape[1])}[form]
    lse = torch.full((*places, 1), torch.nan)
    for sequence in _sequences(
        form,
        mask,
        (cu_seqlens_q, cu_seqlens_kv),
        (cu_seqlens_q_padded, cu_seqlens_kv_padded),
        (Q, K),
        (max_seqlen_q, max_seqlen_kv),
    ):
        query = sequence.rows(Q, sequence.queries).float()
        key, value = (_for_each_head(sequence.rows(each, sequence.keys), heads) for each in (K, V))
        hidden = _hidden(mask, window_size, query.shape[1], key.shape[1])
        scores = _scores(query, key, attn_scale, hidden)
        sequence.stats(lse).copy_(scores.logsumexp(-1, keepdim=True))
        sequence.rows(out, sequence.queries).copy_(scores.softmax(-1) @ value)
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


@kernel
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: NVTE_QKV_Layout,
    bias_type: NVTE_Bias_Type,
    attn_mask_type: NVTE_Mask_Type,
    softmax_type: NVTE_Softmax_Type,
    window_size: tuple[int, int],
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,  # noqa: E741
    dO: Tensor,
    fake_dtype: torch.dtype,
    dqkv_type: DType,
    aux_ctx_tensors: list[Tensor],
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    *rest: Any,
) -> list[Tensor | None]:
    """Differentiate attention -> [dQ, dK, dV, None, None]; in thd 0 in rows of no sequence.

    Caller: pytorch/cpp_extensions/fused_attn.py fused_attn_bwd (2.11.0). With P = exp(scores - log-sum-exp):
    dV = P' dO; dS = P * (dO V' - rowsum(dO * O)) * scale; dQ = dS K; dK = dS' Q. The log-sum-exp may be that of more
    keys than are here, as context parallelism has it.
    """
    assert not dropout
    _require_one_type(Q, K, V, O, dO)
    mask, form, heads = NVTE_Mask_Type(attn_mask_type), _form(qkv_layout), Q.shape[-2]
    unwritten = 0.0 if form == "THD" else torch.nan
    dQ, dK, dV = (torch.full(tensor.shape, unwritten, dtype=tensor.dtype) for tensor in (Q, K, V))
    for sequence in _sequences(
        form,
        mask,
        (cu_seqlens_q, cu_seqlens_kv),
        (cu_seqlens_q_padded, cu_seqlens_kv_padded),
        (Q, K),
        (max_seqlen_q, max_seqlen_kv),
    ):
        query, output, grad = (sequence.rows(each, sequence.queries).float() for each in (Q, O, dO))
        key, value = (_for_each_head(sequence.rows(each, sequence.keys), heads) for each in (K, V))
        hidden = _hidden(mask, window_size, query.shape[1], key.shape[1])
        weights = torch.exp(_scores(query, key, attn_scale, hidden) - sequence.stats(aux_ctx_tensors[0]))
        inner = grad @ value.transpose(1, 2) - (grad * output).sum(-1, keepdim=True)
        slope = weights * inner * attn_scale
        sequence.rows(dQ, sequence.queries).copy_(slope @ key)
        for target, of_heads in ((dK, slope.transpose(1, 2) @ query), (dV, weights.transpose(1, 2) @ grad)):
            rows = sequence.rows(target, sequence.keys)
            rows.copy_(of_heads.unflatten(0, (len(rows), -1)).sum(1))
    return [dQ, dK, dV, None, None]
