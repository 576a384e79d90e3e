"""Under xdist a module's tests stay together, for what they share, and so do all modules that start vLLM."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("vllm" if name.endswith("_vllm") else name))
