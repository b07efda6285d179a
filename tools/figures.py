"""Write figures from `benchmarks/` into README.md and docs/: printed, or put there with `--write`.

Those of the README are the `--json` output of example runs, for instance
`DEV=CPU python examples/resnet.py --infer --control --json benchmarks/resnet18-cpu.json`; `measuring-*.json` are what the
proofs of tests/proofs wrote (`make prove`); `agents-*` what `make learn` and `make bench-agents` left, and the result.json of
`python -m autotune.experiments.agents`; `sims-*` and `dynamics-speed-*` what `make bench-sims` and tools/bench_dynamics.py did
(tools/sims_figures.py); `bench-*.tar.xz` runs of `make bench-live` that were kept (tools/keep_run.py).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from xml.etree import ElementTree

from account_figures import accounts
from bench_figures import benchmarks
from planning_figures import planning
from sims_figures import simulators
from tables import interval, line, table

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: tools/figures.py --write -->", "<!-- end of figures -->"
PROOF, AGENTS = "measuring-", "agents-"  # begin the names of the proofs' files, and of the agents'


def row(name: str, figures: dict) -> list[str]:
    """One run as cells of the table; times in ms, summed over the calls of all kernels."""
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
    beam = latency.get("beam")  # a process that searches first, and then runs
    cells += [f"{base:.1f} -> {own:.1f} ({own / base:.2f})", f"{tune['seconds']:.0f}",
              f"{beam['ms']:.1f} ms after {beam['start_seconds']:.0f} s" if beam else "", f"`{name}`"]  # fmt: skip
    return cells


def examples(folder: Path) -> str:
    head = ("program", "DEV", "trials a kernel", "hand-coded ms", "random ms", "tuned ms", "of hand-coded", "of random",
            "worst kernel", "whole program under TinyJit, ms", "tuning s", "with tinygrad's own BEAM", "file")  # fmt: skip
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = [row(name, figures) for name, figures in found.items() if "tune" in figures]  # an example's run
    told = [
        i for i, _ in enumerate(head) if any(cells[i] for cells in rows)
    ]  # BEAM and the control run only where asked
    return table([head[i] for i in told], [line([cells[i] for i in told]) for cells in rows])


# **** what the proofs found ****


def proofs(folder: Path) -> str:
    """A table of all proofs, then the timing protocol's figures, one table a device."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"{PROOF}*.json"))}
    protocols = [_protocol(figures) for figures in found.values() if "pairs" in figures]
    rows = [_proof(name, figures) for name, figures in found.items() if "pairs" not in figures]
    return "\n\n".join([table(("proof", "DEV", "tried", "found", "file"), rows), *protocols])


def _proof(name: str, figures: dict) -> str:
    kind = name.removeprefix(PROOF).removesuffix(".json").split("-")[0]
    return f"| {kind} | {figures.get('device', 'any')} | {TRIED[kind](figures)} | {FOUND[kind](figures)} | `{name}` |"


def _bars(figures: dict) -> str:
    return ", ".join(f"{name}: {bar['seen']}" for name, bar in figures["bars"].items())


def _verdicts(figures: dict) -> str:
    return "; ".join(f"{how}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
                     for how, counts in figures["verdicts"].items())  # fmt: skip


def _walked(figures: dict) -> list[str]:
    """The targets of the dynamics that could be opened."""
    return [target for target in ("CPU", "CL", "CUDA") if f"{target}: steps" in figures]


TRIED = {
    "redteam": lambda f: f"{f['attacks']} hostile programs, in a trial and in a duel each",
    "dynamics": lambda f: ", ".join(f"{f[f'{t}: steps']} random steps for {t}" for t in _walked(f)),
    "fuzz": lambda f: f"{f['schedules']} random schedules of {f['kernels']} kernels",
    "killed": lambda f: (
        f"{f['runs']} runs, {f['kills of tuner']} kills of the tuner, {f['kills of worker']} of a worker"
    ),
    "cold": lambda f: f"{f['searches']} searches on {f['kernels']} kernels",
    "concurrently": lambda f: f"{f['rounds']} rounds of {f['processes']} tuners on one file, {f['trials made']} trials",
    "malformed": lambda f: f"{f['tried']} malformed inputs",
}
FOUND = {
    "dynamics": lambda f: (
        f"{sum(b['seen'] for n, b in f['bars'].items() if 'unlike' in n)} differences from tinygrad or the scalar version; "
        + "asked tinygrad: "
        + ", ".join(f"{f['bars'][f'{t}: steps that asked tinygrad']['seen']}" for t in _walked(f))
    ),
    "redteam": lambda f: f"{f['wrong']} escaped or got a wrong verdict",
    "fuzz": lambda f: (
        f"{_verdicts(f)}. Wrong and not known: "
        f"{sum(w['drawn'] != 'any' or all(o[0] != 'PADTO' for o in w['schedule']) for w in f['wrong'])}"
    ),
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
        table(same, itself), table(("two schedules, ratio", "comparisons", "same verdict", "verdicts"), pairs),
    ])  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


