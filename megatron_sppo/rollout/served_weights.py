"""A mix-in under vLLM's worker, by which a server tells exactly which weights it computes with.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL_DIR \\
        --worker-extension-cls megatron_sppo.rollout.served_weights.ServedWeights

Weights are named as in the files: fused ones (query, key and value; gate and up) are cut apart, and a rank of tensor or
pipeline parallelism tells the sum of its share (`weight_sums`). On a CPU vLLM computes with packed copies; they are
read out by a product with the identity, which is exact: what is computed with counts, not what lies beside it.

Experts of a mixture are not told: kernels keep them in orders of their own. Nor are quantized weights: the files have
other numbers.

LoRA adapters are told likewise. vLLM keeps them in slots of stacked buffers, in the model's type, the scaling
multiplied into B (vLLM 0.32, lora/lora_weights.py `optimize`); a module that it does not find is passed over in
silence. What lies in the slots is what counts.
"""

import os
from collections.abc import Iterator
from typing import Any

from megatron_sppo.rollout.vllm_seeder import Seeder
from megatron_sppo.rollout.weight_sums import Sums, added, can_be_summed, weight_sum

FACTOR_A, FACTOR_B = ".lora_A", ".lora_B"
_IDENTITY_ROWS = 512


class ServedWeights:
    """Adds methods to the worker; called by vLLM's `collective_rpc`."""

    def sppo_weights(self) -> dict[str, Any]:
        """Sum this rank's share of every weight -> {"sums": {name: [hex sum, numbers]}, "dtypes", "data_parallel"}."""
        import torch

        worker: Any = self
        shares: list[Sums] = []
        dtypes: dict[str, str] = {}
        with torch.inference_mode():
            for name, weight, row, column in _pieces(worker.model_runner.get_model()):
                value = weight_sum(weight, first_row=row, first_column=column)
                shares.append({name: (value, weight.numel())})
                dtypes[name] = str(weight.dtype).removeprefix("torch.")
        return {
            "sums": {name: [f"{value:016x}", count] for name, (value, count) in added(shares).items()},
            "dtypes": dtypes,
            "data_parallel": int(worker.vllm_config.parallel_config.data_parallel_size),
        }

    def sppo_files(self, directory: str) -> dict[str, int]:
        """List what this machine sees of a directory -> {file name: bytes}, empty where there is no such directory."""
        if not os.path.isdir(directory):
            return {}
        return {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}

    def sppo_mend(self) -> dict[str, bool]:
        """Pack the output layer anew where it shares the embedding's weight -> {"packed": whether it did}.

        vLLM 0.32 on CPU, after reload_weights: a tied lm_head goes on computing with the copy that it packed at the
        start, while every parameter holds the new numbers.
        """
        import torch

        worker: Any = self
        head: Any = getattr(worker.model_runner.get_model(), "lm_head", None)
        if not hasattr(head, "cpu_linear") or not head.weight.numel():
            return {"packed": False}
        with torch.inference_mode():
            head.quant_method.process_weights_after_loading(head)
        return {"packed": True}

    def sppo_adapters(self) -> dict[str, Any]:
        """Sum this rank's share of each adapter in a slot -> {"sums": {id: {name: [hex sum, numbers]}}, "dtype"}.

        Names are those of PEFT's modules with .lora_A or .lora_B; what is zero throughout is left out.
        """
        import torch

        worker: Any = self
        manager = getattr(getattr(worker.model_runner, "lora_manager", None), "_adapter_manager", None)
        if manager is None or manager.lora_config.fully_sharded_loras:  # cut otherwise than below
            return {"sums": {}, "dtype": ""}
        held: dict[str, Sums] = {}
        with torch.inference_mode():
            for slot, adapter in enumerate(manager.lora_index_to_id):
                if adapter is not None:
                    shares = ({name: _told(*part)} for name, *part in _adapter_pieces(manager, slot))
                    held[str(adapter)] = added(shares)
        return {
            "sums": {
                adapter: {name: [f"{value:016x}", count] for name, (value, count) in sums.items() if value}
                for adapter, sums in held.items()
            },
            "dtype": str(manager.lora_config.lora_dtype).removeprefix("torch."),
        }


class SeededWeights(Seeder, ServedWeights):
    """Adds what an engine of ours needs that computes with an adapter."""


Piece = tuple[str, Any, int, int]
"""(name in the files, part of that weight, its first row, its first column)."""


def _pieces(model: Any) -> Iterator[Piece]:
    """Cut the model's weights into parts of the weights in the files -> each number of a weight on exactly one rank."""
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    is_first = get_tensor_model_parallel_rank() == 0
    seen: set[int] = set()
    for place, module in model.named_modules():
        path = place.replace(".base_layer", "")  # what vLLM wraps for adapters
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.dim() > 2 for parameter in own.values()):
            continue  # experts
        for name, parameter in own.items():
            # Of a layer that packs a copy on a CPU the copy counts, shared parameter or not; an embedding has one too,
            # and does not use it.
            looks_up = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
            computes_with_copy = name == "weight" and hasattr(module, "cpu_linear") and not looks_up
            if id(parameter) in seen and not computes_with_copy:
                continue
            seen.add(id(parameter))
            weight = _unpacked(module) if computes_with_copy else parameter.data
            is_scale = isinstance(module, LinearBase) and name not in ("weight", "bias")
            if is_scale or not can_be_summed(weight):
                continue  # quantized
            full = f"{path}.{name}" if path else name
            if isinstance(module, VocabParallelEmbedding):
                yield from _vocabulary_rows(full, module, weight)
            elif isinstance(module, LinearBase):
                yield from _linear(full, path, module, name, weight, packed, is_first=is_first)
            elif is_first:
                yield full, weight, 0, 0


