"""The rollout stage: prompts in, K responses each out, shard by shard, the manifest last. The same command resumes."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sppo.checkpoints.hf_files import CONFIG_FILE
from megatron_sppo.checkpoints.model_files import ModelFiles, read_model_files
from megatron_sppo.checkpoints.peft_files import PeftAdapter
from megatron_sppo.cluster.config import PoolConfig
from megatron_sppo.cluster.kept import kept_address
from megatron_sppo.cluster.pool import logs_directory, run_tasks
from megatron_sppo.cluster.progress import StageProgress, progress_file
from megatron_sppo.cluster.ray_team import cluster_has_gpus
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import ChatTokenizer, TokenizedPrompt
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.rollout.engine_differences import check_engine
from megatron_sppo.rollout.finished_shards import FinishedShard, FinishedShards, open_finished_shards, read_earlier_job
from megatron_sppo.rollout.outcomes import count_outcomes, outcome_warnings
from megatron_sppo.rollout.policy import Policy, open_adapter_of
from megatron_sppo.rollout.prepared import PreparedPrompts, PromptsRecord, inputs_hash, prepare_prompts
from megatron_sppo.rollout.probes import Probes
from megatron_sppo.rollout.prompts import PromptRows
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    EngineSteps,
    Response,
    RolloutGroup,
    RolloutManifest,
    SetAside,
    write_manifest,
    write_shard,
)
from megatron_sppo.rollout.sampler import Answer, Refusal, Shard, check_responses
from megatron_sppo.rollout.sampling_worker import SamplerFactory, ShardAnswers, WorkerFactory
from megatron_sppo.rollout.tables import warn_of_several_splits

logger = logging.getLogger(__name__)

_SHARD_SIZE, _SHARD_SIZES_ON_GPU = 64, (4, 512)
_SHARDS_ON_GPU = 16384
"""An engine on a GPU takes shards in an endless stream, of whatever size. With small ones all engines of a cluster end
at about the same time (benchmarks/rollout_simulation.py); of many prompts fewer files are kinder to everyone after."""
_KEPT_LENGTH = 2048
"""Tokens; on a CPU, whose cache has 2 GiB, one such sequence of any model that one would run there has room."""


def generate_rollouts(config: GenerateConfig, *, make_sampler: SamplerFactory | None = None) -> RolloutManifest:
    """Sample the shards that are missing and write the manifest -> RolloutManifest.

    When the directory is complete no engine is started and no prompt tokenised: the shards are read once, for their
    digests.

    Args:
        make_sampler: starts the sampler; None starts vLLM, or talks to the servers that the config names.

    Raises:
        ConfigError: settings that cannot be run; an output directory of another request.
        DataError: model, prompts or responses that cannot be used.
    """
    rows = PromptRows(config.prompts, **_chosen(config))
    files = read_model_files(config.model)
    tokenizer = ChatTokenizer(config.model, template=config.template)
    sampling = replace(config.sampling(), stop_token_ids=_stop_token_ids(tokenizer, files))
    settings = {**sampling.as_dict(), "chat_template_kwargs": tokenizer.arguments}
    adapter = None if config.adapter is None else open_adapter_of(config.model, files.model_hash, config.adapter)
    prompts = _Prompts(config, rows, tokenizer, room=_room(config, files))
    if prompts.are_new:  # before anything is written: the remedy may change which prompts there are
        _engine_length(config, prompts.prepared.longest, files)
    identity = {
        "model_hash": files.model_hash,
        "tokenizer_hash": files.tokenizer_hash,
        "chat_template_hash": tokenizer.template_hash,
        **({} if adapter is None else {"adapter_hash": adapter.adapter_hash}),
    }
    request = {
        **identity,
        **settings,
        "prompts_hash": prompts.record.prompts_hash,
        "shard_size": prompts.shard_size,
    }
    with (
        open_finished_shards(config.output, request, prompts.record, num_shards=prompts.num_shards) as finished,
        contextlib.closing(prompts),
    ):
        if finished.is_complete():
            logger.info("%s is complete: nothing to do", config.output)
        elif missing := finished.missing():
            max_model_len = _engine_length(config, prompts.prepared.longest, files)
            make_worker = WorkerFactory(
                config=config,
                max_model_len=max_model_len,
                sampling=sampling,
                model_hash=files.model_hash,
                tokenizer_hash=files.tokenizer_hash,
                adapter=adapter,
                probes=_probes(config, files, adapter, max_model_len) if make_sampler is None else None,
                make_sampler=make_sampler,
            )
            _sample_missing(make_worker, prompts, missing, finished, vocab_size=files.vocab_size)
        refused = [row for shard in finished.in_order() for row in shard.refused]
        if refused:
            logger.warning(
                "%d prompts are refused by the server and set aside; the first: %s: %s",
                *(len(refused), refused[0]["prompt_id"], refused[0]["reason"]),
            )
        manifest = RolloutManifest(
            schema_version=SCHEMA_VERSION,
            model=str(config.model),
            **identity,
            vocab_size=files.vocab_size,
            sampling=settings,
            num_prompts=prompts.record.num_prompts - len(refused),
            adapter=None if config.adapter is None else str(config.adapter),
            shards=tuple(shard.entry for shard in finished.in_order() if shard.entry.rows),
            quarantined=(*prompts.record.quarantined, *refused),
            outcomes=finished.outcomes(),
            engine_steps=finished.engine_steps(),
        )
        _refuse_no_signal(config, finished.outcomes())
        _tell_engine_steps(manifest.engine_steps)
        write_manifest(config.output, manifest)
    return manifest


def _probes(config: GenerateConfig, files: ModelFiles, adapter: PeftAdapter | None, room: int) -> Probes | None:
    """Compute what engines of our own have to give with the adapter; servers are asked for more than that."""
    if adapter is None or config.servers.server:
        return None
    return Policy(directory=config.model, model_hash=files.model_hash, room=room, adapter=adapter).adapted_probes()


class _Prompts:
    """The prompts of a job: what they are, and, from when they are needed, they themselves."""

    def __init__(self, config: GenerateConfig, rows: PromptRows, tokenizer: ChatTokenizer, *, room: int) -> None:
        """Learn what the prompts are: of the job that began the output, if its inputs were the same; else read them."""
        self._config, self._rows, self.tokenizer, self._room = config, rows, tokenizer, room
        self._prepared: PreparedPrompts | None = None
        earlier = read_earlier_job(config.output)
        self._inputs = inputs_hash(config.prompts, room=room, **_chosen(config))
        is_known = earlier.prompts is not None and earlier.prompts.inputs == self._inputs
        self.record = earlier.prompts if is_known and earlier.prompts is not None else self._prepare()
        self.shard_size = (
            config.shard_size or earlier.shard_size or _default_shard_size(config, self.record.num_prompts)
        )
        if self.record.quarantined:
            left_out = self.record.quarantined
            logger.warning(
                "%d prompts set aside; the first: %s: %s",
                *(len(left_out), left_out[0]["prompt_id"], left_out[0]["reason"]),
            )

    @property
    def are_new(self) -> bool:
        """Tell whether they have been read for a job that has not been begun."""
        return self._prepared is not None

    @property
    def num_shards(self) -> int:
        """Shards that the prompts fill; the last may be smaller."""
        return -(-self.record.num_prompts // self.shard_size)

    @property
    def prepared(self) -> PreparedPrompts:
        """The prompts as the sampler takes them.

        Raises:
            ConfigError: another version of this package read them otherwise, when the output was begun.
        """
        if self._prepared is None:
            found = self._prepare()
            if found.prompts_hash != self.record.prompts_hash:
                raise ConfigError(
                    f"{self._config.output} was begun with {self.record.num_prompts} prompts, which are read otherwise "
                    f"now ({found.num_prompts}). Use another --output, or remove it."
                )
        assert self._prepared is not None
        return self._prepared

    def close(self) -> None:
        """Give the space of the prompts back."""
        if self._prepared is not None:
            self._prepared.close()

    def _prepare(self) -> PromptsRecord:
        self._prepared, quarantined = prepare_prompts(
            self._rows,
            self.tokenizer,
            room=self._room,
            max_tokens=self._config.max_tokens,
            beside=self._config.output,
        )
        if self._config.split is None:
            warn_of_several_splits(self._config.prompts, self._rows.splits)
        return PromptsRecord(
            inputs=self._inputs,
            prompts_hash=self._prepared.prompts_hash,
            num_prompts=len(self._prepared),
            quarantined=quarantined,
        )


def _chosen(config: GenerateConfig) -> dict[str, Any]:
    """Which rows of the prompt file are taken."""
    chosen = {"split": config.split, "subset": config.subset, "offset": config.offset, "limit": config.limit}
    # Left out where there are none: jobs that were begun before there were any are known by the rest.
    return {**chosen, "keep_columns": config.keep_columns} if config.keep_columns else chosen


def _default_shard_size(config: GenerateConfig, num_prompts: int) -> int:
    if config.servers.server or not _has_gpus(config.pool):
        return _SHARD_SIZE
    least, most = _SHARD_SIZES_ON_GPU
    return min(max(num_prompts // _SHARDS_ON_GPU, least), most)


def _has_gpus(pool: PoolConfig) -> bool:
    if pool.ray is not None:
        return cluster_has_gpus(pool)
    import torch

    return torch.cuda.is_available()


def _room(config: GenerateConfig, files: ModelFiles) -> int:
    """Choose how long a prompt with its answer may be -> tokens."""
    room = files.context_length if config.max_model_len is None else config.max_model_len
    if room > files.context_length:
        raise ConfigError(
            f"max_model_len ({room}) is over the model's context ({files.context_length} tokens). "
            f"Use --max-model-len {files.context_length}."
        )
    return room


def _engine_length(config: GenerateConfig, longest: int, files: ModelFiles) -> int:
    """Choose the longest sequence of the engines -> tokens.

    Of one that further jobs are to use, what those will hardly exceed: they have other prompts.

    Args:
        longest: tokens of the longest prompt.

    Raises:
        ConfigError: vLLM computes such long sequences of this model otherwise than training.
    """
    length, room = longest + config.max_tokens, _room(config, files)
    if config.engine.max_lora_rank is not None and not config.servers.server:
        further = max(_KEPT_LENGTH, 1 << (length - 1).bit_length())
        length = room if config.max_model_len is not None else min(room, further)
    check_engine(
        files.config,
        tokens=length,
        place=str(config.model / CONFIG_FILE),
        has_gpus=lambda: bool(config.servers.server) or _has_gpus(config.pool),
    )
    return length


def shard_seed(seed: int, index: int) -> int:
    """Derive shard `index`'s seed from the run's -> int in [0, 2**31). Shards resume alone, so each has its own."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4]) >> 1


