"""Proves what is sent to a server and what is read of its refusals, against real HTTP on the loopback."""

import contextlib
import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_sppo.errors import ConfigError
from megatron_sppo.rollout import openai_server
from megatron_sppo.rollout.openai_server import HttpError, NoReply, OpenAIServer, UnusableReply, retry_after_seconds


class Server(ThreadingHTTPServer):
    """Answers every request with what `reply` holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.headers: list[dict[str, str]] = []
        self.reply: tuple[int, bytes] = (200, b"{}")
        self.encoding = "identity"
        self.pause = 0.0
        """Seconds after each byte."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        status, content = self.server.reply
        self.send_response(status)
        self.send_header("Content-Encoding", self.server.encoding)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has gone
            for byte in content if self.server.pause else ():
                self.wfile.write(bytes([byte]))
                time.sleep(self.server.pause)
            if not self.server.pause:
                self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("key", ["", "sk-ours"])
def test_only_the_key_that_is_given_is_sent_and_no_proxy_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "of-another-server")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer of-another-server\nX-Tenant: of-another-server")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    assert OpenAIServer(server.url, key=key, timeout_seconds=5).exchange("/models") == {}
    assert OpenAIServer(server.url, key=key, timeout_seconds=5).exchange("/completions", {"prompt": [1]}) == {}
    for headers in server.headers:
        assert headers.get("authorization") == (f"Bearer {key}" if key else None)
        assert not any("of-another-server" in value for value in headers.values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "too long\nfor sk-ours"}}, "too long for ***"),
        ({"object": "error", "message": "too long"}, "too long"),
        ({"detail": "too long"}, "too long"),
        ({"error": "busy"}, "busy"),
        ("<html>", '"<html>"'),
        ({"error": {"message": "x" * 999}}, "x" * 300 + "..."),
    ],
)
def test_a_refusal_carries_the_servers_words_in_one_line_without_the_key(
    server: Server, content: Any, words: str
) -> None:
    server.reply = (422, json.dumps(content).encode())
    with pytest.raises(HttpError) as caught:
        OpenAIServer(server.url, key="sk-ours", timeout_seconds=5).exchange("/completions", {})
    assert (caught.value.status, caught.value.words) == (422, words)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize("content", [b"[]", b"7", b"<html>", b"", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_object_is_shown(server: Server, content: bytes) -> None:
    server.reply = (200, content)
    with pytest.raises(UnusableReply, match="no JSON object but"):
        OpenAIServer(server.url, key="", timeout_seconds=5).exchange("/models")


def test_bytes_that_are_no_utf8_are_not_replaced_silently(server: Server) -> None:
    server.reply = (200, b'{"text": "\xff"}')
    with pytest.raises(UnusableReply, match="no JSON object but"):
        OpenAIServer(server.url, key="", timeout_seconds=5).exchange("/models")


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_reply_is_read_no_further_than_the_limit(
    server: Server, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(openai_server, "LARGEST_REPLY_BYTES", 1 << 17)
    api = OpenAIServer(server.url, key="", timeout_seconds=5)
    server.encoding = encoding
    for size in (1 << 16, 1 << 18, 1 << 16):
        content = json.dumps({"text": "x" * size}).encode()
        server.reply = (200, gzip.compress(content) if encoding == "gzip" else content)
        if size > 1 << 17:
            with pytest.raises(UnusableReply, match="more than 131072 bytes"):
                api.exchange("/models")
        else:
            assert len(api.exchange("/models")["text"]) == size


def test_of_a_refusal_without_end_the_beginning_is_read(server: Server) -> None:
    server.reply = (401, b"a page " * (1 << 20))
    with pytest.raises(HttpError, match=r"HTTP 401 a page a page .*\.\.\.$"):
        OpenAIServer(server.url, key="", timeout_seconds=5).exchange("/models")


@pytest.mark.parametrize(("name", "value"), [("all_proxy", "socks://127.0.0.1:9"), ("SSL_CERT_FILE", "/missing.pem")])
def test_an_environment_that_allows_no_client_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Check the URL and the environment variables") as caught:
        OpenAIServer("http://judge.example/v1", key="", timeout_seconds=5)
    assert "\n" not in str(caught.value)


def test_a_closed_port_is_no_reply(server: Server) -> None:
    server.shutdown()  # a thread that waits at the socket keeps it open
    server.server_close()
    with pytest.raises(NoReply, match="refused"):
        OpenAIServer(server.url, key="", timeout_seconds=5).exchange("/models")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("3", 3.0),
        ("0", 0.0),
        ("-5", 0.0),
        ("100000", 100000.0),
        ("", None),
        ("nan", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, expected: float | None) -> None:
    assert retry_after_seconds(header) == expected


def test_retry_after_a_date_to_come_is_how_far_it_is() -> None:
    assert retry_after_seconds("Thu, 01 Jan 2150 00:00:00 GMT") == pytest.approx(5680281600 - time.time(), abs=600)


@pytest.mark.counts("hangs")
@pytest.mark.parametrize("status", [200, 503])
def test_a_server_that_trickles_is_not_waited_for_beyond_the_time_out(server: Server, status: int) -> None:
    """Every byte comes well within the time-out of a read; a hundred of them would take twenty seconds."""
    server.reply, server.pause = (status, b" " * 100), 0.2
    begin = time.monotonic()
    with pytest.raises(NoReply, match="it trickles"):
        OpenAIServer(server.url, key="", timeout_seconds=1).exchange("/models")
    assert time.monotonic() - begin < 15
