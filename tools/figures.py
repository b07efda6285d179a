"""Write the README's figures from `benchmarks/*.json`: `python tools/figures.py` prints them, `--write` puts them there.

Each file is the `--json` output of one example run, for instance
`DEV=CPU python examples/resnet.py --infer --control --json benchmarks/resnet18-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: tools/figures.py --write -->", "<!-- end of figures -->"


def row(name: str, figures: dict) -> str:
    """One run as a line of the table; times in ms, summed over the calls of all kernels."""
    tune, control, latency = figures["tune"], figures.get("control"), figures["latency"]
    cells = [figures["program"], tune["device"], str(figures["trials"])]
    if control is not None:
        hand, random, tuned = (control[f"{k}_ms"] for k in ("hand_coded", "random", "tuned"))
        cells += [
            f"{hand:.1f}",
            f"{random:.1f}",
            f"{tuned:.1f}",
            f"{tuned / hand:.2f}",
            f"{tuned / random:.2f}",
            f"{control['worst']:.2f}",
        ]
    else:
        hand, tuned = tune["hand_coded_ms"], tune["tuned_ms"]
        cells += [f"{hand:.1f}", "", f"{tuned:.1f}", f"{tuned / hand:.2f}", "", ""]
    base, own = latency["default"]["ms"], latency["tuned"]["ms"]
    cells += [f"{base:.1f} -> {own:.1f} ({own / base:.2f})", f"{tune['seconds']:.0f}", f"`{name}`"]
    return "| " + " | ".join(cells) + " |"


def table(folder: Path) -> str:
    head = ("program", "DEV", "trials a kernel", "hand-coded ms", "random ms", "tuned ms", "of hand-coded", "of random",
            "worst kernel", "whole program under TinyJit, ms", "tuning s", "file")  # fmt: skip
    rows = [row(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    text = table(ROOT / "benchmarks")
    if not parser.parse_args().write:
        print(text)
        return
    readme = ROOT / "README.md"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", readme.read_text()))


if __name__ == "__main__":
    main()
