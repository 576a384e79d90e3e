"""Models that see images: the text decoder converts, all else is carried along, and every byte comes back.

The models are transformers' own, with a vision tower of one layer; logits are of text alone.
Not shown here: images, which nothing here computes, and training, which knows the decoder only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints.model_files import read_model_files
from megatron_sppo.config import from_dict, parse
from megatron_sppo.conversion.adapters import export_adapter, import_adapter
from megatron_sppo.conversion.complete import check_complete
from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.conversion.merging import export_merged
from megatron_sppo.errors import ConversionError
from megatron_sppo.model_file import read_architecture
from megatron_sppo.rollout.policy import open_adapter_of
from megatron_sppo.selfplay.config import SelfPlayConfig
from megatron_sppo.selfplay.loop import self_play
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.inputs import open_weights
from megatron_sppo.verification.verify import verify
from tests.adapters import random_adapter
from tests.families import COMMON, FAMILIES
from tests.models import byte_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
PIXTRAL = {"vision_config": {"model_type": "pixtral", "patch_size": 14, "head_dim": 8, **TOWER}}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {"vision_config": {"model_type": "siglip_vision_model", "patch_size": 14, **TOWER}, "mm_tokens_per_image": 1},
    ),
    "mistral3": ("mistral", PIXTRAL),
    "mistral3, as published since Ministral 3": ("ministral3", PIXTRAL),
    "qwen3_5": ("qwen3_5_text", {"vision_config": {"model_type": "qwen3_5_vision", **QWEN_TOWER}}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": {"model_type": "qwen3_5_moe_vision", **QWEN_TOWER}}),
}


def wrapped_model(directory: Path, kind: str) -> Path:
    """Write a random model by transformers, with the byte tokenizer -> the directory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, settings = WRAPPERS[kind]
    tied = {"tie_word_embeddings": kind == "gemma3"}
    config = AutoConfig.for_model(
        kind.partition(",")[0], text_config={**COMMON, **FAMILIES[text], **tied}, **settings, **tied
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: wrapped_model(tmp_path_factory.mktemp(kind) / "hf", kind) for kind in WRAPPERS}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def changed(source: Path, directory: Path, **config: Any) -> Path:
    """Copy a model and change keys of its config.json -> the copy."""
    shutil.copytree(source, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


@pytest.mark.parametrize("kind", WRAPPERS)
def test_every_byte_comes_back(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models[kind], tmp_path / "megatron")
    assert content(export_checkpoint(tmp_path / "megatron", tmp_path / "out")) == content(models[kind])
    architecture, _ = read_architecture(tmp_path / "megatron/iter_0000000")
    assert architecture.family == WRAPPERS[kind][0]


def test_both_ways_to_name_a_decoder_are_read_and_written(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 names it model.language_model... in memory; files of either kind are published."""
    renamed = changed(models["mistral3"], tmp_path / "hf")
    tensors = load_file(renamed / "model.safetensors")
    newer = {
        (
            name.replace("language_model.model.", "model.language_model.")
            if name.startswith("language_model.model.")
            else name.replace("language_model.lm_head.", "lm_head.")
            if name.startswith("language_model.")
            else f"model.{name}"
        ): tensor
        for name, tensor in tensors.items()
    }
    save_file(newer, renamed / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(renamed, tmp_path / "megatron")
    # A cast lays the files out anew: the names are known by what is carried along.
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype="bfloat16")
    found = load_file(out / "model.safetensors")
    assert set(found) == set(newer)
    for name, tensor in found.items():
        is_carried = name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
        assert tensor.equal(newer[name] if is_carried else newer[name].bfloat16())


@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind.startswith("mistral3")])
def test_logits_are_hugging_faces_whole_and_by_layer(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models[kind], tmp_path / "megatron")
    for layerwise in (False, True):
        report = verify(models[kind], tmp_path / "megatron", layerwise=layerwise)
        assert report["faults"] == []
        assert report["logits"]["max_abs"] <= 1e-5


TARGETS = r"model\.language_model\.layers\..*\.(q_proj|v_proj|down_proj)"


def adapter_of(base: Path, directory: Path, *, older: bool = False, of_tower: bool = False) -> Path:
    """Write a random adapter of the decoder as PEFT names it -> the directory.

    Args:
        older: as transformers named the decoder before 4.52.
        of_tower: adapt the vision tower too.
    """
    targets = TARGETS.replace("model\\.language_model", "language_model\\.model") if older else TARGETS
    chosen = ["q_proj", "v_proj", "down_proj"] if of_tower else targets
    random_adapter(directory, base, targets=("q_proj", "v_proj", "down_proj"), target_modules=chosen)
    tensors = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        if "vision_tower" in name:
            name = name.replace(".model.vision_tower", ".model.model.vision_tower")
            tensors |= {name: tensor} if of_tower else {}
        else:
            tensors[name if older else name.replace(".language_model.model.", ".model.language_model.")] = tensor
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@pytest.mark.parametrize("older", [False, True])
def test_adapters_of_the_decoder_come_back_to_the_byte(
    kind: str, older: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapter_of(models[kind], tmp_path / "adapter", older=older)
    import_adapter(adapter, tmp_path / "megatron", base=models[kind])
    assert content(export_adapter(tmp_path / "megatron", tmp_path / "back", base=models[kind])) == content(adapter)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_peft_computes_with_an_export_what_the_merged_model_gives(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """In float32; PEFT takes every tensor, and puts none on the vision tower."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    adapter = adapter_of(models[kind], tmp_path / "adapter", older=True)
    import_adapter(adapter, tmp_path / "megatron", base=models[kind], dtype="float32")
    new = export_adapter(tmp_path / "megatron", tmp_path / "new", base=models[kind])
    config = json.loads((new / "adapter_config.json").read_text())
    assert config["target_modules"] == TARGETS
    merged = export_merged(tmp_path / "megatron", tmp_path / "merged", base=models[kind])
    tokens, logits = torch.arange(3, 40)[None], []
    for place, on_top in ((models[kind], None), (models[kind], new), (merged, None)):
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32)
        if on_top is not None:
            model = peft.PeftModel.from_pretrained(model, on_top)
            adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
            assert len(adapted) == len(load_file(new / "adapter_model.safetensors"))
            assert not any("vision" in name for name in adapted)
        with torch.no_grad():
            logits.append(model.eval()(input_ids=tokens).logits)
    assert torch.allclose(logits[1], logits[2], atol=1e-5) and not torch.allclose(logits[0], logits[1], atol=1e-2)
    before, after = load_file(models[kind] / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed_names = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed_names and not any("vision" in name for name in changed_names)
    assert export_merged(tmp_path / "megatron", merged, base=models[kind]) == merged  # the same again


def test_adapters_of_what_sees_images_and_engines_with_adapters_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    base = models["mistral3"]
    adapter = adapter_of(base, tmp_path / "adapter", of_tower=True)
    with pytest.raises(ConversionError, match=r"adapts model\.vision_tower\..*, which is no linear module of the text"):
        import_adapter(adapter, tmp_path / "adapters", base=base)
    assert not list(tmp_path.glob("adapters/*"))
    alone = adapter_of(base, tmp_path / "alone")
    with pytest.raises(ConversionError, match=r"sees images too \(mistral3\).*Merge it: `megatron-sppo convert export"):
        open_adapter_of(base, "0" * 64, alone)


def test_self_play_with_adapters_is_refused_before_it_begins(models: dict[str, Path], tmp_path: Path) -> None:
    run = {"model": str(models["mistral3"]), "prompts": ["prompts.jsonl"], "output": str(tmp_path / "run")}
    training = {"lr": 1e-4, "micro_batch_size": 2, "global_batch_size": 4, "lora_rank": 4}
    sections = {"run": {**run, "iterations": 2}, "scoring": {"judge": "rules:concise"}, "training": training}
    settings = from_dict(SelfPlayConfig, sections, place="a test")
    with pytest.raises(ConversionError, match=r"sees images too \(mistral3\).*Use --lora-merge-each-iteration"):
        self_play(settings)
    assert not (tmp_path / "run").exists()


def test_training_takes_adapters_of_the_decoder(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["mistral3"], tmp_path / "megatron")
    argv = f"--load {tmp_path / 'megatron'} --data d --save s --lr 1e-6 --micro-batch-size 1 --lora-rank 4"
    training = parse(TrainingConfig, name="", description="", argv=argv.split())
    source = tmp_path / "megatron" / "iter_0000000"
    assert open_weights(training, read_architecture(source)[0], source) == [source]


def test_rollouts_find_vocabulary_and_positions(models: dict[str, Path]) -> None:
    found = read_model_files(models["gemma3"])
    assert (found.vocab_size, found.context_length) == (263, 512)
    assert check_complete(models["gemma3"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": None}, "no text_config"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type 'llama'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings true and false"),
        ({"model_type": "gemma3"}, "text_config.model_type 'mistral'"),
    ],
)
def test_configs_that_describe_no_such_model_are_refused(
    config: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    hf = changed(models["mistral3"], tmp_path / "hf", **config)
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("language_model.", "decoder.", "holds no decoder"),
        ("language_model.model.norm.weight", "language_model.model.norm.scale", "lacks model.norm.weight"),
        ("vision_tower.", "audio_tower.", "for which there is no rule"),
    ],
)
def test_tensors_of_no_known_kind_are_refused(
    old: str, new: str, message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    hf = changed(models["mistral3"], tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, hf / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
