"""The child in which answers are checked: `python -m megatron_sppo.judge.check_child TARGET SECONDS`.

TARGET is ifeval, math or FILE:FUNCTION. It reads a JSON object a line, {"answer", "messages", "columns"}, and answers
each with {"passed": [number, ...]} or {"unjudged": reason}; before the first one it says {"ready": versions} or
{"refused": reason}.
"""

import faulthandler
import json
import os
import sys
from typing import IO, Any

from megatron_sppo.judge.checks import Check, RefusedChecks, UncheckedAnswer
from megatron_sppo.judge.own_scorer import load_scorer

_GRACE_SECONDS = 10.0
"""The parent ends a check that takes too long; should it be gone, the child ends itself so much later."""


def main(target: str, seconds: float) -> None:
    """Check answers until the parent closes its end."""
    # What a check prints must not be read as an answer, and what it reads must not be a request.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    process = os.getpid()
    try:
        check, versions = load_checks(target)
    except RefusedChecks as refusal:
        _reply(replies, {"refused": str(refusal)})
        return
    _reply(replies, {"ready": versions})
    for line in requests:
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
        try:
            asked = json.loads(line)
            reply: dict[str, Any] = {"passed": check(asked["answer"], asked["messages"], asked["columns"])}
        except UncheckedAnswer as reason:
            reply = {"unjudged": str(reason)}
        if os.getpid() != process:  # a check has forked and come back twice: a second reply would be the next answer's
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        _reply(replies, reply)


def _reply(replies: IO[str], content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def load_checks(target: str) -> tuple[Check, dict[str, str]]:
    """Load what a target names -> (check, versions of what decides its verdicts).

    Raises:
        RefusedChecks: a library is missing, or a file without such a function.
    """
    try:
        if target == "ifeval":
            from megatron_sppo.judge.instructions import check_instructions, versions

            return check_instructions, versions()
        if target == "math":
            from megatron_sppo.judge.mathematics import check_mathematics, versions

            return check_mathematics, versions()
    except ImportError as error:
        raise RefusedChecks(
            f"--judge verifiable:{target} needs a package that is not installed ({error}). "
            "Run: pip install 'megatron-sppo[verifiable]'"
        ) from None
    return load_scorer(target), {}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
