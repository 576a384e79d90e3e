"""What ranks of the distributed tests run: the pretraining script itself, and one step with its gradient laid bare."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.sharded_saves import save_as_a_run

REPOSITORY = Path(__file__).resolve().parents[2]


def pretrain(argv: list[str]) -> int:
    """Run examples/pretrain_sppo.py as a rank that a launcher started -> its exit code."""
    return run_script("examples/pretrain_sppo.py", argv)


def run_script(script: str, argv: list[str]) -> int:
    """Run a script of the repository as a rank that a launcher started -> its exit code."""
    sys.argv = [Path(script).name, *argv]
    try:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    except SystemExit as leave:
        return int(leave.code or 0)
    raise AssertionError("the script always exits")


def first_step(megatron: str, data: str, reference_GK: np.ndarray, save: str | None, argv: list[str]) -> dict[str, Any]:
    """Compute the first step's loss and gradient, and save the gradient in the weights' place as a checkpoint.

    A checkpoint is free of the layout, so the test exports it with the converter and holds it against Hugging Face.
    `log_ratio` is the largest |log pi_theta - log pi_t| where the reference pass is our own.
    """
    from megatron_sppo.training import checkpoint, inputs, parallel
    from megatron_sppo.training.forward_step import gradient_step, log_probs, objective_terms
    from megatron_sppo.training.optimizer import build_optimizer
    from megatron_sppo.training.policy import weights_hash

    config, source, batches, policy = _begin(["--load", megatron, "--data", data, "--save", save or "nowhere", *argv])
    checkpoint.load_weights(policy, *inputs.open_weights(config, policy.architecture, source))
    weights = weights_hash(policy.stages)
    optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
    plan = next(batches.steps(first=1, last=1, reference_GK=reference_GK))
    reference_N = log_probs(policy, plan)
    log_prob_N = parallel.sum_to_cpu(gradient_step(policy, optimizer, plan, objective=config.objective)[0])()
    router_sums = parallel.sum_to_cpu(policy.pop_router_sums())()
    router_losses = policy.router_metrics(router_sums, num_sequences=len(plan.rows))
    terms = objective_terms(plan, log_prob_N, objective=config.objective)
    for stage in policy.stages:
        if stage.post_process and policy.adapters is None:  # the head's gradient never went through autograd
            tied = stage.share_embeddings_and_output_weights
            weight = stage.shared_embedding_or_output_weight() if tied else stage.output_layer.weight
            assert weight.grad_added_to_main_grad and weight.grad is None
    if save is not None:
        _save_gradient(policy, source, Path(save))
    parallel.shut_down()
    order = np.argsort(plan.rows)
    return {
        "weights": weights,
        "loss": float(terms.mean()),
        "rows": plan.rows[order],
        "log_prob": log_prob_N.numpy()[order],
        "log_ratio": float((log_prob_N - reference_N).abs().max()),
        "router_losses": router_losses,
    }


def step_by_step(
    megatron: str, data: str, reference_GK: np.ndarray, save: str, argv: list[str], first: int, last: int
) -> None:
    """Do the steps `first`..`last`, from the weights or from the checkpoint of the step before, and save all of it.

    `SAVE` gets the last step's checkpoint, `SAVE/gradient_STEP` what each step's optimizer was given.
    """
    from megatron_sppo.training import checkpoint, parallel
    from megatron_sppo.training.forward_step import gradient_step
    from megatron_sppo.training.optimizer import build_optimizer, build_scheduler
    from megatron_sppo.training.progress import Progress
    from megatron_sppo.training.saving import Saver

    config, source, batches, policy = _begin(["--load", megatron, "--data", data, "--save", save, *argv])
    if first == 1:
        checkpoint.load_weights(policy, source)
    optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
    scheduler = build_scheduler(optimizer, config.optimization, train_iters=last)
    if first > 1:
        checkpoint.resume(Path(save, f"iter_{first - 1:07d}"), policy, optimizer, scheduler)
    for step, plan in enumerate(batches.steps(first=first, last=last, reference_GK=reference_GK), start=first):
        gradient_step(policy, optimizer, plan, objective=config.objective)
        kept = [parameter.detach().clone() for chunk in policy.chunks for parameter in chunk.parameters()]
        _save_gradient(policy, source, Path(save, f"gradient_{step}"))
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.copy_(kept.pop(0))
        optimizer.step()
    saver = Saver(Path(save), policy, optimizer, scheduler, progress=Progress(step=last), source=source)
    saver.save(wait=True)
    parallel.shut_down()


def _begin(argv: list[str]) -> tuple[Any, Path, Any, Any]:
    """Do what the script does before it loads weights -> (config, source checkpoint, batches, policy)."""
    from megatron_sppo import config as configuration
    from megatron_sppo.training import inputs, parallel
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.policy import build_policy

    config = configuration.parse(TrainingConfig, name="test", description="", argv=argv)
    source, architecture, tokenizer = inputs.open_source(config)
    dataset = inputs.open_dataset(config, architecture, tokenizer)
    batches = inputs.list_batches(config, dataset, architecture)
    parallel.initialize(config.parallel, seed=1)
    adapters = config.adapters.settings(architecture)
    policy = build_policy(architecture, config.model, config.parallel, adapters=adapters, seed=config.batch.seed)
    return config, source, batches, policy


@torch.no_grad()
def _save_gradient(policy: Any, source: Path, root: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_sppo.checkpoints import megatron_checkpoint
    from megatron_sppo.training import checkpoint, parallel

    for chunk in policy.chunks:
        for parameter in chunk.params_with_grad:
            parameter.copy_(parameter.main_grad)
        if chunk.ddp_config.use_distributed_optimizer:
            # Each rank has the reduced gradient of its own shard alone; gathered as the optimizer gathers weights.
            chunk.start_param_sync(force_sync=True)
    target = Path(root, "iter_0000000")
    if parallel.is_rank_zero():
        target.mkdir(parents=True)
    torch.distributed.barrier()
    save_as_a_run(checkpoint.describe_trained(policy), target)
    assert dist_checkpointing.check_is_distributed_checkpoint(str(target))
    if parallel.is_rank_zero():
        megatron_checkpoint.carry_model_files(source, target)
        megatron_checkpoint.write_manifest(target)
        megatron_checkpoint.publish(root, 0)
