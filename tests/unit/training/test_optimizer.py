"""RMSprop against torch.optim.RMSprop bit for bit, and the schedule against its arithmetic."""

from pathlib import Path

import pytest
import torch

from megatron_sppo.errors import ConfigError
from megatron_sppo.model.config import ModelConfig
from megatron_sppo.training import optimizer as optimizer_module
from megatron_sppo.training.config import OptimizationConfig, ParallelConfig
from megatron_sppo.training.optimizer import (
    RMSprop,
    build_optimizer,
    build_scheduler,
    mcore_optimizer_config,
    norm_on_the_device,
)


def test_rmsprop_is_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    start = [torch.randn(17, 5), torch.randn(33)]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    our_optimizer = RMSprop(ours, lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, adam_w_mode=True)
    their_optimizer = torch.optim.RMSprop(theirs, lr=3e-3, alpha=0.99, eps=1e-8, foreach=False)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * 100
            other.grad = mine.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_the_unrelated_apex_is_told_from_nvidia_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's has no `optimizers`; neither is imported, as the line that would raise shows."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert optimizer_module._unrelated_apex() == str(package)
    (package / "optimizers").mkdir()
    assert optimizer_module._unrelated_apex() is None


def test_without_apex_there_is_nothing_to_tell() -> None:
    assert optimizer_module._unrelated_apex() is None


class _Groups:
    """What the host's schedule asks of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "max_lr": 1.0, "min_lr": 0.0, "wd_mult": 1.0}]


def rates(config: OptimizationConfig, train_iters: int) -> list[float]:
    optimizer = _Groups()
    optimizer.param_groups[0] |= {"max_lr": config.lr, "min_lr": config.min_lr}
    scheduler = build_scheduler(optimizer, config, train_iters=train_iters)
    seen = []
    for _ in range(train_iters):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return seen


def test_linear_warm_up_then_linear_decay_to_zero() -> None:
    """10 steps, 2 of warm-up: 0, 1/2, 1, then 7/8, 6/8, ... of the peak."""
    config = OptimizationConfig(lr=8.0, lr_warmup_fraction=0.2)
    assert rates(config, 10) == pytest.approx([0, 4, 8, 7, 6, 5, 4, 3, 2, 1])


def test_the_papers_schedule_stops_before_the_decay_ends() -> None:
    config = OptimizationConfig(lr=1.0, lr_decay_iters=100)
    assert rates(config, 3) == pytest.approx([1.0, 0.99, 0.98])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"lr": 1e-6, "min_lr": 1e-5},
        {"lr": 1e-6, "lr_warmup_iters": 3, "lr_warmup_fraction": 0.1},
        {"lr": 1e-6, "lr_warmup_fraction": 1.0},
        {"lr": 1e-6, "optimizer": "rmsprop", "weight_decay": 0.1},
        {"lr": 1e-6, "clip_grad": -1.0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        OptimizationConfig(**settings)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="shorter than the decay"):
        build_scheduler(_Groups(), OptimizationConfig(lr=1.0, lr_warmup_iters=5), train_iters=5)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_an_optimizer_on_the_cpu_beside_a_gpu_is_refused_with_what_it_would_do(optimizer: str) -> None:
    config = OptimizationConfig(lr=1.0, optimizer=optimizer, optimizer_config=("optimizer_cpu_offload=true",))
    with pytest.raises(ConfigError, match="before the checkpoint was loaded.*--lora-rank 16"):
        build_optimizer([], config, ModelConfig(), ParallelConfig())


@pytest.mark.parametrize("setting", ["decoupled_lr=1e-6", "decoupled_min_lr=0"])
def test_a_rate_of_the_embedding_s_own_is_refused_as_no_run_could_go_on_with_it(setting: str) -> None:
    with pytest.raises(ConfigError, match="decoupled.*a run could not go on.*Remove it"):
        mcore_optimizer_config(OptimizationConfig(lr=1.0, optimizer_config=(setting,)), ModelConfig(), ParallelConfig())


def test_the_norm_of_several_tensors_is_that_of_all_their_numbers() -> None:
    """sqrt(2^2 + 3^2 + 6^2) = 7."""
    norm, _ = norm_on_the_device(65536, None, [[torch.tensor([2.0, 3.0]), torch.tensor([[6.0]])]], False)
    assert norm.tolist() == [7.0]
