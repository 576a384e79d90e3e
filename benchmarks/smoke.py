"""The first minute on a Hopper: every kernel that training calls, held against the formula in float64.

    python -m benchmarks.smoke

Transformer Engine's norm with linear layer in bfloat16 and in each FP8 recipe, its attention over documents of unequal
lengths, its fused Adam, and the head. Errors are relative, by norm. Rounding to bfloat16 moves a number by at most
2^-9 of it, to E4M3 by 2^-4, to E5M2 by 2^-3: those are the bounds, twice for bfloat16, which rounds what goes in and
what comes out. Each kind of kernel has a process of its own, so that one that dies hides none. Exit code 1: a kernel is
wrong, or there is none for this GPU.
"""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common import recipe

from benchmarks.record import Row, describe_machine, figure, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.objective import linear_log_probs

NAME = "smoke.py"
BFLOAT16, E4M3, E5M2 = 2 * 2.0**-9, 2.0**-4, 2.0**-3
RECIPES: dict[str, Any] = {
    "bf16": None,
    "FP8 tensorwise": recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID),
    "FP8 blockwise": recipe.Float8BlockScaling(),
    "FP8 delayed": recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, amax_history_len=16),
}

# T = tokens, H = hidden size, F = outputs, V = vocabulary


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """Sizes, of which the defaults are those of a small model's layer."""

    tokens: int = 4096
    hidden: int = 2048
    vocab: int = 128256
    machine: str | None = None
    """Folder under benchmarks/results; unset: named after the GPU."""


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN counts as a difference."""
    value = float(((found.double() - wanted).norm() / wanted.norm()).detach())
    return value if value == value else sys.float_info.max


def random(*shape: int) -> Tensor:
    """Draw bfloat16 numbers on the GPU that want a gradient."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def linear(config: SmokeConfig, name: str) -> list[Row]:
    """Norm and product, there and back, thrice for the recipe that looks at past calls -> rows."""
    layer = te.LayerNormLinear(
        config.hidden,
        2 * config.hidden,
        normalization="RMSNorm",
        bias=False,
        params_dtype=torch.bfloat16,
        device="cuda",
    )
    hidden_TH, grad_TF = (
        random(config.tokens, config.hidden),
        torch.randn_like(random(config.tokens, 2 * config.hidden)),
    )
    for _ in range(3):
        hidden_TH.grad = layer.weight.grad = None
        with te.fp8_autocast(enabled=RECIPES[name] is not None, fp8_recipe=RECIPES[name]):
            output_TF = layer(hidden_TH)
        output_TF.backward(grad_TF)
    wide_TH = hidden_TH.detach().double().requires_grad_()
    weight, gain = (
        parameter.detach().double().requires_grad_() for parameter in (layer.weight, layer.layer_norm_weight)
    )
    wanted_TF = torch.nn.functional.rms_norm(wide_TH, (config.hidden,), gain, layer.eps) @ weight.T
    wanted_TF.backward(grad_TF.double())
    narrow = name != "bf16"
    return [
        _row(f"{name}: output of norm and linear layer", error(output_TF, wanted_TF), E4M3 if narrow else BFLOAT16),
        _row(f"{name}: gradient of the input", error(hidden_TH.grad, wide_TH.grad), E5M2 if narrow else BFLOAT16),
        _row(f"{name}: gradient of the weight", error(layer.weight.grad, weight.grad), E5M2 if narrow else BFLOAT16),
    ]


