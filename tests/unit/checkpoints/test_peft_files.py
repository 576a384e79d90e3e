"""Proves: a PEFT adapter is read as PEFT means it, and every one that is more than plain LoRA, damaged or another
model's is refused in words.

That vLLM and `peft` take what is written: tests/e2e/test_adapter_rollouts.py, tests/unit/conversion/test_adapters.py.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sppo.checkpoints.hf_checkpoint import open_hf_checkpoint
from megatron_sppo.checkpoints.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_fits, open_peft_adapter
from megatron_sppo.errors import ConversionError
from tests.adapters import random_adapter
from tests.models import MIXTURES, tiny_llama

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def check(adapter: Path, base: Path) -> None:
    opened = open_hf_checkpoint(base)
    check_fits(open_peft_adapter(adapter), {name: entry.shape for name, entry in opened.entries.items()}, base=base)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_added_is_alpha_over_rank_or_its_root_times_b_a(base: Path, tmp_path: Path, use_rslora: bool) -> None:
    directory = random_adapter(tmp_path / "a", base, rank=4, alpha=6, use_rslora=use_rslora)
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    found = open_peft_adapter(directory).delta("model.layers.0.self_attn.q_proj")
    product = tensors[f"{Q0}B.weight"].double() @ tensors[f"{Q0}A.weight"].double()
    assert torch.allclose(found.double(), product * (6 / math.sqrt(4) if use_rslora else 6 / 4), atol=1e-6)


def test_an_adapter_of_peft_itself_is_taken_and_peft_s_words_are_understood(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "saved")
    check(tmp_path / "saved", base)
    opened = open_peft_adapter(tmp_path / "saved")
    assert len(opened.factors) == 14  # seven linear layers in each of two layers
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    assert torch.allclose(opened.delta("model.layers.1.mlp.down_proj"), layer.get_delta_weight("default"), atol=1e-6)


def test_experts_are_linear_layers_by_their_own_names(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", **MIXTURES["qwen3_moe"])
    check(random_adapter(tmp_path / "a", base, targets=("q_proj", "gate_proj", "up_proj", "down_proj")), base)
    check(random_adapter(tmp_path / "b", base, targets=("q_proj",)), base)


def test_the_hash_is_of_what_is_computed(base: Path, tmp_path: Path) -> None:
    one = open_peft_adapter(random_adapter(tmp_path / "one", base)).adapter_hash
    elsewhere = random_adapter(tmp_path / "two", base, base_model_name_or_path="another/name")
    assert open_peft_adapter(elsewhere).adapter_hash == one
    others = [{"seed": 1}, {"alpha": 9}, {"use_rslora": True}]
    hashes = {
        open_peft_adapter(random_adapter(tmp_path / str(i), base, **o)).adapter_hash for i, o in enumerate(others)
    }
    assert len(hashes | {one}) == 4


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "says peft_type 'IA3'. Only LoRA adapters"),
    "DoRA": ({"use_dora": True}, "says use_dora true, which is DoRA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r'says modules_to_save \["lm_head"\], whole layers beside'),
    "biases": ({"bias": "lora_only"}, "says bias 'lora_only'"),
    "what is not known": ({"use_future_lora": True}, "says use_future_lora true: it is more than plain LoRA"),
    "no rank": ({"r": 0}, "r is 0, not a positive whole number"),
    "a rank of text": ({"r": "16"}, "r is '16', not a positive whole number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None, not a positive number"),
    "another rank": ({"r": 8}, r"lora_A \[4, \d+\] and lora_B \[\d+, 4\] of .*_proj, where .* says rank r = 8"),
    "no targets": ({"target_modules": []}, "names no modules"),
    "a target of no tensors": ({"target_modules": ["q_proj", "w_proj"]}, "names the target w_proj, and .* no tensors"),
    "a damaged pattern": ({"target_modules": "(q_proj"}, "names no modules"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_more_or_less_than_plain_lora_is_refused(base: Path, tmp_path: Path, kind: str) -> None:
    changes, message = KINDS[kind]
    directory = random_adapter(tmp_path / "a", base)
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError, match=message) as refusal:
        open_peft_adapter(directory)
    assert "\n" not in str(refusal.value)


READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules")
PARTIAL = ("exclude_modules", "layers_to_transform")
"""What they leave out is in no file: an import asks for all layers, rollouts take the adapter as it is."""
OF_TRAINING = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "layers_pattern"),
    *("lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config", "task_type"),
)
"""Where it came from, and how it was begun or trained: PEFT computes with the saved matrices as without them."""
REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [7],
    "alpha_pattern": {"q_proj": 8},
    "arrow_config": {"top_k": 2},
    "fan_in_fan_out": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"use_entropy": True},
    "rank_pattern": {"q_proj": 8},
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"scale": 0.5},
}


def test_every_field_of_peft_s_config_is_handled_or_refused() -> None:
    """A new version's new field belongs into one of the four lists; until then it is refused where it is set."""
    peft = pytest.importorskip("peft")
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert sorted([*READ, *PARTIAL, *OF_TRAINING, *REFUSED]) == sorted(fields)
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    assert len(variants) > 3 and variants <= set(REFUSED)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("field", REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(base: Path, tmp_path: Path, field: str) -> None:
    directory = random_adapter(tmp_path / "a", base, **{field: REFUSED[field]})
    with pytest.raises(ConversionError, match=f"says {field} .*: it is more than plain LoRA of one rank") as refusal:
        open_peft_adapter(directory)
    assert "\n" not in str(refusal.value)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "a_start_of_tomorrow"]
)
def test_starts_that_change_the_base_or_are_not_known_are_refused(base: Path, tmp_path: Path, start: str) -> None:
    directory = random_adapter(tmp_path / "a", base, init_lora_weights=start)
    with pytest.raises(ConversionError, match=f"says init_lora_weights '{start}', by which PEFT changes the base's"):
        open_peft_adapter(directory)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_as_it_is_are_taken(base: Path, tmp_path: Path, start: bool | str) -> None:
    check(random_adapter(tmp_path / "a", base, init_lora_weights=start), base)


