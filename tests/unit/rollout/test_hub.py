"""hub:NAME through the real `datasets`: fetched from a hub on this machine once, then read again without any.

Rows have the columns of the data sets as published; of their contents this says nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.hub import hub_fingerprint, hub_name, load_hub_table
from megatron_sppo.rollout.prompts import read_prompts
from megatron_sppo.selfplay.config import EvaluationConfig, RunConfig
from megatron_sppo.selfplay.prompt_parts import divide_prompts, hash_of_prompts
from tests.commands import run_here
from tests.fake_hub import REVISION, parquet, serve_hub

REPOSITORY = Path(__file__).resolve().parents[3]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def binarized(split: str, count: int) -> bytes:
    """HuggingFaceH4/ultrafeedback_binarized."""
    return parquet(
        [
            {
                "prompt": f"{split} {n}?", "prompt_id": f"{split}-{n}", "score_chosen": 8.0, "score_rejected": 4.0,
                "chosen": turns(f"{split} {n}?", "Yes."), "rejected": turns(f"{split} {n}?", "No."),
                "messages": turns(f"{split} {n}?", "Yes."),
            }
            for n in range(count)
        ]
    )  # fmt: skip


def ultra_feedback(start: int, stop: int) -> bytes:
    """openbmb/UltraFeedback: JSON lines, one file for each source of prompts."""
    completion = {"model": "m", "response": "Yes.", "overall_score": 8.0}
    rows = [
        {"source": "s", "instruction": f"Why {n}?", "models": ["m"], "completions": [completion]}
        for n in range(start, stop)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def third(number: int) -> bytes:
    """UCLA-AGI/data-mistral-7b-instruct-sppo-iterN, read by the authors' generate.py: split train, column prompt."""
    return parquet([{"prompt": f"Third {number}, {n}?", "prompt_id": str(n)} for n in range(4)])


def ifeval() -> bytes:
    """google/IFEval: every argument in every mapping, null where it is another instruction's."""
    arguments = [{"num_words": None, "relation": None}, {"num_words": 300, "relation": "at least"}]
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    return parquet([{"key": 1000, "prompt": "Write.", "instruction_id_list": names, "kwargs": arguments}])


