"""log pi_t of every response that will be trained on: computed once, by the model, layout and precision of training.

The numbers lie beside the data with a fingerprint of all that they depend on. A mismatch is refused, never recomputed
silently: a reference of another model or precision shows as nats in the loss.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

from megatron_sppo.data import reference_file
from megatron_sppo.data.dataset import PreferenceDataset
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.training import parallel
from megatron_sppo.training.ahead import ahead
from megatron_sppo.training.bad_steps import check_reference
from megatron_sppo.training.batches import Batches
from megatron_sppo.training.config import TrainingConfig
from megatron_sppo.training.forward_step import log_probs, log_probs_and_sum
from megatron_sppo.training.metrics import drift_per_token
from megatron_sppo.training.policy import Policy, adapters_hash, weights_hash
from megatron_sppo.training.progress import Progress
from megatron_sppo.training.reference_store import ReferenceStore
from megatron_sppo.training.stopping import SIGTERM_EXIT_CODE, StopRequest
from megatron_sppo.training.watchdog import beat

logger = logging.getLogger(__name__)

MEASURED_EPOCHS = 4
"""Epochs behind the first whose drift is measured."""


def fingerprint(policy: Policy, dataset: PreferenceDataset, batches: Batches, config: TrainingConfig) -> dict[str, Any]:
    """Name all that reference log-probabilities depend on -> JSON dict. Collective.

    The layout is not part of it: other layouts give the same numbers up to rounding, which the first step reports as
    `sppo/ref_drift_step0`.
    """
    model, batch = config.model, config.batch
    names: dict[str, Any] = {
        **_weights_names(policy),
        "dataset_hash": dataset.dataset_hash,
        "selection": batches.selection,
        "seq_length": batch.seq_length,
        "max_prompt_length": batch.max_prompt_length,
        "params_dtype": model.params_dtype,
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe if model.fp8 != "none" else None,
        "packing": batch.packing,
        "packed_sequence_size": batch.packed_sequence_size,
        "share_prompts": batch.share_prompts,
    }
    if model.fp8 != "none" and model.first_last_layers_bf16:
        names["first_last_layers_bf16"] = True  # not named where it is not so, as in files from before it was
    if _num_passes(batches, config) > 1:
        names["epochs"] = {
            "num_epochs": _num_passes(batches, config),
            "seed": batch.seed,
            "global_batch_size": batch.global_batch_size,
            "micro_batch_size": batch.micro_batch_size,
        }
    return names


def _weights_names(policy: Policy) -> dict[str, Any]:
    """Name the weights of a policy, and the adapters on them -> JSON dict. Collective.

    Adapters that add nothing leave their base's numbers, to the bit; but in FP8 its norms are rounded otherwise.
    """
    names: dict[str, Any] = {"weights_hash": weights_hash(policy.stages)}
    if policy.adapters is not None:
        added = adapters_hash(policy.stages)
        if added is not None or policy.config.fp8:
            settings = dataclasses.asdict(policy.adapters)
            names["adapter"] = {"adapters_hash": added, **settings, "targets": list(policy.adapters.targets)}
    return names


def _num_passes(batches: Batches, config: TrainingConfig) -> int:
    return batches.num_epochs if config.batch.reference_per_epoch else 1


def say_what_it_carries(batches: Batches, config: TrainingConfig) -> None:
    """Warn of what makes log pi of the same weights differ between the reference pass and a step."""
    model = config.model
    if model.fp8 == "none":
        return
    if model.fp8_recipe == "delayed":
        logger.warning(
            "fp8_recipe delayed scales by the largest values of earlier calls: log pi of the same weights changes from "
            "call to call, log-ratios do not begin at 0 (2.9 nats a response were seen, emulated), and training "
            "regresses that noise. Use --fp8-recipe tensorwise"
        )
    elif model.fp8_recipe == "tensorwise" and batches.num_epochs > _num_passes(batches, config):
        logger.warning(
            "fp8_recipe tensorwise scales by the largest value of a micro-batch, and the reference is computed in the "
            "first epoch's: later epochs carry the difference as noise, which sppo/ref_drift reports (0.05 nats a "
            "token were seen, emulated). Use --reference-per-epoch (%d reference passes), or --num-epochs 1",
            batches.num_epochs,
        )


def load_or_compute(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    expected: dict[str, Any],
    *,
    config: TrainingConfig,
    stop: StopRequest,
    name: str = reference_file.NAME,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Read the reference log-probabilities, and compute and write those that the run will look at and that are absent.

    What a killed pass had computed is kept in pieces (`reference_file.Pieces`) and goes on from there. The first value
    of a response stays: log pi_t of steps that were trained on does not change when a longer run adds others.
    Collective.

    Args:
        expected: `fingerprint` of this run.
        name: of the files, `reference_file.name_of` for another policy than pi_t.
        known: values that were computed under the same fingerprint for another use.

    Returns:
        [G, K] float32, nats; with `reference_per_epoch` one for each epoch, one after another: [epochs * G, K].
        Responses that no step visits may be NaN.

    Raises:
        SystemExit: a SIGTERM came before the end; what was computed by then is kept.
    """
    store = ReferenceStore(config.save, expected, dataset, name=name)
    values = store.read()
    if values is None and known is not None:
        store.publish(known, replaces=False)
        values = known
    if values is None:
        values = store.nothing()
    steps = _missing_steps(batches, values, first=1, num_passes=_num_passes(batches, config))
    if not steps and not store.has_pieces:
        logger.info("reference log-probabilities read from %s", store.directory)
        return values
    _complete(policy, batches, values, steps, store, config=config, stop=stop)
    return values


