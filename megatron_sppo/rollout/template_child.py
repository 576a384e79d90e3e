"""The child in which chat templates are rendered: `python -m megatron_sppo.rollout.template_child`.

It reads a JSON object a line, {"template", "conversations", "add_generation_prompt", "values"}, and answers with a line
for each conversation: {"text"}, {"refused": reason}, {"exhausted": reason} or, of what is no Jinja, {"syntax": [line,
reason]}. Before the first it says {"ready": true}.

transformers' own sandbox lets a template reach nothing but its messages; what it computes, though, may take for ever or
all of the memory (`range` in `range`, 10**10**8, 'x' * 10**9). So the kernel ends this process at `CPU_SECONDS` a
conversation, inside a computation too, and gives it no more than `MEMORY_BYTES`.
"""

import json
import resource
import signal
import sys
from typing import IO, Any

CPU_SECONDS = 5.0
"""A template of a real model takes some 0.0001."""
MEMORY_BYTES = 1 << 30
"""Above what the libraries take."""
LARGEST_TEXT = 1 << 26
"""Characters; the longest contexts are a tenth of it."""


def main(cpu_seconds: float, requests: IO[str], replies: IO[str]) -> None:
    """Render until the parent closes its end."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    replies.write('{"ready": true}\n')
    replies.flush()
    for line in requests:
        asked = json.loads(line)
        for conversation in asked["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF, which nobody here handles: the end
            reply: dict[str, Any]
            try:
                rendered: Any = render_jinja_template(
                    [conversation],
                    chat_template=asked["template"],
                    add_generation_prompt=asked["add_generation_prompt"],
                    **asked["values"],
                )
                text = rendered[0][0]
                reply = {"text": text}
                if len(text) > LARGEST_TEXT:
                    reply = {"exhausted": f"it writes {len(text)} characters, and at most {LARGEST_TEXT} are taken"}
            except TemplateSyntaxError as error:
                reply = {"syntax": [error.lineno, str(error.message)]}
            except MemoryError:
                reply = {"exhausted": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
            except Exception as error:  # noqa: BLE001 (whatever a stranger's expressions raise; nothing of ours runs here)
                reply = {"refused": " ".join(str(error).split()) or type(error).__name__}
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(json.dumps(reply) + "\n")
            replies.flush()  # what is done is not lost with a conversation that ends the process


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.stdin, sys.stdout)
