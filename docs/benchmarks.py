"""Write docs/benchmarks.md: every figure of benchmarks/results in a table, with what it means.

python docs/benchmarks.py            # tests/unit/test_docs.py fails where the page is not what this writes
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/benchmarks.md"
RESULTS = REPOSITORY / "benchmarks/results"
CPU, OTHER_CPU = "cpu-amd-epyc-2core", "cpu-intel-xeon-processor-2core"
HEAD = """# Benchmarks

What was measured, where, and whether the target that was set beforehand is met. Each figure comes from a script
under `benchmarks/` that runs the peer beside us in one run, checks first that the results are equal, and writes a
JSON file with machine, versions and command. Peers run at their best documented settings; one that cannot run is
named, never estimated. A target that was missed says so.

!!! warning "Most figures are of two CPU cores"
    C1 to W1 were measured on two cores of a shared AMD EPYC, C8 and C10 on two of a shared Intel Xeon. There only
    ratios mean anything: times are CPU seconds, one thread each, taken in turns. Of the figures whose names begin with
    G, G1 and G2 are of one H200; G3 and G4 have not been measured: [One H100, ten minutes](one-hopper.md).

| name | what |
|---|---|
| C1, C2 | the head: hidden states to log-probabilities, and its use on padded pairs |
| C3 | training beside TRL and the official maths |
| C4 | a checkpoint to Megatron and back |
| C5 | packing |
| C6 | PairRM beside llm-blender |
| C7 | rollouts beside transformers; the pool's driver, simulated |
| C8, F1 to F15 | how every stage's cost grows, networks taken away |
| C10 | a training step beside a supervised step |
| W1 | weak scaling, simulated |
| M1 | a mixture's routes, replayed in training |
| R | faults that are made: tried, and passed |
| 3.1, 3.6 | the theorem and the loss, by their equations' numbers in the paper |
| G1, G2, loop | head, training step and an iteration of self-play on one H200 |
| G3, G4 | training beside TRL and PairRM beside llm-blender on a GPU: not measured |

Lengths are drawn, not taken from a data set: log-normal prompts (median 120 tokens, cut at 512) and answers (median
250).

This page is written by `docs/benchmarks.py` from `benchmarks/results/`.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One section: what is measured, by which command, and the files that hold it."""

    title: str
    text: str
    command: str
    files: tuple[str, ...] = ()


FIGURES = (
    Figure(
        title="C1: the head's memory and time",
        text="""\
