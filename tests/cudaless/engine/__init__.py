"""`transformer_engine_torch`, the extension of Transformer Engine 2.11.0, on CPU tensors that say cuda:0.

Its Python part runs as it is; what it calls of the extension is here, as far as this project's paths go. Sums are taken
in float32 and rounded once to the output's type; FP8 values are truly E4M3 and E5M2. What Hopper's kernels refuse is
refused, and memory that they leave unwritten holds NaN. Which algorithm a library picks, how a kernel orders its sums
and how fast it is are not shown.

`install()` puts it in place; `CALLS` counts the calls.
"""

from tests.cudaless.engine.kernel import CALLS
from tests.cudaless.engine.module import install

__all__ = ["CALLS", "install"]
