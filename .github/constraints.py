"""Turn a report of pip (`pip install --report FILE`) into requirements with hashes: make constraints."""

import json
import sys
from pathlib import Path

HEADER = "# What CI installs beside torch and vLLM, which come in builds for the CPU. Written by `make constraints`."


def pinned(report: Path) -> str:
    """Spell `NAME==VERSION --hash=sha256:...`, a line a package, by name -> text."""
    lines = []
    for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
        lines.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    return "\n".join([HEADER, *sorted(lines)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(pinned(Path(sys.argv[1])))
