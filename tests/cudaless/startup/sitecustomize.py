"""On PYTHONPATH with CUDALESS set, every Python process is emulated: tests, tools, forked ranks."""

import os

if os.environ.get("CUDALESS"):
    import warnings

    # transformer_engine/common/__init__.py (2.11.0): its library is not there, and is not needed.
    warnings.filterwarnings("ignore", message="Detected a PyTorch installation but could not find the shared object")
    from tests.cudaless import device, engine

    device.install()
    engine.install()
