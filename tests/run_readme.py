"""Run a document's shell and Python blocks, in order: `python tests/run_readme.py README.md`.

A block fenced as ```sh or ```python is run from the repository's root with this interpreter's `python` first on PATH and
a cache directory of its own. On the line before the fence may stand
    <!-- fast: COMMAND -->    run COMMAND in place of the block, which would take too long
    <!-- skip: REASON -->     do not run the block; its first line and the reason are printed
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 900.0  # for one block
DIRECTIVE = re.compile(r"<!--\s*(fast|skip):\s*(.*?)\s*-->\s*\Z")


@dataclass(frozen=True)
class Block:
    line: int  # of the fence, counted from 1
    language: str  # "sh" or "python"
    text: str
    fast: str = ""
    skip: str = ""


def parse(document: str) -> list[Block]:
    """All sh and python blocks of a Markdown text. Raises ValueError for a fence that is never closed."""
    blocks: list[Block] = []
    lines = document.splitlines()
    i = 0
    while i < len(lines):
        if not lines[i].startswith("```"):
            i += 1
            continue
        end = next((j for j in range(i + 1, len(lines)) if lines[j].rstrip() == "```"), None)
        if end is None:
            raise ValueError(f"line {i + 1}: this block is never closed")
        language = lines[i][3:].strip()
        if language in ("sh", "python"):
            found = DIRECTIVE.match(next((line for line in reversed(lines[:i]) if line.strip()), ""))
            options = {found[1]: found[2]} if found else {}
            blocks.append(Block(i + 1, language, "\n".join(lines[i + 1 : end]) + "\n", **options))
        i = end + 1
    return blocks


def command_of(block: Block) -> list[str]:
    if block.language == "sh" or block.fast:
        return ["bash", "-euo", "pipefail", "-c", block.fast or block.text]
    return [sys.executable, "-c", block.text]


def environment(cache: str) -> dict[str, str]:
    """Like a person's shell with the virtual environment activated, CPU chosen, and empty caches."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"DEV": "CPU", **os.environ, "PATH": path, "XDG_CACHE_HOME": cache}


def main(document: Path) -> int:
    """Returns 1 at the first block that fails."""
    blocks = parse(document.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as cache:
        for block in blocks:
            name = f"{document.name}:{block.line} ({block.language}) {block.text.splitlines()[0][:60]}"
            if block.skip:
                print(f"== {name}\n   skipped: {block.skip}", flush=True)
                continue
            print(f"== {name}" + (f"\n   fast: {block.fast}" if block.fast else ""), flush=True)
            started = time.monotonic()
            try:
                status = subprocess.run(
                    command_of(block), cwd=ROOT, env=environment(cache), timeout=LIMIT_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
            print(f"   {time.monotonic() - started:.1f} s, exit status {status}", flush=True)
            if status != 0:
                return 1
    print(f"== all {len(blocks)} blocks of {document.name} are fine")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
