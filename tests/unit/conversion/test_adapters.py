"""Proves: PEFT's files come out of a Megatron checkpoint of adapters as they went in, to the byte; `peft` computes with
what is exported; a merged model is base + scaling B A to the last bit; bad adapters are one line, and nothing is there.

That Megatron computes with them what `peft` does: tests/distributed/test_adapter_layouts.py.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints import adapter_file
from megatron_sppo.checkpoints.hf_checkpoint import open_hf_checkpoint
from megatron_sppo.conversion.adapters import export_adapter, import_adapter
from megatron_sppo.conversion.binding import bind
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.conversion.families import family_of
from megatron_sppo.conversion.megatron_model import open_megatron
from megatron_sppo.conversion.merging import export_merged
from megatron_sppo.conversion.weights_hash import weights_hash
from megatron_sppo.errors import ConfigError, ConversionError, DataError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import build_stage
from megatron_sppo.model_file import read_architecture
from megatron_sppo.training import checkpoint, parallel, policy
from megatron_sppo.training.config import ParallelConfig
from tests.adapters import random_adapter
from tests.commands import run_here
from tests.families import FAMILIES, family_model
from tests.models import MIXTURES, tiny_llama

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", dtype="bfloat16")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.shut_down()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_has_the_name_that_training_gives_it(name: str, dtype: str, tmp_path: Path, _one_rank: None) -> None:
    hf = family_model(tmp_path / "hf", name)
    source = import_checkpoint(hf, tmp_path / "megatron")
    architecture, _ = read_architecture(source)
    model = ModelConfig(params_dtype=dtype, transformer_impl="torch")
    config = policy.mcore_config(architecture, model, ParallelConfig())
    stage = build_stage(architecture, config, model, pre_process=True, post_process=True)
    checkpoint.load_stages((stage,), source)
    bindings = bind(family_of(architecture.family, place=name), architecture)
    found = weights_hash(open_hf_checkpoint(hf), bindings, dtype=getattr(torch, dtype))
    assert found == policy.weights_hash((stage,))


KINDS: dict[str, dict[str, Any]] = {
    "all linears": {},
    "some": {"targets": ("q_proj", "v_proj", "down_proj"), "rank": 3, "alpha": 5},
    "rslora, half precision": {"use_rslora": True, "dtype": torch.bfloat16},
    "words of its own": {"base_model_name_or_path": "org/name", "peft_version": "0.21.2", "lora_dropout": 0.05},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_the_same_to_the_byte(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = random_adapter(tmp_path / "adapter", base, **KINDS[kind])
    import_adapter(adapter, tmp_path / "megatron", base=base)
    export_adapter(tmp_path / "megatron", tmp_path / "back", base=base)
    for file in FILES:
        assert (tmp_path / "back" / file).read_bytes() == (adapter / file).read_bytes()


def test_words_of_an_import_that_went_or_changed_are_damage(base: Path, tmp_path: Path) -> None:
    directory = import_adapter(random_adapter(tmp_path / "adapter", base), tmp_path / "megatron", base=base)
    for name in ("peft_layout.json", "hf/config.json"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-2] + b" }")
        with pytest.raises(DataError, match=rf"{name} is not what was written"):
            export_adapter(tmp_path / "megatron", tmp_path / "out", base=None)
        (directory / name).unlink()
        with pytest.raises(DataError, match=rf"{name} is missing"):
            export_adapter(tmp_path / "megatron", tmp_path / "out", base=None)
        (directory / name).write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_given_is_named_or_refused(base: Path, tmp_path: Path) -> None:
    """Of adapters whose words are no import's: exported without a base, they name none when it is given."""
    import_adapter(random_adapter(tmp_path / "adapter", base), tmp_path / "megatron", base=base)
    write = functools.partial(export_adapter, tmp_path / "megatron", tmp_path / "out", dtype="float32")
    write(base=None)
    write(base=None)
    with pytest.raises(ConversionError, match=r"names the base None\. Choose another --adapter, or add --overwrite"):
        write(base=base)
    write(base=base, overwrite=True)
    write(base=base)
    write(base=None)  # asks for no name
    assert json.loads((tmp_path / "out" / FILES[0]).read_text())["base_model_name_or_path"] == str(base)


