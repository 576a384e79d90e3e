"""One OpenAI-compatible server, asked through the `openai` client: for the sampler's pool and for the judge.

Trying again is the callers': the client's own retries would stay with a server that fails where the pool has others,
count a pause that the server asks for as an attempt, give up on pauses above two minutes that the judge makes, and send
requests past the judge's --max-requests. So they are off, and the time that a server asks for is handed on.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import ipaddress
import json
import math
import os
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from megatron_sppo.command_line import without_secrets
from megatron_sppo.errors import ConfigError

LARGEST_REPLY_BYTES = 1 << 28
_READ_OF_REFUSALS = 1 << 16
_SHOWN_CHARACTERS = 300
_SENT_HEADERS = frozenset(
    {"accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host"}
    | {"transfer-encoding", "user-agent"}
)


class ServerFault(Exception):
    """A request that came to nothing; the words are of one line, and never hold the key."""

    retry_after: float | None = None
    """Seconds that the server asks to be left alone; None: it asks for nothing."""


class NoReply(ServerFault):
    """No connection, or a reply that did not come in time or whole."""


class UnusableReply(ServerFault):
    """Something else came back than an answer: perhaps from no API at all."""


class EmptyReply(UnusableReply):
    """It agreed, and said nothing."""


class HttpError(ServerFault):
    """The server refuses."""

    def __init__(self, status: int, words: str, *, retry_after: float | None) -> None:
        super().__init__(f"HTTP {status} {words}".strip())
        self.status, self.words, self.retry_after = status, words, retry_after


@functools.cache
def _certificates(trusts_environment: bool, *of_environment: str | None) -> ssl.SSLContext:
    """Read whom to trust, once for all servers: each client of httpx (0.28) would, 30 milliseconds at a time.

    Args:
        of_environment: what the environment names, so that another is read again.
    """
    import httpx

    return httpx.create_ssl_context(trust_env=trusts_environment)


class OpenAIServer:
    """One base URL and its key. Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        key: str,
        timeout_seconds: float,
        keeps_connections: bool = True,
    ) -> None:
        import openai  # a second of CPU time

        self._openai, self._key = openai, key
        limits = openai.DEFAULT_CONNECTION_LIMITS
        if not keeps_connections:
            limits = type(limits)(max_connections=limits.max_connections, max_keepalive_connections=0)
        self._headers: dict[str, Any] = {"Authorization": f"Bearer {key}" if key else openai.Omit()}
        trusts_environment = not _is_loopback(urlsplit(url).hostname or "")  # a proxy cannot reach our own loopback
        try:
            self._client = openai.OpenAI(
                base_url=url,
                api_key=key or "none",
                timeout=timeout_seconds,
                max_retries=0,
                http_client=openai.DefaultHttpxClient(
                    # One leads to a server that nobody has named, with the prompts and, on one host, the key.
                    follow_redirects=False,
                    limits=limits,
                    trust_env=trusts_environment,
                    verify=_certificates(
                        trusts_environment, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
                    ),
                    event_hooks={"request": [_strip], "response": [functools.partial(_bound, timeout_seconds)]},
                ),
            )
        except Exception as error:  # noqa: BLE001 (an InvalidURL of httpx is an Exception and no more)
            raise ConfigError(
                f"no client can be made for {url} ({type(error).__name__}: {' '.join(str(error).split())}). "
                "Check the URL and the environment variables http_proxy, https_proxy, all_proxy and SSL_CERT_FILE."
            ) from None

    def exchange(
        self, route: str, body: dict[str, Any] | None = None, *, timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """Send a request, GET where there is no body -> the JSON object that came back.

        Raises:
            NoReply, UnusableReply, HttpError: it came to nothing.
        """
        options: Any = {"headers": self._headers} | ({"timeout": timeout_seconds} if timeout_seconds else {})
        try:
            kind = self._openai.HttpxBinaryResponseContent  # a text would hide bytes that are no UTF-8
            if body is None:
                reply = self._client.get(route, cast_to=kind, options=options)
            else:
                reply = self._client.post(route, cast_to=kind, body=body, options=options)
        except self._openai.APIStatusError as error:
            asked = retry_after_seconds(error.response.headers.get("Retry-After"))
            words = self._words(error.response.text)
            if 300 <= error.status_code < 400:
                words = self.shown(f"it redirects to {error.response.headers.get('Location')}, where nothing is sent")
            raise HttpError(error.status_code, words, retry_after=asked) from None
        except self._openai.OpenAIError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ServerFault):
                raise cause from None
            raise NoReply(self.shown(f"{type(cause).__name__}: {cause}")) from None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(reply.content)
            if isinstance(content, dict):
                return content
        if not reply.content:
            raise EmptyReply("no JSON object but ''")
        raise UnusableReply(f"no JSON object but {self.shown(reply.content.decode('utf-8', 'replace'))!r}")

    def shown(self, text: str) -> str:
        """Shorten a server's words to one line without the key, which some servers repeat -> str."""
        text = (text.replace(self._key, "***") if self._key else text)[:_READ_OF_REFUSALS]
        line = without_secrets(" ".join(text.split()))
        return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."

    def _words(self, text: str) -> str:
        """Find what the server says about a refusal -> its words, empty where it says nothing."""
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(text)
            if isinstance(content, dict):
                inner = content.get("error", content)
                named = inner if isinstance(inner, str) else None
                if isinstance(inner, dict):
                    named = next((inner[key] for key in ("message", "detail") if inner.get(key)), None)
                text = named if isinstance(named, str) else text
        return self.shown(text)


def _strip(request: Any) -> None:
    """Send what a request needs and no more: the client adds what OPENAI_* variables hold for another server."""
    for name in set(request.headers) - _SENT_HEADERS:
        del request.headers[name]


def _bound(timeout_seconds: float, response: Any) -> None:
    """Let a reply be read no further than LARGEST_REPLY_BYTES, unpacked, and of a refusal the beginning alone.

    And no longer than the time-out: the client's own is of each read, and a server that trickles meets it for ever.
    """
    whole, begin = response.iter_bytes, time.monotonic()

    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        left = _READ_OF_REFUSALS if response.is_error else LARGEST_REPLY_BYTES
        for chunk in whole(chunk_size):
            yield chunk[:left]
            left -= len(chunk)
            if (seconds := time.monotonic() - begin) > timeout_seconds:
                response.close()
                raise NoReply(f"it trickles: {seconds:.0f} s for a part of a reply")
            if left < 0:
                response.close()
                if response.is_error:
                    return
                raise UnusableReply(f"more than {LARGEST_REPLY_BYTES} bytes")

    response.iter_bytes = iter_bytes


def retry_after_seconds(header: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, 10.2.3) -> seconds from now, 0 or more; None: no wish."""
    value = (header or "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment - datetime.datetime.now(moment.tzinfo)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
