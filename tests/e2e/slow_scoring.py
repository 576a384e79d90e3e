"""tools/score_pairrm.py with judges that take their time, wherever they judge: it lasts long enough to be killed.

SLOW_SECONDS: of a call, which is a shard. SLOW_MOST: file with a number; so many calls end, of all workers together,
each of which adds a byte to FILE.ended. SLOW_LOG: file that each call appends its process to. SLOW_FIRST: the first
process named there is at its first call until there are so many.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

from megatron_sppo.command_line import run
from megatron_sppo.commands import score
from megatron_sppo.judge import workers
from megatron_sppo.judge.workers import JudgeWorker, _Loaded, _Sent

SETTINGS = {name: os.environ.get(name, "") for name in ("SLOW_SECONDS", "SLOW_MOST", "SLOW_LOG", "SLOW_FIRST")}


class SlowJudge:
    """A judge that rests before each call."""

    def __init__(self, judge: Any, settings: dict[str, str]) -> None:
        self._judge, self._settings = judge, settings
        self.name, self.fingerprint, self.counts = judge.name, judge.fingerprint, judge.counts

    def judge_logits(self, groups: Any) -> Any:
        if log := self._settings["SLOW_LOG"]:
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
            while calls_of(log)[0] == str(os.getpid()) and len(calls_of(log)) < int(self._settings["SLOW_FIRST"]):
                time.sleep(0.02)
        time.sleep(float(self._settings["SLOW_SECONDS"] or 0))
        if most := self._settings["SLOW_MOST"]:
            while not may_end(Path(most)):
                time.sleep(0.02)
        return self._judge.judge_logits(groups)


def may_end(most: Path) -> bool:
    """Count one more call that ends, unless so many have."""
    with open(most.with_name(f"{most.name}.ended"), "ab", buffering=0) as ended:
        fcntl.flock(ended, fcntl.LOCK_EX)
        if ended.seek(0, os.SEEK_END) >= int(most.read_text()):
            return False
        ended.write(b".")
        return True


def calls_of(log: str) -> list[str]:
    return Path(log).read_text().split()


class Slowed:
    """Makes a worker slow where it is made. Pickled by value, since this file is the program."""

    def __init__(self, make_worker: Any, settings: dict[str, str]) -> None:
        self._make_worker, self._settings = make_worker, settings

    def __call__(self) -> JudgeWorker:
        return JudgeWorker(SlowJudge(self._make_worker()._judge, self._settings))


if __name__ == "__main__":
    workers._Loaded = lambda **fields: Slowed(_Loaded(**fields), SETTINGS)  # type: ignore[assignment,misc]
    workers._Sent = lambda judge: Slowed(_Sent(judge), SETTINGS)  # type: ignore[assignment,misc]
    run(lambda: score.main("slow_scoring.py"), name="slow_scoring.py")