def _stop_token_ids(tokenizer: ChatTokenizer, files: ModelFiles) -> tuple[int, ...]:
    """Gather the tokens that end an answer: the template's end of turn, and what the model's files call EOS -> ids.

    An engine knows the latter alone; where they do not name the former, every answer would run on through it.
    """
    markers = tokenizer.markers
    known = {token for token in (*files.eos_token_ids, tokenizer.eos_token_id) if token is not None}
    stops = known if markers.end_of_turn_id is None else {*known, markers.end_of_turn_id}
    spelled = ", ".join(f"{tokenizer.token_text(token)} ({token})" for token in sorted(stops))
    if markers.end_of_turn is not None and markers.end_of_turn_id is None:
        logger.warning(
            "the chat template ends a turn with %s, which is no single token of the tokenizer: answers are not stopped "
            "there but at %s. Use the tokenizer that belongs to the template.",
            *(markers.end_of_turn, spelled or "max_tokens"),
        )
    elif not stops:
        logger.warning("neither the chat template nor the model's files name a token that ends an answer.")
    elif stops != known:
        logger.warning(
            "the chat template ends a turn with %s (%d), which neither config.json, generation_config.json nor the "
            "tokenizer calls EOS: answers are stopped there too. For other programs, add it to eos_token_id in "
            "generation_config.json.",
            *(markers.end_of_turn, markers.end_of_turn_id),
        )
    logger.info("answers end at %s", spelled or "max_tokens alone")
    return tuple(sorted(stops))