# **** what the agents can do ****


def agents(folder: Path) -> str:
    """The rungs, the comparison on recorded kernels, and the speed of an update: what there is of them."""
    parts = [_rungs(path) for path in sorted(folder.glob(f"{AGENTS}rungs-*.xml"))]
    parts += [_comparison(json.loads(path.read_text())) for path in sorted(folder.glob(f"{AGENTS}replay-*.json"))]
    parts += [_speed(json.loads(path.read_text())) for path in sorted(folder.glob(f"{AGENTS}speed*.json"))]
    return "\n\n".join(parts)


def _rungs(path: Path) -> str:
    """Every line "NAME: bar BAR, FIGURES" that a learning test has printed, from pytest's own report."""
    rows = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        missed = any(child.tag in ("failure", "error") for child in case)
        for text in (case.findtext("system-out") or "").splitlines():
            if found := re.match(r"(.+?): bar (.+?), (.+)", text):
                rows.append(line([*found.groups(), "**missed**" if missed else "met"]))
    return f"`{path.name}`:\n\n" + table(
        ("rung", "bar", "figure, and what a control or a broken agent scores", ""), rows
    )


def _comparison(result: dict) -> str:
    """All agents on recorded kernels, best first."""
    figures = result["figures"]
    settings, summary = figures["settings"], figures["summary"]
    kinds = list(next(iter(summary.values())))
    rows = [f"| {name} | " + " | ".join(interval(row[kind]) if kind in row else "" for kind in kinds) + " |"
            for name, row in summary.items()]  # fmt: skip
    references = ", ".join(f"{name} {value:.3f}" for name, value in figures["references"].items())
    head = (f"DEV={result['device']}, recorded timings: {settings['env_steps']} environment steps each, {settings['seeds']} seeds, "
            f"{len(figures['rows'][0]['greedy'])} held-out kernels; IQM of the score and its 95% interval. For scale: {references}.")  # fmt: skip
    return head + "\n\n" + table(("agent", *kinds), rows)


def _speed(found: dict) -> str:
    """The rate of an update beside the core's peak."""
    update, start = found["update"], found["first_update_seconds"]
    kernels = update["kernel_ms"]
    rows = [f"| {name} | {update['seconds'][name] * 1e3:.1f} | {rate:.1f} | {update['share_of_peak'][name]:.1%} |"
            for name, rate in update["gflops"].items()]  # fmt: skip
    slowest = [f"| {k['kernel']} | {k['calls']} | {k['ms']:.2f} | {k['gflops']:.1f} |" for k in update["slowest"]]
    return "\n\n".join([
        f"First update of a fresh process: {start['cached']:.2f} s with cached captures (bar: under {found['bar_seconds']} s), "
        f"{start['captured']:.1f} s without. One update is {update['flops'] / 1e9:.2f} GFLOP in {update['kernels']} kernels; "
        f"the core's measured matmul peak is {update['peak_gflops']:.0f} GFLOP/s. {update['tuned_kernels']} of "
        f"{update['distinct_kernels']} distinct kernels were tuned with {update['trials']} trials.",
        table(("schedules", "ms an update", "GFLOP/s", "of peak"), rows),
        f"Timed alone, its kernels take {kernels['hand_coded']:.1f} ms with default schedules and {kernels['tuned']:.1f} ms tuned; "
        f"what is left of an update is Python launching {update['kernels']} of them. The slowest after tuning:",
        table(("kernel", "calls", "ms", "GFLOP/s"), slowest),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    folder = ROOT / "benchmarks"
    texts = {"README.md": examples(folder), "docs/measuring.md": proofs(folder), "docs/agents.md": agents(folder),
             "docs/simulators.md": "\n\n".join(filter(None, (simulators(folder), planning(folder)))),
             "docs/benchmarks.md": "\n\n".join(filter(None, (benchmarks(folder), accounts(folder))))}  # fmt: skip
    if not parser.parse_args().write:
        print("\n\n".join(texts.values()))
        return
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    for name, text in texts.items():
        page = ROOT / name
        page.write_text(pattern.sub(lambda _, text=text: f"{BEGIN}\n{text}\n{END}", page.read_text()))


if __name__ == "__main__":
    main()
