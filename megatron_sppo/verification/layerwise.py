"""Both sides of a verification with one layer in memory: each module's weights come when it is called, and go after it.

Hugging Face's model and the Megatron stage are built whole on the meta device, so that every layer has its own settings
(sliding windows, say) and the models' own forward passes do the rest: masks, rotary embeddings, scales, caps. Hooks
bring the weights: Hugging Face's through `from_pretrained` of a model of one layer, with its renaming and fusing of
experts; Megatron's at the keys and offsets of mcore's own `sharded_state_dict`.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories, apply_factory_merges
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.distcp import DistcpReader
from megatron_sppo.checkpoints.hf_checkpoint import HFCheckpoint
from megatron_sppo.checkpoints.hf_files import read_config
from megatron_sppo.checkpoints.pretrained import load_pretrained, name_families
from megatron_sppo.checkpoints.wrapped import is_wrapped
from megatron_sppo.conversion.megatron_model import OpenedMegatron
from megatron_sppo.conversion.sources import open_source
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.gpt import PolicyModel, build_stage, forward
from megatron_sppo.training import parallel
from megatron_sppo.training.config import ParallelConfig
from megatron_sppo.training.policy import mcore_config

# B = prompts, S = tokens, padded at the end, V = vocabulary

_BATCH_TOKENS = 1024
"""Of a batch, padding included: its logits and activations are small beside a layer of a large model."""
_ROWS = 8
"""Vocabulary of the models of no or one layer, whose embeddings are never used."""

Logits = Callable[[Tensor], Tensor]
"""Tokens [B, S] -> float32 logits [B, S, V] on the CPU."""


def batches(token_ids: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Cut prompts into runs of at most 1024 tokens, padding counted -> lists of token lists, in order."""
    batch: list[list[int]] = []
    for ids in token_ids:
        longest = max(len(ids), *(len(other) for other in batch)) if batch else len(ids)
        if batch and longest * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def padded(batch: Sequence[list[int]]) -> Tensor:
    """Pad at the end, where causal attention never looks -> int64 [B, S]."""
    longest = max(len(ids) for ids in batch)
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])


