"""Tests of the emulation run under it alone: `make test-cudaless`, or CUDALESS=1 as README.md says."""

import os

from tests.gpu.conftest import _no_process_group_is_left, data, hf, megatron

__all__ = ["_no_process_group_is_left", "data", "hf", "megatron"]

collect_ignore_glob = [] if os.environ.get("CUDALESS") else ["test_*.py", "*/test_*.py"]
