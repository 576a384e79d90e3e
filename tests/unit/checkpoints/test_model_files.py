"""Proves that a model's hash follows its weights alone, and that broken directories are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sppo.checkpoints.model_files import model_hash, read_model_files
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.errors import ConfigError, ConversionError, DataError


@pytest.fixture
def model_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def test_sizes_and_hashes_come_from_the_files(model_dir: Path) -> None:
    files = read_model_files(model_dir)
    assert (files.vocab_size, files.context_length) == (259, 512)
    assert files.tokenizer_hash == tokenizer_hash(model_dir)


def test_the_hash_changes_with_one_bit_of_the_weights_and_with_nothing_else(model_dir: Path) -> None:
    before = model_hash(model_dir)
    (model_dir / "README.md").write_text("a model")
    assert model_hash(model_dir) == before
    content = bytearray((model_dir / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model_dir / "model.safetensors").write_bytes(bytes(content))
    assert model_hash(model_dir) != before


def test_links_as_in_the_hub_cache_are_followed(model_dir: Path, tmp_path: Path) -> None:
    before = read_model_files(model_dir)
    blobs = Path(shutil.move(model_dir, tmp_path / "blobs"))
    model_dir.mkdir()
    for file in blobs.iterdir():
        (model_dir / file.name).symlink_to(file)
    assert read_model_files(model_dir) == before


def test_every_shard_of_the_index_is_hashed_and_must_be_there(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="two.safetensors does not exist"):
        model_hash(model_dir)
    index["weight_map"]["b"] = "../two.safetensors"
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside"):
        model_hash(model_dir)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:100], lambda b: b[:4], lambda b: b"x" * 64, lambda b: b""]
)
def test_a_cut_or_foreign_weights_file_is_refused(model_dir: Path, damage) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match="model.safetensors .*Fetch it again"):
        read_model_files(model_dir)


def test_a_hub_name_is_refused_with_the_download_command() -> None:
    with pytest.raises(ConfigError, match="hf download org/model"):
        read_model_files(Path("org/model"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "no \\*.safetensors weights"),
        ("tokenizer.json", "no tokenizer file"),
    ],
)
def test_a_missing_file_is_named(model_dir: Path, name: str, message: str) -> None:
    (model_dir / name).unlink()
    with pytest.raises((ConversionError, DataError), match=message):
        read_model_files(model_dir)


@pytest.mark.parametrize("value", [None, 0, "259", True])
def test_an_impossible_vocabulary_is_refused(model_dir: Path, value: object) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "vocab_size": value}))
    with pytest.raises(DataError, match="vocab_size is"):
        read_model_files(model_dir)


def test_what_other_stages_ask_of_a_models_files_needs_no_torch() -> None:
    """Rollouts, judges and plans ask; torch costs each of them a second of CPU time."""
    modules = ("checkpoints.model_files", "checkpoints.side_files", "checkpoints.pretrained", "conversion.complete")
    names = ", ".join(f"megatron_sppo.{module}" for module in modules)
    script = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