def test_a_merge_casts_what_an_export_casts(tmp_path: Path) -> None:
    """Not the router's biases, nor layers that predict further tokens: bit for bit the base's, in float32."""
    hf = tiny_llama(tmp_path / "hf", **MIXTURES["glm4_moe"])
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(hf, tmp_path / "model")
    import_adapter(random_adapter(tmp_path / "adapter", hf, targets=("q_proj",)), tmp_path / "megatron", base=hf)
    plain = load_file(export_checkpoint(tmp_path / "model", tmp_path / "plain", dtype="bfloat16") / "model.safetensors")
    for _ in range(2):  # the second one finds it done
        merged = export_merged(tmp_path / "megatron", tmp_path / "merged", base=hf, dtype="bfloat16")
    found = load_file(merged / "model.safetensors")
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in plain.items()}
    kept = [name for name, one in found.items() if one.dtype == torch.float32]
    assert len(kept) == 2 and all(torch.equal(found[name], tensors[name]) for name in kept)


def test_a_tied_copy_of_the_embedding_is_cast_with_it(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, hf / "model.safetensors")
    import_adapter(random_adapter(tmp_path / "adapter", hf), tmp_path / "megatron", base=hf)
    merged = export_merged(tmp_path / "megatron", tmp_path / "merged", base=hf, dtype="bfloat16")
    import_checkpoint(merged, tmp_path / "again")  # which refuses two that differ


def test_a_merge_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf")
    import_adapter(random_adapter(tmp_path / "adapter", hf), tmp_path / "megatron", base=hf)
    merge = functools.partial(export_merged, tmp_path / "megatron", tmp_path / "out", base=hf)
    merge()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"out holds thesis\.tex beside a model, which --overwrite would remove"):
        merge(overwrite=True)
    (tmp_path / "out" / "thesis.tex").unlink()
    with pytest.raises(ConversionError, match="of another size"):
        merge(max_shard_size="100KB")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConversionError, match="with other config, tokenizer or other side files"):
        merge()
    merge(overwrite=True)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "phi3"])