def read_for_resume(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    progress: Progress,
    *,
    config: TrainingConfig,
    stop: StopRequest,
    load_pi_t: Callable[[], object],
) -> np.ndarray:
    """Read the reference that an interrupted run trained against -> as `load_or_compute`.

    Where the run is to be longer than it was, and so visits responses whose log pi_t is not there yet, pi_t is loaded
    to compute them; the policy's own weights are to be loaded afterwards. Collective.

    Raises:
        ConfigError: it was not computed for the epochs that are asked for, or pi_t is other than it was.
        DataError: it is gone or is not the one that the checkpoint names.
        SystemExit: as `load_or_compute`.
    """
    expected = progress.reference
    stored_epochs = expected.get("epochs", {}).get("num_epochs", 1)
    if _num_passes(batches, config) > stored_epochs or (stored_epochs > 1 and not config.batch.reference_per_epoch):
        flag = "--reference-per-epoch" if stored_epochs > 1 else "--no-reference-per-epoch"
        raise ConfigError(
            f"{config.save} was trained against log pi_t of the micro-batches of {stored_epochs} epoch(s), and pi_t is "
            f"not here to compute others. Use {flag} and --num-epochs {stored_epochs}, or another --save."
            if stored_epochs > 1
            else f"{config.save} was trained against one reference pass, and pi_t is not here to compute others. "
            f"Use {flag}, or another --save."
        )
    return read_or_extend(
        policy,
        dataset,
        batches,
        expected,
        first=progress.step + 1,
        config=config,
        stop=stop,
        load_weights=load_pi_t,
        flag=f"--load {config.load}",
    )


def read_or_extend(
    policy: Policy,
    dataset: PreferenceDataset,
    batches: Batches,
    expected: dict[str, Any],
    *,
    first: int,
    config: TrainingConfig,
    stop: StopRequest,
    load_weights: Callable[[], object],
    flag: str,
    name: str = reference_file.NAME,
) -> np.ndarray:
    """Read what a run was trained against, and compute what steps from `first` on need beside -> [G, K]. Collective.

    Args:
        load_weights: brings the policy that computed it, where something is missing.
        flag: that names it, for messages.
        name: as `load_or_compute`.

    Raises:
        ConfigError, DataError, SystemExit: as `read_for_resume`.
    """
    store = ReferenceStore(config.save, expected, dataset, name=name)
    values = store.read()
    if values is None:
        raise DataError(
            f"{store.directory} has no reference log-probabilities, but the checkpoint to resume from was trained "
            f"against some. Restore {name}.*, or start anew with another --save."
        )
    steps = _missing_steps(batches, values, first=first, num_passes=_num_passes(batches, config))
    if not steps:
        return values
    load_weights()
    found = _weights_names(policy)
    if any(expected.get(name) != found.get(name) for name in ("weights_hash", "adapter")):
        raise ConfigError(
            f"the reference in {store.directory} has no log pi of the responses of {len(steps)} steps that the run is "
            f"now to do, and {flag} is not the policy that computed it. Use the one that the run began with, or no "
            "more steps than it was to do then."
        )
    _complete(policy, batches, values, steps, store, config=config, stop=stop)
    return values


def _missing_steps(batches: Batches, values: np.ndarray, *, first: int, num_passes: int) -> list[int]:
    """List the steps, from `first` on, that visit a response without a value; once for each pass -> steps."""
    last = min(batches.train_iters, batches.first_step(num_passes) - 1)
    if num_passes == 1 and batches.num_epochs > 1:
        first = 1  # later epochs look at the whole of the first one's
    return [
        step
        for step in range(first, last + 1)
        if np.isnan(values.reshape(-1)[_places(batches, values, step, batches.rows_of(step))]).any()
    ]


