"""Keep a finished run as one file (autotune/experiments/kept.py).

python tools/keep_run.py runs/3 benchmarks/bench-resnet-cpu.tar.xz
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autotune.errors import UsageError
from autotune.experiments.kept import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        pack(args.run, args.file)
    except (UsageError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{args.file}: {args.file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