def hf_logits(hf: Path, dtype: torch.dtype, *, on_layer: Callable[[], object], attention: str | None = None) -> Logits:
    """Open a Hugging Face model to be run layer by layer.

    Args:
        on_layer: called after each layer.
        attention: transformers' name of an implementation; None: its default.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    source, device = open_source(hf), parallel.device()
    name_families()
    config = AutoConfig.from_pretrained(
        hf, attn_implementation=attention, local_files_only=True, trust_remote_code=False
    )
    if is_wrapped(read_config(hf)):  # the decoder alone, under whose names `source` has its tensors
        tied = config.tie_word_embeddings
        config = config.get_text_config()
        config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype).eval()
    # A model of no layers and few rows gives all that is no layer: norms, rotary frequencies, the embedding's scale.
    small = auto.from_config(_cut(config, []), dtype=dtype).to(device).eval()
    decoder = model.get_decoder()
    for target, donor in ((model, small), (decoder, small.get_decoder())):
        for name, child in donor.named_children():
            if child is not small.get_decoder() and child is not small.get_decoder().layers:
                setattr(target, name, child)
    names = {module: name for name, module in model.named_modules()}
    layers_name = names[decoder.layers]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()

    def weight(name: str) -> Tensor:
        return source.read(name).to(device, dtype)

    def lend_rows(module: Any, name: str) -> None:
        _lend(module, lambda _: setattr(module, "weight", torch.nn.Parameter(weight(name), requires_grad=False)))

    def lend_layer(layer: Any, index: int) -> None:
        def load(_: object) -> None:
            loaded = _hf_layer(type(model), source, config, index, f"{layers_name}.", dtype)
            layer.load_state_dict({name: tensor.to(device) for name, tensor in loaded.items()}, assign=True)

        _lend(layer, load, after=on_layer)

    for name, parameter in model.named_parameters():
        if not name.startswith((f"{layers_name}.", f"{names[embedding]}.", f"{names[output]}.")):
            parameter.data = weight(name)
    tied = f"{names[output]}.weight" not in source.entries
    lend_rows(embedding, f"{names[embedding]}.weight")
    lend_rows(output, f"{names[embedding if tied else output]}.weight")
    for index, layer in enumerate(decoder.layers):
        lend_layer(layer, index)

    def logits(tokens_BS: Tensor) -> Tensor:
        return model(input_ids=tokens_BS.to(device), use_cache=False).logits.float().cpu()

    return logits


@contextlib.contextmanager
def built_stage(opened: OpenedMegatron, dtype: str, *, on_meta: bool) -> Iterator[PolicyModel]:
    """Build a checkpoint's model as training does, in one process, its weights yet to be loaded -> stage."""
    layout = ParallelConfig()
    config = ModelConfig(params_dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if on_meta:  # which Transformer Engine's modules do not know
        config = dataclasses.replace(config, transformer_impl="torch")
    with _process_groups(layout):
        settings = mcore_config(opened.architecture, config, layout)
        if on_meta:
            settings.use_cpu_initialization, settings.perform_initialization = True, False
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            stage = build_stage(opened.architecture, settings, config, pre_process=True, post_process=True)
        yield stage.eval()


@contextlib.contextmanager
def _process_groups(layout: ParallelConfig) -> Iterator[None]:
    """Have Megatron-Core's process groups for the block; within another block, that one's."""
    if parallel.is_initialized():
        yield
        return
    parallel.initialize(layout, seed=0)
    try:
        yield
    finally:
        parallel.shut_down()


def stage_logits(stage: PolicyModel, architecture: Architecture) -> Logits:
    """Run a stage that is the whole model."""
    device = parallel.device()

    def logits(tokens_BS: Tensor) -> Tensor:
        tokens_BS = tokens_BS.to(device)
        positions_BS = torch.arange(tokens_BS.shape[1], device=device).expand_as(tokens_BS)
        return forward(stage, tokens_BS, positions_BS)[..., : architecture.vocab_size].float().cpu()

    return logits


@contextlib.contextmanager
def megatron_logits(opened: OpenedMegatron, dtype: str, *, on_layer: Callable[[], object]) -> Iterator[Logits]:
    """Open a Megatron checkpoint to be run layer by layer; `on_layer` is called after each."""
    with built_stage(opened, dtype, on_meta=True) as stage:
        lent = [(layer, f"decoder.layers.{index}.") for index, layer in enumerate(stage.decoder.layers)]
        for module, prefix in lent:
            _lend(module, _mcore_loader(opened, stage, prefix), after=on_layer)
        if not opened.architecture.share_embeddings_and_output_weights:
            # Where they are tied the output layer borrows the embedding's weight, which therefore stays.
            for module, prefix in ((stage.embedding, "embedding."), (stage.output_layer, "output_layer.")):
                _lend(module, _mcore_loader(opened, stage, prefix))
                lent.append((module, prefix))
        # What is not lent: the final norm, and a tied embedding.
        away = tuple(prefix for _, prefix in lent)
        rest = tuple(name for name in stage.sharded_state_dict() if not name.startswith(away))
        stage.load_state_dict(_mcore_load(opened, stage, rest), strict=False, assign=True)
        yield stage_logits(stage, opened.architecture)


def _lend(module: Any, load: Callable[[Any], object], *, after: Callable[[], object] = lambda: None) -> None:
    """Give a module its weights before each call of it, and take them away after."""

    def take_back(*_: object) -> None:
        _drop_parameters(module)
        after()

    _drop_parameters(module)
    module.register_forward_pre_hook(lambda *_: load(module))
    module.register_forward_hook(take_back)


def _drop_parameters(module: torch.nn.Module) -> None:
    """Leave the shapes of a module's parameters; its buffers (scales of embeddings, say) stay."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _hf_layer(kind: Any, source: HFCheckpoint, config: Any, index: int, prefix: str, dtype: torch.dtype) -> Any:
    """Load one layer through a model of it alone, by transformers' own renaming and fusing -> {name: tensor}."""
    from transformers.utils import logging as transformers_logging

    own = f"{prefix}{index}."
    state = {
        f"{prefix}0.{name.removeprefix(own)}": source.read(name) for name in source.entries if name.startswith(own)
    }
    bars: Any = transformers_logging
    shows_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        # The rest of the model is not there on purpose.
        one = load_pretrained(
            kind, None, needed=f"{prefix}0.", config=_cut(config, [index]), state_dict=state, dtype=dtype
        )
    finally:
        if shows_bars:
            bars.enable_progress_bar()
    return one.get_decoder().layers[0].state_dict()


def _cut(config: Any, layers: Sequence[int]) -> Any:
    """Describe a model of some of the layers, with a vocabulary of next to nothing -> config."""
    cut = copy.deepcopy(config)
    if getattr(cut, "layer_types", None) is not None:
        # Rotary frequencies may be each kind's own, and a model of no layers is built for those of all kinds.
        cut.layer_types = [config.layer_types[index] for index in layers] or config.layer_types
    _set_kind_of_layer(cut, config, layers)
    cut.num_hidden_layers, cut.vocab_size, cut.pad_token_id = len(layers), _ROWS, None
    return cut


def _set_kind_of_layer(cut: Any, config: Any, layers: Sequence[int]) -> None:
    """Have a cut model's layers dense or sparse as they are in the whole one: configs say which by number."""
    for key in ("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace"):
        if not hasattr(config, key):
            continue
        if key == "first_k_dense_replace":
            value: Any = sum(layer < config.first_k_dense_replace for layer in layers)
        elif key == "decoder_sparse_step":
            value = 1
        else:
            step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
            value = [place for place, layer in enumerate(layers) if layer in dense or (layer + 1) % step]
        setattr(cut, key, value)


def _mcore_loader(opened: OpenedMegatron, stage: PolicyModel, prefix: str) -> Callable[[torch.nn.Module], object]:
    def load(module: torch.nn.Module) -> None:
        loaded = _mcore_load(opened, stage, (prefix,))
        module.load_state_dict({name.removeprefix(prefix): value for name, value in loaded.items()}, assign=True)

    return load


def _mcore_load(opened: OpenedMegatron, stage: PolicyModel, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Read some of a stage's tensors at the keys and offsets that mcore gives them -> {name: tensor}.

    mcore's own load wants all layers of a key at once.
    """
    state = {name: value for name, value in stage.sharded_state_dict().items() if name.startswith(prefixes)}
    factories = {name: value for name, value in state.items() if isinstance(value, ShardedTensorFactory)}
    apply_factories(state)
    loaded = apply_factory_merges(_read_all(opened.reader, state), factories)
    kinds = stage.state_dict()
    return {
        name: value.to(parallel.device(), kinds[name].dtype) if isinstance(value, Tensor) else value
        for name, value in loaded.items()
    }


def _read_all(reader: DistcpReader, state: Any) -> Any:
    """Read what a (nested) sharded state dict describes; layers' extra states, which are empty here, become None."""
    if isinstance(state, dict):
        return {name: _read_all(reader, value) for name, value in state.items()}
    if isinstance(state, list):
        return [_read_all(reader, value) for value in state]
    return _read_sharded(reader, state) if isinstance(state, ShardedTensor) else None


def _read_sharded(reader: DistcpReader, tensor: Any) -> Tensor:
    """Read one tensor; rows that pad the vocabulary and are not in the checkpoint are zero -> [*local_shape]."""
    stacked = tensor.prepend_axis_num
    sizes = (*(1,) * stacked, *tensor.local_shape)
    limits = zip(sizes, reader.shapes()[tensor.key], tensor.global_offset, strict=True)
    held = tuple(min(size, whole - offset) for size, whole, offset in limits)
    values = reader.read(tensor.key, tensor.global_offset, held).reshape(held[stacked:])
    if held == sizes:
        return values
    result = torch.zeros(tensor.local_shape, dtype=values.dtype)
    result[tuple(slice(0, size) for size in held[stacked:])] = values
    return result
