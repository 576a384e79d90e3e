"""A judge's server for tests: real HTTP on the loopback, its answers made up."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Answers a question's body by `answer`."""

    daemon_threads = True
    request_queue_size = 64  # with the default of 5, connections beyond it wait a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], Answer] = longer_wins

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        status, content, headers = self.server.answer(body)
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def answers_of(body: dict[str, Any]) -> tuple[str, str]:
    question = body["messages"][1]["content"]
    mark = question.split("[Answer A begins, ")[1].split("]")[0]
    a, b = (question.split(f"[Answer {x} begins, {mark}]\n")[1].split(f"\n[Answer {x} ends")[0] for x in "AB")
    return a, b


def longer_wins(body: dict[str, Any]) -> Answer:
    a, b = answers_of(body)
    return 200, {"choices": [{"message": {"content": "A" if len(a) >= len(b) else "B"}}]}, {}


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Serve in a thread until the block ends."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
