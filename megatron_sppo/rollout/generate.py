"""The rollout stage: prompts in, K responses each out, shard by shard, the manifest last. The same command resumes."""

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sppo.checkpoints.model_files import ModelFiles, read_model_files
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import ChatTokenizer, TokenizedPrompt, UnusablePrompt
from megatron_sppo.rollout.config import GenerateConfig, Sampling
from megatron_sppo.rollout.finished_shards import FinishedShard, FinishedShards, open_finished_shards
from megatron_sppo.rollout.outcomes import count_outcomes, outcome_warnings
from megatron_sppo.rollout.prompts import PromptSet, prompts_hash, read_prompts
from megatron_sppo.rollout.records import (
    SCHEMA_VERSION,
    Response,
    RolloutGroup,
    RolloutManifest,
    SetAside,
    write_manifest,
    write_shard,
)
from megatron_sppo.rollout.sampler import Refusal, Sampler, check_responses
from megatron_sppo.rollout.server import ServerSampler
from megatron_sppo.rollout.tables import warn_of_several_splits
from megatron_sppo.rollout.vllm_engine import VllmSampler

logger = logging.getLogger(__name__)

SamplerFactory = Callable[[GenerateConfig, int], Sampler]
"""(config, tokens of the longest prompt with its answer) -> Sampler."""


def generate_rollouts(config: GenerateConfig, *, make_sampler: SamplerFactory | None = None) -> RolloutManifest:
    """Sample the shards that are missing and write the manifest -> RolloutManifest.

    Nothing is sampled, and no engine started, when the directory is complete.

    Args:
        make_sampler: starts the sampler; None starts vLLM, or talks to the servers that the config names.

    Raises:
        ConfigError: settings that cannot be run; an output directory of another request.
        DataError: model, prompts or responses that cannot be used.
    """
    prompt_set = read_prompts(
        config.prompts, split=config.split, subset=config.subset, offset=config.offset, limit=config.limit
    )
    if config.split is None:
        warn_of_several_splits(config.prompts, prompt_set.splits)
    files = read_model_files(config.model)
    tokenizer = ChatTokenizer(config.model, template=config.template)
    sampling = replace(config.sampling(), stop_token_ids=_stop_token_ids(tokenizer, files))
    settings = {**sampling.as_dict(), "chat_template_kwargs": tokenizer.arguments}
    prompts, quarantined = _tokenize(config, prompt_set, tokenizer, files)
    shards = [prompts[start : start + config.shard_size] for start in range(0, len(prompts), config.shard_size)]
    request: dict[str, Any] = {
        "model_hash": files.model_hash,
        "tokenizer_hash": files.tokenizer_hash,
        "chat_template_hash": tokenizer.template_hash,
        **settings,
        "prompts_hash": prompts_hash(tuple(prompt.prompt for prompt in prompts)),
        "shard_size": config.shard_size,
    }
    with open_finished_shards(config.output, request, num_shards=len(shards)) as finished:
        if not finished.is_complete():
            sampler = functools.partial(make_sampler or _start_sampler, config)
            _sample_missing(shards, finished, sampler, tokenizer, config.output, sampling, vocab_size=files.vocab_size)
        else:
            logger.info("%s is complete: nothing to do", config.output)
        refused = [row for shard in finished.in_order() for row in shard.refused]
        if refused:
            logger.warning(
                "%d prompts are refused by the server and set aside; the first: %s: %s",
                *(len(refused), refused[0]["prompt_id"], refused[0]["reason"]),
            )
        manifest = RolloutManifest(
            schema_version=SCHEMA_VERSION,
            model=str(config.model),
            model_hash=files.model_hash,
            tokenizer_hash=files.tokenizer_hash,
            chat_template_hash=tokenizer.template_hash,
            vocab_size=files.vocab_size,
            sampling=settings,
            num_prompts=len(prompts) - len(refused),
            shards=tuple(shard.entry for shard in finished.in_order() if shard.entry.rows),
            quarantined=(*quarantined, *refused),
            outcomes=finished.outcomes(),
        )
        _refuse_no_signal(config, finished.outcomes())
        write_manifest(config.output, manifest)
    return manifest


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


