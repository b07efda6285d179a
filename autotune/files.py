"""The files that ship beside the program: guides, and JSON lines, compressed, of corpus, trials and recordings."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agents.checkpoint import replacing

DATA = Path(__file__).parent / "data"


def read_lines(path: Path) -> list[Any]:
    """The rows of a file of `write_lines`."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def write_lines(rows: Iterable[Any], path: Path) -> None:
    """JSON lines, compressed: the same rows give the same bytes. Finished or not at all."""
    with (
        replacing(path) as draft,
        draft.open("wb") as raw,
        gzip.GzipFile(path.name, "wb", fileobj=raw, mtime=0) as file,  # a header holds the name
    ):
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
