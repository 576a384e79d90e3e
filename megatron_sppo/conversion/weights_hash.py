"""Name a model by its weights' bits as training does (training/policy.py `weights_hash`), from Hugging Face's files."""

import hashlib

import torch

from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.conversion.binding import Binding

_HASH_BITS = 48
_IN_MODULES_OF_THE_TORCH_SPEC = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
    ".mlp.experts.experts.": ".mlp.experts.",
}
"""Names in a checkpoint -> those in a model of the torch spec, by which training hashes."""


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
        factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") | 1
        kind = torch.float32 if binding.mapping.keeps_type else dtype
        for part in binding.hf_shapes:
            bits = source.read(part).to(kind).view(torch.int16 if kind.itemsize == 2 else torch.int32)
            total += factor * int(bits.sum(dtype=torch.int64))
    return f"{total % (1 << _HASH_BITS):012x}"
