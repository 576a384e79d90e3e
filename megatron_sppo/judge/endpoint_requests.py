"""Requests to a judge's server: again after passing faults, within a budget, without what the server does not take.

A server's refusal is raised with its own words; whether it is the question's fault is for who asked.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from typing import Any

from megatron_sppo.errors import DataError
from megatron_sppo.rollout.openai_server import HttpError, NoReply, OpenAIServer, ServerFault, UnusableReply

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 600.0
"""A server may ask for so much quiet; who asks for more is left alone, and the run ends."""
_RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Passing faults; above 504 those of proxies and of servers that are overloaded."""
UNREADABLE_STATUSES = frozenset({400, 413, 414, 422})
_ROW_STATUSES = UNREADABLE_STATUSES | {403, 451, 500}
"""What a server may answer because of a text: too long, moderated, or one that it fails on."""
_REMEDIES: dict[type[ServerFault], str] = {
    NoReply: "Start the server, then run the same command again: finished shards are kept.",
    UnusableReply: "Check the address: on most servers it ends in /v1.",
    HttpError: "Run the same command again when it has room: finished shards are kept.",
}
_NOT_SUPPORTED = re.compile(r"(?i)unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed")
_CONCESSIONS = {
    "max_tokens": (("max_tokens",), "it is given max_completion_tokens"),
    "top_logprobs": (("logprobs", "top_logprobs"), "its verdicts are bare, and say nothing about how sure it is"),
    "logprobs": (("logprobs", "top_logprobs"), "its verdicts are bare, and say nothing about how sure it is"),
    "temperature": (("temperature",), "it answers at its own, so that another run may judge otherwise"),
}
"""Parameters that a server may refuse by name: what is then left out, and what that means."""


class Refused(Exception):
    """A server does not want a question."""

    def __init__(self, message: str, *, status: int | None, words: str) -> None:
        super().__init__(message)
        self.status, self.words = status, words
        self.may_be_the_rows = status is None or status in _ROW_STATUSES


class EndpointRequests:
    """A server that is asked with patience, by several threads."""

    def __init__(
        self,
        url: str,
        *,
        key: str,
        key_name: str,
        timeout_seconds: float,
        max_requests: int | None,
        max_attempts: int,
        first_wait_seconds: float,
        traffic: Counter[str],
    ) -> None:
        """Remember how to ask; nothing is sent.

        Args:
            key: of the API; empty: none is sent.
            key_name: the environment variable that it is from, for messages.
            max_requests: questions that may be sent, repeated ones included; None: no limit.
            max_attempts: tries of one question; waits double between them, and what the server asks to wait is no try.
            first_wait_seconds: before the second try.
            traffic: questions that are sent are counted there, as `requests`.
        """
        self._url, self._key, self._key_name = url, key, key_name
        self._server = OpenAIServer(url, key=key, timeout_seconds=timeout_seconds)
        self._max_attempts, self._first_wait_seconds = max_attempts, first_wait_seconds
        self._requests_left, self._lock, self._traffic = max_requests, threading.Lock(), traffic
        self._quiet_until = 0.0
        self._conceded: set[str] = set()

    def shown(self, text: str) -> str:
        """Shorten what a server said, and blot the key out of it -> text for a message."""
        return self._server.shown(text)

    def send(self, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send one request, again after a passing fault -> the JSON object that came back.

        Raises:
            Refused: the server does not want this question.
            DataError: it stays silent through all attempts, or asks for a longer pause than is made.
        """
        fault: ServerFault | None = None
        asked_to_wait, wait_seconds, attempt = 0.0, 0.0, 0
        while attempt < self._max_attempts:
            time.sleep(max(wait_seconds, self._quiet_until - time.monotonic(), 0.0))
            wait_seconds = self._first_wait_seconds * 2**attempt
            if body is not None:
                self._spend_request()
            conceded = frozenset(self._conceded)
            attempt += 1
            try:
                return self._server.exchange(route, None if body is None else _without(body, conceded))
            except HttpError as error:
                fault = error
                if body is not None and error.status in (400, 422) and self._concede(conceded, error.words):
                    attempt, wait_seconds = 0, 0.0
                    continue
                if error.status not in _RETRIED_STATUSES:
                    raise self._refusal(route, error.status, str(error)) from None
                pause = error.retry_after or 0.0
                if pause > LONGEST_WAIT_SECONDS:
                    raise DataError(
                        f"{self._url}{route} asks to be left alone for {pause:.0f} s ({error}). Run the same command "
                        "again then: finished shards and cached answers are kept."
                    ) from None
                # All connections keep the pause, and it is no attempt as long as such pauses stay bearable.
                self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
                asked_to_wait += pause
                if 0 < asked_to_wait <= LONGEST_WAIT_SECONDS:
                    attempt -= 1
            except ServerFault as error:
                fault = error
            logger.debug("%s%s, attempt %d: %s", self._url, route, attempt, fault)
        assert fault is not None
        if isinstance(fault, HttpError) and fault.status == 500:
            raise self._refusal(route, fault.status, f"{fault} in {self._max_attempts} attempts")
        raise DataError(
            f"{self._url}{route} did not answer in {self._max_attempts} attempts ({fault}). {_REMEDIES[type(fault)]}"
        )

    def _spend_request(self) -> None:
        """Take one request from the budget.

        Raises:
            DataError: nothing is left of it.
        """
        with self._lock:
            self._traffic["requests"] += 1
            if self._requests_left is None:
                return
            if not self._requests_left:
                raise DataError(
                    "The budget of --max-requests is used up. Run the same command again with another: finished shards "
                    "and cached answers are kept."
                )
            self._requests_left -= 1

    def _concede(self, conceded: frozenset[str], words: str) -> bool:
        """See whether the server refuses by name a parameter that was sent, and do without it -> whether to ask again.

        Args:
            conceded: what was done without already.
        """
        named = [name for name in _CONCESSIONS if name not in conceded and re.search(rf"\b{name}\b", words)]
        if not named or not _NOT_SUPPORTED.search(words):
            return False
        with self._lock:
            if named[0] not in self._conceded:
                self._conceded.add(named[0])
                left_out, meaning = _CONCESSIONS[named[0]]
                logger.warning("%s does not take %s: %s.", self._url, " and ".join(left_out), meaning)
        return True

    def _refusal(self, route: str, status: int, fault: str) -> Refused:
        remedy = "Check the address, the model's name and what the server says."
        if 300 <= status < 400:
            remedy = "If you trust that address, give it with --judge endpoint:URL#MODEL."
        if status in (401, 403):
            state = "which holds a key that it does not take" if self._key else "which is not set"
            remedy = f"The API key is read from the environment variable {self._key_name}, {state}." + (
                "" if os.environ.get("SPPO_ENDPOINT_KEY_NAME") else " SPPO_ENDPOINT_KEY_NAME names another variable."
            )
        return Refused(f"{self._url}{route} refuses with {fault.rstrip('.')}. {remedy}", status=status, words=fault)


def _without(body: dict[str, Any], conceded: frozenset[str]) -> dict[str, Any]:
    """Leave out what the server does not take -> the body as it is sent."""
    left_out = {name for refused in conceded for name in _CONCESSIONS[refused][0]}
    sent = {name: value for name, value in body.items() if name not in left_out}
    return sent | ({"max_completion_tokens": body["max_tokens"]} if "max_tokens" in left_out else {})
