"""Name a model by its weights' bits as training does (training/policy.py `weights_hash`), from Hugging Face's files."""

import hashlib

import torch
from torch import Tensor

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.conversion.binding import Binding

_HASH_BITS = 48
_IN_MODULES_OF_THE_TORCH_SPEC = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".self_attention.in_proj.layer_norm_": ".input_layernorm.",
    ".self_attention.linear_q_up_proj.layer_norm_": ".self_attention.q_layernorm.",
    ".self_attention.linear_kv_up_proj.layer_norm_": ".self_attention.kv_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
    ".mlp.experts.experts.": ".mlp.experts.",
}
"""Names in a checkpoint -> those in a model of the torch spec, by which training hashes."""
_STACK = ".mlp.experts.linear_fc"
"""In the name of what all experts of a layer have in one tensor."""


def weights_hash(source: HFCheckpoint, bindings: tuple[Binding, ...], *, dtype: torch.dtype) -> str:
    """Hash a model's weights in a type -> 12 hex digits. A tensor at a time is read.

    Each Megatron parameter's bit patterns are added as integers and weighted by a hash of its name, modulo 2^48; so
    the order of rows within it does not matter, and it need not be put together.
    """
    total = 0
    for binding in bindings:
        name = binding.megatron_name
        for of_checkpoint, of_spec in _IN_MODULES_OF_THE_TORCH_SPEC.items():
            name = name.replace(of_checkpoint, of_spec)
        kind = torch.float32 if binding.mapping.keeps_type else dtype
        for part, (experts, *_) in binding.hf_shapes.items():
            if _STACK in name:  # all experts in one tensor; training knows each by its number
                for expert in range(experts):
                    one = name.replace(_STACK, f".mlp.experts.{expert}.linear_fc")
                    total += _factor(one) * _bits(source.read_rows(part, expert, 1), kind)
            else:
                total += _factor(name) * _bits(source.read(part), kind)
    return f"{total % (1 << _HASH_BITS):012x}"


def _factor(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") | 1


def _bits(tensor: Tensor, dtype: torch.dtype) -> int:
    """Add up a tensor's bit patterns in a type."""
    bits = tensor.to(dtype).contiguous().view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    return int(bits.sum(dtype=torch.int64))
