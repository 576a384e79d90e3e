"""Collected by `make test-triton` alone, which sets TRITON_INTERPRET and gives this folder a Triton of its own."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