@pytest.mark.parametrize("layers", [0, [0], 1])
def test_an_adapter_of_some_layers_is_whole_without_the_others(
    base: Path, tmp_path: Path, layers: int | list[int]
) -> None:
    """PEFT's layers_to_transform: 0 is a layer's number."""
    directory = random_adapter(tmp_path / "a", base, layers_to_transform=layers)
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    own = f".layers.{layers if isinstance(layers, int) else layers[0]}."
    save_file({name: tensor for name, tensor in tensors.items() if own in name}, directory / ADAPTER_WEIGHTS)
    check(directory, base)


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in [*tensors] if name in key] and None  # type: ignore[func-returns-value]


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a factor is missing": (
        _without("layers.1.self_attn.v_proj.lora_B"),
        "lacks lora_B of model.layers.1.self_attn.v_p",
    ),
    "a layer is missing": (
        _without("layers.1.self_attn.v_proj"),
        r"lacks the tensors of model.layers.1.self_attn.v_proj",
    ),
    "a module that the base lacks": (
        lambda t: t.update({k.replace("s.1.", "s.7."): v.clone() for k, v in t.items() if "s.1.mlp" in k}),
        "adapts model.layers.7.mlp.*, which .*base does not have",
    ),
    "another shape": (
        lambda t: t.update({f"{Q0}A.weight": torch.ones(4, 65)}),
        r"as a weight of shape \[64, 65\], which .*base has as \[64, 64\]",
    ),
    "the output layer": (
        lambda t: t.update(
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                "base_model.model.lm_head.lora_B.weight": torch.ones(259, 4),
            }
        ),
        "adapts lm_head, which is no linear layer within a decoder layer",
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 259)}),
        "holds .*lora_embedding_A, which is no factor of a linear layer",
    ),
    "a magnitude of DoRA": (
        lambda t: t.update({Q0.replace("lora_", "lora_magnitude_vector.weight"): torch.ones(64)}),
        "which is no factor of a linear layer",
    ),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("kind", DAMAGE)
def test_tensors_that_are_not_the_base_s_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    directory = random_adapter(tmp_path / "a", base)
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    damage(tensors)
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    with pytest.raises(ConversionError, match=message) as refusal:
        check(directory, base)
    assert "\n" not in str(refusal.value)


def test_a_base_that_the_adapter_names_by_hash_is_held_against_the_one_given(base: Path, tmp_path: Path) -> None:
    directory = random_adapter(tmp_path / "a", base)
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"base_model_hash": "a" * 64})
    shapes = {name: entry.shape for name, entry in open_hf_checkpoint(base).entries.items()}
    adapter = open_peft_adapter(directory)
    check_fits(adapter, shapes, base=base, base_hash="a" * 64)
    with pytest.raises(ConversionError, match="was trained on a model with hash aaaaaaaaaaaa.*has bbbbbbbbbbbb"):
        check_fits(adapter, shapes, base=base, base_hash="b" * 64)


def test_what_is_no_adapter_says_what_it_is(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="so it is no PEFT adapter but a whole model"):
        open_peft_adapter(base)
    with pytest.raises(ConversionError, match="is not a directory"):
        open_peft_adapter(tmp_path / "nowhere")
    directory = random_adapter(tmp_path / "pickled", base)
    (directory / ADAPTER_WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(ConversionError, match="as pickle only"):
        open_peft_adapter(directory)
    directory = random_adapter(tmp_path / "cut", base)
    content = (directory / ADAPTER_WEIGHTS).read_bytes()
    (directory / ADAPTER_WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(ConversionError, match="cut short or damaged"):
        open_peft_adapter(directory)
    (directory / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(ConversionError, match="is not valid JSON"):
        open_peft_adapter(directory)
