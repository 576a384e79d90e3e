"""Proves that no file which may hold a pickle, or code, is ever run: a canary lies in each place where one could be.

The canary makes a directory when it is unpickled or imported. Every reader either refuses the artefact in one line of
ours, or does not touch the file and gives what it gives without it; the directory is not there in either case.
"""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sppo.checkpoints.distcp import check_metadata, read_metadata
from megatron_sppo.checkpoints.megatron_checkpoint import write_manifest
from megatron_sppo.checkpoints.model_files import read_model_files
from megatron_sppo.conversion.adapters import export_adapter, import_adapter
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.data.schema import read_signed, write_signed
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.judge.load import load_judge
from megatron_sppo.judge.matrices import MatricesJudge
from megatron_sppo.judge.shard_scores import score_rollouts
from megatron_sppo.judge.workers import pooled_here
from megatron_sppo.rollout.chat_template import ChatTokenizer
from megatron_sppo.rollout.prompts import read_prompts
from megatron_sppo.rollout.records import read_rollouts
from megatron_sppo.storage import sha256_of_file
from tests.adapters import random_adapter
from tests.models import tiny_llama
from tests.unit.data import make
from tests.unit.judge.rollout_files import random_rollouts

REFUSALS = (DataError, ConversionError, ConfigError)
WEIGHTS = "model.safetensors"
Place = Path


class Canary:
    """Makes the directory `owned`, in the current one, when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("owned",)


CODE = "import os\nos.mkdir('owned')\n"


def raw() -> bytes:
    return pickle.dumps(Canary())


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": Canary()}, buffer)
    return buffer.getvalue()


def objects() -> bytes:
    """An .npz whose arrays are of objects."""
    buffer = io.BytesIO()
    array = np.empty(1, dtype=object)
    array[0] = Canary()
    np.savez(buffer, key=array, judge_logits=array, reasons=array, counts=array)
    return buffer.getvalue()


def put(name: str, content: Callable[[], bytes], *, without: str | None = None) -> Callable[[Place], None]:
    """Write a canary into an artefact, and take one of its files away."""

    def place(directory: Path) -> None:
        if without is not None:
            (directory / without).unlink()
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content())

    return place


def keys(name: str, code: str | None = None, **values: Any) -> Callable[[Place], None]:
    """Set keys of a JSON file, beside a module of code that they name."""

    def place(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))
        if code is not None:
            (directory / code).write_text(CODE)

    return place


def both(*changes: Callable[[Place], None]) -> Callable[[Place], None]:
    return lambda directory: [change(directory) for change in changes] and None


def of_iteration(change: Callable[[Path], None]) -> Callable[[Place], None]:
    """Change an iteration's directory by somebody who signs it afterwards."""

    def place(root: Path) -> None:
        directory = root / "iter_0000000"
        change(directory)
        (directory / "manifest.json").unlink()
        write_manifest(directory)

    return place


def metadata(change: Callable[[Any], object]) -> Callable[[Place], None]:
    def place(directory: Path) -> None:
        value = read_metadata(directory)
        change(value)
        (directory / ".metadata").write_bytes(pickle.dumps(value))

    return of_iteration(place)


def item(directory: Path) -> None:
    """Put a canary where a tensor's bytes are."""
    value, content = read_metadata(directory), saved()
    info = next(info for index, info in value.storage_data.items() if "linear_fc2" in index.fqn)
    path = directory / info.relative_path
    info.offset = path.stat().st_size
    info.length = len(content)
    path.write_bytes(path.read_bytes() + content)
    (directory / ".metadata").write_bytes(pickle.dumps(value))
    path.with_suffix(".digests").unlink()


def signed_shard(directory: Path) -> None:
    """A shard of rollouts that is a pickle, with its true checksum."""
    (directory / "shard-00000.jsonl").write_bytes(raw())
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest.pop("content_sha256")
    manifest["shards"][0]["sha256"] = sha256_of_file(directory / "shard-00000.jsonl")
    (directory / "manifest.json").write_text(json.dumps(manifest))


def signed_dataset(name: str) -> Callable[[Place], None]:
    def place(directory: Path) -> None:
        (directory / name).write_bytes(raw())
        fields = read_signed(directory / "manifest.json", schema_version=1, remedy="")
        fields["files"][name] = {"sha256": sha256_of_file(directory / name), "bytes": len(raw())}
        write_signed(directory / "manifest.json", fields)

    return place


def import_model(directory: Path, sound: Path) -> None:
    import_checkpoint(directory, Path("megatron"))


def sample_by(directory: Path, sound: Path) -> None:
    read_model_files(directory)
    ChatTokenizer(directory).tokenize_all([])


def export_model(directory: Path, sound: Path) -> None:
    export_checkpoint(directory, Path("hf"))


