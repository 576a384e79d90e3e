"""vLLM servers over the OpenAI completions API: prompts go as token ids, responses come back as token ids.

Prompts are shared out round-robin. A request that fails, hangs past its time-out or comes back incomplete is sent
again, to the next server, after a growing pause; a server that keeps failing is left alone for a while. An answer
belongs to exactly one request in flight, so no (prompt, k) is lost or doubled. A server that names a time to wait
(Retry-After) is given it. A prompt that a server refuses while it answers others is set aside with the server's words.
Servers must return token ids (vLLM's `return_token_ids`): text is never tokenised again. A server that wants a key gets
the one in the environment variable VLLM_API_KEY.

The server's weights cannot be checked from here; that it speaks the same token ids is (it echoes the prompt's). With
seeds (the default) a GPU server repeats a response as far as its batching allows, which is not to the bit.
"""

import contextlib
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling, ServerConfig
from megatron_sppo.rollout.openai_server import HttpError, OpenAIServer, ServerFault, UnusableReply
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import Answer, AnsweredShard, Refusal, Shard, ShardsUnderWay, prompt_seed

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_DEAD_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 30.0
_MODELS_TIMEOUT_SECONDS = 10.0
_OTHER_LIMIT_NAME = "max_completion_tokens"
_LONGEST_RETRY_AFTER_SECONDS = 120.0
_TRY_LATER = (408, 425, 429)
_OF_THE_ROW = (400, 413, 422)
"""What a server answers to a prompt that it cannot take, such as one that is too long for it."""


