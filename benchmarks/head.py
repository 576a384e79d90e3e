"""Figures C1 and C2: the head's time and memory beside three others, forward and backward, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.head
    OMP_NUM_THREADS=1 python -m benchmarks.head --only times      # one part, into head_times.json

C1: every head gets the same hidden states, weight, labels and gradient, the logits being hidden @ weight.T in bfloat16,
widened to float32. C2: a padded batch of preference pairs, all of whose positions the official head sends through the
vocabulary; ours takes the rows that predict a response token. Each memory is a fresh process's peak over what it held
before, less the results that any head returns (the two gradients). Times are CPU seconds of heads that take turns.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import Row, alternate, describe_cpu, peak_in_child, peak_of, ratio_of_medians, write_results
from megatron_sppo.command_line import run as run_tool
from megatron_sppo.config import parse
from megatron_sppo.objective import linear_log_probs, sequence_sums

# T = tokens, H = hidden size, V = vocabulary, B = sequences, S = padded length, R = response tokens.
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
NAME = "head.py"
ROWS_PER_LOOP = 512
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of the comparison."""

    tokens: int = 2048
    """T of C1; memory is also taken at T / 2."""
    hidden: int = 2048
    vocab: int = 128256
    chunk_size: int | None = None
    """`chunk_size` of our head in C1's times; None: its default. 512 at a smaller vocabulary keeps as large a share of
    the logits for backward as the default keeps at V=128256."""
    repeats: int = 5
    """Measured turns of each head, after the one that is checked."""
    pairs: int = 4
    """Pairs in C2's padded batch; all logits of the official head take 22 bytes each at its peak."""
    recipe_vocab: int = 32000
    """V of C2's second batch, of 8 pairs: the official recipe's model (Mistral 7B) and pairs per device."""
    only: Literal["memory", "times", "padded"] | None = None
    """One part, written to head_PART.json; None: all three, written to head.json."""
    machine: str | None = None
    """Folder under benchmarks/results; None names the processor."""

    def __post_init__(self) -> None:
        assert self.repeats >= 5 and self.tokens % 2 == 0