THIRDS = [f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{number}" for number in (1, 2, 3)]
SUBSETS = """---
configs:
- config_name: main
  data_files: main/train.jsonl
- config_name: socratic
  data_files: socratic/train.jsonl
---
"""
REPOSITORIES = {
    "openbmb/UltraFeedback": {"evol_instruct.jsonl": ultra_feedback(0, 3), "flan.jsonl": ultra_feedback(3, 5)},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "data/train_prefs-00000-of-00001.parquet": binarized("train_prefs", 6),
        "data/test_prefs-00000-of-00001.parquet": binarized("test_prefs", 2),
    },
    "owner/subsets": {
        "README.md": SUBSETS.encode(),
        "main/train.jsonl": b'{"prompt": "main?"}',
        "socratic/train.jsonl": b'{"prompt": "socratic?"}',
    },
    "google/IFEval": {"data/train-00000-of-00001.parquet": ifeval()},
    "owner/columns": {"data/train-00000-of-00001.parquet": parquet([{"body": "x"}])},
    **{name: {"data/train-00000-of-00001.parquet": third(n)} for n, name in enumerate(THIRDS, start=1)},
}
FETCHED = (
    "openbmb/UltraFeedback",
    "HuggingFaceH4/ultrafeedback_binarized@train_prefs",
    "owner/subsets",
    "owner/subsets:main",
    "owner/columns",
    "google/IFEval",
    *THIRDS,
)


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What HF_HOME holds after a machine with a network has read all of them once, through our own reader."""
    home = tmp_path_factory.mktemp("hf")
    program = (
        "import sys; from pathlib import Path; from megatron_sppo.rollout.prompts import read_prompts\n"
        "from megatron_sppo.errors import ConfigError, DataError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(len(read_prompts(Path('hub:' + name)).prompts), flush=True)\n"
        "    except (ConfigError, DataError) as error: print(error, flush=True)\n"
    )
    with serve_hub(REPOSITORIES) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", program, *FETCHED], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    counts = done.stdout.splitlines()
    assert re.search(r"main.*socratic.*Name a subset: hub:owner/subsets:SUBSET", counts.pop(2)), done.stdout
    assert "no column prompt or messages (it has: body)" in counts.pop(3), done.stdout
    assert counts == ["5", "6", "1", "1", "4", "4", "4"]
    return home


@pytest.fixture
def offline(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process reads that cache, and asks no hub (HF_HUB_OFFLINE is set for all tests)."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_home / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_home / "hub"))
    load_hub_table.cache_clear()
    yield hub_home
    load_hub_table.cache_clear()


def texts(name: str, **chosen: str) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in read_prompts(Path(name), **chosen).prompts]


def test_ifeval_as_published_carries_what_its_judge_checks_by(offline: Path) -> None:
    (prompt,) = read_prompts(Path("hub:google/IFEval")).prompts
    assert prompt.columns == {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None, "relation": None}, {"num_words": 300, "relation": "at least"}],
    }


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("hub:openbmb/UltraFeedback", {}, [f"Why {n}?" for n in range(5)]),
        ("hub:HuggingFaceH4/ultrafeedback_binarized@test_prefs", {}, ["test_prefs 0?", "test_prefs 1?"]),
        ("hub:HuggingFaceH4/ultrafeedback_binarized", {"split": "test_prefs"}, ["test_prefs 0?", "test_prefs 1?"]),
        (f"hub:{THIRDS[1]}", {}, [f"Third 2, {n}?" for n in range(4)]),
        (f"hub:{THIRDS[1]}@train", {"split": "train"}, [f"Third 2, {n}?" for n in range(4)]),
        ("hub:owner/subsets:main@train", {}, ["main?"]),
        ("hub:owner/subsets", {"subset": "main"}, ["main?"]),
    ],
)
def test_a_data_set_of_the_hub_is_read_from_the_cache_without_a_network(
    offline: Path, name: str, chosen: dict, expected: list[str]
) -> None:
    assert texts(name, **chosen) == expected


def test_what_hf_download_has_left_is_read_too(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf download` fills the hub's cache and not that of `datasets`."""
    import huggingface_hub.constants

    shutil.copytree(offline / "hub", tmp_path / "hub", symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    assert texts("hub:HuggingFaceH4/ultrafeedback_binarized@test_prefs") == ["test_prefs 0?", "test_prefs 1?"]
    assert len(hub_fingerprint(Path("hub:HuggingFaceH4/ultrafeedback_binarized@test_prefs"))) == 64


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("hub:HuggingFaceH4/ultrafeedback_binarized", {}, r"several splits. Use hub:\S+@SPLIT with one of: t.*_prefs"),
        ("hub:HuggingFaceH4/ultrafeedback_binarized@train", {}, r"no split 'train'. Use hub:\S+@SPLIT with"),
        ("hub:HuggingFaceH4/ultrafeedback_binarized@train", {"split": "test"}, "the split train, --split says test"),
        ("hub:owner/subsets:main", {"subset": "socratic"}, "the subset main, --subset says socratic"),
        ("hub:owner/subsets:other", {}, r"no subset 'other'. Use --subset with one of: main"),
        ("hub:a/b/c", {}, "hub:OWNER/NAME@SPLIT"),
        ("hub:", {}, "hub:OWNER/NAME@SPLIT"),
        ("hub:a/b@", {}, "hub:OWNER/NAME@SPLIT"),
        ("hub:../b", {}, "hub:OWNER/NAME@SPLIT"),
    ],
)
def test_what_is_not_named_rightly_is_refused(offline: Path, name: str, chosen: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        texts(name, **chosen)


@pytest.mark.parametrize(("name", "words"), [("csv", "names a format"), ("owner/prompts", "would be read in place of")])
def test_files_of_the_directory_that_one_is_in_are_not_taken_for_the_hub_s(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    """`datasets` would: it reads owner/prompts, and for csv every table that it finds."""
    (tmp_path / "owner/prompts").mkdir(parents=True)
    for place in ("owner/prompts", "."):
        (tmp_path / place / "train.csv").write_text("prompt\nWhy?\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        texts(f"hub:{name}")


def test_without_network_and_cache_the_command_ends_with_one_line_and_the_remedy(
    tiny_llama_dir: Path, tmp_path: Path, offline: Path
) -> None:
    arguments = ["--model", tiny_llama_dir, "--prompts", "hub:nobody/nothing", "--output", tmp_path / "r"]
    done = run_here("tools/generate_rollouts.py", *arguments, "--num-responses", "2", "--max-tokens", "8")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and not (tmp_path / "r").exists()
    assert "hub:nobody/nothing is not kept on this machine, and HF_HUB_OFFLINE is set" in last
    assert "hf download --repo-type dataset nobody/nothing" in last


def test_the_fingerprint_is_the_revisions_and_not_the_caches(offline: Path, tmp_path: Path, monkeypatch) -> None:
    name = Path("hub:openbmb/UltraFeedback")
    before = hub_fingerprint(name)
    moved = shutil.copytree(offline / "datasets", tmp_path / "elsewhere")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", moved)
    load_hub_table.cache_clear()
    assert hub_fingerprint(name) == before
    (revision,) = moved.glob(f"openbmb___*/*/*/{REVISION}")
    revision.rename(revision.with_name("2" * 40))
    load_hub_table.cache_clear()
    assert hub_fingerprint(name) != before


def test_the_published_thirds_are_an_iteration_each(offline: Path) -> None:
    """Their prompts are called 0, 1, ... each; a held-out one is trained on in none, and each has a name of its own."""
    run = RunConfig(model=Path("m"), prompts=tuple(Path(f"hub:{name}") for name in THIRDS), output=Path("o"))
    parts = divide_prompts(run, EvaluationConfig(heldout_prompts=5))
    held = {prompt.messages[0]["content"] for prompt in parts.heldout}
    assert len(held) == len({prompt.prompt_id for prompt in parts.heldout}) == 5
    for number, part in enumerate(parts.iterations, start=1):
        everything = {f"Third {number}, {n}?" for n in range(4)}
        assert {prompt.messages[0]["content"] for prompt in part} == everything - held
    assert hash_of_prompts(run, lambda path: pytest.fail(f"{path} is no file")) != hash_of_prompts(
        RunConfig(model=Path("m"), prompts=run.prompts[::-1], output=Path("o")), str
    )


def test_the_splits_of_one_data_set_train_and_evaluate(offline: Path) -> None:
    run = RunConfig(
        model=Path("m"), prompts=(Path("hub:HuggingFaceH4/ultrafeedback_binarized"),), output=Path("o"),
        train_split="train_prefs", heldout_split="test_prefs", iterations=3,
    )  # fmt: skip
    parts = divide_prompts(run, EvaluationConfig())
    assert [len(part) for part in parts.iterations] == [2, 2, 2]
    assert [prompt.prompt_id for prompt in parts.heldout] == ["test_prefs-0", "test_prefs-1"]


def test_fewer_sources_than_iterations_are_refused() -> None:
    sources = (Path("a.jsonl"), Path("b.jsonl"))
    with pytest.raises(ConfigError, match=r"2 prompts are given.* 3 iterations. Use --iterations 2"):
        RunConfig(model=Path("m"), prompts=sources, output=Path("o"), iterations=3)
    assert RunConfig(model=Path("m"), prompts=sources, output=Path("o"), prompts_per_iteration="all").iterations == 3
    assert hub_name(Path("hub:a/b:c@d")).subset == "c"
