"""Figure G1: the head on a GPU beside its three matrix products, eager PyTorch, Liger and cut-cross-entropy.

    python -m benchmarks.head_gpu                                                    T = 8192 and 32768
    python -m benchmarks.head_gpu --tokens 64 --hidden 64 --vocab 512 --repeats 2    a dry run on any machine

The roofline is an H100's or H200's: three products at 989 TFLOP/s, and of our head what it multiplies again and the
bytes of its elementwise kernels besides (megatron_sppo/objective/log_ratio.py has the arithmetic).

Every head goes forward and backward on the same bfloat16 hidden states and weight; log-probabilities and gradients are
first checked equal. Liger and cut-cross-entropy take part where they are installed; who runs out of memory is named.
"""

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.record import Row, alternate_seconds, describe_machine, figure, ratio_of_medians, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.objective import linear_log_probs
from megatron_sppo.objective.log_ratio import column_blocks, default_chunk_size, spare_blocks

NAME = "head_gpu.py"
GIB = 1 << 30
FLOPS = 989e12
"""Dense bfloat16 operations per second, of an H100 and of an H200."""
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12}
"""Bytes per second of their memories; other machines are held against an H100."""
KERNEL_BYTES = 6
"""That our kernels move of each bfloat16 logit: read in forward, read and written in backward (tests/triton)."""
Head = Callable[[Tensor, Tensor, Tensor], Tensor]

# T = tokens, H = hidden size, V = vocabulary


@dataclass(frozen=True, kw_only=True)
class HeadGpuConfig:
    """Sizes of the comparison."""

    tokens: tuple[int, ...] = (8192, 32768)
    hidden: int = 4096
    vocab: int = 128256
    repeats: int = 5
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the GPU."""


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax in float32 and a gather: the official SPPO code's way -> [T]."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's kernel, per token -> [T]."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused kernel, which computes gradients in its forward pass -> [T]."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")


def heads() -> dict[str, Head]:
    """List ours and the peers that are installed."""
    found: dict[str, Head] = {"ours": linear_log_probs, "eager": eager}
    for name, package, head in (
        ("Liger", "liger_kernel", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
    ):
        if importlib.util.find_spec(package) is not None:
            found[name] = head
        else:
            print(f"    {name} is not installed: left out", flush=True)
    return found


def forward_backward(head: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Take the sum of log-probabilities there and back -> log-probabilities, gradients of hidden and weight."""
    log_prob = head(hidden, weight, labels)
    return [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), (hidden, weight))]


@torch.no_grad()
def three_products(hidden: Tensor, weight: Tensor) -> None:
    """Do the matrix products that no head can do without: logits and both gradients, nothing else."""
    logits = hidden @ weight.T
    torch.mm(logits, weight)
    torch.mm(logits.T, hidden)


def peak_over_floor(head: Head, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Peak of a forward and backward over what its two gradients take -> GiB."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(head, *tensors)
    floor = tensors[0].nbytes + tensors[1].nbytes
    return (torch.cuda.max_memory_allocated() - before - floor) / GIB


def rooflines(config: HeadGpuConfig, num_tokens: int) -> tuple[float, float]:
    """Work out the least seconds of the three products, and of our head -> (products, ours)."""
    card = next((name for name in BANDWIDTHS if name in describe_machine().upper()), "H100")
    chunk_size = default_chunk_size(config.vocab, 2, device_type="cuda")
    columns, num_kept, size = column_blocks(config.vocab, num_tokens, chunk_size, device_type="cuda")
    num_kept += spare_blocks(columns, size, num_tokens, hidden_size=config.hidden)
    again = 1 - sum(block.stop - block.start for block in columns[-num_kept:]) / config.vocab
    product = 2 * num_tokens * config.hidden * config.vocab / FLOPS
    passes = KERNEL_BYTES * num_tokens * config.vocab / BANDWIDTHS[card]
    return 3 * product, (3 + again) * product + passes


def check_equal(wanted: list[Tensor], found: list[Tensor], name: str) -> None:
    """Refuse to time what computes something else: 0.05 nats, 2 % of a gradient's norm."""
    error = float((wanted[0] - found[0]).abs().max())
    assert error <= 0.05, f"{name}: log-probabilities differ by {error:.3g}"
    for what, want, have in zip(("dh", "dW"), wanted[1:], found[1:], strict=True):
        error = float((want.float() - have.float()).norm() / want.float().norm())
        assert error <= 0.02, f"{name}: {what} differs by {error:.3g}"


def compare(config: HeadGpuConfig, num_tokens: int) -> list[Row]:
    """Compare the heads at one T -> rows."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    hidden = (2 * torch.randn(num_tokens, config.hidden, device=device)).bfloat16().requires_grad_()
    weight = (torch.randn(config.vocab, config.hidden, device=device) / config.hidden**0.5).bfloat16().requires_grad_()
    labels = torch.randint(config.vocab, (num_tokens,), device=device)
    tensors = (hidden, weight, labels)
    size = f"bf16 T={num_tokens} H={config.hidden} V={config.vocab}"
    wanted = forward_backward(linear_log_probs, *tensors)
    running: dict[str, Head] = {}
    rows = []
    for name, head in heads().items():
        try:
            if name != "ours":
                check_equal(forward_backward(head, *tensors), wanted, name)
            running[name] = head
        except torch.cuda.OutOfMemoryError:
            rows.append(_row(f"runs, {size}", 1.0, None, f"{name}: out of memory", None, None, None))
    del wanted
    runs: dict[str, Callable[[], object]] = {
        name: partial(forward_backward, head, *tensors) for name, head in running.items()
    }
    runs["its three products"] = partial(three_products, hidden, weight)
    runs["its three products"]()
    seconds = alternate_seconds(runs, repeats=config.repeats)
    for name in (name for name in runs if name != "ours"):
        ratio, spread = ratio_of_medians(seconds["ours"], seconds[name])
        target, met = ("<= 1.35", ratio <= 1.35) if name == "its three products" else (None, None)
        ours, theirs = (statistics.median(seconds[which]) for which in ("ours", name))
        rows.append(_row(f"seconds, {size}", ours, theirs, name, ratio, target, met, spread))
    products, least = rooflines(config, num_tokens)
    ours = statistics.median(seconds["ours"])
    for metric, found in (("seconds by arithmetic", least), ("seconds", ours)):
        name, ratio = "three products by the roofline", found / products
        rows.append(_row(f"{metric}, {size}", found, products, name, ratio, None, None))
    if on_gpu:
        peaks = {name: peak_over_floor(head, tensors) for name, head in running.items()}
        for name, peak in peaks.items():
            ours, has_target = peaks["ours"], name == "ours" and num_tokens == 32768
            target = "ours <= 1" if has_target else None
            met = ours <= 1 if has_target else None
            rows.append(_row(f"GiB over dW + dh, {size}", ours, peak, name, ours, target, met))
    return rows


_row = partial(figure, "G1")


def main() -> None:
    """Measure and write benchmarks/results/<machine>/head_gpu.json."""
    config = parse(HeadGpuConfig, name=NAME, description=str(__doc__))
    rows = [row for num_tokens in config.tokens for row in compare(config, num_tokens)]
    write_results("head_gpu", rows, machine=config.machine or describe_machine(), packages=["torch"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
