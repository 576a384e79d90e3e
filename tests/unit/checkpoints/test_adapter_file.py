"""Which modules adapters have, by every family's own table; the file that names them; settings that are refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_sppo.checkpoints.adapter_file import (
    AdapterFile,
    AdapterSettings,
    BaseName,
    linear_modules,
    read_adapter,
    resolve_targets,
    write_adapter,
)
from megatron_sppo.conversion.binding import bind, hf_shapes
from megatron_sppo.conversion.families import FAMILIES
from megatron_sppo.conversion.hf_config import architecture_from_hf
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.model.config import AdapterConfig
from tests.families import FAMILIES as CONFIGS
from tests.families import family_model

SETTINGS = AdapterSettings(rank=4, alpha=8.0, scaling="rslora", targets=("q_proj", "down_proj"))
CONTENT = AdapterFile(settings=SETTINGS, base=BaseName(weights_hash="0123456789ab", params_dtype="bfloat16"))
NO_ADAPTERS = ("norm", "embed", "lm_head", "gate.weight", "expert_gate", "router", "sinks")


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_are_the_two_dimensional_weights_of_the_family_s_layers(name: str, tmp_path: Path) -> None:
    """Names and sizes as the converter's table has them, which writes what Hugging Face loads.

    Of names that mean weights of two shapes, experts and a shared one say, there is no adapter.
    """
    config = json.loads((family_model(tmp_path / "hf", name) / "config.json").read_text())
    architecture = architecture_from_hf(config)
    if architecture.delta_net is not None:
        with pytest.raises(ConfigError, match="have attention or a gated delta net"):
            linear_modules(architecture)
        return
    if architecture.latent_attention is not None:
        with pytest.raises(ConfigError, match="not placed on latent attention"):
            linear_modules(architecture)
        return
    table = hf_shapes(bind(FAMILIES[architecture.family], architecture))
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for key, shape in table.items():
        is_matrix = re.match(r"model\.layers\.\d+\.", key) and key.endswith(".weight") and len(shape) == 2
        if is_matrix and not any(part in key for part in NO_ADAPTERS):
            shapes.setdefault(key.split(".")[-2], set()).add(shape)
    expected = {name: next(iter(found)) for name, found in shapes.items() if len(found) == 1}
    found = {module.name: (module.out_features, module.in_features) for module in linear_modules(architecture)}
    assert found == expected


def test_targets_are_names_of_the_model_s_modules_in_their_order(tmp_path: Path) -> None:
    dense, mixture = (
        architecture_from_hf(json.loads((family_model(tmp_path / name, name) / "config.json").read_text()))
        for name in ("llama", "mixtral")
    )
    assert resolve_targets(("down_proj", "q_proj", "q_proj"), dense) == ("q_proj", "down_proj")
    assert resolve_targets(("experts", "o_proj"), mixture) == ("o_proj", "w1", "w3", "w2")
    for targets, architecture in (("lm_head",), dense), (("experts",), dense), (("gate_proj",), mixture):
        with pytest.raises(ConfigError, match=rf"names '{targets[0]}'.*Use --lora-targets with some of: q_proj "):
            resolve_targets(targets, architecture)


def test_scales_are_peft_s() -> None:
    assert dataclasses.replace(SETTINGS, scaling="lora").scale == 2.0
    assert SETTINGS.scale == 4.0  # 8 / sqrt(4)


def test_the_file_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONTENT)
    assert read_adapter(tmp_path) == CONTENT
    stored = json.loads((tmp_path / "adapter.json").read_text())
    for change in (
        {"schema_version": 2},
        {"rank": 0},
        {"rank": True},
        {"alpha": "8"},
        {"scaling": "dora"},
        {"targets": []},
        {"base": {"weights_hash": "0123456789ab"}},
        {"further": 1},
    ):
        (tmp_path / "adapter.json").write_text(json.dumps({**stored, **change}))
        with pytest.raises(DataError, match=r"adapter\.json does not describe adapters"):
            read_adapter(tmp_path)
    (tmp_path / "adapter.json").unlink()
    with pytest.raises(DataError):
        read_adapter(tmp_path)


@pytest.mark.parametrize("settings", [{"lora_alpha": 8.0}, {"lora_targets": ("q_proj",)}, {"load_adapter": Path("x")}])
def test_settings_of_adapters_without_a_rank_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="there are no adapters. Use --lora-rank 16"):
        AdapterConfig(**settings)  # type: ignore[arg-type]


def test_a_drawn_anew_is_the_same_and_within_peft_s_bounds() -> None:
    """kaiming_uniform_ with a = sqrt(5) is U(-1/sqrt(I), 1/sqrt(I)): variance 1 / (3 I)."""
    from megatron_sppo.checkpoints.adapter_file import AdaptedModule
    from megatron_sppo.model.adapters import Place, _initial_a

    module = AdaptedModule(name="q_proj", linear="linear_qkv", in_features=4096, parts=(("q", 64),))
    one = _initial_a(module, 16, Place(layer=3, num_layers=4), seed=1)
    assert torch.equal(one, _initial_a(module, 16, Place(layer=3, num_layers=80), seed=1))
    others = [Place(layer=2, num_layers=4), Place(layer=3, num_layers=4, expert=1, num_experts=2)]
    assert not any(torch.equal(one, _initial_a(module, 16, place, seed=1)) for place in others)
    assert not torch.equal(one, _initial_a(module, 16, Place(layer=3, num_layers=4), seed=2))
    assert one.abs().max() <= 4096**-0.5
    assert one.var().item() == pytest.approx(1 / (3 * 4096), rel=0.02)
