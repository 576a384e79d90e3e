"""Answers checked in a process of their own: a check that hangs or crashes costs the judge that answer alone."""

from __future__ import annotations

from typing import Any

from megatron_sppo.errors import ConfigError
from megatron_sppo.judge.checks import UncheckedAnswer
from megatron_sppo.rollout.line_process import LineProcess
from megatron_sppo.rollout.records import Turn

_START_SECONDS = 300.0
"""Libraries are imported in it, on a machine that may be busy."""


class CheckProcess:
    """The parent's side of `check_child`: started when it is made, and again after a check that had to be ended."""

    def __init__(self, target: str, *, seconds: float) -> None:
        """Start the child and load the checks in it.

        Args:
            target: "ifeval", "math" or FILE:FUNCTION.
            seconds: longest time for one answer.

        Raises:
            ConfigError: a package is missing, or a file that cannot be imported or has no such function.
        """
        self._target, self._seconds = target, seconds
        self._child: _Child | None = None
        self.versions = self._started().versions
        """Of what decides the verdicts."""

    def check(self, answer: str, messages: list[Turn], columns: dict[str, Any]) -> list[float]:
        """Check one answer -> how far it passes each check, in [0, 1].

        Raises:
            UncheckedAnswer: it cannot be checked, or its check hangs or crashes.
        """
        child = self._started()
        try:
            child.send({"answer": answer, "messages": messages, "columns": columns})
            reply = child.receive(self._seconds)
        except TimeoutError:
            self._end()
            raise UncheckedAnswer(
                f"its check took longer than {self._seconds:g} s and was ended: --scorer-seconds gives it more"
            ) from None
        except (EOFError, OSError):
            reason = child.last_words()
            self._end()
            raise UncheckedAnswer(f"its check ended the process it ran in ({reason})") from None
        if "unjudged" in reply:
            raise UncheckedAnswer(reply["unjudged"])
        return [float(value) for value in reply["passed"]]

    def _started(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._target, self._seconds)
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
        self._child = None


class _Child(LineProcess):
    """One child process, loaded and waiting."""

    def __init__(self, target: str, seconds: float) -> None:
        super().__init__("megatron_sppo.judge.check_child", target, str(seconds))
        try:
            reply = self.receive(_START_SECONDS)
        except (TimeoutError, EOFError, OSError) as error:
            reason = f"nothing in {_START_SECONDS:g} s" if isinstance(error, TimeoutError) else self.last_words()
            self.end()
            remedy = "Run" if target in ("ifeval", "math") else "Mend the file, and run"
            raise ConfigError(
                f"the checks of {target} do not start ({reason}). {remedy} the same command again."
            ) from None
        if "refused" in reply:
            self.end()
            raise ConfigError(reply["refused"])
        self.versions: dict[str, str] = reply["ready"]