def _told(part: Any, row: int, column: int) -> tuple[int, int]:
    return weight_sum(part, first_row=row, first_column=column), part.numel()


def _adapter_pieces(manager: Any, slot: int) -> Iterator[Piece]:
    """Cut the matrices of an adapter into parts of those in PEFT's file -> each number on exactly one rank."""
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

    is_first, packed = get_tensor_model_parallel_rank() == 0, manager.packed_modules_mapping
    for path, layer in manager.modules.items():
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, LinearBase):
            continue  # experts
        last = path.rpartition(".")[2]
        matrices_a = [stacked[slot, 0] for stacked in layer.lora_a_stacked]
        matrix_b = torch.cat([stacked[slot, 0] for stacked in layer.lora_b_stacked])
        if isinstance(base, RowParallelLinear):  # ranks divide its inputs: A, and not B
            yield f"{path}{FACTOR_A}", matrices_a[0], 0, base.tp_rank * matrices_a[0].shape[1]
            if is_first:
                yield f"{path}{FACTOR_B}", matrix_b, 0, 0
            continue
        names = packed.get(last, [])
        if is_first:
            for name, matrix in zip(names if len(names) == len(matrices_a) else [last], matrices_a, strict=True):
                yield f"{path.removesuffix(last)}{name}{FACTOR_A}", matrix, 0, 0
        for name, part, row, column in _linear(
            f"{path}.weight", path, base, "weight", matrix_b, packed, is_first=is_first
        ):
            yield f"{name.removesuffix('.weight')}{FACTOR_B}", part, row, column


def _linear(
    full: str, path: str, module: Any, name: str, weight: Any, packed: dict[str, list[str]], *, is_first: bool
) -> Iterator[Piece]:
    """Cut a linear layer's parameter, or a matrix with the same rows, into parts of those in the files."""
    from vllm.model_executor.layers import linear

    last = path.rpartition(".")[2]
    if isinstance(module, linear.RowParallelLinear):
        if name == "weight":
            yield full, weight, 0, module.tp_rank * weight.shape[1]
        elif is_first:
            yield full, weight, 0, 0
    elif isinstance(module, linear.QKVParallelLinear):
        q, kv = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        v = module.num_kv_heads * getattr(module, "v_head_size", module.head_size)
        kv_rank, copy = divmod(module.tp_rank, module.num_kv_head_replicas)
        kv_ranks = module.tp_size // module.num_kv_head_replicas
        yield from _cut(
            *(full, last, packed, weight),
            sizes=(q, kv, v),
            wholes=(q * module.tp_size, kv * kv_ranks, v * kv_ranks),
            firsts=(q * module.tp_rank, kv * kv_rank, v * kv_rank),
            kept=(True, copy == 0, copy == 0),
        )
    elif isinstance(module, linear.MergedColumnParallelLinear):
        sizes = tuple(size // module.tp_size for size in module.output_sizes)
        yield from _cut(
            *(full, last, packed, weight),
            sizes=sizes,
            wholes=tuple(module.output_sizes),
            firsts=tuple(size * module.tp_rank for size in sizes),
            kept=(True,) * len(sizes),
        )
    elif isinstance(module, linear.ColumnParallelLinear):
        yield full, weight, module.tp_rank * weight.shape[0], 0
    elif is_first:
        yield full, weight, 0, 0


def _cut(
    full: str,
    last: str,
    packed: dict[str, list[str]],
    weight: Any,
    *,
    sizes: tuple[int, ...],
    wholes: tuple[int, ...],
    firsts: tuple[int, ...],
    kept: tuple[bool, ...],
) -> Iterator[Piece]:
    """Cut a fused weight -> parts; where the files hold it fused as well, rows of the one weight.

    Args:
        sizes: rows of each part on this rank.
        wholes: rows of each part on all ranks.
        firsts: the first of this rank's rows within each part.
        kept: whether this rank tells the part, or another one that holds the same rows.
    """
    names = packed.get(last, [])
    is_split = len(names) == len(sizes)
    before = 0
    for index, part in enumerate(weight.split(list(sizes))):
        if kept[index]:
            name = full.replace(last, names[index]) if is_split else full
            yield name, part, firsts[index] + (0 if is_split else before), 0
        before += wholes[index]


def _vocabulary_rows(full: str, module: Any, weight: Any) -> Iterator[Piece]:
    if full.endswith(".bias") or weight.dim() < 2:
        return
    shard = module.shard_indices
    first = shard.org_vocab_start_index
    yield full, weight[: shard.org_vocab_end_index - first], first, 0


def _unpacked(module: Any) -> Any:
    """Read out what a layer multiplies with -> [out, in]."""
    import torch

    parameter = module.weight
    width = parameter.shape[1] if parameter.numel() else getattr(module, "input_size_per_partition", None)
    width = width or module.input_size
    parts = []
    for start in range(0, width, _IDENTITY_ROWS):
        count = min(_IDENTITY_ROWS, width - start)
        rows = torch.zeros(count, width, dtype=parameter.dtype, device=parameter.device)
        rows[torch.arange(count), start + torch.arange(count)] = 1
        parts.append(module.quant_method.apply(module, rows, None))
    return torch.cat(parts).t()
