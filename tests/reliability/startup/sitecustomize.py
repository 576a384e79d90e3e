"""Gives a process and its children a disk that fails and a clock that jumps, for tests.

Python imports a module of this name before anything else where its folder is on PYTHONPATH. FAULT_ROOT, FAULT_KIND and
FAULT_AT are `file_faults.watched`'s; CLOCK_JUMPS is the seed of a clock that goes a day forwards or back now and then
(what measures durations, `time.monotonic`, goes on as it is).
"""

import os
import random
import time
from pathlib import Path

if "FAULT_KIND" in os.environ:
    from tests.reliability.file_faults import Fault, watched

    _watching = watched(Path(os.environ["FAULT_ROOT"]), Fault(os.environ["FAULT_KIND"], int(os.environ["FAULT_AT"])))
    _watching.__enter__()

if "CLOCK_JUMPS" in os.environ:
    _dice, _now, _now_ns = random.Random(int(os.environ["CLOCK_JUMPS"]) + os.getpid()), time.time, time.time_ns
    _offset = 0

    def _jumped() -> int:
        global _offset
        if _dice.random() < 0.02:
            _offset = _dice.choice((-86_400, 0, 86_400))
        return _offset

    time.time = lambda: _now() + _jumped()
    time.time_ns = lambda: _now_ns() + _jumped() * 10**9