def host_load(directory: Path, sound: Path) -> None:
    """What is checked before Megatron-Core's own reader, which trusts what it reads, is given the directory."""
    check_metadata(directory / "iter_0000000")


def merge_adapter(directory: Path, sound: Path) -> None:
    import_adapter(directory, Path("megatron"), base=sound / "hf")
    export_adapter(Path("megatron"), Path("back"), base=None)


def judge_by_pairrm(directory: Path, sound: Path) -> None:
    load_judge(f"pairrm:{directory}")


def judge_by_reward(directory: Path, sound: Path) -> None:
    load_judge(f"reward:{directory}")


def judge_by_gpm(directory: Path, sound: Path) -> None:
    load_judge(f"gpm:{directory}")


def score(directory: Path, sound: Path) -> None:
    score_rollouts(sound / "rollouts", pooled_here(load_judge("rules:cyclic")), directory, rule="paper")


def open_dataset(directory: Path, sound: Path) -> None:
    PreferenceDataset(directory)


def read_all(directory: Path, sound: Path) -> None:
    list(read_rollouts(directory))


def prompts(name: str) -> Callable[[Path, Path], None]:
    def read(directory: Path, sound: Path) -> None:
        read_prompts(directory / name)

    return read


def matrices(directory: Path, sound: Path) -> None:
    MatricesJudge(str(directory / "matrices.jsonl"), rule="paper")