def _tokenize(
    config: GenerateConfig, prompt_set: PromptSet, tokenizer: ChatTokenizer, files: ModelFiles
) -> tuple[list[TokenizedPrompt], tuple[SetAside, ...]]:
    """Template and tokenise every prompt -> (those that can be sampled, all that were set aside)."""
    room = files.context_length if config.max_model_len is None else config.max_model_len
    if room > files.context_length:
        raise ConfigError(
            f"max_model_len ({room}) is over the model's context ({files.context_length} tokens). "
            f"Use --max-model-len {files.context_length}."
        )
    kept: list[TokenizedPrompt] = []
    num_too_long = 0
    quarantined = list(prompt_set.quarantined)
    for prompt in tqdm(prompt_set.prompts, desc="tokenize", unit="prompt", disable=None, leave=False):
        try:
            tokenized = tokenizer.tokenize(prompt)
            needed = len(tokenized.token_ids) + config.max_tokens
            if needed > room:
                num_too_long += 1
                raise UnusablePrompt(
                    f"{len(tokenized.token_ids)} tokens and max_tokens {config.max_tokens} exceed {room}"
                )
            kept.append(tokenized)
        except UnusablePrompt as reason:
            quarantined.append({"prompt_id": prompt.prompt_id, "reason": str(reason)})
    if quarantined:
        first = quarantined[0]
        logger.warning("%d prompts set aside; the first: %s: %s", len(quarantined), first["prompt_id"], first["reason"])
    if not kept:
        remedy = "Use a smaller --max-tokens or" if num_too_long else "Use a --chat-template that takes them or"
        raise DataError(
            f"no prompt of {config.prompts} can be sampled ({len(quarantined)} set aside; the first: "
            f"{quarantined[0]['prompt_id']}: {quarantined[0]['reason']}). {remedy} other prompts."
        )
    return kept, tuple(quarantined)


def _sample_missing(
    shards: Sequence[Sequence[TokenizedPrompt]],
    finished: FinishedShards,
    make_sampler: Callable[[int], Sampler],
    tokenizer: ChatTokenizer,
    output: Path,
    sampling: Sampling,
    *,
    vocab_size: int,
) -> None:
    missing = [index for index in range(len(shards)) if index not in finished]
    if not missing:
        return
    done = sum(shard.entry.rows for shard in finished.in_order())
    total = sum(map(len, shards))
    logger.info("%d of %d prompts to sample, %d responses each", total - done, total, sampling.num_responses)
    longest = max(len(prompt.token_ids) for prompt in itertools.chain.from_iterable(shards))

    def holds_marker(response: Response) -> bool:
        return tokenizer.holds_marker(response.text, response.token_ids, stop_token_ids=sampling.stop_token_ids)

    sampler = make_sampler(longest + sampling.max_tokens)
    try:
        with tqdm(total=total, initial=done, desc="rollouts", unit="prompt", disable=None) as bar:
            report = _rate_reporter(bar)
            for index in missing:
                prompts = shards[index]
                answers = sampler.sample(
                    prompts, sampling=sampling, seed=shard_seed(sampling.seed, index), on_progress=report
                )
                check_responses(prompts, answers, sampling=sampling, vocab_size=vocab_size)
                groups, refused = _groups(prompts, answers)
                outcomes = count_outcomes(groups, holds_marker)
                entry = write_shard(output, index, groups)
                finished.enter(index, FinishedShard(entry=entry, outcomes=outcomes, refused=tuple(refused)))
                if index == missing[0] and len(missing) > 1:  # early, while there is something to save
                    for line in outcome_warnings(outcomes):
                        logger.warning("the first shard: %s", line)
    finally:
        sampler.close()


def _rate_reporter(bar: Any) -> Callable[[int, int], None]:
    start, tokens = time.monotonic(), 0

    def report(num_prompts: int, num_tokens: int) -> None:
        nonlocal tokens
        tokens += num_tokens
        bar.set_postfix_str(f"{tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s", refresh=False)
        bar.update(num_prompts)

    return report


def _groups(
    prompts: Sequence[TokenizedPrompt], answers: Sequence[tuple[Response, ...] | Refusal]
) -> tuple[list[RolloutGroup], list[SetAside]]:
    """Put prompts and answers together -> (rows, prompts that have no answers with the reason)."""
    pairs = list(zip(prompts, answers, strict=True))
    groups = [prompt.group(responses) for prompt, responses in pairs if not isinstance(responses, Refusal)]
    refused = [
        SetAside(prompt_id=prompt.prompt.prompt_id, reason=refusal.reason)
        for prompt, refusal in pairs
        if isinstance(refusal, Refusal)
    ]
    return groups, refused


def _start_sampler(config: GenerateConfig, max_model_len: int) -> Sampler:
    if config.servers.server:
        return ServerSampler(config.servers, max_model_len=max_model_len)
    return VllmSampler(config.model, config=config.engine, max_model_len=max_model_len, seed=config.seed)
