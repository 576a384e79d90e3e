"""pytest plugin of the emulation (`-p tests.cudaless.plugin`): truths are computed without it."""

import functools
from typing import Any

from tests.cudaless.device import suspended


def pytest_configure() -> None:
    """Let Hugging Face's model, the truth of tests/gpu and tests/distributed, run as on a machine without a GPU."""
    from tests.distributed.truth import Truth

    plain = Truth._hugging_face

    @functools.wraps(plain)
    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return plain(*args, **kwargs)

    Truth._hugging_face = on_the_cpu  # type: ignore[method-assign]
