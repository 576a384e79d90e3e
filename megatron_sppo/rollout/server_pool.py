"""The servers that a job samples from: what is asked of one, and which is asked next.

A server whose weights have to be proven gets no request before they are, and again not after a connection to it was
lost: it may have come back with the weights that it was started with.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout.adapter_hand_over import load_adapter, prove_adapter, still_uses
from megatron_sppo.rollout.adapter_proof import adapter_name
from megatron_sppo.rollout.config import ServerConfig
from megatron_sppo.rollout.hand_over import CannotTell, DiedLoading, Proof, Unproven, prove, still_holds
from megatron_sppo.rollout.openai_server import HttpError, OpenAIServer, UnusableReply
from megatron_sppo.rollout.policy import Policy

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_DEAD_SECONDS = 30.0
_MODELS_TIMEOUT_SECONDS = 10.0
_OTHER_LIMIT_NAME = "max_completion_tokens"
_LONGEST_RETRY_AFTER_SECONDS = 120.0
_TRY_LATER = (408, 425, 429)
_OF_THE_ROW = (400, 413, 422)
"""What a server answers to a prompt that it cannot take, such as one that is too long for it."""
_DEATHS_IN_LOADING = 2
"""A server that came back from one may have been unlucky."""


class RowRefused(Exception):
    """The server answers, but not this prompt."""


class Server:
    """One base URL."""

    def __init__(self, url: str, config: ServerConfig, *, policy: Policy | None) -> None:
        """Make the clients; nothing is sent.

        Args:
            policy: what it has to hold; None: whatever it holds is sampled from. With an adapter, what it has to use.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.root: str | None = None
        self.unusable: str | None = None
        """Why it is left out until the end."""
        self.is_busy = False
        """It is being proven, which may take as long as loading the weights."""
        self._config = config
        self._timeout = config.server_timeout
        self._model: str | None = config.server_model
        self._limit_name = "max_tokens"
        self._key = os.environ.get("VLLM_API_KEY") or ""
        if self._key and not re.fullmatch(r"[\x21-\x7e]+", self._key):
            raise ConfigError(
                "VLLM_API_KEY holds a space, a line's end or a character beyond ASCII: no HTTP header carries it. "
                "Use `export VLLM_API_KEY=KEY` with the key alone."
            )
        settings: Any = {"key": self._key, "timeout_seconds": self._timeout}
        self._api = OpenAIServer(f"{self.url}/v1", **settings)
        # vLLM closes a connection on which it answered 500 (a method that its workers lack).
        self._bare_api = OpenAIServer(self.url, keeps_connections=False, **settings)
        self._policy = policy
        self._adapter = None if policy is None else policy.adapter
        self._adapter_name = None if self._adapter is None else adapter_name(self._adapter)
        self._proves = config.server_weights != "trust"
        self._proof: Proof | None = None
        self._proof_of_base: Proof | None = None
        """Outlives a doubt, where there is an adapter: what is computed with it shows its base too."""
        self._lock = threading.Lock()
        self._confirmed = 0.0
        """When the last confirmation began."""
        self._deaths_in_loading = 0

    def find_model(self, name: str | None, max_model_len: int) -> None:
        """Learn the served model's name and check its context length."""
        models = self._models()
        if not models:
            raise ConfigError(
                f"{self.url} answers /v1/models without model names: it is no OpenAI API. Check --server."
            )
        # Adapters are listed as models that have a parent.
        names = [listed for listed, card in models.items() if name is not None or not card.get("parent")]
        if name is None and len(names) != 1:
            raise ConfigError(
                f"{self.url} serves {len(names)} models ({', '.join(names)}). Choose with --server-model NAME."
            )
        if name is not None and name not in names:
            raise ConfigError(
                f"{self.url} does not serve {name!r} but {', '.join(names)}. Use --server-model {names[0]}."
            )
        self._model = name or names[0]
        root = models[self._model].get("root")
        self.root = root if isinstance(root, str) else None
        allowed = models[self._model].get("max_model_len")
        if isinstance(allowed, int) and allowed < max_model_len:
            raise ConfigError(
                f"{self.url} allows {allowed} tokens, the longest prompt with its answer needs {max_model_len}. "
                f"Restart it with --max-model-len {max_model_len}, or use --max-model-len {allowed} here."
            )
        if isinstance(allowed, int) and self._policy is not None:
            self._policy.check_engine(allowed, self.url)

    def _models(self) -> dict[str, dict[str, Any]]:
        """Ask which models and adapters are served -> {name: what is said of it}, empty where that makes no sense."""
        with self._worded(of_row=()):
            reply = self._api.exchange("/models", timeout_seconds=min(self._timeout, _MODELS_TIMEOUT_SECONDS))
        listed: Any = reply.get("data")
        is_list = isinstance(listed, list) and all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed)
        return {model["id"]: model for model in listed} if is_list else {}

    def adapters(self) -> dict[str, str]:
        """Ask which adapters it has -> {name: directory}, in the order in which it got them."""
        return {name: str(card.get("root")) for name, card in self._models().items() if card.get("parent")}

    def make_ready(self) -> Proof | None:
        """Have the server hold the policy's weights; costs nothing where that is proven -> Proof, None: not asked for.

        Raises:
            Unproven: it cannot be shown; the server is `unusable` from now on.
            ServerFault: it does not answer.
        """
        policy = self._policy
        if policy is None or self._proof is not None:
            return self._proof
        with self._lock:
            if self._proof is not None or self._policy is None:
                return self._proof
            self.is_busy = True
            try:
                proof = self._prove(policy)
            except Unproven as fault:
                self._leave_out(str(fault))
            except DiedLoading as fault:
                self._deaths_in_loading += 1
                if self._deaths_in_loading >= _DEATHS_IN_LOADING:
                    self._leave_out(f"{fault}, {self._deaths_in_loading} times. See its log")
                raise
            finally:
                self.is_busy = False
            self._proof, self._confirmed = proof, time.monotonic()
        return proof

    def _prove(self, policy: Policy) -> Proof | None:
        """Prove base and adapter, as far as is asked -> Proof, None: nothing was proven and nothing need be again."""
        must_be_sure = self._config.server_weights == "prove"
        try:
            if self._adapter is None:
                proof = prove(self, policy, must_be_sure=must_be_sure)
                done = "has loaded" if proof.was_loaded else "holds"
                logger.info("server %s %s %s: %s", self.url, done, policy.directory, proof)
                return proof
            if self._proves:
                return self._prove_adapter(policy)
        except CannotTell as fault:
            if must_be_sure:
                self._leave_out(f"{fault}: which weights it holds cannot be told. Use a vLLM server")
            of_what = "--model" if self._adapter is None else "--model and --adapter"
            logger.warning("%s: %s: that it holds the weights of %s is not proven", self.url, fault, of_what)
            if self._adapter is None:
                self._policy = None
                return None
            self._proves = False
        assert self._adapter is not None
        load_adapter(self, self._adapter)
        return Proof(distance=0.0, num_sums=0, num_weights=0, was_loaded=False, is_marked=False, salt=None)

    def _prove_adapter(self, policy: Policy) -> Proof:
        if self._proof_of_base is not None and still_uses(self, policy):
            return self._proof_of_base
        # Its base never changes, so that what it computes is enough to know it.
        self._proof_of_base = proof = prove(self, policy, must_be_sure=False)
        distance = prove_adapter(self, policy)
        logger.info(
            "server %s holds %s (%s) and computes with %s: log-probabilities of fixed texts differ by %.4f standard "
            "deviations",
            *(self.url, policy.directory, proof, policy.adapter and policy.adapter.directory, distance),
        )
        return proof

    def doubt(self) -> None:
        """Have the weights proven again before the next request: the server may be another process than before."""
        self._proof = None

    def confirm(self, proof: Proof | None, *, since: float) -> None:
        """Make sure that an answer was computed with the policy's weights.

        Args:
            proof: `make_ready`'s, before the request was sent.
            since: when the answer came (time.monotonic).

        Raises:
            ServerFault: the server was restarted or given other weights in the meantime; the answer is void.
        """
        policy = self._policy
        if proof is None or policy is None:
            return
        if self._adapter is None and not (proof.is_marked or self._config.server_weights == "prove"):
            return
        with self._lock:
            if self._confirmed >= since and self._proof is proof:
                return
            began = time.monotonic()
            if self._proof is not proof or not self._still_holds(policy, proof):
                self.doubt()
                raise UnusableReply("it was restarted or given other weights while it answered")
            self._confirmed = began

    def _still_holds(self, policy: Policy, proof: Proof) -> bool:
        if self._adapter_name is not None:  # a restart loses it, and its base is what the server is started with
            return self._adapter_name in self.adapters()
        return still_holds(self, policy, proof)

    def post_completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one completion request -> the reply's JSON object."""
        if self._model is None:  # it did not answer at the start
            self.find_model(None, 0)
        body = {"model": self._adapter_name or self._model, **body}
        limit, name = body.pop("max_tokens"), self._limit_name
        with self._worded(of_row=_OF_THE_ROW):
            try:
                return self._api.exchange("/completions", {**body, name: limit})
            except HttpError as refusal:  # of requests in flight each learns it by itself
                if refusal.status == 404 and body["model"] == self._adapter_name:
                    self.doubt()
                    raise UnusableReply("it does not know the adapter any more: it was restarted") from None
                wants_other = refusal.status in _OF_THE_ROW and _OTHER_LIMIT_NAME in refusal.words
                if name == _OTHER_LIMIT_NAME or not wants_other:
                    raise
            logger.info("%s wants %s in place of max_tokens", self.url, _OTHER_LIMIT_NAME)
            self._limit_name = _OTHER_LIMIT_NAME
            return self._api.exchange("/completions", {**body, self._limit_name: limit})

    def log_probs(self, token_ids: Sequence[int], *, of_adapter: str | None = None) -> list[float]:
        """Ask for the log-probability of each token but the first -> nats.

        Args:
            of_adapter: name of the adapter that is asked; None: the base.

        Raises:
            CannotTell: the server gives none.
        """
        # vLLM reads no prefix cache for a request like this, and so computes every token.
        body = {"prompt": list(token_ids), "n": 1, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        body["model"] = of_adapter or self._model
        try:
            reply = self.post_completion(body)
        except RowRefused as refusal:
            raise CannotTell(str(refusal)) from None
        try:
            (choice,) = reply["choices"]
            given = choice["prompt_logprobs"][1:]
            values = [float(places[str(token)]["logprob"]) for token, places in zip(token_ids[1:], given, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            raise CannotTell("it gives no log-probabilities of a prompt (vLLM's prompt_logprobs)") from None
        return values

    def control(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request to one of vLLM's development routes, GET where there is no body -> its JSON object."""
        return self._bare_api.exchange(route, body)

    def _leave_out(self, reason: str) -> None:
        self.unusable = reason
        raise Unproven(reason) from None

    @contextlib.contextmanager
    def _worded(self, *, of_row: tuple[int, ...]) -> Iterator[None]:
        """Tell refusals that another try cannot change, of the prompt or of everything; other faults pass through."""
        try:
            yield
        except HttpError as error:
            if error.status >= 500 or error.status in _TRY_LATER or 300 <= error.status < 400:
                raise
            if error.status in (401, 403):
                is_set = "the key in VLLM_API_KEY is not its own" if self._key else "VLLM_API_KEY is not set"
                raise ConfigError(
                    f"{self.url} wants a key: {error}, and {is_set}. Use `export VLLM_API_KEY=KEY` with the KEY of its "
                    "--api-key."
                ) from None
            if error.status in of_row:
                raise RowRefused(f"{self.url} refuses it: {error}") from None
            raise ConfigError(f"{self.url} refuses the request: {error}. Check --server and its log.") from None


class ServerPool:
    """Round-robin over the servers that live."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self._lock = threading.Lock()
        self._turn = 0
        self._failures = {server.url: 0 for server in servers}
        self._dead_until = {server.url: 0.0 for server in servers}
        self._asked_until = {server.url: 0.0 for server in servers}

    def next(self) -> Server:
        """Take the next server that lives and asks for no time; when none does, the one whose rest ends first.

        Raises:
            ConfigError: not one can be shown to hold the policy's weights.
        """
        now = time.monotonic()
        with self._lock:
            usable = [server for server in self.servers if server.unusable is None]
            if not usable:
                refuse_all(self.servers)
            for _ in self.servers:
                server = self.servers[self._turn % len(self.servers)]
                self._turn += 1
                if server.unusable is None and not server.is_busy and self._rests_until(server) <= now:
                    return server
            return min(usable, key=lambda server: (server.is_busy, self._rests_until(server)))

    def _rests_until(self, server: Server) -> float:
        return max(self._dead_until[server.url], self._asked_until[server.url])

    def asked_to_wait(self, server: Server) -> float:
        """Tell how long the server asked to be left alone from now -> seconds."""
        with self._lock:
            return max(0.0, self._asked_until[server.url] - time.monotonic())

    def report(self, server: Server, *, ok: bool, deadly: bool = False, retry_after: float | None = None) -> None:
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


def refuse_all(servers: Sequence[Server]) -> NoReturn:
    """Say why no server is left.

    Raises:
        ConfigError: always.
    """
    reasons = [f"{server.url}: {server.unusable}" for server in servers if server.unusable]
    raise ConfigError(
        f"no server holds the weights of --model ({reasons[0].rstrip('.')}). Check --server and the servers' logs."
    )
