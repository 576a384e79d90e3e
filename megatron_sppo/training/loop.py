"""The training loop: a step is micro-batches forward and backward, one update, one line of metrics."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_sppo import flops
from megatron_sppo.command_line import default_grace_seconds, launch
from megatron_sppo.errors import DataError
from megatron_sppo.model.transformer_config import bfloat16_products
from megatron_sppo.tracking.run import TrackedRun
from megatron_sppo.training import parallel
from megatron_sppo.training.bad_steps import Fault, GradientWatch, GuardedOptimizer, Referee
from megatron_sppo.training.config import ObjectiveConfig, TrainingConfig
from megatron_sppo.training.forward_step import gradient_step, log_probs, objective_terms
from megatron_sppo.training.grace import Grace, checkpoint_bytes
from megatron_sppo.training.ledger import Ledger
from megatron_sppo.training.metrics import drift_per_token, response_metrics
from megatron_sppo.training.policy import Policy
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.replicas import ReplicaCheck
from megatron_sppo.training.saving import Saver
from megatron_sppo.training.step_plan import StepPlan
from megatron_sppo.training.stopping import StopRequest
from megatron_sppo.training.telemetry import GpuSampler, Stragglers, flops_metrics
from megatron_sppo.training.telling import Said, Told, tell
from megatron_sppo.training.watchdog import beat

logger = logging.getLogger(__name__)


def train(
    policy: Policy,
    optimizer: GuardedOptimizer,
    scheduler: OptimizerParamScheduler,
    steps: Iterator[StepPlan],
    *,
    config: TrainingConfig,
    train_iters: int,
    progress: Progress,
    saver: Saver,
    stop: StopRequest,
    tracked: TrackedRun,
) -> bool:
    """Train from `progress.step` to `train_iters` -> whether the run is complete (False: asked to stop, and saved).

    Raises:
        DataError: a step is bad (`bad_steps`) and is not to be left out; what is saved is from before that step.
        MachineError: a rank computes wrongly.
    """
    sampler, stopwatch, stragglers = GpuSampler(), _Stopwatch(policy), Stragglers(parallel.host_names())
    watch, referee = GradientWatch(policy), Referee(config.safety, progress)
    replicas = ReplicaCheck(policy, optimizer, every=config.safety.check_replicas)
    num_bytes = checkpoint_bytes(policy, config.optimization)
    grace_seconds = config.run.grace_seconds or default_grace_seconds()
    with parallel.failing_together(OSError, DataError):
        grace = Grace(config.save, num_bytes=num_bytes, grace_seconds=grace_seconds)
    ledger = Ledger(config, tracked, step=progress.step, train_iters=train_iters)
    beat(f"data of step {progress.step + 1}")
    for plan in steps:
        beat(f"step {progress.step + 1}, before its first micro-batch")
        started = time.monotonic()
        stopwatch.start()
        learning_rate = optimizer.param_groups[0]["lr"]
        said = Said(
            seconds=stopwatch.last_seconds,
            num_skipped=progress.num_skipped,
            stops=stop.asked,
            writes=saver.is_writing(),
            refused=ledger.is_refused,
        )
        metrics, columns, told, fault = _step(
            policy,
            optimizer,
            plan,
            said,
            config=config,
            step=progress.step + 1,
            watch=watch,
            referee=referee,
            replicas=replicas,
        )
        if told.refused:
            saver.finish()
            ledger.check()
        if fault is None:
            referee.take()
            progress.num_clipped += 0 < config.optimization.clip_grad < metrics["grad_norm"]
        else:
            with _finishing(saver):
                referee.reject(plan, fault)
        scheduler.step(increment=1)
        progress.step += 1
        metrics |= {"lr": learning_rate, **_standing(progress, config)}
        metrics |= _speed(plan, time.monotonic() - started, policy) | sampler.sample()
        metrics |= stragglers.note(told.seconds) if all(told.seconds) else {}
        if not told.writes:
            saver.finish()
        if (waited := saver.pop_seconds()) > 0:
            metrics["perf/save_seconds"] = waited
        ledger.write(progress.step, metrics, columns)
        last, interval = progress.step == train_iters, config.run.save_interval
        stops = told.stops and not last
        if last or stops or (interval is not None and progress.step % interval == 0):
            if stops:
                grace.warn_at_signal(stop)
            beat(f"save of step {progress.step}")
            replicas.before_save(progress.step)
            began = time.monotonic()
            with _finishing(saver):
                ledger.sync()
            saver.save(wait=last or stops)
            if not config.run.async_save:
                grace.note(time.monotonic() - began)
        if stops:
            tracked.is_stopped = True
            logger.warning(
                "stopped by a signal after step %d of %d; the same command goes on", progress.step, train_iters
            )
            break
        beat(f"data of step {progress.step + 1}")
    ledger.close()
    return progress.step >= train_iters


@contextlib.contextmanager
def _finishing(saver: Saver) -> Iterator[None]:
    """Finish what was begun to be saved, which is from before this step, where all ranks raise an error."""
    try:
        yield
    except (OSError, DataError):
        saver.finish()
        raise


def _standing(progress: Progress, config: TrainingConfig) -> dict[str, float]:
    """Say where the run stands after a step -> metrics."""
    standing: dict[str, float] = {"sppo/grad_clip_rate": progress.num_clipped / progress.step}
    if config.safety.on_bad_step == "skip":
        standing["sppo/skipped_steps"] = progress.num_skipped
    if str(progress.step) in progress.ref_drift:
        standing["sppo/ref_drift"] = progress.ref_drift[str(progress.step)]
    return standing


def _step(
    policy: Policy,
    optimizer: GuardedOptimizer,
    plan: StepPlan,
    said: Said,
    *,
    config: TrainingConfig,
    step: int,
    watch: GradientWatch,
    referee: Referee,
    replicas: ReplicaCheck,
) -> tuple[dict[str, float], dict[str, Any], Told, Fault | None]:
    """Do one optimizer step -> (metrics, columns [N] of the responses, what the ranks told each other, a bad step's
    fault, with which nothing was updated).

    The CPU waits for the device once, where Megatron-Core reads the gradient's norm: all that is read besides has been
    copied before that, so that the step is judged before the update.
    """
    wide_log_prob_N = None
    if step == 1 and policy.config.fp8:
        with bfloat16_products(policy.config):
            wide_log_prob_N = log_probs(policy, plan)
    told_by_row = gradient_step(policy, optimizer, plan, objective=config.objective)
    beat(f"reduction of gradients and optimizer of step {step}")
    if replicas.is_due(step):  # before the update, which makes some of what went wrong in between alike again
        replicas.check(step)
    answer = tell([*told_by_row, policy.pop_router_sums()], said, is_unfit=watch.pop())
    faults: list[Fault | None] = []

    def is_fit(grad_norm: float) -> bool:
        (log_prob_N, term_N, _), told = answer()
        faults.append(referee.find_fault(log_prob_N, term_N, grad_norm=grad_norm, told=told))
        return faults[0] is None

    grad_norm = optimizer.step_if(is_fit)
    (fault,) = faults
    (log_prob_N, _, router_sums), told = answer()
    metrics, columns = _measures(plan, log_prob_N, objective=config.objective)
    metrics |= {"grad_norm": grad_norm, **policy.router_metrics(router_sums, num_sequences=len(plan.rows))}
    if step == 1:
        metrics["sppo/ref_drift_step0"] = drift_per_token(columns["log_ratio"], plan.num_response_tokens)
    if wide_log_prob_N is not None:
        metrics["sppo/fp8_gap"] = drift_per_token(log_prob_N - wide_log_prob_N, plan.num_response_tokens)
        logger.info("FP8 moves log-probabilities by %.3g nats a token against bfloat16", metrics["sppo/fp8_gap"])
    return metrics, columns, told, fault


def _measures(
    plan: StepPlan, log_prob_N: Tensor, *, objective: ObjectiveConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure a step by its log-probabilities -> (metrics, columns [N] of the responses)."""
    row, targets = objective.row, plan.targets
    log_ratio_N, target_N = log_prob_N - targets.reference_log_prob, row.target(targets)
    # The loss is evaluated again on the whole global batch, so that it is one number in every layout.
    loss = float(objective_terms(plan, log_prob_N, objective=objective).mean())
    metrics = {"loss": loss} | response_metrics(
        log_ratio_N,
        log_prob_N,
        win_rate_N=targets.win_rate,
        target_N=target_N,
        eta=row.nats_per_reward,
        couples_pairs=row.column is None,
    )
    columns = {"group": plan.group, "response": plan.response, "win_rate": targets.win_rate, "log_ratio": log_ratio_N}
    return metrics, columns if target_N is None else {**columns, "target": target_N}


