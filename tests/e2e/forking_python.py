"""`python` for shells: what it is told to run is forked (forked.py), in the caller's directory, with its files.

`forking_python.py SOCKET` answers there until it is killed; `write_client` writes the program that asks it, to be found
on a shell's PATH.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.forked import Forked

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([[*{words!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(8).decode() or 1))
"""


def write_client(program: Path, address: Path, *words: str) -> None:
    """Write a program that does as `python WORDS` with the words that it is given beside."""
    program.write_text(CLIENT.format(python=sys.executable, address=str(address), words=words))
    program.chmod(0o755)


@contextlib.contextmanager
def serving(address: Path) -> Iterator[int]:
    """Have a server for the block -> its pid; what it forks are its children."""
    server = Forked(Path(__file__), [address])
    while not address.exists() and server.poll() is None:
        time.sleep(0.05)
    try:
        yield server.pid
    finally:
        server.kill()


def answer(client: socket.socket) -> None:
    """Run what a client asks for, and tell it the exit code."""
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as stream:
        words, directory, environment = json.loads(stream.read(int.from_bytes(size, "little")))
    stdin, stdout, stderr = files
    command = [sys.executable, *words]
    done = subprocess.Popen(command, cwd=directory, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
    client.sendall(str(done.wait() & 0xFF).encode())


def serve(address: str) -> None:
    """Answer each client in a process of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(client)
                os._exit(0)
            client.close()


if __name__ == "__main__":
    serve(sys.argv[1])
