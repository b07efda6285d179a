"""A finished run as one file: what `python -m autotune replay FILE` needs to repeat it, and `curves with part=FILE` to go on.

Left out are checkpoints (settings that name one find it), single searches (they are in result.json), where the parts of an
earlier run lay (its trials are in the records), and what sacred notes of the machine.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path

from agents.checkpoint import replacing
from autotune.errors import UsageError

PARTS = ("config.json", "result.json", "program.json", "named.json")


def pack(run: Path, file: Path) -> None:
    """Write `file`, whole or not at all; the same run gives the same bytes. Raises UsageError for what is no finished run, and for one
    whose records somebody holds open."""
    if any(run.glob("records*.db-wal")):
        raise UsageError(f"{run} is in use, or was killed: a part of its records lies in a log beside them")
    if missing := [part for part in ("run.json", "config.json", "result.json") if not (run / part).exists()]:
        raise UsageError(f"{run} is no finished run: it has no {missing[0]}")
    name = json.loads((run / "run.json").read_text())["experiment"]["name"]
    parts = {"run.json": json.dumps({"experiment": {"name": name}}).encode()}
    parts |= {part: (run / part).read_bytes() for part in PARTS if (run / part).exists()}
    config = json.loads(parts["config.json"])
    if "part" in config:
        parts["config.json"] = json.dumps({**config, "part": ""}, indent=2).encode()
    parts |= {path.name: path.read_bytes() for path in sorted(run.glob("records*.db"))}
    with replacing(file) as draft, tarfile.open(draft, "w:xz") as kept:
        for part, data in parts.items():
            info = tarfile.TarInfo(part)
            info.size = len(data)
            kept.addfile(info, io.BytesIO(data))


def unpack(file: Path, folder: Path) -> None:
    """Its parts, into `folder`. Raises UsageError where it is no run that was kept."""
    try:
        with tarfile.open(file) as kept:
            kept.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        raise UsageError(f"{file} is no run that was kept: {error}") from None
