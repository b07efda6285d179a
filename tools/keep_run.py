"""Keep a finished run as one file: what `python -m autotune replay FILE` needs to repeat it, and tools/figures.py to tell of it.

    python tools/keep_run.py runs/3 benchmarks/bench-resnet-cpu.tar.xz

Left out are checkpoints (settings that name one find it), single searches (they are in result.json), where the parts of an
earlier run lay (its trials are in the records), and what sacred notes of the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

KEPT = ("config.json", "result.json", "program.json")


def keep(run: Path, file: Path) -> None:
    """Write `file`; the same run gives the same bytes."""
    name = json.loads((run / "run.json").read_text())["experiment"]["name"]
    parts = {"run.json": json.dumps({"experiment": {"name": name}}).encode()}
    parts |= {part: (run / part).read_bytes() for part in KEPT if (run / part).exists()}
    config = json.loads(parts["config.json"])
    if "part" in config:
        parts["config.json"] = json.dumps({**config, "part": ""}, indent=2).encode()
    parts |= {path.name: path.read_bytes() for path in sorted(run.glob("records*.db"))}
    with tarfile.open(file, "w:xz") as kept:
        for part, data in parts.items():
            info = tarfile.TarInfo(part)
            info.size = len(data)
            kept.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    keep(args.run, args.file)
    print(f"{args.file}: {args.file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
