"""SPPO on Megatron-Core: train pi_{t+1} from pi_t and a dataset of its judged responses.

    torchrun --nproc-per-node 8 examples/pretrain_sppo.py --config examples/configs/mistral_7b_paper.yaml \
        --load checkpoints/pi_t --data datasets/iteration_t --save checkpoints/pi_t_plus_1 \
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel

The same command again resumes, in another layout too. One process needs no torchrun. Exit codes: 0 done, 2 something
that you can fix (one line on stderr), 143 stopped by SIGTERM after a checkpoint, 3 a rank computes wrongly, 4 a rank
hangs, 1 a crash.
"""

import functools
import logging
import sys
from collections.abc import Sequence

from megatron_sppo import config as configuration
from megatron_sppo.command_line import run
from megatron_sppo.training.config import TrainingConfig

NAME = "pretrain_sppo.py"
logger = logging.getLogger(__name__)


def main(name: str, argv: Sequence[str] | None = None) -> None:
    config = configuration.parse(TrainingConfig, name=name, description=__doc__ or "", argv=argv)

    # torch and Megatron-Core take seconds to import, which neither --help nor a refused setting needs.
    from megatron_sppo.training import checkpoint, inputs, loop, parallel, reference, references, stopping
    from megatron_sppo.training.ahead import ahead
    from megatron_sppo.training.optimizer import build_optimizer, build_scheduler
    from megatron_sppo.training.policy import build_policy
    from megatron_sppo.training.progress import Progress, resume_key
    from megatron_sppo.training.saving import Saver
    from megatron_sppo.training.watchdog import watching

    # What can be refused is refused here, before the first second of compute.
    config.objective.row.mixture_weights(len(config.reference))
    resumed = inputs.find_resumable(config)
    source, architecture, tokenizer = inputs.open_source(config, resumed)
    weights = inputs.open_weights(config, architecture, source, resumed)
    dataset = inputs.open_dataset(config, architecture, tokenizer)
    batches = inputs.list_batches(config, dataset, architecture)
    key = resume_key(batches, config)
    progress = Progress(resume_key=key) if resumed is None else inputs.read_progress(config, resumed)
    progress.check_resumes(key, config.save)
    if progress.step >= batches.train_iters:
        logger.info("%s is complete: %d steps are done, %d asked for", config.save, progress.step, batches.train_iters)
        return
    reference.say_what_it_carries(batches, config)
    further = inputs.open_references(config, architecture, tokenizer) if resumed is None else []
    inputs.prepare_save_directory(config)
    tracked = inputs.start_trackers(config, first_step=progress.step + 1)

    parallel.initialize(config.parallel, seed=config.batch.seed)
    with watching(name, config):
        adapters = config.adapters.settings(architecture)  # None: the weights themselves are trained
        policy = build_policy(architecture, config.model, config.parallel, adapters=adapters, seed=config.batch.seed)
        stop = stopping.StopRequest()
        # log pi_t of every response, once, through the very micro-batches of training: before the first step log
        # pi_theta equals it, and every log-ratio is zero. So it is with other policies that the objective looks at.
        if resumed is None:
            reference_GK = references.load_or_compute(
                policy, dataset, batches, progress, weights, further, config=config, stop=stop
            )
        else:
            reference_GK = references.read_for_resume(policy, dataset, batches, progress, config=config, stop=stop)
        optimizer = build_optimizer(policy.chunks, config.optimization, config.model, config.parallel)
        scheduler = build_scheduler(optimizer, config.optimization, train_iters=batches.train_iters)
        if resumed is not None:
            checkpoint.load_weights(policy, *weights)  # the base of adapters, which no checkpoint of theirs holds
            checkpoint.resume(resumed, policy, optimizer, scheduler)
            progress.warn_if_micro_batches_changed(batches.micro_batch_key)

        saver = Saver(
            config.save,
            policy,
            optimizer,
            scheduler,
            progress=progress,
            source=source,
            in_background=config.run.async_save,
            keep_last=config.run.keep_last,
            needed=[config.load, *config.reference, *filter(None, [config.adapters.load_adapter])],
        )
        # (log pi_theta / pi_t - (eta w - log Z))^2, averaged over the responses of a global batch, one update each; the
        # next steps' micro-batches are made meanwhile.
        remaining = batches.steps(first=progress.step + 1, last=batches.train_iters, reference_GK=reference_GK)
        with tracked, ahead(remaining) as steps:
            complete = loop.train(
                policy,
                optimizer,
                scheduler,
                steps,
                config=config,
                train_iters=batches.train_iters,
                progress=progress,
                saver=saver,
                stop=stop,
                tracked=tracked,
            )
    if complete:
        stop.restore()
    else:
        stop.ignore_the_next()
    parallel.shut_down()
    if not complete:
        sys.exit(stopping.SIGTERM_EXIT_CODE)


if __name__ == "__main__":
    run(functools.partial(main, NAME), name=NAME)
