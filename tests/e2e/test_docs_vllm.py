"""Proves that what README and the pages tell a reader to type works as it stands, one command after the other.

Fences marked `run: NAME` are one story: executed by bash in one directory, in the order of the pages, with a tiny
random model that vLLM answers from. `with A as B` in a mark says what stands in for what cannot be had here, such as a
judge from a model hub. All other commands are parsed by tests/unit/test_docs.py.
"""

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import torch
from safetensors.torch import load_file

from tests.e2e.forking_python import serving, write_client
from tests.fences import PAGES, REPOSITORY, Fence, fences
from tests.models import tiny_llama

RUNNABLE = [
    fence for page in PAGES for fence in fences(page) if fence.language == "bash" and (fence.mark or "")[:1] == ("run",)
]
STORIES = list(dict.fromkeys(re.split("; ", fence.mark[1])[0] for fence in RUNNABLE if fence.mark))
PROMPTS = ("Why do cats purr?", "What is a fjord?", "Name three uses of a lemon.", "How do bees find home?")


def script_of(fence: Fence) -> str:
    """Take a block's commands, with what stands in for what -> bash."""
    text = fence.text
    assert fence.mark is not None
    for pair in fence.mark[1].partition("; with ")[2].split(", "):
        said, _, instead = pair.partition(" as ")
        assert said in text, f"{fence}: the mark replaces {said!r}, which is not there"
        text = text.replace(said, instead)
    return "set -euo pipefail\n" + text


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`megatron-sppo` and `python` for a shell -> their directory."""
    directory = tmp_path_factory.mktemp("bin")
    write_client(directory / "python", directory / "socket")
    write_client(directory / "megatron-sppo", directory / "socket", "-m", "megatron_sppo")
    with serving(directory / "socket"):
        yield directory


def tell(story: str, directory: Path, programs: Path) -> None:
    """Run the blocks of a story."""
    work = directory / "work"
    # vLLM's attention for the CPU wants heads of 64.
    tiny_llama(work / "my-model", head_dim=64, num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for fence in RUNNABLE:
        if fence.mark is not None and fence.mark[1].partition("; ")[0] == story:
            command = ["bash", "-c", script_of(fence)]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, f"{fence}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("story", STORIES)
def test_what_a_page_tells_to_type_works(story: str, tmp_path: Path, programs: Path) -> None:
    tell(story, tmp_path, programs)
    work = tmp_path / "work"
    if story in ("readme", "tutorial"):
        before, after = (load_file(work / name / "model.safetensors") for name in ("my-model", "my-model-aligned"))
        assert before.keys() == after.keys()
        assert all(before[name].shape == after[name].shape for name in before)
        metrics = (work / "checkpoints/aligned/metrics.jsonl").read_text().splitlines()
        assert json.loads(metrics[0])["sppo/ref_drift_step0"] == 0
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
    if story == "tutorial":
        assert (work / "tokens.jsonl").read_text().count("\n") > 1


def test_there_are_stories_to_tell() -> None:
    assert {"readme", "tutorial", "trl", "plan"} <= set(STORIES)
    assert len(RUNNABLE) >= 10