def test_experts_and_packed_modules_come_out_as_they_went_in(kind: str, tmp_path: Path) -> None:
    hf = family_model(tmp_path / "hf", kind) if kind == "phi3" else tiny_llama(tmp_path / "hf", **MIXTURES[kind])
    targets = {"phi3": ("qkv_proj", "gate_up_proj"), "mixtral": ("w1", "w2", "w3", "o_proj")}
    adapter = random_adapter(tmp_path / "adapter", hf, targets=targets.get(kind, ("gate_proj", "down_proj", "k_proj")))
    directory = import_adapter(adapter, tmp_path / "megatron", base=hf)
    export_adapter(tmp_path / "megatron", tmp_path / "back", base=None)
    before, after = (load_file(place / FILES[1]) for place in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    (directory / "peft_layout.json").unlink()  # as of a checkpoint that training saved
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["peft_layout.json"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    export_adapter(tmp_path / "megatron", tmp_path / "new", base=hf)
    after = load_file(tmp_path / "new" / FILES[1])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_peft_s_own_files_and_an_export_without_them_compute_the_same(base: Path, tmp_path: Path) -> None:
    """In float32, by `peft` on transformers' model: the adapter as peft saved it, and as written anew."""
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "saved")
    import_adapter(tmp_path / "saved", tmp_path / "megatron", base=base)
    export_adapter(tmp_path / "megatron", tmp_path / "same", base=base)
    for file in FILES:
        assert (tmp_path / "same" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    import_adapter(tmp_path / "saved", tmp_path / "float32", base=base, dtype="float32")
    export_adapter(tmp_path / "float32", tmp_path / "new", base=base)
    config = json.loads((tmp_path / "new" / FILES[0]).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 6)
    tokens = torch.arange(3, 40)[None]
    logits = []
    for place in ("saved", "new"):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(fresh, tmp_path / place).eval()(tokens).logits)
            plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
    assert torch.equal(*logits) and not torch.allclose(plain, logits[0], atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cast", [None, "float32", "bfloat16"])
def test_a_merged_model_is_base_plus_scaling_b_a_rounded_once(dtype: str, cast: str | None, tmp_path: Path) -> None:
    hf = tiny_llama(tmp_path / "hf", dtype=dtype)
    adapter = random_adapter(tmp_path / "adapter", hf, rank=4, alpha=6, targets=("q_proj", "k_proj", "up_proj"))
    import_adapter(adapter, tmp_path / "megatron", base=hf)
    export_merged(tmp_path / "megatron", tmp_path / "merged", base=hf, dtype=cast)
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    factors = load_file(adapter / FILES[1])
    assert before.keys() == after.keys()
    num_adapted = 0
    for name, weight in before.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        kind = weight.dtype if cast is None else getattr(torch, cast)
        expected = weight.to(kind)
        if f"{prefix}A.weight" in factors:
            product = factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
            expected = (weight.float() + product * (6 / 4)).to(kind)
            assert not torch.equal(expected, weight.to(kind))
            num_adapted += 1
        assert after[name].dtype == kind and torch.equal(after[name], expected)
    assert num_adapted == 6
    for file in hf.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == (cast or dtype)


def test_a_command_that_has_done_its_work_does_nothing_and_overwrites_nothing(base: Path, tmp_path: Path) -> None:
    adapters = [random_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (0, 1)]
    megatron = ["--megatron", tmp_path / "megatron"]
    steps = [
        ["import", "--adapter", adapters[0], "--base", base, *megatron],
        ["export", "--adapter", tmp_path / "peft", *megatron],
        ["export", "--hf", tmp_path / "merged", "--merge", "--template", base, *megatron],
    ]
    for step in steps:
        assert run_here("tools/convert.py", *step).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for step in steps:
        again = run_here("tools/convert.py", *step)
        assert again.returncode == 0, again.stderr
    refused = run_here("tools/convert.py", "import", "--adapter", adapters[1], "--base", base, *megatron)
    assert refused.returncode == 2 and "holds other adapters or another dtype" in refused.stderr
    import_adapter(adapters[1], tmp_path / "other", base=base)
    other = ["--megatron", tmp_path / "other"]
    refused = run_here("tools/convert.py", "export", "--adapter", tmp_path / "peft", *other)
    assert refused.returncode == 2 and "holds another adapter or another dtype" in refused.stderr
    refused = run_here("tools/convert.py", "export", "--hf", tmp_path / "merged", "--merge", "--base", base, *other)
    assert refused.returncode == 2 and "holds another model or another dtype" in refused.stderr
    written = [path for path in before if path.suffix in (".distcp", ".safetensors") or "config" in path.name]
    assert written and all(path.stat().st_mtime_ns == before[path] for path in written)
    (tmp_path / "peft/notes.txt").write_text("mine")
    refused = run_here("tools/convert.py", "export", "--adapter", tmp_path / "peft", *other, "--overwrite")
    assert refused.returncode == 2 and "holds notes.txt beside an adapter" in refused.stderr
    (tmp_path / "peft/notes.txt").unlink()
    assert run_here("tools/convert.py", "export", "--adapter", tmp_path / "peft", *other, "--overwrite").returncode == 0
    assert (tmp_path / "peft" / FILES[1]).read_bytes() == (adapters[1] / FILES[1]).read_bytes()


def _change(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> None:
    tensors = load_file(adapter / FILES[1])
    change(tensors)
    save_file(tensors, adapter / FILES[1])
    path = adapter / FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def _in_one_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1." in name and "o_proj" in name]:
        del tensors[name]


BAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "DoRA": (lambda a, b: _change(a, lambda t: None, use_dora=True), "which is DoRA"),
    "other layers": (
        lambda a, b: _change(a, _in_one_layer, layers_to_transform=[0]),
        "adapts o_proj in some layers and not in others .model.layers.1.self_attn.o_proj",
    ),
    "another base": (lambda a, b: tiny_llama(b, num_key_value_heads=2), "which .* has as"),
    "two types": (
        lambda a, b: _change(
            a, lambda t: t.update({name: t[name].bfloat16() for name in t if "layers.1.mlp.up_proj.lora_A" in name})
        ),
        "holds up_proj in torch.float32 and torch.bfloat16, which Megatron keeps in one tensor",
    ),
    "no base": (lambda a, b: shutil.rmtree(b), "is not a directory"),
    "a base whose type is not trained": (lambda a, b: tiny_llama(b, dtype="float16"), "--dtype bfloat16"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_one_line_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    damage, message = BAD[kind]
    base = tiny_llama(tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", base)
    damage(adapter, base)
    with pytest.raises(ConversionError, match=message) as refusal:
        import_adapter(adapter, tmp_path / "megatron", base=base)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("megatron/*"))


def test_a_mixture_s_router_is_no_module_that_is_trained(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", **MIXTURES["qwen3_moe"])
    adapter = random_adapter(tmp_path / "adapter", base, targets=("q_proj", "gate"))
    with pytest.raises(ConversionError, match="adapts gate, which Megatron's adapters cannot: only q_proj"):
        import_adapter(adapter, tmp_path / "megatron", base=base)


def test_adapters_of_another_base_are_neither_merged_nor_named_after_it(base: Path, tmp_path: Path) -> None:
    """Of the same shapes: only its weights tell."""
    import_adapter(random_adapter(tmp_path / "adapter", base), tmp_path / "megatron", base=base)
    other = tiny_llama(tmp_path / "other", seed=1, dtype="bfloat16")
    with pytest.raises(ConversionError, match="has weights .* were trained on"):
        export_merged(tmp_path / "megatron", tmp_path / "merged", base=other)
    with pytest.raises(ConversionError, match="has weights .* were trained on"):
        export_adapter(tmp_path / "megatron", tmp_path / "back", base=other)
    wider = tiny_llama(tmp_path / "wider", intermediate_size=128, dtype="bfloat16")
    with pytest.raises(ConversionError, match="ffn_hidden_size is 128 in the base and 96 in the checkpoint"):
        export_merged(tmp_path / "megatron", tmp_path / "merged", base=wider)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "back").exists()


def test_models_and_adapters_are_not_taken_for_each_other(base: Path, tmp_path: Path) -> None:
    import_adapter(random_adapter(tmp_path / "adapter", base), tmp_path / "adapters", base=base)
    import_checkpoint(base, tmp_path / "model")
    with pytest.raises(ConversionError, match="holds adapters and no model. Use .*--adapter DIR, or with --hf"):
        open_megatron(tmp_path / "adapters")
    with pytest.raises(ConversionError, match="holds a whole model and no adapters"):
        export_adapter(tmp_path / "model", tmp_path / "back", base=None)


def test_a_damaged_checkpoint_of_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    directory = import_adapter(random_adapter(tmp_path / "adapter", base), tmp_path / "megatron", base=base)
    settings = adapter_file.read_adapter(directory)
    assert settings.settings.rank == 4 and settings.base.params_dtype == "bfloat16"
    data = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises((ConversionError, DataError), match="not what was written"):
        export_adapter(tmp_path / "megatron", tmp_path / "back", base=None)
    assert not (tmp_path / "back").exists()


USAGE = {
    "both": (["import", "--hf", "a", "--adapter", "b", "--megatron", "c"], "either a model or an adapter"),
    "neither": (["import", "--megatron", "c"], "either a model or an adapter"),
    "no base": (["import", "--adapter", "b", "--megatron", "c"], "--adapter and --base belong together"),
    "a base of a model": (["import", "--hf", "b", "--base", "d", "--megatron", "c"], "--adapter and --base belong"),
    "nothing to write": (["export", "--megatron", "c"], "either a model or an adapter"),
    "merged without a base": (["export", "--megatron", "c", "--hf", "d", "--merge"], "Use --hf DIR --merge --base HF"),
    "merged into an adapter": (["export", "--megatron", "c", "--adapter", "d", "--merge"], "--merge makes a model"),
    "a base of nothing": (["export", "--megatron", "c", "--hf", "d", "--base", "e"], "--base is the model of adapters"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("case", USAGE)
def test_flags_that_do_not_go_together_are_one_line(case: str) -> None:
    arguments, message = USAGE[case]
    done = run_here("tools/convert.py", *arguments)
    assert done.returncode == 2 and message in done.stderr.strip().splitlines()[-1]