def _refuse_no_signal(config: GenerateConfig, outcomes: Mapping[str, int]) -> None:
    """Say which answers are of little use; stop where no prompt got two different ones, before a manifest says done."""
    for line in outcome_warnings(outcomes):
        logger.warning("%s", line)
    if config.num_responses == 1:
        if outcomes["empty"] == outcomes["responses"] and not config.allow_no_signal:
            raise DataError(
                f"all {outcomes['responses']} answers are empty. Check --model and its chat template; "
                "--allow-no-signal accepts it."
            )
        logger.warning(
            "one response a prompt is enough to evaluate, but nothing can be preferred: for training use "
            "--num-responses 2 or more (5 in the paper)."
        )
    elif outcomes["uniform"] == outcomes["groups"] and not config.allow_no_signal:
        raise DataError(
            f"no prompt got two different answers ({outcomes['groups']} prompts, {config.num_responses} answers each; "
            f"{outcomes['empty']} of {outcomes['responses']} empty): nothing can be preferred. Check --model and "
            "--temperature; --allow-no-signal accepts it."
        )


def _sample_missing(
    make_worker: WorkerFactory,
    prompts: _Prompts,
    missing: Sequence[int],
    finished: FinishedShards,
    *,
    vocab_size: int,
) -> None:
    config, sampling = make_worker.config, make_worker.sampling
    prepared, size, tokenizer = prompts.prepared, prompts.shard_size, prompts.tokenizer
    done = sum(shard.entry.rows for shard in finished.in_order())
    total = len(prepared)
    logger.info("%d of %d prompts to sample, %d responses each", total - done, total, sampling.num_responses)

    def shards() -> Iterator[Shard]:
        for index in missing:
            seed = shard_seed(sampling.seed, index)
            yield Shard(index=index, seed=seed, prompts=prepared.read(index * size, (index + 1) * size))

    def holds_marker(response: Response) -> bool:
        return tokenizer.holds_marker(response.text, response.token_ids, stop_token_ids=sampling.stop_token_ids)

    is_first = len(missing) > 1
    with StageProgress(
        progress_file(config.output), stage="rollouts", unit="prompts", total=total, done=done, amount_unit="tokens"
    ) as progress:
        answered = run_tasks(
            make_worker,
            shards(),
            pool=config.pool,
            num_gpus=config.engine.tensor_parallel_size,
            progress=progress,
            logs=logs_directory(config.output),
            size_of=lambda shard: len(shard.prompts),
            kept=None if config.servers.server else kept_address(),
        )
        with contextlib.closing(answered):
            for shard, answers in answered:
                outcomes = _write(
                    shard, answers, config.output, finished, sampling, holds_marker, vocab_size=vocab_size
                )
                if is_first:  # early, while there is something to save
                    for line in outcome_warnings(outcomes):
                        logger.warning("the first shard: %s", line)
                is_first = False
    if left := finished.missing():
        raise DataError(
            f"the sampler answered {len(missing) - len(left)} of {len(missing)} shards. Run the same command again."
        )