From hidden states and the output weight to each token's log-probability, forward and backward, in bfloat16 with
Llama-3's vocabulary. The peers: log_softmax and gather (official SPPO), selective log-softmax (TRL),
`F.cross_entropy`. Memory is counted beyond what the two gradients need anyway. The head goes by blocks of columns
and keeps a ring of 128 MiB of logits that backward starts from; the rest is computed again, four matrix products
against three. From T=1024 to T=2048 its memory grows 1.07 times, the peers' 2.5 times.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.head",
        files=(f"{CPU}/head_times", f"{CPU}/head_memory"),
    ),
    Figure(
        title="C2: padded preference pairs",
        text="""\
A padded batch sends every position through the vocabulary; ours sends those that predict an answer's token. Each
batch is the median one of 201 drawn ones, not a favourable one.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.head --only padded",
        files=(f"{CPU}/head_padded",),
    ),
    Figure(
        title="C3: training",
        text="""\
A 22M Llama on two data-parallel processes, two steps of 2x4 pairs, five turns; losses of the same batches agree
within 2e-5. Each trainer pays for its reference. What is gained hangs on how unlike the lengths of a batch are:
here a padding trainer's slower rank computes 1.84 positions a real token, 1.96 in the mean of 100,000 such batches
of drawn lengths (1.73 at 2 pairs a rank, 1.48 at one). Three other steps, of 1.55, gave 3.6x TRL and 2.0x the
official maths, before this setup let the head keep all its logits. The peers' environment: the script's docstring.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.train_throughput --peer-python trl/bin/python",
        files=(f"{CPU}/train_throughput",),
    ),
    Figure(
        title="C4: a checkpoint to Megatron and back",
        text="""\
One layer of Llama-3-8B's shapes, 2.54 GB, there and back with equal sha256, beside `cp` followed by fsync; five
rounds with nothing else running. `cp` followed by one pass of sha256 is what is really asked for. Load-everything
is the usual way. Llama-3-70B is planned from these bandwidths, not run.""",
        command="python -m benchmarks.convert --directory EMPTY_DIR --layers 1",
        files=(f"{CPU}/convert",),
    ),
    Figure(
        title="C5: packing",
        text="""\
A million answers into packs of 8,192 tokens, beside next-fit dealt out in turn; then steps as training plans them,
on 8 ranks. Fill is real tokens over room; max/mean rank cost is how much longer the slowest rank computes than the
mean one. `K=5 responses behind one prompt` is `--share-prompts`.""",
        command="python -m benchmarks.packing",
        files=(f"{CPU}/packing",),
    ),
    Figure(
        title="C6: PairRM",
        text="""\
Both orders of each pair, 6 layers of 384, real text lengths, beside llm-blender's own `rank` at batch 1 (its best
on a CPU) and at the best of 2, 4 and 6; scores equal within 1e-5. Five turns on a busy machine.
`benchmarks/llm_blender_peer.py` says how to make the peer's environment.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.pairrm --peer-python PEER/bin/python",
        files=(f"{CPU}/pairrm",),
    ),
    Figure(
        title="C7: rollouts",
        text="""\
vLLM as the rollout stage runs it beside transformers' `generate`, SmolLM2-135M in float32, four prompts of five
answers, both checked to find the same tokens likeliest; CPU seconds of one thread in three turns on a busy machine.
On a CPU, and with prompts as short as these, it makes hardly a difference whether a prompt's answers are asked for in
one request or in K: what one request saves is the prompt. Engine steps are counted with an engine that computes
nothing.

600 engines that are simulated, on a simulated clock, and the pool's real driver: its loop and its bookkeeping are
those of a stage on Ray. An engine computes 8 answers at once, a step for each token, takes the next shard before the
last has drained, and loses all that it has at work when it dies, for a minute; the driver takes 10 ms to write a
shard. What is missing to 100 % is the end of the stage, when some engines still have an answer at work: the share
falls where a stage is shorter or an engine wider, to 86 % with 64 answers at once and shards of 16, for 100 prompts
an engine.

New weights for a running server are loaded in place and proven, beside a server that is started anew with them and
proves nothing: three turns, tests running beside.""",
        command="""\
OMP_NUM_THREADS=1 python -m benchmarks.rollouts --prompts 4 --max-tokens 32
python -m benchmarks.rollout_simulation
OMP_NUM_THREADS=1 python -m benchmarks.hand_over --model .cache/smollm2""",
        files=(f"{OTHER_CPU}/rollouts", f"{OTHER_CPU}/rollout_simulation", f"{OTHER_CPU}/hand_over"),
    ),
    Figure(
        title="C8: cost that does not grow",
        text="""\
Every stage without its network: a sampler and a judge that answer at once, K = 5, 150 tokens a prompt, 400 an
answer; models of 4 to 18 million parameters for what grows with the model. F1 to F15 are the faults that were found
when this was first looked at, as they were (commit 87e42d6, in which F3, 334 ms a step at 600,000 prompts, and F11
had been mended) and as they are. Counts decide: calls of our functions, files opened, entries of directories, bytes
read, written and hashed at 500, 1,000 and 2,000 prompts; a growth of 1 is linear. `tests/unit/test_scale.py` holds
them in every run of the tests. Seconds and memory stand beside them, at 2,000 prompts and at the largest size, from
a machine that other work kept busy. Bytes of a model's files are held against those of its weights; a checkpoint of
float32 with Adam is three times as large. A save writes each byte once, in one pass that hashes it for its tensor's
digest, which a reader of that tensor checks; a run also tries the disk with 64 MiB to know how long its checkpoint
takes. All of it is one run of one commit. At 600,000 prompts the merge and the report are measured with answers of 8
tokens.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.scale --work EMPTY_DIR --before SCALE.json",
        files=(f"{OTHER_CPU}/scale",),
    ),
    Figure(
        title="C10: a training step beside a supervised step",
        text="""\
The same Megatron model, packs, gradient buffers and optimizer. The supervised step takes all positions through the
vocabulary, by Megatron-Core's own head and loss; ours those of the answers. Seven turns on a busy machine.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.train_step",
        files=(f"{OTHER_CPU}/train_step",),
    ),
    Figure(
        title="W1: weak scaling, simulated",
        text="""\
One rank's own work in worlds of 8 to 4,096 ranks, with Torch's fake process group: nothing is sent. What must grow
does: Megatron-Core lists every group of the world once a run, and each rank plans the whole step.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.weak_scaling",
        files=(f"{CPU}/weak_scaling",),
    ),
    Figure(
        title="M1: a mixture's routes, replayed",
        text="""\
Whether training should use the routes of the reference pass again, as `moe_enable_routing_replay` would have it. A
random mixture of 4 layers, 16 experts, 4 of them a token, in bfloat16; means over models and data drawn anew. In the
layout that computed the reference both passes choose the same experts: the first log-ratio is 0 without replay. Only
a reference of another layout is nearer with it. After training the loss is higher with replay, most of all where the
model chooses its experts itself, as it does when it samples: so nothing is replayed here.""",
        command="OMP_NUM_THREADS=1 python -m benchmarks.router_replay --seeds 2 --steps 16",
        files=(f"{OTHER_CPU}/router_replay",),
    ),
    Figure(
        title="R: faults that are made",
        text="""\
Kills, signals, disks that fail, damaged and hostile files, numbers that go wrong: each kind of case, how many were
tried and how many passed, and whether they are as many as was set beforehand. `make test` tries some of each. A write
that fails is held by its bytes: a reader sees all of the old or all of the new, and the same command again ends with
the new. Crashes of the machine are simulated from the log of a writer's operations, on a file system that keeps what
was not synced in any order, or not at all. What a disk does that lies about fsync is not tried.

The table is of one whole soak of one commit, 61 minutes beside other work on two cores, 20 of them self-play under
random faults. One case of the 1,573 tests' failed, for the test was too slow: a report was done before its signal came.
That test ran again, with the change that lets the last stage be done.""",
        command="make soak SOAK_MINUTES=60",
        files=tuple(name for name in (f"{OTHER_CPU}/soak",) if (RESULTS / f"{name}.json").exists()),
    ),
    Figure(
        title="3.1 and 3.6: the theorem, and the loss on samples",
        text="""\
[Concepts](concepts.md) has the pictures. The exact update on games small enough to be played: the duality gap
beside the theorem's bound. Then a policy trained by the loss on K = 5 samples, under the paper's and the official
rule of preference.""",
        command="python -m benchmarks.theory",
        files=("theory",),
    ),
    Figure(
        title="G1: the head on a GPU",
        text="""\
One H200, whose power limit holds large products at about 720 of its 989 TFLOP/s. At T=8192 the head takes 1.33 times
its three products. At T=32768 it takes 1.46 (1.36 to 1.52), which misses 1.35: by its own profile 94 % of the time is
the three products and the fourth that computes logits again, each as fast as cuBLAS alone, and 5 % the two kernels
between. What would save time is memory: it stays within 1 GiB, where eager holds 46 GiB and is as fast. Liger and
cut-cross-entropy hold less and are slower, by 1.1 to 1.6 and by 3 to 3.6.""",
        command="benchmarks/hopper.sh g1",
        files=("h200/head_gpu",),
    ),
    Figure(
        title="G2: a training step on a GPU",
        text="""\
One H200. Both steps are of the same Megatron model, packs and optimizer; SPPO's is faster, for its head computes the
positions of responses alone. FP8 pays where the layers are as wide as an 8B model's (eight of its layers here); at the
1B shape Python cannot launch its smaller kernels fast enough, and bfloat16 is faster. Blockwise FP8, which scales each
128 channels by themselves, is the slower recipe (`benchmarks.train_gpu --shape 8b --fp8-recipe blockwise`).""",
        command="benchmarks/hopper.sh g2",
        files=("h200/train_gpu_1b", "h200/train_gpu_8b", "h200/train_gpu_8b_blockwise"),
    ),
    Figure(
        title="S: each kernel that training calls",
        text="""\
One H200, against float64.""",
        command="benchmarks/hopper.sh smoke",
        files=("h200/smoke",),
    ),
    Figure(
        title="loop: self-play on a GPU",
        text="""\
The first of two iterations of SmolLM2-135M on one H200, with adapters and one engine of vLLM; time ran out in the
second. The judge prefers shorter answers. Seconds are mostly of imports and of compiling: 192 prompts are few.""",
        command="benchmarks/hopper.sh loop",
        files=("h200/loop_gpu",),
    ),
    Figure(
        title="G3 and G4: peers on a GPU",
        text="""\
Not measured. G3, training beside TRL: at least 2x real tokens a second, at least 3x the tokens that fit; run dry on a
CPU at a toy size. G4, PairRM: at least 8x llm-blender at batch 1, at least 2x its best batch. The losses of 40 steps in
FP8 and bfloat16, within 5 %, neither.""",
        command="benchmarks/hopper.sh g3 fit g4 curve",
    ),
)