def ours(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The head of this package -> [T], float32."""
    return linear_log_probs(hidden_TH, weight_VH, labels_T, chunk_size=chunk_size)


def log_softmax_gather(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """The official SPPO code's: log_softmax of all logits, then gather -> [T]. Its models widen the logits."""
    logits = (hidden_TH @ weight_VH.T).float()
    return logits.log_softmax(-1).gather(-1, labels_T.unsqueeze(-1)).squeeze(-1)


def selective_log_softmax(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """TRL's way with float32 logits: the label's logit less a logsumexp, sequence by sequence -> [T]."""
    logits = (hidden_TH @ weight_VH.T).float()
    chosen = logits.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.cat([rows.logsumexp(-1) for rows in logits.split(ROWS_PER_LOOP)])


def cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """Torch's fused log-softmax and pick -> [T]."""
    return -F.cross_entropy((hidden_TH @ weight_VH.T).float(), labels_T, reduction="none")


HEADS: dict[str, Head] = {
    "ours": ours,
    "log_softmax+gather (official SPPO)": log_softmax_gather,
    "selective log-softmax (TRL)": selective_log_softmax,
    "F.cross_entropy": cross_entropy,
}


def inputs(num_tokens: int, num_hidden: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw hidden states [T, H], weight [V, H] (both bfloat16), labels [T], gradient [T] of the log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, num_hidden, dtype=torch.bfloat16).normal_(generator=generator).mul_(num_hidden**-0.5)
    hidden = torch.empty(num_tokens, num_hidden, dtype=torch.bfloat16).normal_(generator=generator).mul_(2)
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.randn(num_tokens, generator=generator)


def forward_backward(head: Head, hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> list[Tensor]:
    """Take a head there and back -> log-probabilities, gradients of hidden and weight."""
    log_prob = head(hidden, weight, labels)
    return [log_prob.detach(), *torch.autograd.grad(log_prob, (hidden, weight), grad)]


def check_equal(expected: list[Tensor], found: list[Tensor], *, name: str) -> None:
    """Refuse to time what computes something else: log-probabilities to 0.02 nats, gradients to 1 % in norm."""
    for what, want, have in zip(("log-probabilities", "dh", "dW"), expected, found, strict=True):
        if what == "log-probabilities":
            error, limit = float((want - have).abs().max()), 0.02
        else:
            error, limit = float((want.float() - have.float()).norm() / want.float().norm()), 0.01
        print(f"    {name}: {what} differ by {error:.2g}", flush=True)
        assert error <= limit, f"{name}: {what} differ by {error:.3g} (limit {limit:g})"


def memory_of(name: str, num_tokens: int, num_hidden: int, vocab: int) -> tuple[int, int]:
    """Peak of one forward and backward, in this process -> (bytes before, peak bytes)."""
    forward_backward(HEADS[name], *inputs(16, 64, 256))  # the libraries' own start-up
    return peak_of(partial(forward_backward, HEADS[name], *inputs(num_tokens, num_hidden, vocab)))


def over_floor(name: str, num_tokens: int, config: HeadConfig) -> float:
    """MiB over the floor (dW and dh) of a head in a fresh process."""
    before, peak = peak_in_child(memory_of, name, num_tokens, config.hidden, config.vocab)
    floor = 2 * config.hidden * (config.vocab + num_tokens)
    print(f"    {name}: T={num_tokens} peak {(peak - before) / MIB:.0f} MiB, floor {floor / MIB:.0f} MiB", flush=True)
    return (peak - before - floor) / MIB


def compare_memory(config: HeadConfig) -> list[Row]:
    """C1 -> rows of memory and of its dependence on T."""
    memory = {name: over_floor(name, config.tokens, config) for name in HEADS}
    half = {name: over_floor(name, config.tokens // 2, config) for name in HEADS}
    rows = []
    for peer in list(HEADS)[1:]:
        less = memory[peer] / memory["ours"]
        rows.append(
            Row(
                id="C1",
                metric=f"MiB over the dW+dh floor, bf16 T={config.tokens} H={config.hidden} V={config.vocab}",
                ours=memory["ours"],
                peer=memory[peer],
                peer_name=peer,
                ratio=less,
                target="peer / ours >= 12",
                met=less >= 12,
            )
        )
    for peer in list(HEADS)[1:]:
        growth = memory["ours"] / half["ours"]
        rows.append(
            Row(
                id="C1",
                metric=f"memory over the floor at T={config.tokens} / at T={config.tokens // 2}",
                ours=growth,
                peer=memory[peer] / half[peer],
                peer_name=peer,
                ratio=growth,
                target="ours <= 1.1",
                met=growth <= 1.1,
            )
        )
    return rows


def compare_times(config: HeadConfig) -> list[Row]:
    """C1 -> rows of time."""
    tensors = inputs(config.tokens, config.hidden, config.vocab)
    heads = HEADS | {"ours": partial(ours, chunk_size=config.chunk_size)}
    found = forward_backward(heads["ours"], *tensors)
    for name, head in heads.items():
        if name != "ours":
            check_equal(forward_backward(head, *tensors), found, name=name)
    del found
    seconds = alternate(
        {name: partial(forward_backward, head, *tensors) for name, head in heads.items()}, repeats=config.repeats
    )
    rows = []
    size = f"bf16 T={config.tokens} H={config.hidden} V={config.vocab}, {torch.get_num_threads()} thread(s)"
    for peer in list(HEADS)[1:]:
        ratio, spread = ratio_of_medians(seconds["ours"], seconds[peer])
        rows.append(
            Row(
                id="C1",
                metric=f"CPU seconds, {size}",
                ours=statistics.median(seconds["ours"]),
                peer=statistics.median(seconds[peer]),
                peer_name=peer,
                ratio=ratio,
                target="ours / peer <= 1.05",
                met=ratio <= 1.05,
                spread=spread,
            )
        )
    return rows


def draw_lengths(num_pairs: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw prompts' and responses' lengths -> [B] and [B] tokens, B = 2 * num_pairs, a pair's rows side by side.

    Chat prompts and answers, log-normal: prompts of median 120 tokens, cut at 512; responses of median 250, sequences
    cut at 1024. The cuts are the official recipe's; the medians are near UltraFeedback's.
    """
    prompt = np.clip(generator.lognormal(np.log(120), 0.9, num_pairs), 8, 512).astype(np.int64).repeat(2)
    response = np.clip(generator.lognormal(np.log(250), 0.6, 2 * num_pairs), 4, 1024 - prompt).astype(np.int64)
    return prompt, response


def compare_padded(config: HeadConfig) -> list[Row]:
    """C2 -> rows of time on two padded batches, and of positions over many."""
    generator = np.random.default_rng(7)
    shares = []
    for _ in range(10_000):
        prompts, responses = draw_lengths(8, generator)
        shares.append(16 * (prompts + responses).max() / responses.sum())
    return [
        time_padded(config, num_pairs=config.pairs, vocab=config.vocab),
        time_padded(config, num_pairs=8, vocab=config.recipe_vocab),
        Row(
            id="C2",
            metric="positions sent through the vocabulary / response tokens, median of 10,000 batches of 8 pairs: "
            "what the rows above rest on",
            ours=1.0,
            peer=float(np.median(shares)),
            peer_name="official padded head",
            ratio=float(np.median(shares)),
            target=None,
            met=None,
            spread=[float(np.min(shares)), float(np.max(shares))],
        ),
    ]


def time_padded(config: HeadConfig, *, num_pairs: int, vocab: int) -> Row:
    """Time one padded batch of typical lengths through both heads -> its row."""
    prompt, response = draw_lengths(num_pairs, np.random.default_rng(typical_seed(num_pairs)))
    num_sequences, length = len(prompt), int((prompt + response).max())
    hidden, weight, labels, _ = inputs(num_sequences * length, config.hidden, vocab)
    coefficient = torch.randn(num_sequences, generator=torch.Generator().manual_seed(1))
    column = torch.arange(length)
    start, stop = torch.from_numpy(prompt).unsqueeze(1), torch.from_numpy(prompt + response).unsqueeze(1)
    predicts = ((column >= start - 1) & (column < stop - 1)).reshape(-1)
    sequence = torch.arange(num_sequences).repeat_interleave(length)

    def official() -> list[Tensor]:
        log_prob = log_softmax_gather(hidden, weight, labels)
        sums = (log_prob * predicts).view(num_sequences, length).sum(-1)
        return [sums.detach(), *torch.autograd.grad(sums, (hidden, weight), coefficient)]

    def rows_only() -> list[Tensor]:
        sums = sequence_sums(
            linear_log_probs(hidden[predicts], weight, labels[predicts]), sequence[predicts], num_sequences
        ).float()
        return [sums.detach(), *torch.autograd.grad(sums, (hidden, weight), coefficient)]

    wanted, found = official(), rows_only()
    wanted[0], found[0] = wanted[0] / response.mean(), found[0] / response.mean()
    check_equal(wanted, found, name="official padded head (sums per token)")
    del wanted, found
    seconds = alternate({"ours": rows_only, "official": official}, repeats=config.repeats)
    ratio, spread = ratio_of_medians(seconds["official"], seconds["ours"])
    share = num_sequences * length / response.sum()
    return Row(
        id="C2",
        metric=f"CPU seconds, {num_pairs} pairs, {num_sequences}x{length} positions, {response.sum()} response "
        f"tokens (x{share:.2f}), H={config.hidden} V={vocab}",
        ours=statistics.median(seconds["ours"]),
        peer=statistics.median(seconds["official"]),
        peer_name="official padded head",
        ratio=ratio,
        target="peer / ours >= 3",
        met=bool(ratio >= 3),
        spread=spread,
    )


def typical_seed(num_pairs: int) -> int:
    """Find the seed below 201 whose batch has the median ratio of positions to response tokens: no lucky batch."""
    ratios = []
    for seed in range(201):
        prompt, response = draw_lengths(num_pairs, np.random.default_rng(seed))
        ratios.append(len(prompt) * int((prompt + response).max()) / int(response.sum()))
    return int(np.argsort(ratios, kind="stable")[100])


def main() -> None:
    """Measure and write benchmarks/results/<machine>/head.json."""
    config = parse(HeadConfig, name=NAME, description=str(__doc__))
    rows: list[Row] = []
    parts = {"memory": compare_memory, "times": compare_times, "padded": compare_padded}
    name = f"head_{config.only}" if config.only else "head"
    for compare in [parts[config.only]] if config.only else parts.values():  # written part by part: all take minutes
        rows += compare(config)
        write_results(name, rows, machine=config.machine or describe_cpu(), packages=["torch", "numpy"])


if __name__ == "__main__":
    run_tool(main, name=NAME)
