"""Every layout of tests/distributed that one GPU can hold, held against Hugging Face's model under autograd.

In float32 with our own layers, within the bounds of the CPU tests; and in bfloat16 with Transformer Engine's, on models
of sizes that suit it, within what rounding to bfloat16 takes. In every layout the reference pass and the first step
agree exactly. Run on an H200, and on the emulated GPU (tests/cudaless).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import test_layouts, test_moe_layouts, test_packing_layouts
from tests.distributed.layouts import FOURS, PACKS, SHARDED, SHARED_PROMPTS
from tests.distributed.truth import Truth, by_hub_names
from tests.gpu.test_hopper import distance, gap_per_token
from tests.models import MIXTURES, tiny_llama

pytestmark = [pytest.mark.gpu]

MODELS: dict[str, dict[str, Any]] = {**test_layouts.MODELS, **MIXTURES}
_FIXED = {**test_layouts.LAYOUTS, **{f"mixture, {name}": layout for name, layout in test_moe_layouts.LAYOUTS.items()}}
# (model, flags)
LAYOUTS: dict[str, tuple[str, str]] = {
    **{
        name: (model, f"--micro-batch-size {size} {flags}")
        for name, (model, ranks, size, flags) in _FIXED.items()
        if ranks == 1
    },
    **{name: ("GQA", flags) for name, (ranks, flags) in test_packing_layouts.LAYOUTS.items() if ranks == 1},
    "sharded optimizer": ("GQA", f"{FOURS} {SHARDED}"),
    "tied, shared": ("tied", SHARED_PROMPTS),
    "MQA, shared": ("MQA", SHARED_PROMPTS),
    "mixture, shared": ("qwen3_moe", SHARED_PROMPTS),
    "mixture, packs": ("qwen3_moe", PACKS),
}
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64, "dtype": "bfloat16"}
OURS = "--transformer-impl torch"
GAP_BOUND, DISTANCE_BOUND = 1.5 * 0.0053, 1.5 * 0.0245
"""MARGIN times what the emulated GPU (tests/cudaless) finds, nats a token and norm; as in test_hopper.py."""
MIXTURE_DISTANCE_BOUND = 1.5 * 0.0409
"""A token whose router nearly ties goes to other experts once rounded."""


def in_this_process(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run a function of one rank on this process's GPU -> its result, as `run_ranks` returns it."""
    assert world_size == 1
    return [function(*arguments)]


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Truth]:
    """Models by name and size, each made when a layout first asks; sharing prompts makes other global batches."""

    @cache
    def find(model: str, *, wide: bool, shared: bool) -> Truth:
        sizes = SIZES if wide else {}
        overrides = {**sizes, "num_key_value_heads": 2, **MODELS[model]} if wide else MODELS[model]
        return Truth.of(
            tiny_llama(tmp_path_factory.mktemp(model) / "hf", num_hidden_layers=4, **overrides),
            by_exported_names=(lambda gradients: by_hub_names(gradients, model)) if model in MIXTURES else dict,
            one_rank=f"{SHARED_PROMPTS if shared else FOURS} {OURS}",
            launch=in_this_process,
        )

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_own_layers_in_float32(layout: str, truth_of: Callable[..., Truth], tmp_path: Path) -> None:
    model, flags = LAYOUTS[layout]
    truth = truth_of(model, wide=False, shared="--share-prompts" in flags)
    truth.assert_equal_under(1, f"{flags} {OURS}", tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformer_engines_in_bfloat16(layout: str, truth_of: Callable[..., Truth], tmp_path: Path) -> None:
    model, flags = LAYOUTS[layout]
    truth = truth_of(model, wide=True, shared="--share-prompts" in flags)
    found = truth.step(1, f"{flags} --params-dtype bfloat16 --transformer-impl transformer_engine", tmp_path)
    wanted = truth.hugging_face(found["rows"])
    gap, apart = gap_per_token(found, wanted, truth.data), distance(found["gradient"], wanted["gradient"])
    print(f"{layout}: gap {gap:.5f} nats/token, gradient {apart:.5f}")
    assert gap <= GAP_BOUND
    assert apart <= (MIXTURE_DISTANCE_BOUND if model in MIXTURES else DISTANCE_BOUND)
