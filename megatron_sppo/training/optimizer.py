"""Adam and RMSprop through Megatron-Core's optimizers, and its learning-rate schedule."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core.optimizer as mcore_optimizer
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sppo.model.config import ModelConfig
from megatron_sppo.model.transformer_config import mcore_dataclass, parse_overrides
from megatron_sppo.training.bad_steps import GuardedOptimizer
from megatron_sppo.training.config import OptimizationConfig, ParallelConfig
from megatron_sppo.training.optimizer_shards import sharded_boxes

logger = logging.getLogger(__name__)


def build_optimizer(
    chunks: Sequence[Any], config: OptimizationConfig, model: ModelConfig, layout: ParallelConfig
) -> GuardedOptimizer:
    """Build Megatron-Core's optimizer over DDP-wrapped model chunks -> GuardedOptimizer.

    bfloat16 weights get float32 master weights; the distributed optimizer shards these and the moments.
    """
    mcore_config = mcore_optimizer_config(config, model, layout)
    _report_implementation(config.optimizer)
    if torch.cuda.is_available() and clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":
        clip_grads.l2_norm_impl = norm_on_the_device
    classes: dict[str, Any] = {"DistributedOptimizer": ReshardableOptimizer, "ChainedOptimizer": GuardedOptimizer}
    if config.optimizer == "rmsprop":
        classes |= {"Adam": RMSprop, "USING_PYTORCH_OPTIMIZER": False}
    with _in_megatron_core(**classes):
        optimizer = get_megatron_optimizer(mcore_config, list(chunks))
    assert isinstance(optimizer, GuardedOptimizer)
    return optimizer


def mcore_optimizer_config(config: OptimizationConfig, model: ModelConfig, layout: ParallelConfig) -> OptimizerConfig:
    """Describe the optimizer to Megatron-Core -> OptimizerConfig.

    Raises:
        ConfigError: an unknown or refused KEY=VALUE, or what Megatron-Core itself refuses.
    """
    values: dict[str, Any] = {
        "optimizer": "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2 if config.optimizer == "adam" else config.rmsprop_alpha,
        "adam_eps": config.adam_eps,
        "clip_grad": config.clip_grad,
        "bf16": model.params_dtype == "bfloat16",
        "params_dtype": model.dtype,
        "use_distributed_optimizer": layout.use_distributed_optimizer,
    }
    values |= parse_overrides(config.optimizer_config, OptimizerConfig, flag="--optimizer-config", taken=values)
    return mcore_dataclass(OptimizerConfig, values)


def _report_implementation(name: str) -> None:
    """Say whose optimizer runs, and what to do where a GPU has none that is fused."""
    if name == "rmsprop":
        logger.info("optimizer: RMSprop in torch")
        return
    module = mcore_optimizer.Adam.__module__
    implementations = {"transformer_engine": "Transformer Engine's FusedAdam", "apex": "NVIDIA apex's FusedAdam"}
    fused = implementations.get(module.partition(".")[0])
    logger.info("optimizer: %s", fused or f"{mcore_optimizer.Adam.__name__} of {module}, not fused")
    if unrelated := _unrelated_apex():
        logger.warning(
            "the package `apex` in %s is not NVIDIA's (it has no apex.optimizers). Use: pip uninstall apex", unrelated
        )
    if fused is None and torch.cuda.is_available():
        logger.warning(
            "neither Transformer Engine nor NVIDIA's apex is installed: Adam takes several passes over memory. "
            "Use: pip install --no-build-isolation transformer-engine[pytorch]"
        )


def _unrelated_apex() -> str | None:
    """Find PyPI's `apex`, a web framework, by what it lacks and without importing it -> its directory, or None."""
    found = importlib.util.find_spec("apex")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    if not places or any(Path(place, "optimizers").is_dir() for place in places):
        return None
    return places[0]


