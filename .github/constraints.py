"""Turn pip's report of an installation (`pip install --report FILE`) into requirements with hashes: make constraints."""

import json
import sys
from pathlib import Path


def main(report: Path) -> None:
    """Print `NAME==VERSION --hash=sha256:...`, a line a package, by name."""
    print("# What CI installs beside torch and vLLM, which come in builds for the CPU. Written by `make constraints`.")
    lines = []
    for item in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
        lines.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    print(*sorted(lines), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
