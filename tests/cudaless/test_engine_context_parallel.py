"""Transformer Engine's own ring of context parallelism over gloo ranks, on the emulated kernels: as one rank.

What it does not show: NCCL, and what its streams run at the same time.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cudaless.engine.constants import DType
from tests.distributed.harness import run_ranks

HEADS, GROUPS, WIDTH = 4, 2, 16
DOCUMENTS = (8, 24, 16)
"""Tokens, multiples of 2 * 2 ranks and of 2 * 4."""
ROWS = sum(DOCUMENTS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs(form: str) -> list[Tensor]:
    """q, k, v and the output's gradient of one sequence, [ROWS, 1, heads, WIDTH], or of packed ones."""
    lead = (ROWS, 1) if form == "sbhd" else (ROWS,)
    return [normal(*lead, heads, WIDTH, seed=seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS, HEADS))]


def bounds(form: str) -> Tensor:
    lengths = (ROWS,) if form == "sbhd" else DOCUMENTS
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def zigzag(form: str, rank: int, size: int) -> list[int]:
    """List a rank's tokens: chunks r and 2 * size - 1 - r of each sequence's 2 * size."""
    tokens: list[int] = []
    for first, last in itertools.pairwise(bounds(form).tolist()):
        chunk = (last - first) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            tokens += range(first + index * chunk, first + (index + 1) * chunk)
    return tokens


def attention_of_a_rank(form: str) -> tuple[list[int], list[np.ndarray], dict[str, int]]:
    """Run DotProductAttention under the ring -> (this rank's tokens, output and gradients of them, kernels called)."""
    import transformer_engine.pytorch as te

    from tests.cudaless.engine import CALLS

    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    cu_seqlens = bounds(form).cuda()
    tokens = zigzag(form, rank, size)
    *qkv, grad = (tensor[tokens].cuda() for tensor in inputs(form))
    qkv = [tensor.requires_grad_() for tensor in qkv]
    mask = "causal" if form == "sbhd" else "padding_causal"
    layer = te.DotProductAttention(HEADS, WIDTH, num_gqa_groups=GROUPS, qkv_format=form, attn_mask_type=mask)
    layer.set_context_parallel_group(dist.new_group(), list(range(size)), torch.cuda.Stream(), "p2p")
    longest = max(DOCUMENTS)
    packed = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
    output = layer(*qkv, **(packed if form == "thd" else {}))
    output.backward(grad.reshape(output.shape))
    results = [tensor.detach().cpu().float().numpy() for tensor in (output, *(tensor.grad for tensor in qkv))]
    calls = dict(CALLS)
    dist.destroy_process_group()
    return tokens, results, calls


def truth(form: str) -> list[Tensor]:
    """The formula in float64, document by document -> output, gradients of q, k, v."""
    *qkv, grad = (tensor.double().reshape(ROWS, -1, WIDTH) for tensor in inputs(form))
    q, k, v = qkv = [tensor.requires_grad_() for tensor in qkv]
    outputs = []
    for first, last in itertools.pairwise(bounds(form).tolist()):
        wide = [tensor[first:last].repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (q, k, v)]
        scores = torch.einsum("qhd,khd->hqk", wide[0], wide[1]) / WIDTH**0.5
        later = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), wide[2]))
    output = torch.cat(outputs)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in qkv)]


@pytest.mark.parametrize(("form", "ranks"), [("thd", 2), ("sbhd", 2), ("thd", 4)])
def test_the_ring_is_one_rank(form: str, ranks: int) -> None:
    """Within 2^-7 of the norm for two ranks; of four each adds its part to gradients in bfloat16, 2^-9 a time."""
    found = run_ranks(attention_of_a_rank, ranks, form, timeout=90)
    assert sorted(itertools.chain(*(tokens for tokens, _, _ in found))) == list(range(ROWS))
    for _, _, calls in found:
        assert calls["fused_attn_fwd"] == calls["fused_attn_bwd"] == ranks
        assert ("thd_out_correction" in calls) == (form == "thd")
    for index, wanted in enumerate(truth(form)):
        whole = torch.full_like(wanted, torch.nan)
        for tokens, results, _ in found:
            whole[tokens] = torch.from_numpy(results[index]).double().reshape(len(tokens), *wanted.shape[1:])
        assert float((whole - wanted).norm()) <= 2**-7 * ranks / 2 * float(wanted.norm())


def scale_of_a_rank() -> tuple[float, float]:
    """Quantise a rank's own values with a reduced amax -> (1 / scale, largest value)."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    dist.init_process_group("nccl")
    quantizer = Float8CurrentScalingQuantizer(
        DType.kFloat8E4M3, torch.device("cuda"), with_amax_reduction=True, amax_reduction_group=dist.group.WORLD
    )
    tensor = quantizer(torch.full((16, 16), 1.0 + dist.get_rank()).cuda())
    result = tensor._scale_inv.item(), tensor.dequantize().max().item()
    dist.destroy_process_group()
    return result


def test_ranks_that_share_a_tensor_share_its_scale() -> None:
    """Rank 1 holds 2, so both scale by 448 / 2."""
    assert run_ranks(scale_of_a_rank, 2) == [(pytest.approx(2 / 448), 1.0), (pytest.approx(2 / 448), 2.0)]


def gathered_blocks_of_a_rank() -> bool:
    """Gather a rank's 128 rows in blocks of FP8, as sequence parallelism does -> whether they are the whole's."""
    from transformer_engine.pytorch.distributed import gather_along_first_dim
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    dist.init_process_group("nccl")
    whole = normal(256, 128, seed=0).cuda()
    mine = whole[dist.get_rank() * 128 :][:128].contiguous()
    quantizer = Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)
    found, _ = gather_along_first_dim(mine, dist.group.WORLD, quantizer=quantizer)
    wanted = quantizer(whole)
    names = "_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"
    same = all(torch.equal(getattr(found, name).cpu(), getattr(wanted, name).cpu()) for name in names)
    dist.destroy_process_group()
    return same


def test_blocks_gathered_over_ranks_are_the_whole_s() -> None:
    """What Transformer Engine's `_all_gather_fp8_blockwise` (distributed.py, 2.11.0) says that it returns."""
    assert run_ranks(gathered_blocks_of_a_rank, 2) == [True, True]


def waits_of_a_rank() -> list[Any]:
    """Pass a number round the ring by each way and wait for it twice, as NCCL allows -> what came."""
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    came = []
    for batched in (False, True):
        sent, received = torch.full((3,), float(rank)).cuda(), torch.empty(3).cuda()
        if batched:
            ways = (dist.isend, sent, (rank + 1) % size), (dist.irecv, received, (rank - 1) % size)
            requests = dist.batch_isend_irecv([dist.P2POp(*way) for way in ways])
        else:
            requests = [dist.isend(sent, (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
        for request in [*requests, *requests]:
            request.wait()
        came.append(received.tolist())
    dist.destroy_process_group()
    return came


def test_a_message_can_be_waited_for_twice() -> None:
    """As Transformer Engine's backward does (context_parallel.py, 2.11.0): gloo's own request would wait for ever."""
    assert run_ranks(waits_of_a_rank, 2, timeout=30) == [[[1.0] * 3] * 2, [[0.0] * 3] * 2]