def _write(
    shard: Shard,
    answered: ShardAnswers,
    output: Path,
    finished: FinishedShards,
    sampling: Sampling,
    holds_marker: Callable[[Response], bool],
    *,
    vocab_size: int,
) -> dict[str, int]:
    """Check a shard's answers, write them and enter it -> what became of them."""
    check_responses(shard.prompts, answered.answers, sampling=sampling, vocab_size=vocab_size)
    groups, refused = _groups(shard.prompts, answered.answers)
    outcomes = count_outcomes(groups, holds_marker)
    entry = write_shard(output, shard.index, groups)
    written = FinishedShard(entry=entry, outcomes=outcomes, refused=tuple(refused), engine_steps=answered.engine_steps)
    finished.enter(shard.index, written)
    return outcomes


def _tell_engine_steps(steps: EngineSteps | None) -> None:
    if steps is not None and steps.total:
        logger.info(
            "fewer than half of the engine's slots were busy in %.1f %% of its %d steps",
            *(100 * steps.under_half / steps.total, steps.total),
        )


def _groups(prompts: Sequence[TokenizedPrompt], answers: Sequence[Answer]) -> tuple[list[RolloutGroup], list[SetAside]]:
    """Put prompts and answers together -> (rows, prompts that have no answers with the reason)."""
    pairs = list(zip(prompts, answers, strict=True))
    groups = [prompt.group(responses) for prompt, responses in pairs if not isinstance(responses, Refusal)]
    refused = [
        SetAside(prompt_id=prompt.prompt.prompt_id, reason=refusal.reason)
        for prompt, refusal in pairs
        if isinstance(refusal, Refusal)
    ]
    return groups, refused