Case = tuple[str, Callable[[Place], Any], Callable[[Path, Path], None]]
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
REWARD_MAP = {"AutoModelForSequenceClassification": "evil.Model"}
TOKENIZER_MAP = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
CASES: dict[str, Case] = {
    "pytorch_model.bin alone": ("hf", put("pytorch_model.bin", saved, without=WEIGHTS), import_model),
    "pytorch_model.bin beside the weights": ("hf", put("pytorch_model.bin", saved), import_model),
    "pytorch_model.bin alone, to sample by": ("hf", put("pytorch_model.bin", saved, without=WEIGHTS), sample_by),
    "sharded pickles and their index": (
        "hf",
        both(
            put("pytorch_model-00001-of-00001.bin", saved, without=WEIGHTS),
            keys("pytorch_model.bin.index.json", weight_map={"a": "pytorch_model-00001-of-00001.bin"}),
        ),
        import_model,
    ),
    "weights that are a pickle": ("hf", put(WEIGHTS, raw), import_model),
    "weights that are a torch archive": ("hf", put(WEIGHTS, saved), sample_by),
    "an index that names a pickle": (
        "hf",
        both(
            put("evil.bin", saved, without=WEIGHTS),
            keys("model.safetensors.index.json", weight_map={"model.norm.weight": "evil.bin"}),
        ),
        import_model,
    ),
    "training_args.bin": ("hf", put("training_args.bin", saved), import_model),
    "optimizer.pt": ("hf", put("optimizer.pt", saved), import_model),
    "scheduler.pt": ("hf", put("scheduler.pt", saved), sample_by),
    "rng_state.pth": ("hf", put("rng_state.pth", saved), import_model),
    "a config with auto_map": ("hf", keys("config.json", "evil.py", auto_map=AUTO_MAP), import_model),
    "a config with auto_map of an unknown type": (
        "hf",
        keys("config.json", "evil.py", auto_map=AUTO_MAP, model_type="evil"),
        import_model,
    ),
    "a tokenizer with auto_map": (
        "hf",
        keys("tokenizer_config.json", "evil.py", auto_map=TOKENIZER_MAP, tokenizer_class="Evil"),
        sample_by,
    ),
    "a generation config that generates by code": (
        "hf",
        both(
            keys("generation_config.json", eos_token_id=2, custom_generate="custom_generate"),
            put("custom_generate/generate.py", CODE.encode),
        ),
        sample_by,
    ),
    "tokenizer.json that is a pickle": ("hf", put("tokenizer.json", raw), import_model),
    "tokenizer.model that is a pickle": ("hf", put("tokenizer.model", raw, without="tokenizer.json"), sample_by),
    "tokenizer.pkl": ("hf", put("tokenizer.pkl", raw), sample_by),
    "setup.py and conftest.py": ("hf", both(put("setup.py", CODE.encode), put("conftest.py", CODE.encode)), sample_by),
    ".metadata": ("megatron", of_iteration(put(".metadata", raw)), export_model),
    ".metadata, deep inside": ("megatron", metadata(lambda m: m.planner_data.__setitem__("x", Canary())
                                                    if isinstance(m.planner_data, dict)
                                                    else setattr(m, "planner_data", Canary())), export_model),
    ".metadata, in a key of its places": (
        "megatron",
        metadata(lambda m: m.storage_data.update({Key(): next(iter(m.storage_data.values()))})),
        host_load,
    ),
    "common.pt": ("megatron", of_iteration(put("common.pt", saved)), host_load),
    "common.pt that is a bare pickle": ("megatron", of_iteration(put("common.pt", raw)), host_load),
    "a tensor of a .distcp file": ("megatron", of_iteration(item), export_model),
    "a .distcp file that is a pickle": ("megatron", of_iteration(put("__0_0.distcp", raw)), export_model),
    "Megatron-LM's old files": (
        "megatron",
        put("iter_0000001/mp_rank_00/model_optim_rng.pt", saved),
        export_model,
    ),
    "a carried tensor": ("megatron", of_iteration(put("hf/carried.safetensors", saved)), export_model),
    "optimizer state beside": ("megatron", of_iteration(put("distrib_optim.pt", saved)), export_model),
    "adapter_model.bin alone": (
        "adapter",
        put("adapter_model.bin", saved, without="adapter_model.safetensors"),
        merge_adapter,
    ),
    "adapter_model.bin beside the weights": ("adapter", put("adapter_model.bin", saved), merge_adapter),
    "adapter weights that are a pickle": ("adapter", put("adapter_model.safetensors", saved), merge_adapter),
    "an adapter with code": (
        "adapter",
        keys("adapter_config.json", "evil.py", auto_mapping={"base_model_class": "Model", "parent_library": "evil"}),
        merge_adapter,
    ),
    "PairRM as a pickle": (
        "hf",
        both(put("pytorch_model.bin", saved, without=WEIGHTS), keys("config.json", ranker_type="pairranker",
                                                                     model_name=".")),
        judge_by_pairrm,
    ),
    "a reward model as a pickle": ("hf", put("pytorch_model.bin", saved, without=WEIGHTS), judge_by_reward),
    "a reward model with code": (
        "hf",
        keys("config.json", "evil.py", auto_map=REWARD_MAP, model_type="evil"),
        judge_by_reward,
    ),
    "a preference model with code": (
        "hf",
        keys("config.json", "evil.py", auto_map=AUTO_MAP, model_type="evil"),
        judge_by_gpm,
    ),
    "score shards of objects": ("work", put("scores-00000.npz", objects), score),
    "score shards that are a pickle": ("work", put("scores-00000.npz", raw), score),
    "tokens.bin": ("dataset", signed_dataset("tokens.bin"), open_dataset),
    "tokens.idx": ("dataset", signed_dataset("tokens.idx"), open_dataset),
    "a shard of rollouts": ("rollouts", signed_shard, read_all),
    "prompts.pkl": ("empty", put("prompts.pkl", raw), prompts("prompts.pkl")),
    "prompts.pt": ("empty", put("prompts.pt", saved), prompts("prompts.pt")),
    "prompts.jsonl": ("empty", put("prompts.jsonl", raw), prompts("prompts.jsonl")),
    "prompts.parquet": ("empty", put("prompts.parquet", raw), prompts("prompts.parquet")),
    "prompts.arrow": ("empty", put("prompts.arrow", raw), prompts("prompts.arrow")),
    "prompts.npy": ("empty", put("prompts.npy", objects), prompts("prompts.npy")),
    "a script of the datasets library": ("empty", put("prompts/prompts.py", CODE.encode), prompts("prompts")),
    "joblib's file for matrices": ("empty", put("matrices.jsonl", raw), matrices),
}  # fmt: skip


class Key:
    """Hashable, so that it may be a key."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("owned",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    tiny_llama(root / "hf", num_hidden_layers=1)
    import_checkpoint(root / "hf", root / "megatron")
    random_adapter(root / "adapter", root / "hf")
    make.write(root / "dataset", make.groups())
    random_rollouts(root / "rollouts", num_prompts=2, num_responses=2, rows_per_shard=2)
    for name in ("work", "empty"):
        (root / name).mkdir()
    return root


@pytest.mark.counts("pickles")
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_run(name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, place, read = CASES[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound / artefact, tmp_path / "artefact")
    place(tmp_path / "artefact")
    try:
        read(tmp_path / "artefact", sound)
    except REFUSALS as error:
        assert "\n" not in str(error).strip()
    assert not (tmp_path / "owned").exists()


TRUSTING: dict[str, Callable[[], Any]] = {
    "pickle": lambda: pickle.loads(raw()),
    "torch": lambda: torch.load(io.BytesIO(saved()), weights_only=False),
    "numpy": lambda: np.load(io.BytesIO(objects()), allow_pickle=True)["key"],
}


@pytest.mark.parametrize("library", TRUSTING)
def test_a_reader_that_trusts_them_runs_the_canaries(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    TRUSTING[library]()
    assert (tmp_path / "owned").is_dir()
