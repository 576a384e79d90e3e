"""A Hugging Face hub on this machine: what `datasets` asks for to load a data set, and no more."""

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow
import pyarrow.parquet

REVISION = "1" * 40

Files = Mapping[str, bytes]
"""Path within the repository -> content."""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Write rows as a Parquet file -> its bytes."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@contextlib.contextmanager
def serve_hub(repositories: Mapping[str, Files]) -> Iterator[str]:
    """Serve data sets -> the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, route = self.path.partition("?")[0].removeprefix("/").partition("datasets/")
            owner, name, *rest = route.split("/")
            files = repositories.get(f"{owner}/{name}")
            if files is None:
                self._answer(404, b"", {"x-error-code": "RepoNotFound"})
            elif kind == "api/" and rest[:1] == ["tree"]:
                self._answer_json(_listing(files, "/".join(rest[2:])))
            elif kind == "api/":
                siblings = [{"rfilename": path} for path in files]
                self._answer_json({"id": f"{owner}/{name}", "sha": REVISION, "siblings": siblings})
            elif (path := "/".join(rest[2:])) in files:
                etag = hashlib.sha1(files[path]).hexdigest()
                self._answer(200, files[path], {"x-repo-commit": REVISION, "etag": f'"{etag}"'})
            else:
                self._answer(404, b"", {"x-error-code": "EntryNotFound", "x-repo-commit": REVISION})

        do_HEAD = do_GET

        def _answer_json(self, content: Any) -> None:
            self._answer(200, json.dumps(content).encode(), {"content-type": "application/json"})

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for header, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _listing(files: Files, folder: str) -> list[dict[str, Any]]:
    """List what lies in a folder itself."""
    start = f"{folder}/" if folder else ""
    inside = [path.removeprefix(start) for path in files if path.startswith(start)]
    entries = [
        {"type": "file", "path": start + path, "size": len(files[start + path]), "oid": "0" * 40}
        for path in inside
        if "/" not in path
    ]
    folders = sorted({path.partition("/")[0] for path in inside if "/" in path})
    return entries + [{"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40} for name in folders]
