"""PEFT adapters for tests: real files with random matrices, written without PEFT and without the code under test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DENSE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_config(rank: int, alpha: float, targets: tuple[str, ...], **overrides: Any) -> dict[str, Any]:
    """Spell adapter_config.json as PEFT 0.21 saves it, as far as it matters."""
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **overrides,
    }


def random_adapter(
    directory: Path,
    base: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: tuple[str, ...] = DENSE_TARGETS,
    seed: int = 0,
    scale: float = 0.2,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write an adapter of a model of one safetensors file -> the directory.

    Args:
        targets: ends of the names of the modules to adapt, in every layer.
        scale: standard deviation of A; B's is the same.
        overrides: keys of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not iterable by itself)
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in targets:
                continue
            rows, columns = file.get_slice(name).get_shape()
            for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.randn(shape, generator=generator) * scale
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(peft_config(rank, alpha, targets, **overrides), indent=2))
    return directory