def _places(batches: Batches, values: np.ndarray, step: int, rows: np.ndarray) -> np.ndarray:
    """Find the responses of a step's rows among the values, row after row -> [N] int64."""
    before = batches.epoch_of(step) * batches.num_groups
    assert before < len(values)
    return (before + batches.index.group[rows]) * values.shape[1] + batches.index.response[rows]


def _complete(
    policy: Policy,
    batches: Batches,
    values: np.ndarray,
    steps: list[int],
    store: ReferenceStore,
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> None:
    """Run the reference pass over steps, into the values that are NaN, and publish. Collective.

    A piece is kept every so many seconds, and of what is left when a rank was asked to stop.
    """
    num_known = int((~np.isnan(values)).sum())
    if num_known:
        logger.info("the reference pass goes on: %d responses are there, %d steps are left", num_known, len(steps))
    complete = _fill(policy, batches, values, steps, store.keep, config=config, stop=stop)
    if not complete:
        stop.ignore_the_next()
        parallel.shut_down()
        sys.exit(SIGTERM_EXIT_CODE)
    store.publish(values, replaces=num_known > 0)


def _fill(
    policy: Policy,
    batches: Batches,
    values: np.ndarray,
    steps: list[int],
    keep: Callable[[np.ndarray, np.ndarray], None],
    *,
    config: TrainingConfig,
    stop: StopRequest,
) -> bool:
    """Compute log pi_t of steps where it is NaN -> whether all of it (False: asked to stop, and kept). Collective.

    What rank 0 cannot keep it tells the others with the next step's numbers: every rank raises it then.

    Raises:
        DataError: pi_t gives no number for a response, and such are not to be left out (`on_bad_step`).
    """
    seconds, on_bad_step = config.run.reference_piece_seconds, config.safety.on_bad_step
    flat, fresh, kept_at = values.reshape(-1), list[np.ndarray](), time.monotonic()
    refused: OSError | DataError | None = None
    bar = tqdm(total=len(steps), desc="reference", unit="step", disable=None if parallel.is_rank_zero() else True)
    with bar, ahead(batches.plans(steps)) as plans:
        for done, (step, plan) in enumerate(zip(steps, plans, strict=True), start=1):
            beat(f"reference pass of step {step}")
            said = torch.tensor([float(stop.asked), float(refused is not None)])
            log_prob_N, (asked, refusals) = log_probs_and_sum(policy, plan, said)
            places = _places(batches, values, step, plan.rows)
            absent = np.isnan(flat[places])
            check_reference(plan, log_prob_N, stops=on_bad_step == "stop")
            flat[places[absent]] = log_prob_N.float().numpy()[absent]
            fresh.append(places[absent])
            bar.update()
            if float(refusals) > 0:
                parallel.raise_together(refused)
            if done == len(steps):
                break  # published whole; a SIGTERM now is for the first step of training
            stops = float(asked) > 0
            if stops or time.monotonic() - kept_at >= seconds:
                try:
                    keep(np.concatenate(fresh), values)
                except (OSError, DataError) as error:
                    refused = error
                fresh, kept_at = [], time.monotonic()
            if stops:
                parallel.raise_together(refused)
                logger.warning(
                    "stopped by a signal after step %d of %d of the reference pass; the same command goes on",
                    done,
                    len(steps),
                )
                return False
    return True


def drift_by_step(
    policy: Policy, dataset: PreferenceDataset, batches: Batches, reference_GK: np.ndarray
) -> dict[str, float]:
    """Measure how far log pi_t moves because an epoch's micro-batches are others -> {epoch's first step: drift}.

    Over the responses of the first step of each epoch but the first: the sum of |log pi_t in this step's micro-batches
    - log pi_t in the first epoch's| by the sum of their tokens; nats a token. pi_t's own weights compute both, before
    the first step: no update is in it. What a run without `reference_per_epoch` carries in its log-ratios, and one with
    it does not. Reported as `sppo/ref_drift` with that step. Collective. Each costs a forward pass over a step, so only
    the first MEASURED_EPOCHS of them are measured: a run of many short epochs would spend as long here as in training.
    """
    first_epoch_GK = reference_GK[: dataset.num_groups]
    drift = {}
    for epoch in range(1, min(batches.num_epochs, 1 + MEASURED_EPOCHS)):
        step = batches.first_step(epoch)
        (plan,) = batches.steps(first=step, last=step, reference_GK=reference_GK)
        per_epoch = len(reference_GK) > dataset.num_groups
        log_prob_N = (plan.targets.reference_log_prob if per_epoch else log_probs(policy, plan).float()).numpy()
        difference = torch.from_numpy(log_prob_N - first_epoch_GK[plan.group, plan.response])
        drift[str(step)] = drift_per_token(difference, plan.num_response_tokens)
    return drift
