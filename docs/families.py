"""Write docs/families.md: what the tests hold each family's models to, taken from the tables that the tests run by.

python docs/families.py            # tests/unit/test_docs.py fails where the page is not what this writes
"""

import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/families.md"
HEAD = """# What is proven of each family

Each row is a tiny random model that transformers itself made and wrote, with awkward sizes. Of every one the suite
shows, on each run:

- Hugging Face to Megatron to Hugging Face, every file byte for byte;
- Hugging Face's logits within 1e-5 in float32, in each layout of the row, loaded by Megatron-Core in real gloo ranks.

Gradients are held against Hugging Face's autograd (1e-5 of a tensor's largest entry; of a gated delta net's decays and
rates beside that four times what Hugging Face's own float32 loses of them against float64), with the loss, the
log-probabilities and the first log-ratio, which is 0. "All pairs" is a cover of every two choices of tensor, pipeline,
context, data and expert parallelism, sequence parallelism, packing, recomputation and sharding that can meet. Each
family has some of its layouts in the tests of every change, which run on both versions of Megatron-Core, and the others
in `make test-full`.

The last column is how vLLM 0.32 on a CPU computes models like the row's, in sizes that its kernels take
(`tests/e2e/test_families_vllm.py`): log-probabilities of transformers' float32 within 1e-5; or in bfloat16, where its
kernels take nothing else, with no more error than transformers' own bfloat16 has; or not, where vLLM refuses it. Half
of the models are run in every change, all of them in `make test-full`.
What it computes otherwise without a word, `megatron-sppo rollouts` refuses: [Limits](limits.md).

On one H200 the logits of every family without experts, through Transformer Engine in bfloat16, are as near to Hugging
Face's as Hugging Face's own bfloat16 (`tests/gpu/test_families.py`); the rest was run on CPUs: [Limits](limits.md).

| family | model | logits in | gradients in | vLLM |
|---|---|---|---|---|
"""
FOOT = """
This page is written by `docs/families.py` from `tests/families.py` and `tests/distributed/`.
"""
ALL_PAIRS = "all pairs (`test_layouts.py`)"
ALL_PAIRS_OF_MIXTURES = "all pairs (`test_moe_layouts.py`)"


def page() -> str:
    """Make the page -> its text."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        from tests.distributed import test_family_gradients, test_family_logits, test_mixture_families
        from tests.families import FAMILIES, IN_ENGINE, InEngine
    finally:
        sys.path.remove(str(REPOSITORY))
    gradients: dict[str, list[str]] = {
        "llama": [ALL_PAIRS],
        "qwen3_moe": [ALL_PAIRS_OF_MIXTURES],
        "mixtral": [ALL_PAIRS_OF_MIXTURES],
    }
    for case in test_family_gradients.CASES:
        name, layout = values_of(case)
        gradients.setdefault(name, []).append(layout)
    for case in test_mixture_families.CASES:
        name, _, flags = values_of(case)
        gradients.setdefault(name, []).append(layout_of(flags))
    rows = []
    for name, settings in FAMILIES.items():
        models = test_family_logits.MODELS
        layouts = dict.fromkeys(one for model in models for one in test_family_logits.layouts_of(name, model))
        variant = name.partition(", ")[2]
        found = ", ".join(dict.fromkeys(gradients.get(name, [])))
        engine = IN_ENGINE.get(name, InEngine())
        computed = "refuses it" if engine.refusal else engine.dtype
        rows.append(f"| `{settings['model_type']}` | {variant} | {', '.join(layouts)} | {found} | {computed} |")
    return HEAD + "\n".join(rows) + "\n" + FOOT


def values_of(case: Any) -> tuple[Any, ...]:
    """Take the values of a case that may be marked."""
    return tuple(case.values) if hasattr(case, "values") else case


def layout_of(flags: str) -> str:
    """Name a layout by the flags that make it -> such as "TP2 SP PP2"."""
    words = flags.split()
    sizes = {"tensor-model": "TP", "pipeline-model": "PP", "context": "CP", "expert-model": "EP"}
    found = [
        f"{short}{words[words.index(flag) + 1]}"
        for axis, short in sizes.items()
        if (flag := f"--{axis}-parallel-size") in words
    ]
    found += ["SP"] * ("--sequence-parallel" in words) + ["padded"] * ("--no-packing" in words)
    return " ".join(found if any(one[-1].isdigit() for one in found) else ["one rank", *found])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