def _speed(plan: StepPlan, seconds: float, policy: Policy) -> dict[str, float]:
    model_flops = flops.training_flops(
        policy.architecture,
        num_tokens=plan.num_computed_tokens,
        attended_positions=plan.attended_positions,
        num_response_tokens=int(plan.num_response_tokens.sum()),
        is_frozen=policy.adapters is not None,
    )
    on_gpu = torch.cuda.is_available()
    speed = {
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": plan.num_tokens / seconds,
        "perf/padding_fraction": plan.padding_fraction,
        **flops_metrics(
            model_flops,
            seconds=seconds,
            world_size=launch().world_size,
            device_name=torch.cuda.get_device_name() if on_gpu else None,
        ),
    }
    if plan.num_computed_tokens < plan.num_tokens:
        speed["perf/shared_token_fraction"] = 1 - plan.num_computed_tokens / plan.num_tokens
    return speed


class _Stopwatch:
    """Times a rank's own computation: from the start of a step until it begins to reduce gradients with others.

    By the device's clock, which nobody waits for: a step's time is known when the next one begins.
    """

    def __init__(self, policy: Policy) -> None:
        self.last_seconds = 0.0
        """Of the step before the one that was started last; 0: there is none."""
        self._begin: Any = None
        self._end: Any = None
        self._reduce = policy.config.finalize_model_grads_func
        policy.config.finalize_model_grads_func = self._stop_and_reduce

    def start(self) -> None:
        """Begin a step, whose predecessor the CPU has waited for."""
        if self._begin is not None:
            self.last_seconds = _seconds_between(self._begin, self._end)
        self._begin = _now()

    def _stop_and_reduce(self, *arguments: Any, **settings: Any) -> Any:
        self._end = _now()
        return self._reduce(*arguments, **settings)


def _now() -> Any:
    """Mark a moment on the device's own clock -> an event of CUDA, or seconds."""
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begin: Any, end: Any) -> float:
    seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
    return max(float(seconds), 1e-9)  # 0 means that there is none
