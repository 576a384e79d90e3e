"""vLLM servers over the OpenAI completions API: prompts go as token ids, responses come back as token ids.

Prompts are shared out round-robin. A request that fails, hangs past its time-out or comes back incomplete is sent
again, to the next server, after a growing pause; a server that keeps failing is left alone for a while. An answer
belongs to exactly one request in flight, so no (prompt, k) is lost or doubled. A server that names a time to wait
(Retry-After) is given it. A prompt that a server refuses while it answers others is set aside with the server's words.
Servers must return token ids (vLLM's `return_token_ids`): text is never tokenised again. A server that wants a key gets
the one in the environment variable VLLM_API_KEY.

Which weights a server holds is proven before it is asked, and it is given the policy's where it holds others
(`hand_over`); an answer counts when the server still held them after it. With seeds (the default) a GPU server repeats
a response as far as its batching allows, which is not to the bit.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.rollout.adapter_hand_over import takes_adapters
from megatron_sppo.rollout.chat_template import TokenizedPrompt
from megatron_sppo.rollout.config import Sampling, ServerConfig
from megatron_sppo.rollout.hand_over import EXTENSION, Unproven, can_be_given_weights
from megatron_sppo.rollout.openai_server import HttpError, NoReply, ServerFault, UnusableReply
from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.records import Response
from megatron_sppo.rollout.sampler import Answer, AnsweredShard, Refusal, Shard, ShardsUnderWay, prompt_seed
from megatron_sppo.rollout.server_pool import RowRefused, Server, ServerPool, refuse_all

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 30.0


class ServerSampler:
    """Samples over one or several servers."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        max_model_len: int,
        policy: Policy | None = None,
        first_pause_seconds: float = 0.5,
    ) -> None:
        """Ask every server for its model, and have it hold the policy's weights.

        Args:
            max_model_len: tokens of the longest prompt with its answer; a server that allows less is refused.
            policy: what servers have to hold; None: whatever they hold is sampled from. An adapter is loaded by those
                of server_weights=trust too.
            first_pause_seconds: before the first retry; doubled for each further one.

        Raises:
            ConfigError: no server answers, or one serves another model or a shorter context; none can be shown to hold
                the policy's weights.
        """
        self._config = config
        self._first_pause_seconds = first_pause_seconds
        has_adapter = policy is not None and policy.adapter is not None
        asked = policy if config.server_weights != "trust" or has_adapter else None
        self._pool = ServerPool([Server(url, config, policy=asked) for url in config.server])
        faults = self._ask_all(max_model_len)
        self._has_answered = False
        if any(server.unusable for server in self._pool.servers) and len(faults) == len(self._pool.servers):
            refuse_all(self._pool.servers)
        if len(faults) == len(self._pool.servers):
            raise ConfigError(
                f"no server answers ({faults[0]}). Start one with `vllm serve MODEL_DIR` and check --server."
            )

    def _ask_all(self, max_model_len: int) -> list[str]:
        """Make the servers ready, all at once -> faults of those that are not."""

        def ask(server: Server) -> ServerFault | None:
            try:
                server.find_model(self._config.server_model, max_model_len)
                server.make_ready()
            except ServerFault as fault:
                return fault
            return None

        faults = []
        with ThreadPoolExecutor(max_workers=len(self._pool.servers)) as threads:
            for server, fault in zip(self._pool.servers, threads.map(ask, self._pool.servers), strict=True):
                if fault is None:
                    continue
                faults.append(f"{server.url}: {fault}")
                if isinstance(fault, Unproven):
                    logger.warning("server %s is left out: %s", server.url, fault)
                    continue
                self._pool.report(server, ok=False, deadly=True)
                logger.warning("server %s does not answer (%s)", server.url, fault)
        return faults

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
                except RowRefused as error:
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
                proof = server.make_ready()
                salt = {"cache_salt": proof.salt} if proof is not None and proof.salt else {}
                reply = server.post_completion(body | salt)
                server.confirm(proof, since=time.monotonic())
                responses = _responses(reply, prompt, sampling, seed)
            except ServerFault as error:
                fault = error
                logger.debug("%s: prompt %s: %s", server.url, prompt.prompt.prompt_id, error)
                if isinstance(error, NoReply) or (isinstance(error, HttpError) and error.status >= 500):
                    server.doubt()
                elif isinstance(error, Unproven):
                    logger.warning("server %s is left out: %s", server.url, error)
                    continue
                self._pool.report(server, ok=False, retry_after=error.retry_after)
                continue
            self._pool.report(server, ok=True)
            return responses
        raise DataError(
            f"prompt {prompt.prompt.prompt_id!r} failed {self._config.server_retries + 1} times (the last: {fault}). "
            "Finished shards are kept: check the servers and run the same command again."
        )


def check_takes_policies(config: ServerConfig, *, adapters: bool) -> None:
    """Refuse servers that cannot be given the policy of a next iteration; nothing is changed on them.

    Args:
        adapters: the policies are adapters on one base; otherwise whole models.

    Raises:
        ConfigError: no server answers, or none of those that do has the routes for it.
    """
    faults = []
    missing = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if adapters else "VLLM_SERVER_DEV_MODE=1"
    for url in config.server:
        server = Server(url, config, policy=None)
        try:
            server.find_model(config.server_model, 0)
            if takes_adapters(server) if adapters else can_be_given_weights(server):
                continue
            fault = f"it takes no new {'adapters' if adapters else 'weights'}: {missing} is not set there"
        except ServerFault as error:
            fault = str(error)
        faults.append(f"{server.url}: {fault}")
        logger.warning("server %s cannot be used: %s", server.url, fault)
    if len(faults) == len(config.server):
        lora = " --enable-lora --max-lora-rank R --lora-target-modules q_proj ..." if adapters else ""
        raise ConfigError(
            f"no server can take over the {'adapter' if adapters else 'weights'} of a next iteration ({faults[0]}). "
            f"Start them with `{missing} vllm serve MODEL_DIR{lora} --worker-extension-cls {EXTENSION}`, where "
            "nobody else reaches them, or use --iterations 1."
        )


def _responses(
    reply: dict[str, Any], prompt: TokenizedPrompt, sampling: Sampling, seed: int | None
) -> tuple[Response, ...]:
    """Check one reply whole -> its K responses in index order."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UnusableReply("the reply has no choices")
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
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
            raise RowRefused("an answer to it holds half a surrogate pair") from None
        # vLLM gives sequence k of a request the seed that follows by k.
        child_seed = None if seed is None else seed + index
        responses.append(
            Response(text=text, token_ids=tuple(token_ids), finish_reason=choice["finish_reason"], seed=child_seed)
        )
    return tuple(responses)