def number(value: float | None) -> str:
    """Word a number -> four significant digits at most; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line(row: dict[str, Any]) -> str:
    """Word one row of a results file -> a line of the table."""
    spread = "" if row["spread"] is None else f" [{number(row['spread'][0])}, {number(row['spread'][1])}]"
    verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
    target = "" if row["target"] is None else f"{row['target']} "
    peer = row["peer_name"] if row["peer"] is None else f"{row['peer_name']}: {number(row['peer'])}"
    cells = (row["metric"], number(row["ours"]), peer, number(row["ratio"]) + spread, f"{target}{verdict}".strip())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Lay rows out -> Markdown."""
    lines = "\n".join(map(line, rows))
    head = "| what | ours | beside | ratio [least, greatest] | target |\n|---|---|---|---|---|"
    return f'<div class="figures" markdown>\n\n{head}\n{lines}\n\n</div>\n'


def section(figure: Figure) -> str:
    """Write one figure -> Markdown: what has a target in sight, the rest folded away."""
    files = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in figure.files]
    rows = [row for file in files for row in file["rows"]]
    parts = [f"## {figure.title}\n", figure.text + "\n", f"```bash\n{figure.command}\n```\n"]
    if files:
        versions = ", ".join(f"{name} {version}" for name, version in files[0]["versions"].items())
        parts.append(f"Measured {files[0]['date']}; {versions}.\n")
    if judged := [row for row in rows if row["met"] is not None]:
        met = sum(row["met"] for row in judged)
        parts.append(f"{met} of {len(judged)} rows with a target meet it.\n\n{table(judged)}")
    if rest := [row for row in rows if row["met"] is None]:
        parts.append(
            f"<details markdown>\n<summary>{len(rest)} rows beside them</summary>\n\n{table(rest)}\n</details>\n"
        )
    return "\n".join(parts)


def page() -> str:
    """Write the whole page -> Markdown."""
    return HEAD + "\n" + "\n".join(map(section, FIGURES))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