def attention() -> list[Row]:
    """Two documents of 96 and 160 tokens in one row, 16 heads over 4 -> rows."""
    bounds = torch.tensor([0, 96, 256], dtype=torch.int32, device="cuda")
    query, key, value = random(256, 16, 128), random(256, 4, 128), random(256, 4, 128)
    layer = te.DotProductAttention(16, 128, num_gqa_groups=4, attn_mask_type="padding_causal", qkv_format="thd")
    output = layer(query, key, value, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=160, max_seqlen_kv=160)
    grad = torch.randn_like(output)
    output.backward(grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    documents = zip(*(tensor.split([96, 160]) for tensor in wide), strict=True)
    wanted = torch.cat([_attend(*document) for document in documents])
    wanted.backward(grad.double())
    rows = [_row("attention over documents: output", error(output, wanted), BFLOAT16)]
    for name, found, want in zip(("query", "key", "value"), (query, key, value), wide, strict=True):
        # Probabilities are rounded on the way back as well.
        rows.append(
            _row(f"attention over documents: gradient of the {name}", error(found.grad, want.grad), 2 * BFLOAT16)
        )
    return rows


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    key, value = (tensor.repeat_interleave(4, dim=0) for tensor in heads[1:])
    score = heads[0] @ key.transpose(1, 2) / 128**0.5
    visible = torch.ones_like(score, dtype=torch.bool).tril()
    return (score.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(0, 1).flatten(1)


def adam() -> list[Row]:
    """Adam's first step in float32: every element moves by lr g / (|g| + eps) -> rows."""
    weight = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda"))
    before, weight.grad = weight.detach().double(), torch.randn_like(weight)
    te.optimizers.FusedAdam([weight], lr=1e-3, weight_decay=0.0).step()
    wanted = -1e-3 * weight.grad.double() / (weight.grad.double().abs() + 1e-8)
    # A weight of up to 4 steps by 2^-22 in float32, a move is 2^-10.
    return [_row("fused Adam: the first move", error(weight.detach().double() - before, wanted), 2.0**-12)]


def head(config: SmokeConfig) -> list[Row]:
    """Log-probabilities and gradients of our head on 512 tokens -> rows."""
    hidden_TH, weight_VH = (
        random(512, config.hidden),
        (random(config.vocab, config.hidden).detach() / 32).requires_grad_(),
    )
    labels_T = torch.randint(config.vocab, (512,), device="cuda")
    log_prob_T = linear_log_probs(hidden_TH, weight_VH, labels_T)
    log_prob_T.sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    wanted_T = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    wanted_T.sum().backward()
    return [
        _row("head: log-probabilities", error(log_prob_T, wanted_T), BFLOAT16),
        _row("head: gradient of the hidden states", error(hidden_TH.grad, wide[0].grad), BFLOAT16),
        _row("head: gradient of the weight", error(weight_VH.grad, wide[1].grad), BFLOAT16),
    ]


def of_each(kinds: dict[str, Callable[[], list[Row]]]) -> list[Row]:
    """Measure each kind in a child, which looks for the GPU anew -> rows; of one that died, one that says so."""
    rows, context = [], multiprocessing.get_context("fork")
    for kind, measure in kinds.items():
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=lambda: there.send(measure()))  # noqa: B023 (it has forked when it is called)
        child.start()
        there.close()
        try:
            rows += here.recv()
            child.join()
        except EOFError:
            child.join()
            died = f"{kind}: the process died (exit code {child.exitcode})"
            rows.append(_figure(died, None, None, "float64", None, "lives", False))
    return rows


def _row(metric: str, found: float, bound: float) -> Row:
    return _figure(metric, found, None, "float64", found, f"<= {bound:.2g}", found <= bound)


_figure = partial(figure, "S")


def main() -> None:
    """Measure and write benchmarks/results/<machine>/smoke.json."""
    config = parse(SmokeConfig, name=NAME, description=str(__doc__))
    torch.manual_seed(0)
    kinds: dict[str, Callable[[], list[Row]]] = {name: partial(linear, config, name) for name in RECIPES}
    rows = of_each(kinds | {"attention": attention, "Adam": adam, "head": partial(head, config)})
    write_results("smoke", rows, machine=config.machine or describe_machine(), packages=["torch"])
    wrong = [row.metric for row in rows if not row.met]
    if wrong:
        sys.exit(f"smoke: {len(wrong)} of {len(rows)} kernels are wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    run_tool(main, name=NAME)
