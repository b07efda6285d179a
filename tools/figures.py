"""Write figures from `benchmarks/*.json` into README.md and docs/measuring.md: printed, or put there with `--write`.

Those of the README are the `--json` output of example runs, for instance
`DEV=CPU python examples/resnet.py --infer --control --json benchmarks/resnet18-cpu.json`; `measuring-*.json` are what the
proofs of tests/proofs wrote (`make prove`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: tools/figures.py --write -->", "<!-- end of figures -->"
PROOF = "measuring-"  # begins the names of the proofs' files


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
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(PROOF)]
    return _table(head, [row(path.name, json.loads(path.read_text())) for path in paths])


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


# **** what the proofs found ****


def proofs(folder: Path) -> str:
    """A table of all proofs, then the timing protocol's figures, one table a device."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"{PROOF}*.json"))}
    protocols = [_protocol(figures) for figures in found.values() if "pairs" in figures]
    rows = [_proof(name, figures) for name, figures in found.items() if "pairs" not in figures]
    return "\n\n".join([_table(("proof", "DEV", "tried", "found", "file"), rows), *protocols])


def _proof(name: str, figures: dict) -> str:
    kind = name.removeprefix(PROOF).removesuffix(".json").split("-")[0]
    return f"| {kind} | {figures.get('device', 'any')} | {TRIED[kind](figures)} | {FOUND[kind](figures)} | `{name}` |"


def _bars(figures: dict) -> str:
    return ", ".join(f"{name}: {bar['seen']}" for name, bar in figures["bars"].items())


def _verdicts(figures: dict) -> str:
    return "; ".join(f"{how}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
                     for how, counts in figures["verdicts"].items())  # fmt: skip


TRIED = {
    "redteam": lambda f: f"{f['attacks']} hostile programs, in a trial and in a duel each",
    "fuzz": lambda f: f"{f['schedules']} random schedules of {f['kernels']} kernels",
    "killed": lambda f: (
        f"{f['runs']} runs, {f['kills of tuner']} kills of the tuner, {f['kills of worker']} of a worker"
    ),
    "cold": lambda f: f"{f['searches']} searches on {f['kernels']} kernels",
    "concurrently": lambda f: f"{f['rounds']} rounds of {f['processes']} tuners on one file, {f['trials made']} trials",
    "malformed": lambda f: f"{f['tried']} malformed inputs",
}
FOUND = {
    "redteam": lambda f: f"{f['wrong']} escaped or got a wrong verdict",
    "fuzz": _verdicts,
    "killed": _bars,
    "cold": lambda f: f"{_bars(f)}; {f['median_seconds']} s each, {f['worst_seconds']} s at most",
    "concurrently": _bars,
    "malformed": lambda f: (
        f"{f['escaped']} escaped, {sum(k['refused'] for k in f['kinds'].values())} refused with a typed error"
    ),
}


def _protocol(figures: dict) -> str:
    """Repeatability, resolution and cost on one device."""
    trial = figures["trial"]
    parts = ", ".join(f"{part} {share:.1%}" for part, share in trial["shares"].items())
    itself = [f"| {_ms(f['seconds'])} | {f['comparisons']} | {f['said to differ']} | {f['median difference']:.2%} | "
              f"{f['95 % of differences below']:.2%} | {f['largest difference']:.2%} | "
              f"{'more than 20%' if f['smallest difference seen'] is None else format(f['smallest difference seen'], '.1%')} |"
              for f in figures["itself"]]  # fmt: skip
    pairs = [f"| {f['ratio']:.3f} ({f['from']:.3f} to {f['to']:.3f}) | {f['comparisons']} | {f['same verdict']:.0%} | "
             + ", ".join(f"{n} {verdict}" for verdict, n in f["verdicts"].items()) + " |" for f in figures["pairs"]]  # fmt: skip
    same = ("kernel against itself, ms", "comparisons", "said to differ", "median difference", "95% below", "largest",
            "smallest difference seen in 95%")  # fmt: skip
    return "\n\n".join([
        f"DEV={figures['device']}: a trial takes {trial['seconds a trial']:.2f} s ({trial['trials']} trials): {parts}.",
        _table(same, itself), _table(("two schedules, ratio", "comparisons", "same verdict", "verdicts"), pairs),
    ])  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    texts = {"README.md": table(ROOT / "benchmarks"), "docs/measuring.md": proofs(ROOT / "benchmarks")}
    if not parser.parse_args().write:
        print("\n\n".join(texts.values()))
        return
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    for name, text in texts.items():
        page = ROOT / name
        page.write_text(pattern.sub(lambda _, text=text: f"{BEGIN}\n{text}\n{END}", page.read_text()))


if __name__ == "__main__":
    main()