def norm_on_the_device(
    _chunk_size: int, _noop: Any, tensor_lists: list[list[torch.Tensor]], *_: Any
) -> tuple[torch.Tensor, None]:
    """Compute the Euclidean norm of all tensors together, as amp_C.multi_tensor_l2norm -> ([1] float32, None).

    In place of local_multi_tensor_l2_norm (megatron-core 0.16.1 and 0.19.2, utils.py), which makes the CPU wait
    for every parameter. It is taken where neither Transformer Engine nor apex is there, and by 0.19.2 beside a
    Transformer Engine without multi_tensor_scale_tensor, such as 2.11 (optimizer/clip_grads.py).
    """
    (tensors,) = tensor_lists
    return torch.nn.utils.get_total_norm(tensors).float().reshape(1), None


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizationConfig, *, train_iters: int
) -> OptimizerParamScheduler:
    """Build Megatron-Core's schedule, counted in optimizer steps -> OptimizerParamScheduler.

    Raises:
        ConfigError: the warm-up is as long as the decay, or longer.
    """
    warmup, decay = config.warmup_and_decay(train_iters)
    if decay < train_iters and config.lr_decay_style != "constant":
        logger.warning("lr_decay_iters ends the decay at step %d of %d: the rest trains at min_lr", decay, train_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # On resume the command line decides, and the checkpoint only says how many steps were done.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


class RMSprop(torch.optim.AdamW):
    """RMSprop in AdamW's state layout without the first moment, so that Megatron-Core shards and saves it as its own.

    v <- alpha v + (1 - alpha) g^2;  p <- p - lr g / (sqrt(v) + eps), the arithmetic of torch.optim.RMSprop without
    momentum, centring or weight decay, bit for bit in float32. `betas[1]` is alpha, and `exp_avg_sq` is v.
    """

    def __init__(self, params: Any, *, adam_w_mode: bool = True, **settings: Any) -> None:
        super().__init__(params, foreach=False, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            alpha, eps, lr = group["betas"][1], group["eps"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = _state_of(self, parameter)
                state["step"] += 1
                square = state["exp_avg_sq"]
                square.mul_(alpha).addcmul_(parameter.grad, parameter.grad, value=1 - alpha)
                parameter.addcdiv_(parameter.grad, square.sqrt().add_(eps), value=-lr)


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name the tensors that an optimizer keeps for each parameter -> names of its state."""
    return ("exp_avg_sq",) if isinstance(optimizer, RMSprop) else ("exp_avg", "exp_avg_sq")


def _state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Find a parameter's state, as a first step makes it where there is none yet -> state."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0)
        state |= {name: torch.zeros_like(parameter) for name in moments(optimizer)}
    return state


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW and RMSprop the state that their first step would make, for a checkpoint to fill.

    The distributed optimizer reads `step` of every parameter when it describes itself to a load, and does not create
    it (megatron-core 0.16.1 and 0.19.2, optimizer/distrib_optimizer.py). TE's and apex's optimizers need nothing.
    """
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                _state_of(inner, parameter)


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step count again.

    The distributed optimizer loads one tensor into all of them; AdamW counts in place, once for each parameter.
    """
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


class ReshardableOptimizer(DistributedOptimizer):
    """Megatron-Core's distributed optimizer, of which each rank saves and loads what it holds, and nothing else.

    Megatron-Core's own `fully_reshardable` layout gathers master weights and moments of the whole model-parallel slice
    on every rank, and cuts them up by other places than it gathered them by behind the first padded bucket (0.16.1 and
    0.19.2, optimizer/distrib_optimizer.py, "issue #504"). The files are the same to a reader: the same tensors under
    the same names, in other pieces.
    """

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, metadata: Any = None
    ) -> dict[int, dict[str, list[ShardedTensor]]]:
        """Describe this rank's values, for a save or to be loaded in place -> {parameter: {state: boxes}}."""
        described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        by_parameter = {description.data: description for description in nested_values(described)}
        replica = self.distributed_optimizer_instance_id
        return {
            number: {
                name: sharded_boxes(by_parameter[parameter], name, flat_N, start=start, replica=replica)
                for name, flat_N in self._held_values(parameter).items()
            }
            for number, (parameter, start) in enumerate(self._held_ranges())
        }

    def load_parameter_state_from_fully_reshardable(self, state_dict: Mapping[int, Any]) -> None:
        """Take over what was described and loaded; most of it has been read into its place."""
        for number, (parameter, _) in enumerate(self._held_ranges()):
            values = self._get_main_param_and_optimizer_states(parameter)
            for name, loaded in state_dict[number].items():
                places = values[name].detach().split([piece.numel() for piece in loaded])
                for place, piece in zip(places, loaded, strict=True):
                    if place.data_ptr() != piece.data_ptr():
                        place.copy_(piece.flatten())
            # Does something where the optimizer keeps its state in other types than it gives it out in.
            self._set_main_param_and_optimizer_states(parameter, values)

    def _held_ranges(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield the parameters that this rank holds a range of -> (parameter, where in it the range begins)."""
        for buckets_by_dtype in self.gbuf_ranges:
            for buckets in buckets_by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"].start

    def _held_values(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Find the values that this rank holds of a parameter -> {"param", "exp_avg", ...}, flat."""
        tensors = self._get_main_param_and_optimizer_states(parameter)
        return {name: tensors[name] for name in ("param", *moments(self.optimizer))}


@contextlib.contextmanager
def _in_megatron_core(**replacements: Any) -> Iterator[None]:
    """Let Megatron-Core's builder of optimizers take other classes (optimizer/__init__.py takes them by these names).

    Neither supported version has RMSprop; it stands in Adam's place.
    """
    saved = {name: getattr(mcore_optimizer, name) for name in replacements}
    try:
        vars(mcore_optimizer).update(replacements)
        yield
    finally:
        vars(mcore_optimizer).update(saved)