class ServerSampler:
    """Samples over one or several servers."""

    def __init__(self, config: ServerConfig, *, max_model_len: int, first_pause_seconds: float = 0.5) -> None:
        """Ask every server for its model.

        Args:
            max_model_len: tokens of the longest prompt with its answer; a server that allows less is refused.
            first_pause_seconds: before the first retry; doubled for each further one.

        Raises:
            ConfigError: no server answers, or one serves another model or a shorter context.
        """
        self._config = config
        self._first_pause_seconds = first_pause_seconds
        self._pool = _Pool([_Server(url, config) for url in config.server])
        faults = []
        for server in self._pool.servers:
            try:
                server.find_model(config.server_model, max_model_len)
            except ServerFault as fault:
                faults.append(f"{server.url}: {fault}")
                self._pool.report(server, ok=False, deadly=True)
                logger.warning("server %s does not answer (%s)", server.url, fault)
        self._has_answered = False
        if len(faults) == len(self._pool.servers):
            raise ConfigError(
                f"no server answers ({faults[0]}). Start one with `vllm serve MODEL_DIR` and check --server."
            )

    def sample(
        self, shards: Iterable[Shard], *, sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> Iterator[AnsweredShard]:
        """Answer shards -> each once, as soon as it is answered whole (`Sampler.sample`).

        Shards are taken so early that as many requests as may be are in flight until the last shard.

        Raises:
            ConfigError: a server refuses the request itself, or every prompt from the first on.
            DataError: a prompt stayed unanswered after all retries.
        """
        waiting: queue.SimpleQueue[tuple[Shard, int] | None] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[Shard, int, Answer | ValueError | None]] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while (place := waiting.get()) is not None and not stop.is_set():
                outcome: Answer | ValueError | None = None
                try:
                    outcome = self._answer(*place, sampling, stop)
                except _RowRefused as error:
                    outcome = Refusal(reason=str(error))
                except (ConfigError, DataError) as error:
                    outcome = error
                finally:
                    finished.put((*place, outcome))  # None: the thread crashed, and the caller must not wait

        under_way, num_workers = ShardsUnderWay(shards), 0
        most = self._config.server_concurrency * len(self._pool.servers)
        try:
            while True:
                # Half as much again as may be in flight: none of them waits while an answered shard is written.
                while under_way.num_unanswered < most + (most + 1) // 2 and (shard := under_way.take()) is not None:
                    for position in range(len(shard.prompts)):
                        waiting.put((shard, position))
                if not under_way.num_unanswered:
                    return
                for _ in range(min(most, under_way.num_unanswered) - num_workers):
                    # Daemons: a hung server must not keep the process alive after an error or Ctrl-C.
                    threading.Thread(target=work, daemon=True).start()
                    num_workers += 1
                shard, position, outcome = finished.get()
                if isinstance(outcome, ValueError):
                    raise outcome
                assert outcome is not None, "a request thread crashed; its traceback is above"
                responses = () if isinstance(outcome, Refusal) else outcome
                self._has_answered = self._has_answered or bool(responses)
                on_progress(1, sum(len(response.token_ids) for response in responses))
                answers = under_way.answer(shard, position, outcome)
                if answers is not None:
                    self._refuse_refusals(answers)
                    yield AnsweredShard(shard=shard, answers=answers)
        finally:
            stop.set()
            for _ in range(num_workers):
                waiting.put(None)

    def _refuse_refusals(self, answers: Sequence[Answer]) -> None:
        """Stop where a whole shard, and every prompt before, is refused: that is no fault of the prompts."""
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if refused and not self._has_answered:
            raise ConfigError(f"every prompt is refused: {refused[0].reason}. Check --server and --max-tokens.")

    def close(self) -> None:
        """Nothing to end: idle connections go with the process."""

    def _answer(self, shard: Shard, position: int, sampling: Sampling, stop: threading.Event) -> tuple[Response, ...]:
        prompt = shard.prompts[position]
        body: dict[str, Any] = {
            "prompt": list(prompt.token_ids),
            "n": sampling.num_responses,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "return_token_ids": True,
            # Spelled out, because a server fills what is left out from the model's generation_config.json.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        seed = prompt_seed(shard, position) if self._config.server_seeds else None
        if seed is not None:
            body["seed"] = seed
        fault: ServerFault | None = None
        for attempt in range(self._config.server_retries + 1):
            if attempt > 0:
                pause = min(self._first_pause_seconds * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                if stop.wait(pause * random.uniform(0.5, 1.0)):
                    break
            server = self._pool.next()
            if stop.wait(self._pool.asked_to_wait(server)):
                break
            try:
                reply = server.post_completion(body)
                responses = _responses(reply, prompt, sampling, seed)
            except ServerFault as error:
                fault = error
                logger.debug("%s: prompt %s: %s", server.url, prompt.prompt.prompt_id, error)
                self._pool.report(server, ok=False, retry_after=error.retry_after)
                continue
            self._pool.report(server, ok=True)
            return responses
        raise DataError(
            f"prompt {prompt.prompt.prompt_id!r} failed {self._config.server_retries + 1} times (the last: {fault}). "
            "Finished shards are kept: check the servers and run the same command again."
        )


class _RowRefused(Exception):
    """The server answers, but not this prompt."""


class _Server:
    """One base URL."""

    def __init__(self, url: str, config: ServerConfig) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = config.server_timeout
        self._model: str | None = config.server_model
        self._limit_name = "max_tokens"
        self._key = os.environ.get("VLLM_API_KEY") or ""
        if self._key and not re.fullmatch(r"[\x21-\x7e]+", self._key):
            raise ConfigError(
                "VLLM_API_KEY holds a space, a line's end or a character beyond ASCII: no HTTP header carries it. "
                "Use `export VLLM_API_KEY=KEY` with the key alone."
            )
        self._api = OpenAIServer(f"{self.url}/v1", key=self._key, timeout_seconds=self._timeout)

    def find_model(self, name: str | None, max_model_len: int) -> None:
        """Learn the served model's name and check its context length."""
        with self._worded(of_row=()):
            reply = self._api.exchange("/models", timeout_seconds=min(self._timeout, _MODELS_TIMEOUT_SECONDS))
        listed: Any = reply.get("data")
        is_list = isinstance(listed, list) and all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed)
        models = {model["id"]: model for model in listed} if is_list else {}
        if not models:
            raise ConfigError(
                f"{self.url} answers /v1/models without model names: it is no OpenAI API. Check --server."
            )
        names = list(models)
        if name is None and len(names) != 1:
            raise ConfigError(
                f"{self.url} serves {len(names)} models ({', '.join(names)}). Choose with --server-model NAME."
            )
        if name is not None and name not in names:
            raise ConfigError(
                f"{self.url} does not serve {name!r} but {', '.join(names)}. Use --server-model {names[0]}."
            )
        self._model = name or names[0]
        allowed = models[self._model].get("max_model_len")
        if isinstance(allowed, int) and allowed < max_model_len:
            raise ConfigError(
                f"{self.url} allows {allowed} tokens, the longest prompt with its answer needs {max_model_len}. "
                f"Restart it with --max-model-len {max_model_len}, or use --max-model-len {allowed} here."
            )

    def post_completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one completion request -> the reply's JSON object."""
        if self._model is None:  # it did not answer at the start
            self.find_model(None, 0)
        body = {"model": self._model, **body}
        limit, name = body.pop("max_tokens"), self._limit_name
        with self._worded(of_row=_OF_THE_ROW):
            try:
                return self._api.exchange("/completions", {**body, name: limit})
            except HttpError as refusal:  # of requests in flight each learns it by itself
                wants_other = refusal.status in _OF_THE_ROW and _OTHER_LIMIT_NAME in refusal.words
                if name == _OTHER_LIMIT_NAME or not wants_other:
                    raise
            logger.info("%s wants %s in place of max_tokens", self.url, _OTHER_LIMIT_NAME)
            self._limit_name = _OTHER_LIMIT_NAME
            return self._api.exchange("/completions", {**body, self._limit_name: limit})

    @contextlib.contextmanager
    def _worded(self, *, of_row: tuple[int, ...]) -> Iterator[None]:
        """Tell refusals that another try cannot change, of the prompt or of everything; other faults pass through."""
        try:
            yield
        except HttpError as error:
            if error.status >= 500 or error.status in _TRY_LATER:
                raise
            if error.status in (401, 403):
                is_set = "the key in VLLM_API_KEY is not its own" if self._key else "VLLM_API_KEY is not set"
                raise ConfigError(
                    f"{self.url} wants a key: {error}, and {is_set}. Use `export VLLM_API_KEY=KEY` with the KEY of its "
                    "--api-key."
                ) from None
            if error.status in of_row:
                raise _RowRefused(f"{self.url} refuses it: {error}") from None
            raise ConfigError(f"{self.url} refuses the request: {error}. Check --server and its log.") from None


class _Pool:
    """Round-robin over the servers that live."""

    def __init__(self, servers: list[_Server]) -> None:
        self.servers = servers
        self._lock = threading.Lock()
        self._turn = 0
        self._failures = {server.url: 0 for server in servers}
        self._dead_until = {server.url: 0.0 for server in servers}
        self._asked_until = {server.url: 0.0 for server in servers}

    def next(self) -> _Server:
        """Take the next server that lives and asks for no time; when none does, the one whose rest ends first."""
        now = time.monotonic()
        with self._lock:
            for _ in self.servers:
                server = self.servers[self._turn % len(self.servers)]
                self._turn += 1
                if max(self._dead_until[server.url], self._asked_until[server.url]) <= now:
                    return server
            return min(self.servers, key=lambda s: max(self._dead_until[s.url], self._asked_until[s.url]))

    def asked_to_wait(self, server: _Server) -> float:
        """Tell how long the server asked to be left alone from now -> seconds."""
        with self._lock:
            return max(0.0, self._asked_until[server.url] - time.monotonic())

    def report(self, server: _Server, *, ok: bool, deadly: bool = False, retry_after: float | None = None) -> None:
        """Count an attempt's outcome; several failures in a row rest the server, unless it says itself how long."""
        with self._lock:
            if retry_after is not None:
                self._asked_until[server.url] = time.monotonic() + min(retry_after, _LONGEST_RETRY_AFTER_SECONDS)
                return
            self._failures[server.url] = 0 if ok else self._failures[server.url] + 1
            if ok:
                self._dead_until[server.url] = 0.0
            elif deadly or self._failures[server.url] >= _FAILURES_UNTIL_DEAD:
                if self._dead_until[server.url] <= time.monotonic() and not deadly:
                    logger.warning("server %s keeps failing; left alone for %.0f s", server.url, _DEAD_SECONDS)
                self._dead_until[server.url] = time.monotonic() + _DEAD_SECONDS


def _responses(
    reply: dict[str, Any], prompt: TokenizedPrompt, sampling: Sampling, seed: int | None
) -> tuple[Response, ...]:
    """Check one reply whole -> its K responses in index order."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnusableReply("the reply has no choices")
    by_index = {choice.get("index"): choice for choice in choices}
    if len(choices) != sampling.num_responses or set(by_index) != set(range(sampling.num_responses)):
        raise UnusableReply(f"{len(choices)} responses came back instead of {sampling.num_responses}")
    responses = []
    for index in range(sampling.num_responses):
        choice = by_index[index]
        echoed, token_ids, text = choice.get("prompt_token_ids"), choice.get("token_ids"), choice.get("text")
        if choice.get("finish_reason") not in ("stop", "length") or not isinstance(text, str):
            raise UnusableReply(f"response {index} is unfinished (finish_reason {choice.get('finish_reason')!r})")
        is_list = isinstance(token_ids, list) and all(type(token) is int for token in token_ids)
        if not is_list or (text and not token_ids):
            raise ConfigError(
                "the server returns no token ids. Use a vLLM server that knows return_token_ids (0.10.2 or later)."
            )
        if echoed is not None and echoed != list(prompt.token_ids):
            raise UnusableReply("the server answered another prompt than it was sent")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _RowRefused("an answer to it holds half a surrogate pair") from None
        # vLLM gives sequence k of a request the seed that follows by k.
        child_seed = None if seed is None else seed + index
        responses.append(
            Response(text=text, token_ids=tuple(token_ids), finish_reason=choice["finish_reason"], seed=child_seed)
        )
    return tuple(responses)
