"""What this machine's processor is slow at, found out without torch."""

from pathlib import Path

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux names them: x86's two, and Arm's."""


def is_slow_in_bfloat16(*, processor: Path = Path("/proc/cpuinfo"), gpu_driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Tell whether products in bfloat16 run on a processor that has no instructions for it. False where unknown.

    Measured on an EPYC without AVX-512 (torch 2.13, vLLM 0.32): a product with a transposed operand takes 4 times
    float32's time, one without 30 times; SmolLM2-135M samples 5 times and trains 3 times slower.
    """
    if gpu_driver.exists():
        return False
    try:
        lines = processor.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return bool(flags) and not _INSTRUCTIONS.intersection(flags)
