"""Starts a Ray worker as Ray does, without a second Python: `ray_worker.py setup_worker.py WORDS`, to be forked."""

import runpy
import sys
from collections.abc import Sequence

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.utils import update_envs


def go_on_as_worker(context: RuntimeEnvContext, words: Sequence[str], _language: object) -> None:
    """Be what Ray would execute in this process's place: default_worker.py, with its environment."""
    update_envs(context.env_vars)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    RuntimeEnvContext.exec_worker = go_on_as_worker
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
