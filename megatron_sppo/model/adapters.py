"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on Megatron-Core's linear layers: y = W x + scale B (A x).

W is frozen; A and B are all that is trained. Megatron-Core computes query, key and value in one layer, and gate and up;
here each has an A and a B of its own, as Hugging Face's modules have, and what they add is brought into the order of
the fused layer's channels. A hook adds it behind either spec's layer, which knows nothing of it.

What is divided follows the layer. Column-parallel: B by rows, A whole on every rank. Row-parallel: A by columns, B
whole. Only A x, `rank` channels a token, is ever sent between ranks. Experts are adapted each by itself.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sppo.architecture import Architecture
from megatron_sppo.checkpoints.adapter_file import AdaptedModule, AdapterSettings, adapted_modules, linear_modules

# S = tokens, B = sequences, R = ranks of all adapters of a layer together, I and O = its inputs and outputs here


@dataclass(frozen=True, kw_only=True)
class Place:
    """One linear layer in the whole model."""

    layer: int
    """From 0."""
    num_layers: int
    expert: int = 0
    num_experts: int = 0
    """0: no expert."""


class Adapter(torch.nn.Module):
    """The adapters of all modules that one linear layer computes."""

    def __init__(
        self,
        modules: Sequence[AdaptedModule],
        parts: Sequence[tuple[str, int]],
        settings: AdapterSettings,
        config: TransformerConfig,
        place: Place,
        *,
        seed: int,
    ) -> None:
        """Make A random and B zero (`reset`).

        Args:
            modules: those of the layer that are adapted.
            parts: all outputs of the layer in Megatron-Core's order, (what, rows in the whole model).
            seed: of A.
        """
        super().__init__()
        self.modules_adapted, self.settings, self.place, self.seed = tuple(modules), settings, place, seed
        self.is_expert, self.is_column_parallel = modules[0].is_expert, modules[0].is_column_parallel
        self.group = _tensor_group(is_expert=self.is_expert)
        self.sums_over_tokens = config.sequence_parallel and self.group.size() > 1
        """Whether ranks see other tokens, or partial sums: the gradients of what each holds whole add up."""
        num_ranks = self.group.size()
        # Query, key and value of a key/value head lie together; gate and up of a rank are two blocks.
        self.num_blocks = config.num_query_groups // num_ranks if modules[0].linear == "linear_qkv" else 1
        self.rows = {part: rows // (num_ranks if self.is_column_parallel else 1) for part, rows in parts}
        self.matrices: dict[str, str] = {}
        """Each parameter's name -> its key in a checkpoint."""
        for module in modules:
            for matrix, shape in module.matrices(settings.rank).items():
                self._hold(_name(module, matrix), shape, config.params_dtype, is_a=matrix == "lora_A")
                self.matrices[_name(module, matrix)] = module.key(matrix)
        self.reset()

    def _hold(self, name: str, shape: tuple[int, int], dtype: torch.dtype, *, is_a: bool) -> None:
        """Make a parameter of this rank's part of a matrix, and tell Megatron-Core how its gradient comes about."""
        is_divided, dim = is_a != self.is_column_parallel, 1 if is_a else 0
        sizes = list(shape)
        sizes[dim] //= self.group.size() if is_divided else 1
        parameter: Any = torch.nn.Parameter(torch.empty(sizes, dtype=dtype))
        # Whole experts that lie on tensor-parallel ranks are others on each: each counts in the gradient's norm.
        if is_divided or (self.is_expert and self.group.size() == 1):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        else:  # finalize_model_grads sums the marked ones over tensor-parallel ranks
            parameter.sequence_parallel = self.sums_over_tokens
        if self.is_expert:
            parameter.allreduce = False
        self.register_parameter(name, parameter)

    @torch.no_grad()
    def reset(self) -> None:
        """Draw A anew, the same as before, and make B zero: the layer is its base again."""
        for module in self.modules_adapted:
            a = self.get_parameter(_name(module, "lora_A"))
            whole = _initial_a(module, self.settings.rank, self.place, seed=self.seed)
            a.copy_(whole if self.is_column_parallel else whole.chunk(self.group.size(), 1)[self.group.rank()])
            for matrix in _b_matrices(module):
                self.get_parameter(_name(module, matrix)).zero_()

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add what the adapters make of the layer's inputs [.., I] to its outputs -> [.., O].

        Collectives on the tensor-parallel group, of [S, B, R]: column-parallel none forward and a sum on all ranks
        backward, row-parallel the reverse; under sequence parallelism a gather one way and a scatter of sums the
        other. None for experts: their dispatcher sums what they give.
        """
        a: list[Tensor] = [self.get_parameter(_name(module, "lora_A")) for module in self.modules_adapted]
        inner = self._between_ranks(_product(inputs, torch.cat(a) if len(a) > 1 else a[0]))
        added: dict[str, Tensor] = {}
        for module, own in zip(self.modules_adapted, inner.chunk(len(a), -1), strict=True):
            for matrix, (part, _) in zip(_b_matrices(module), module.parts, strict=True):
                added[part] = _product(own, self.get_parameter(_name(module, matrix)))
        return torch.add(outputs, self._in_order(added, inner), alpha=self.settings.scale)

    def _in_order(self, added: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Lay what is added to each part as the layer lays its outputs, zeros for the others -> [.., O]."""
        if len(self.rows) == 1:
            return next(iter(added.values()))
        blocks = [
            (added[part] if part in added else inner.new_zeros(*inner.shape[:-1], rows)).unflatten(
                -1, (self.num_blocks, rows // self.num_blocks)
            )
            for part, rows in self.rows.items()
        ]
        return torch.cat(blocks, -1).flatten(-2)

    def _between_ranks(self, inner: Tensor) -> Tensor:
        """Bring A x, [.., R], to the tokens that the layer's outputs are of, on every rank whole."""
        if self.is_expert or self.group.size() == 1:
            return inner
        if self.is_column_parallel:
            if self.sums_over_tokens:
                gathered: Tensor = gather_from_sequence_parallel_region(
                    inner, tensor_parallel_output_grad=True, group=self.group
                )
                return gathered
            copied: Tensor = copy_to_tensor_model_parallel_region(inner, group=self.group)
            return copied
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sums_over_tokens
            else reduce_from_tensor_model_parallel_region
        )
        reduced: Tensor = reduce(inner, group=self.group)
        return reduced

    def add_to(self, layer: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """Do as `forward` behind a layer of either spec: a forward hook."""
        result, bias, *normed = outputs
        # Transformer Engine's fused layer gives what its norm has made of the inputs behind a bias, or in its place.
        if isinstance(result, tuple):
            result, *normed = result
        return self(normed[0] if normed else inputs[0], result), bias

    def names(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield this rank's parameters by names that are the same in every layout."""
        for name, key in self.matrices.items():
            yield f"{key}.{self.place.layer}.{self.place.expert}", self.get_parameter(name)

    def describe(self, prefix: str) -> dict[str, ShardedTensor]:
        """Describe the parameters to a checkpoint: stacked over layers, and then experts -> {prefix + name: place}."""
        place, stacked = self.place, [(0, self.place.layer, self.place.num_layers)]
        if place.num_experts:
            stacked.append((1, place.expert, place.num_experts))
        copy = (
            parallel_state.get_expert_data_parallel_rank()
            if self.is_expert
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        described = {}
        for name, key in self.matrices.items():
            parameter: Any = self.get_parameter(name)
            is_divided = getattr(parameter, "tensor_model_parallel", False)
            axes = list(stacked)
            if is_divided:
                axes.append((len(stacked) + parameter.partition_dim, self.group.rank(), self.group.size()))
            described[prefix + name] = ShardedTensor.from_rank_offsets(
                key,
                parameter,
                *axes,
                replica_id=(0, 0 if is_divided else self.group.rank(), copy),
                prepend_axis_num=len(stacked),
            )
        return described


class GroupedAdapter(torch.nn.Module):
    """The adapters of Transformer Engine's grouped layer: one for each expert of this rank."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(adapters)

    def forward(self, inputs: Tensor, outputs: Tensor, splits: Sequence[int]) -> Tensor:
        """Add to the outputs [tokens, O] of the experts, whose tokens lie one expert after the other."""
        both = zip(inputs.split(splits), outputs.split(splits), strict=True)
        return torch.cat([adapter(*tokens) for adapter, tokens in zip(self.experts, both, strict=True)])

    def add_to(self, layer: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Tensor, Any]:
        """Do as `forward` behind the layer: a forward hook."""
        result, bias = outputs
        splits = inputs[1].tolist() if isinstance(inputs[1], Tensor) else list(inputs[1])
        return self(inputs[0], result, splits), bias


class Adapters(torch.nn.Module):
    """All adapters of a stage. Its checkpoint is its own: to its stage's it adds nothing."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.settings = settings
        self.layers = torch.nn.ModuleList()

    def each(self) -> Iterator[Adapter]:
        """Yield the adapter of every linear layer, or of every expert's."""
        yield from (module for module in self.modules() if isinstance(module, Adapter))

    def reset(self) -> None:
        """Make the model its base again, and the adapters those that training begins with."""
        for adapter in self.each():
            adapter.reset()

    def describe(self) -> dict[str, ShardedTensor]:
        """Describe the adapters to a checkpoint -> {name in the stage: place}."""
        found: dict[str, ShardedTensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, Adapter):
                found |= module.describe(f"{NAME}.{name}.")
        return found

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Describe nothing to a checkpoint of the stage, which is of its base."""
        return {}


NAME = "adapters"
"""Of the adapters among a stage's modules."""


def attach_adapters(stage: Any, architecture: Architecture, settings: AdapterSettings, *, seed: int) -> Adapters:
    """Freeze a stage and put adapters on it, which are zero until they are trained -> `stage.adapters`.

    Args:
        seed: of A. With the module, layer and expert it decides every A, whatever the layout.
    """
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    adapters = Adapters(settings)
    for layer in stage.decoder.layers:
        number = layer.layer_number - 1
        adapters.layers.append(torch.nn.ModuleList(_attach_to_layer(layer, number, architecture, settings, seed=seed)))
    adapters.to(next(stage.parameters()).device)
    stage.adapters = adapters
    if stage.pre_process:
        # Recomputed layers give their parameters no gradient where no input wants one (torch's reentrant checkpoint).
        stage.embedding.register_forward_hook(_wanting_a_gradient)
    return adapters


def _wanting_a_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _attach_to_layer(
    layer: Any, number: int, architecture: Architecture, settings: AdapterSettings, *, seed: int
) -> Iterator[torch.nn.Module]:
    """Hang adapters behind the linear layers of a transformer layer -> those that there are."""
    config = layer.config
    modules = adapted_modules(architecture, settings.targets)

    def make(name: str, place: Place) -> Adapter:
        chosen = [module for module in modules if module.linear == name]
        return Adapter(chosen, _all_parts(architecture, name), settings, config, place, seed=seed)

    place = Place(layer=number, num_layers=architecture.num_layers)
    for name in dict.fromkeys(module.linear for module in modules):
        if name in ("linear_qkv", "linear_proj"):
            yield _hang(getattr(layer.self_attention, name), make(name, place))
        elif architecture.num_moe_experts is None:
            yield _hang(getattr(layer.mlp, name), make(name, place))
        else:
            places = _expert_places(place, architecture.num_moe_experts)
            experts = layer.mlp.experts
            if hasattr(experts, "local_experts"):
                for expert, its_place in zip(experts.local_experts, places, strict=True):
                    yield _hang(getattr(expert, name), make(name, its_place))
            else:
                grouped = GroupedAdapter([make(name, its_place) for its_place in places])
                yield _hang(getattr(experts, name), grouped)


def _all_parts(architecture: Architecture, linear_name: str) -> list[tuple[str, int]]:
    """List the outputs of a layer in Megatron-Core's order, adapted or not -> (what, rows)."""
    return [part for module in linear_modules(architecture) if module.linear == linear_name for part in module.parts]


def _hang(layer: Any, adapter: Any) -> Any:
    """Let an adapter add to what a layer gives -> the adapter."""
    if hasattr(layer, "return_layernorm_output"):  # Transformer Engine's LayerNormLinear, 2.11
        layer.return_layernorm_output = True
    # In front of a norm that hangs behind the layer (`with_post_norm`).
    layer.register_forward_hook(adapter.add_to, prepend=True)
    return adapter


def _expert_places(place: Place, num_experts: int) -> list[Place]:
    """Number this rank's experts as in the whole model."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    each = num_experts // ranks
    first = parallel_state.get_expert_model_parallel_rank() * each
    return [
        Place(layer=place.layer, num_layers=place.num_layers, expert=first + index, num_experts=num_experts)
        for index in range(each)
    ]


def _tensor_group(*, is_expert: bool) -> Any:
    find: Callable[[], Any] = (
        parallel_state.get_expert_tensor_parallel_group if is_expert else parallel_state.get_tensor_model_parallel_group
    )
    return find()


def _initial_a(module: AdaptedModule, rank: int, place: Place, *, seed: int) -> Tensor:
    """Draw a whole A from U(-1/sqrt(I), 1/sqrt(I)), as PEFT does (kaiming_uniform_, a = sqrt(5)) -> [rank, I]."""
    words = f"{seed} {module.key('lora_A')} {place.layer} {place.expert}"
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))
    bound = module.in_features**-0.5
    return torch.empty(rank, module.in_features, device="cpu").uniform_(-bound, bound, generator=generator)


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Multiply [.., I] by a matrix [O, I] -> [.., O], by the same kernel with gradients and without.

    torch's own for more than two dimensions folds them or not by whether a gradient is wanted (2.13, Linear.cpp and
    LinearAlgebra.cpp, should_fold), which is another order of sums, and log-ratios would not begin at 0.
    """
    return torch.mm(inputs.flatten(0, -2), weight.t()).unflatten(0, inputs.shape[:-1])


def _b_matrices(module: AdaptedModule) -> list[str]:
    return [matrix for matrix in module.matrices(1) if matrix != "lora_A"]


def _name(module: AdaptedModule, matrix: str) -> str:
    return f"{module.name}_{matrix}".replace(".", "_")
