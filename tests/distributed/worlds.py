"""What ranks of the distributed tests run: the pretraining script itself, and one step with its gradient laid bare."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def pretrain(argv: list[str]) -> int:
    """Run examples/pretrain_sppo.py as a rank that a launcher started -> its exit code."""
    sys.argv = ["pretrain_sppo.py", *argv]
    try:
        runpy.run_path(str(REPOSITORY / "examples/pretrain_sppo.py"), run_name="__main__")
    except SystemExit as leave:
        return int(leave.code or 0)
    raise AssertionError("the script always exits")


def save_gradient(megatron: str, data: str, reference_GK: np.ndarray, save: str, argv: list[str]) -> dict[str, Any]:
    """Compute the first step's loss and gradient, and save the gradient in the weights' place as a checkpoint.

    A checkpoint is free of the layout, so the test exports it with the converter and holds it against Hugging Face.
    """
    from megatron.core import dist_checkpointing

    from megatron_sppo import config as configuration
    from megatron_sppo.conversion import megatron_checkpoint
    from megatron_sppo.training import checkpoint, inputs, parallel
    from megatron_sppo.training.batches import Batches
    from megatron_sppo.training.config import TrainingConfig
    from megatron_sppo.training.forward_step import objective_terms, run_micro_batches
    from megatron_sppo.training.policy import build_policy, weights_hash

    arguments = ["--load", megatron, "--data", data, "--save", save, *argv]
    config = configuration.parse(TrainingConfig, name="test", description="", argv=arguments)
    source, architecture, tokenizer = inputs.open_source(config)
    dataset = inputs.open_dataset(config, architecture, tokenizer)
    batches = Batches(dataset, config, max_length=architecture.max_position_embeddings)
    parallel.initialize(config.parallel, seed=1)
    policy = build_policy(architecture, config.model, config.parallel)
    checkpoint.load_weights(policy, source)
    weights = weights_hash(policy.stages)
    plan = next(batches.steps(first=1, last=1, reference_GK=reference_GK))
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()

    def loss(batch: Any, log_prob: Any) -> Any:
        return objective_terms(batch, log_prob, objective=config.objective)

    log_prob_N = run_micro_batches(policy, plan, loss=loss, forward_only=False)
    terms = loss(plan, log_prob_N)
    for stage in policy.stages:
        if stage.post_process:  # the head's gradient never went through autograd
            tied = stage.share_embeddings_and_output_weights
            weight = stage.shared_embedding_or_output_weight() if tied else stage.output_layer.weight
            assert weight.grad_added_to_main_grad and weight.grad is None
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    target = Path(save, "iter_0000000")
    if parallel.is_rank_zero():
        target.mkdir(parents=True)
    torch.distributed.barrier()
    states = checkpoint._model_state(policy)
    checkpoint._host_save(states, target)
    assert dist_checkpointing.check_is_distributed_checkpoint(str(target))
    if parallel.is_rank_zero():
        megatron_checkpoint.carry_model_files(source, target)
        megatron_checkpoint.write_manifest(target)
        megatron_checkpoint.publish(Path(save), 0)
    parallel.shut_down()
    order = np.argsort(plan.rows)
    return {
        "weights": weights,
        "loss": float(terms.mean()),
        "rows": plan.rows[order],
        "log_prob": log_prob_N.numpy()[order],
    }
