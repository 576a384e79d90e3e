"""Proves: HF -> Megatron -> HF gives the same files; what is malformed gives one line and leaves nothing behind.

`test_host_layouts.py` proves that Megatron-Core agrees about what is in between.
"""

import functools
import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from megatron_sppo.checkpoints import distcp_writer, transfer
from megatron_sppo.checkpoints.distcp import read_metadata
from megatron_sppo.checkpoints.hf_writer import parse_size
from megatron_sppo.checkpoints.megatron_checkpoint import verify_checkpoint
from megatron_sppo.checkpoints.tokenizer import tokenizer_hash
from megatron_sppo.conversion import convert
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.locks import locked, locked_place
from megatron_sppo.model_file import read_architecture
from megatron_sppo.verification.verify import verify
from megatron_sppo.weight_counts import num_parameters
from tests.models import CHAT_TEMPLATE, MIXTURES, tiny_llama

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 8},
    "wide heads": {"head_dim": 24},
    "odd layers, odd vocabulary": {"num_hidden_layers": 3, "vocab_size": 263},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    **MIXTURES,
    "mixture, bfloat16": {**MIXTURES["qwen3_moe"], "dtype": "bfloat16", "tie_word_embeddings": True},
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shard(directory: Path, count: int) -> None:
    """Cut model.safetensors into `count` shards with an index, as save_pretrained names them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        names = sorted(tensors)[i::count]
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_there_and_back_every_file_is_the_same(tmp_path: Path, overrides: dict[str, Any]) -> None:
    hf = tiny_llama(tmp_path / "hf", **overrides)
    iteration = import_checkpoint(hf, tmp_path / "megatron")
    verify_checkpoint(iteration)
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(hf)


def test_shards_come_back_as_shards(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    shard(hf, 3)
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(hf)


def test_a_snapshot_of_links_to_blobs_is_read(tmp_path: Path) -> None:
    """The hub's cache: snapshots/REV/NAME -> ../../blobs/HASH."""
    hf = tiny_llama(tmp_path / "hf")
    shard(hf, 2)
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(hf.iterdir())):
        shutil.copyfile(path, tmp_path / "cache" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    import_checkpoint(snapshot, tmp_path / "megatron")
    assert not any(path.is_symlink() for path in (tmp_path / "megatron").rglob("*"))
    shutil.rmtree(tmp_path / "cache")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(hf)


def test_small_shards_hold_all_tensors_and_transformers_reads_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", max_shard_size="100KB")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((out / name).stat().st_size < 102_000 for name in shards)
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    expected = load_file(hf / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("family", MIXTURES)
def test_an_exported_mixture_is_read_by_transformers_and_verified_by_its_logits(tmp_path: Path, family: str) -> None:
    """Large weights, so that the router decides and the experts matter; float32 sums in another order."""
    transformers = pytest.importorskip("transformers")
    hf = tiny_llama(tmp_path / "hf", scale=0.2, **MIXTURES[family])
    import_checkpoint(hf, tmp_path / "megatron")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", max_shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    _, problems = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    report = verify(out, tmp_path / "megatron")
    assert report["faults"] == []
    assert report["logits"]["max_abs"] < 1e-5 and report["logits"]["max_logit"] > 5
    assert report["tensors"]["compared"] == len(load_file(hf / "model.safetensors"))


def test_weights_of_experts_that_do_not_add_up_to_one_are_computed_as_such(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hf = tiny_llama(tmp_path / "hf", scale=0.2, **{**MIXTURES["qwen3_moe"], "norm_topk_prob": False})
    import_checkpoint(hf, tmp_path / "megatron")
    assert verify(hf, tmp_path / "megatron")["logits"]["max_abs"] < 1e-5


def test_a_cast_rounds_as_torch_does_and_config_says_so(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron", dtype="bfloat16")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    original, result = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(result[name], tensor.to(torch.bfloat16)) for name, tensor in original.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    again = export_checkpoint(tmp_path / "megatron", tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()} == {torch.float32}
    assert json.loads((again / "config.json").read_text())["dtype"] == "float32"


def test_the_old_spelling_of_dtype_stays(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    del config["dtype"]
    (hf / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    import_checkpoint(hf, tmp_path / "megatron")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype="bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written


def test_model_json_describes_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", num_key_value_heads=2)
    iteration = import_checkpoint(hf, tmp_path / "megatron")
    for directory in (iteration, tmp_path / "megatron"):
        architecture, tokenizer = read_architecture(directory)
        assert architecture.num_query_groups == 2
        assert tokenizer["hash"] == tokenizer_hash(hf)
        assert "chat_template.jinja" in tokenizer["files"]
    total = sum(tensor.numel() for tensor in load_file(hf / "model.safetensors").values())
    assert num_parameters(architecture) == total


def test_a_template_gives_tokenizer_and_config(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    template = tiny_llama(tmp_path / "template", seed=9)
    (template / "chat_template.jinja").write_text("other")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", template=template)
    assert (out / "chat_template.jinja").read_text() == "other"
    assert (out / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    wrong = tiny_llama(tmp_path / "wrong", hidden_size=32)
    with pytest.raises(ConversionError, match=r"wrong is of another model than .*hidden_size is 32 in the tem"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out2", template=wrong)
    assert not (tmp_path / "out2").exists()


def test_buffers_of_old_checkpoints_and_a_tied_copy_are_left_out(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(hf / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    save_file({**tensors, **extra}, hf / "model.safetensors")
    import_checkpoint(hf, tmp_path / "megatron")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    result = load_file(out / "model.safetensors")
    assert set(result) == set(tensors)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, hf / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head\.weight other than .*tie_word_embeddings: true"):
        import_checkpoint(hf, tmp_path / "megatron2")


def test_the_same_command_again_is_done_at_once_and_another_model_is_refused(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    other = tiny_llama(tmp_path / "other", seed=1)
    iteration = import_checkpoint(hf, tmp_path / "megatron")
    stamp = (iteration / ".metadata").stat().st_mtime_ns
    import_checkpoint(hf, tmp_path / "megatron")
    assert (iteration / ".metadata").stat().st_mtime_ns == stamp
    with pytest.raises(ConversionError, match="--overwrite"):
        import_checkpoint(other, tmp_path / "megatron")
    with pytest.raises(ConversionError, match="--overwrite"):
        import_checkpoint(hf, tmp_path / "megatron", dtype="bfloat16")
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    import_checkpoint(other, tmp_path / "megatron", overwrite=True)
    with pytest.raises(ConversionError, match="--overwrite"):
        export_checkpoint(tmp_path / "megatron", out)
    export_checkpoint(tmp_path / "megatron", out, overwrite=True)
    assert files_of(out) == files_of(other)


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds diary\.txt, which this command did not write"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "notes", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "notes" / "diary.txt")
    shutil.copytree(hf, tmp_path / "model")
    (tmp_path / "model" / "runs").mkdir()
    (tmp_path / "model" / "runs" / "diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match="model holds runs beside a model, which --overwrite would remove"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "model", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "model" / "runs" / "diary.txt").read_text() == "dear"
    shutil.rmtree(tmp_path / "model" / "runs")
    for name in ("README.md", ".git"):
        (tmp_path / "model" / name).mkdir()
        with pytest.raises(ConfigError, match=rf"model holds {name} beside a model"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "model", dtype="bfloat16", overwrite=True)
        (tmp_path / "model" / name).rmdir()
    for name in (".gitattributes", ".lock", ".config.json.tmp-1"):
        (tmp_path / "model" / name).write_text("nobody's")
    (tmp_path / "model" / ".cache" / "huggingface").mkdir(parents=True)
    export_checkpoint(tmp_path / "megatron", tmp_path / "model", dtype="bfloat16", overwrite=True)
    (tmp_path / "run" / "iter_1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="run holds iter_1, which this command did not write"):
        import_checkpoint(hf, tmp_path / "run")
    (tmp_path / "megatron" / "iter_0000010").mkdir()
    with pytest.raises(ConversionError, match="up to iteration 10"):
        import_checkpoint(hf, tmp_path / "megatron", overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


def test_a_release_of_megatron_lm_stays_what_its_root_means(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "other").rename(tmp_path / "release")
    (tmp_path / "root").mkdir()
    (tmp_path / "release").rename(tmp_path / "root" / "release")
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(ConversionError, match=r"root holds a release .*--megatron NEW_DIR"):
        import_checkpoint(hf, tmp_path / "root")
    assert (tmp_path / "root" / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_an_export_whose_files_would_be_others_is_refused(tmp_path: Path) -> None:
    """The same weights under another config, tokenizer or cut: only --overwrite writes what was asked for."""
    template = tiny_llama(tmp_path / "hf")
    megatron, out = tmp_path / "megatron", tmp_path / "out"
    import_checkpoint(template, megatron)
    write = functools.partial(export_checkpoint, megatron, out, template=template)
    write(dtype="bfloat16")
    write(dtype="bfloat16")  # whose config.json names another type than the template's
    with pytest.raises(ConversionError, match=r"other files of another size \(--max-shard-size\).*--overwrite"):
        write(dtype="bfloat16", max_shard_size="100KB")
    write(dtype="bfloat16", max_shard_size="100KB", overwrite=True)
    write(dtype="bfloat16", max_shard_size="100KB")
    (template / "LICENSE").write_text("yours")
    with pytest.raises(ConversionError, match="with other config, tokenizer or other side files"):
        write(dtype="bfloat16")
    write(dtype="bfloat16", overwrite=True)
    edit_config(eos_token_id=[0, 2])(template)
    with pytest.raises(ConversionError, match="with other config, tokenizer or other side files"):
        write(dtype="bfloat16")
    write(dtype="bfloat16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [0, 2]


def test_json_of_other_programs_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With NaN, as transformers' Trainer writes it, or lines of it; what a stage reads must be whole (`MALFORMED`)."""
    hf = tiny_llama(tmp_path / "hf")
    (hf / "trainer_state.json").write_text('{"log_history": [{"grad_norm": NaN}]}')
    (hf / "samples.json").write_text('{"a": 1}\n{"a": 2}\n')
    (hf / "processor.json").write_text('{"chat_template": "{{ messages"}')  # another program's words
    with caplog.at_level("INFO"):
        import_checkpoint(hf, tmp_path / "megatron")
    assert "left behind, no JSON, in spite of its name: samples.json, trainer_state.json" in caplog.text
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert files_of(out).keys() == files_of(hf).keys() - {"trainer_state.json", "samples.json"}


def test_two_conversions_into_one_place_are_refused(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    with locked(tmp_path / "megatron", flag="--megatron"):
        other = multiprocessing.get_context("fork").Process(target=import_checkpoint, args=(hf, tmp_path / "megatron"))
        other.start()
        other.join(60)
    assert other.exitcode == 1 and not (tmp_path / "megatron" / "iter_0000000").exists()
    import_checkpoint(hf, tmp_path / "megatron")
    with locked_place(tmp_path / "out", flag="--hf"), pytest.raises(ConfigError, match="out is in use by process"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_an_import_writes_into_nothing_that_is_somebody_else_s(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    before = files_of(hf)
    with pytest.raises(ConfigError, match=r"hf is the input .*hf\. Choose another directory with --megatron"):
        import_checkpoint(hf, hf)
    with pytest.raises(ConfigError, match=r"holds the input .*hf\. Choose another directory with --megatron"):
        import_checkpoint(hf, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"notes holds diary\.txt, which this command did not write"):
        import_checkpoint(hf, tmp_path / "notes", overwrite=True)
    assert files_of(hf) == before and files_of(tmp_path / "notes") == {"diary.txt": b"dear"}


@pytest.mark.parametrize("text", ["{}", "no JSON", None], ids=["another", "damaged", "gone"])
def test_model_json_at_the_root_is_held_against_the_iteration_s(tmp_path: Path, text: str | None) -> None:
    import_checkpoint(tiny_llama(tmp_path / "hf"), tmp_path / "megatron")
    copy = tmp_path / "megatron" / "model.json"
    copy.unlink()
    if text is None:  # the iteration's own is enough
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
        return
    copy.write_text(text)
    with pytest.raises(DataError, match=r"megatron/model\.json and .*iter_0000000/model\.json differ.*Check which"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    export_checkpoint(tmp_path / "megatron" / "iter_0000000", tmp_path / "out")  # which asks the root nothing


def test_what_is_not_weights_travels_along_or_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A licence goes where the weights go; code, other weights and folders stay, and are named with the reason."""
    hf = tiny_llama(tmp_path / "hf")
    for name in ("LICENSE", "preprocessor_config.json", "additional_chat_templates/tool.jinja"):
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text("{}")
    for name in ("modeling_own.py", "pytorch_model.bin", "README.md", "original/params.json", ".gitattributes"):
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text("x")
    with caplog.at_level("INFO"):
        import_checkpoint(hf, tmp_path / "megatron")
    left = {line for line in caplog.text.splitlines() if "left behind" in line}
    for reason, name in {
        "code, which is never run": "modeling_own.py",
        "in another format": "pytorch_model.bin",
        "not needed by any stage": "README.md",
        "a folder that no stage reads": "original",
    }.items():
        assert [line for line in left if reason in line and name in line], (reason, left)
    assert len(left) == 4
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    expected = {path.relative_to(hf).as_posix() for path in hf.rglob("*") if path.is_file()}
    expected -= {"modeling_own.py", "pytorch_model.bin", "README.md", "original/params.json", ".gitattributes"}
    assert written == expected


def test_two_files_that_state_one_fact_differently_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_llama(tmp_path / "hf", vocab_size=250)  # the tokenizer has 256 bytes and three more
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE + " "}))
    import_checkpoint(hf, tmp_path / "one")
    assert "chat_template.jinja and the chat_template" not in caplog.text
    assert "tokenizer.json has token 258, and the model embeds 250" in caplog.text
    (hf / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    import_checkpoint(hf, tmp_path / "two")
    assert (
        "chat_template.jinja and the chat_template of tokenizer_config.json differ: the first is taken" in caplog.text
    )


def test_a_special_token_that_the_tokenizer_or_the_model_has_not_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "sound")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<end>"}))
    (hf / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 259], "pad_token_id": -1}))
    import_checkpoint(hf, tmp_path / "one")
    assert "tokenizer_config.json says eos_token '<end>', which tokenizer.json does not know" in caplog.text
    assert "special_tokens_map.json says pad_token '<pad>'" in caplog.text
    assert "generation_config.json says eos_token_id [0, 259], and the model has tokens 0 to 258" in caplog.text
    assert "config.json says eos_token_id [2], generation_config.json says [0, 259]" in caplog.text
    (hf / "tokenizer.json").unlink()
    import_checkpoint(hf, tmp_path / "two")
    assert "has no tokenizer (none of tokenizer.json, " in caplog.text


def test_a_licence_in_another_encoding_travels_along(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    (hf / "LICENSE").write_bytes("\xa9 1999".encode("latin-1"))
    import_checkpoint(hf, tmp_path / "megatron")
    assert (export_checkpoint(tmp_path / "megatron", tmp_path / "out") / "LICENSE").read_bytes() == b"\xa9 1999"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors")
        change(tensors)
        save_file(tensors, hf / "model.safetensors")

    return edit


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(hf: Path) -> None:
        shard(hf, 2)
        path = hf / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def truncate(hf: Path) -> None:
    os.truncate(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 10)


def pickle_only(hf: Path) -> None:
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()


def lose_shard(hf: Path) -> None:
    shard(hf, 2)
    (hf / "model-00002-of-00002.safetensors").unlink()


def repeat_tensor(hf: Path) -> None:
    shard(hf, 2)
    second = hf / "model-00002-of-00002.safetensors"
    first = load_file(hf / "model-00001-of-00002.safetensors")
    name = sorted(first)[0]
    save_file({**load_file(second), name: first[name]}, second)


NORM = "model.norm.weight"
MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (edit_tensors(lambda t: t.pop(NORM)), rf"lacks {NORM}"),
    "tensor extra": (edit_tensors(lambda t: t.update(other=torch.ones(2))), r"holds other, for which there is no rule"),
    "tensor mis-shaped": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(63)})),
        r"norm\.weight of shape \[63\]",
    ),
    "tensor of whole numbers": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)})),
        rf"{NORM} is of type I64, which is quantized or no weight",
    ),
    "tensor of float8": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)})),
        rf"{NORM} is of type F8_E4M3, which is quantized or no weight",
    ),
    "tensor of booleans": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.bool)})),
        rf"{NORM} is of type BOOL, which is quantized or no weight",
    ),
    "tokenizer is a pointer": (
        lambda hf: (hf / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        r"tokenizer\.json is a Git LFS pointer, .*git lfs pull",
    ),
    "tokenizer is a web page": (
        lambda hf: (hf / "tokenizer.json").write_text("<!DOCTYPE html><title>401</title>"),
        r"tokenizer\.json is a web page",
    ),
    "tokenizer no JSON": (lambda hf: (hf / "tokenizer.json").write_text("{"), r"tokenizer\.json is damaged"),
    "tokenizer no tokenizer": (
        lambda hf: (hf / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}'),
        r"tokenizer\.json is damaged \(no tokenizer",
    ),
    "settings of the tokenizer empty": (
        lambda hf: (hf / "tokenizer_config.json").write_text(""),
        r"tokenizer_config\.json is damaged \(no text\)",
    ),
    "generation settings a list": (
        lambda hf: (hf / "generation_config.json").write_text("[]"),
        r"generation_config\.json is damaged \(no JSON object\)",
    ),
    "chat template no Jinja": (
        lambda hf: (hf / "chat_template.jinja").write_text("{% for m in messages %}"),
        r"chat_template\.jinja is damaged \(a chat template that is no Jinja: .*line 1\)",
    ),
    "chat template no Jinja, in the settings": (
        lambda hf: (hf / "tokenizer_config.json").write_text('{"chat_template": "{{ messages"}'),
        r"tokenizer_config\.json is damaged \(a chat template that is no Jinja",
    ),
    "SentencePiece model a pointer": (
        lambda hf: (hf / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"tokenizer\.model is a Git LFS pointer",
    ),
    "chat template with a filter that does not exist": (
        lambda hf: (hf / "chat_template.jinja").write_text("{{ messages | as_text }}"),
        r"chat_template\.jinja is damaged .*as_text",
    ),
    "NaN in the generation config": (
        lambda hf: (hf / "generation_config.json").write_text('{"temperature": NaN}'),
        r"generation_config\.json is damaged \(NaN is no number\)",
    ),
    "end of turn that is no id": (
        lambda hf: (hf / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}'),
        r"generation_config\.json says eos_token_id: \[2, \"</s>\"\], which is no token id",
    ),
    "one file beside shards": (
        lambda hf: (
            shutil.copy(hf / "model.safetensors", hf / "copy"),
            shard(hf, 2),
            (hf / "copy").rename(hf / "model.safetensors"),
        ),
        r"holds model\.safetensors and an model\.safetensors\.index\.json that names model-00001-of-00002",
    ),
    "one file beside a stale index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: "a.safetensors"}})
        ),
        r"names a\.safetensors: transformers loads the first",
    ),
    "names without their prefix": (
        edit_tensors(lambda t: t.update({k.removeprefix("model."): t.pop(k) for k in [*t] if k.startswith("model.")})),
        r"lacks model\.embed_tokens\.weight.*, and holds embed_tokens\.weight",
    ),
    "adapter beside the base": (
        lambda hf: (hf / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        r"holds an adapter \(adapter_config\.json\).*Merge it first",
    ),
    "adapter's weights beside the base": (
        lambda hf: save_file({"a": torch.ones(1)}, hf / "adapter_model.safetensors"),
        r"holds an adapter \(adapter_model\.safetensors\)",
    ),
    "mixed types in one stack": (
        edit_tensors(lambda t: t.update({k: t[k].half() for k in t if "layers.1.mlp.down" in k})),
        r"--dtype bfloat16",
    ),
    "more layers promised": (edit_config(num_hidden_layers=5), r"lacks model\.layers\.2.* and 23 more"),
    "fewer layers promised": (edit_config(num_hidden_layers=1), r"holds model\.layers\.1.* and 5 more"),
    "wrong vocabulary": (edit_config(vocab_size=300), r"embed_tokens\.weight of shape \[259, 64\].*\[300, 64\]"),
    "wrong family": (edit_config(model_type="gpt_neox"), r"'gpt_neox'"),
    "no family": (edit_config(model_type=None), r"model_type None"),
    "biases": (edit_config(attention_bias=True), r"lacks .*self_attn\.q_proj\.bias"),
    "NaN in config": (edit_config(rms_norm_eps=float("nan")), r"rms_norm_eps is nan"),
    "rope": (edit_config(rope_parameters={"rope_type": "ntk", "factor": 2.0}), r"'ntk'"),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"has no config\.json"),
    "config no JSON": (lambda hf: (hf / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config a list": (lambda hf: (hf / "config.json").write_text("[1]"), r"no JSON object"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "pickle only": (pickle_only, r"pickle only \(pytorch_model\.bin\)"),
    "weights cut short": (truncate, r"cut short"),
    "weights empty": (lambda hf: (hf / "model.safetensors").write_bytes(b""), r"cut short or no safetensors"),
    "weights are text": (
        lambda hf: (hf / "model.safetensors").write_text("version https://git-lfs"),
        r"is a Git LFS pointer, not the file that it stands for\. Fetch the file: git lfs pull",
    ),
    "shard missing": (lose_shard, r"names model-00002-of-00002\.safetensors, which is missing"),
    "tensor in two shards": (repeat_tensor, r"another shard has it too"),
    "index names a file outside": (edit_index(lambda m: m.update({NORM: "../../x.safetensors"})), r"outside"),
    "index names an absolute path": (edit_index(lambda m: m.update({NORM: "/etc/passwd"})), r"outside"),
    "index names the wrong shard": (
        edit_index(lambda m: m.update(dict.fromkeys(m, "model-00001-of-00002.safetensors"))),
        r"which lacks it",
    ),
    "index names a tensor that is nowhere": (
        edit_index(lambda m: m.update({"model.ghost": "model-00001-of-00002.safetensors"})),
        r"model\.ghost is in",
    ),
    "index empty": (edit_index(lambda m: m.clear()), r"no weight_map"),
    "a file in place of the directory": (lambda hf: (shutil.rmtree(hf), hf.write_text("x")), r"is not a directory"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("damage", "named"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_model_is_one_line_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], Any], named: str
) -> None:
    hf = tiny_llama(tmp_path / "hf")
    damage(hf)
    with pytest.raises((ConversionError, DataError), match=named) as caught:
        import_checkpoint(hf, tmp_path / "megatron")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def damaged(name: str) -> Callable[[Path], Any]:
    def flip(iteration: Path) -> None:
        content = bytearray((iteration / name).read_bytes())
        content[len(content) // 2] ^= 1
        (iteration / name).write_bytes(content)

    return flip


MEGATRON: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"bit flipped in {name}": (damaged(name), r"is not what was written")
        for name in ("__0_0.distcp", ".metadata", "model.json", "hf/config.json", "hf/tokenizer.json")
    },
    "weights missing": (lambda d: (d / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "weights cut short": (lambda d: os.truncate(d / "__0_0.distcp", 1000), r"has 1000 bytes"),
    **{
        f"{name} missing": (lambda d, name=name: (d / name).unlink(), rf"{re.escape(name)} is missing.*use another one")
        for name in (
            "model.json",
            *(f"hf/{name}" for name in ("config.json", "tokenizer.json", "chat_template.jinja", "layout.json")),
            *("hf/additional_chat_templates/tool.jinja", "hf/carried.safetensors"),
        )
    },
    "a file below hf/ changed": (
        lambda d: (d / "hf/additional_chat_templates/tool.jinja").write_text("{}"),
        r"tool\.jinja is not what was written",
    ),
    "a file below hf/ added": (
        lambda d: (d / "hf/additional_chat_templates/other.jinja").write_text("{}"),
        r"other\.jinja is not in manifest\.json",
    ),
    "no manifest, no model.json": (
        lambda d: [(d / name).unlink() for name in ("manifest.json", "model.json")],
        r"no model\.json.*--template",
    ),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(("damage", "named"), MEGATRON.values(), ids=MEGATRON)
def test_a_damaged_megatron_checkpoint_is_never_exported(
    tmp_path: Path, damage: Callable[[Path], Any], named: str
) -> None:
    hf = tiny_llama(tmp_path / "hf", **MIXTURES["glm4_moe"])
    edit_tensors(lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(64, 128)}))(hf)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool.jinja").write_text("ab")
    damage(import_checkpoint(hf, tmp_path / "megatron"))
    with pytest.raises((ConversionError, DataError), match=named) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_llama(tmp_path / "hf")

    written, write = 0, os.pwrite

    def full(descriptor: int, block: Any, offset: int) -> int:
        nonlocal written
        written += memoryview(block).nbytes
        if written > 100_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match="the disk is full") as caught:
        import_checkpoint(hf, tmp_path / "megatron")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "megatron").iterdir()) == []


def test_too_little_space_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_llama(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match=r"needs .* free"):
        import_checkpoint(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_killed_import_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    pid = os.fork()
    if pid == 0:  # dies in the middle of the weights, as by kill -9

        def die(*_: object, **__: object) -> None:
            os._exit(9)

        convert.write_manifest = die
        import_checkpoint(hf, tmp_path / "megatron")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = {path.name for path in (tmp_path / "megatron").iterdir()}
    assert left == {f".iter_0000000.tmp-{pid}", ".lock"}
    with pytest.raises(DataError, match="no usable Megatron checkpoint"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    import_checkpoint(hf, tmp_path / "megatron")
    assert sorted(path.name for path in (tmp_path / "megatron").iterdir()) == [
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
        "model.json",
    ]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_few_tensors_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    """Counts what an import itself holds: read tensors that are still alive when the next one is asked for."""
    import weakref

    from megatron_sppo.checkpoints import hf_checkpoint

    hf = tiny_llama(tmp_path / "hf", num_hidden_layers=6)
    alive: list[int] = []
    seen: list[Any] = []
    original = hf_checkpoint.read_tensor

    def counting(entry: Any) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in seen))
        tensor = original(entry)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(hf_checkpoint, "read_tensor", counting)
    monkeypatch.setattr(transfer, "BUDGET_BYTES", 1)  # every tensor is larger: alone, whatever the threads
    import_checkpoint(hf, tmp_path / "megatron", dtype=dtype, workers=4)
    if dtype is None:
        assert alive == [], "what only moves is never a tensor"
    else:
        assert max(alive) == 2, "q and k, when v is asked for"


@pytest.mark.parametrize("chunk_bytes", [1, 700, 30_000])
def test_large_tensors_are_cut_into_chunks_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    hf = tiny_llama(tmp_path / "hf")
    whole = import_checkpoint(hf, tmp_path / "whole")
    monkeypatch.setattr(distcp_writer, "_MAX_CHUNK_BYTES", chunk_bytes)
    cut = import_checkpoint(hf, tmp_path / "cut")
    verify_checkpoint(cut)
    read, read_whole = read_metadata(cut).state_dict_metadata, read_metadata(whole).state_dict_metadata
    key = "embedding.word_embeddings.weight"
    row = read[key].size[1] * 4
    assert len(read_whole[key].chunks) == 1
    assert len(read[key].chunks) == math.ceil(read[key].size[0] / max(1, chunk_bytes // row))
    state = [{name: torch.empty(entry.size) for name, entry in read.items() if hasattr(entry, "size")} for _ in "ab"]
    for content, directory in zip(state, (whole, cut), strict=True):
        dcp.load(content, checkpoint_id=directory, no_dist=True)  # torch's own reader
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    assert verify(hf, cut)["faults"] == []  # Megatron-Core's reader
    assert files_of(export_checkpoint(cut, tmp_path / "out")) == files_of(hf)


@pytest.mark.parametrize("overrides", [{}, MIXTURES["mixtral"]], ids=["dense", "mixture"])
def test_the_files_are_the_same_by_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    monkeypatch.setattr(distcp_writer, "_MAX_FILE_BYTES", 100_000)
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 1000)  # so that blocks end within tensors
    hf = tiny_llama(tmp_path / "hf", num_hidden_layers=4, **overrides)
    shard(hf, 3)
    results = []
    for workers in (1, 4):
        iteration = import_checkpoint(hf, tmp_path / f"megatron{workers}", workers=workers)
        verify_checkpoint(iteration)
        assert len(list(iteration.glob("*.distcp"))) > 3
        out = export_checkpoint(iteration, tmp_path / f"out{workers}", workers=workers)
        assert files_of(out) == files_of(hf)
        cast = export_checkpoint(iteration, tmp_path / f"cast{workers}", workers=workers, dtype="bfloat16")
        results.append(({path.name: path.read_bytes() for path in iteration.glob("*.*")}, files_of(cast)))
    assert results[0] == results[1]


STEPS = [(name, call) for name in ("pwrite", "fsync", "fdatasync", "rename", "replace") for call in range(3)]


@pytest.mark.parametrize("is_import", [True, False], ids=["import", "export"])
def test_a_reader_sees_old_or_new_whichever_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_import: bool
) -> None:
    """Each write, fsync and rename of an overwriting conversion fails once; then the same command completes."""
    old, new = tiny_llama(tmp_path / "old"), tiny_llama(tmp_path / "new", seed=1)
    megatron = tmp_path / "megatron"
    import_checkpoint(old, megatron)
    out = export_checkpoint(megatron, tmp_path / "out")
    if not is_import:
        import_checkpoint(new, megatron, overwrite=True)

    def convert_again() -> None:
        if is_import:
            import_checkpoint(new, megatron, overwrite=True)
        else:
            export_checkpoint(megatron, out, overwrite=True)

    def state() -> dict[str, bytes]:
        return files_of(out) if not is_import else files_of(export_checkpoint(megatron, tmp_path / "seen"))

    failed = 0
    for name, failing_call in STEPS:
        real, calls = getattr(os, name), iter(range(10**6))

        def fail(*arguments: Any, real: Any = real, calls: Any = calls, at: int = failing_call, **keywords: Any) -> Any:
            if next(calls) == at:
                raise OSError(5, "Input/output error")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            try:
                convert_again()
            except (OSError, DataError):
                failed += 1
        assert state() in (files_of(old), files_of(new)), (name, failing_call)
        shutil.rmtree(tmp_path / "seen", ignore_errors=True)
        assert not [path.name for path in tmp_path.rglob(".*") if ".tmp-" in path.name], (name, failing_call)
    assert failed >= 6, "some steps are not taken three times, and a rename only where two places cannot be exchanged"
    convert_again()
    assert state() == files_of(new)


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5_000_000_000), ("500MiB", 524_288_000), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "big", "-5GB", "5 bananas", "0GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConversionError, match="max-shard-size 5GB"):
        parse_size(text)
