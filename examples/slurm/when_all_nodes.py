"""Wait until Ray has all its nodes, then go on as python: when_all_nodes.py NODES -m megatron_sppo rollouts ...

`ray symmetric-run --min-nodes` waits too, but stays connected, and Ray ends a connected process with exit code 1 when
its node is stopped: a stage that has ended well would count as failed.

MEGATRON_SPPO_BEGUN names a file that is made first of all: ray_node.sh learns from it that Ray has started here.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

COUNT = """
import ray, sys
ray.init("auto", logging_level="ERROR", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
"""
SECONDS = 600


def main() -> None:
    """Wait, then become the command."""
    nodes, *words = sys.argv[1:]
    if begun := os.environ.get("MEGATRON_SPPO_BEGUN"):
        Path(begun).touch()
    deadline = time.monotonic() + SECONDS
    while subprocess.run([sys.executable, "-c", COUNT, nodes], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        if time.monotonic() > deadline:
            sys.exit(f"when_all_nodes.py: error: fewer than {nodes} nodes have joined Ray within {SECONDS} s.")
        time.sleep(1)
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main()
