"""More tables of docs/simulators.md: what planning with simulators gives, from `benchmarks/curves-*.json` and
`imagination-*.json` (the result.json of these experiments), `correction-*.json` (tools/bench_correction.py), `planning-speed-*.json` (tools/bench_planning.py) and `own-nets-*.json`
(tools/bench_own.py).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_figures import FAR, budgets_of
from tables import interval, line, table


def planning(folder: Path) -> str:
    """Every table there is a file for."""
    parts = []
    for kind, text in (
        ("curves", _curves),
        ("correction", _correction),
        ("imagination", _imagination),
        ("planning-speed", _speed),
        ("own-nets", _own),
    ):
        paths = [
            path for path in sorted(folder.glob(f"{kind}-*.json")) if not path.match(FAR)
        ]  # those are in docs/benchmarks.md
        parts += [text(json.loads(path.read_text()), path.name) for path in paths]
    return "\n\n".join(parts)


def _curves(result: Mapping[str, Any], name: str) -> str:
    """Strategies after each budget that they had, then what each costs."""
    figures = result["figures"]
    settings, summary = figures["settings"], figures["summary"]
    budgets = list(next(iter(summary.values()))["score"])
    had = budgets_of(settings)  # beyond it a strategy would have gone on

    def cells(strategy: str, key: str, text: Callable[[Any], str], most: float = math.inf) -> list[str]:
        values = summary[strategy][key]
        return [text(values[b]) if b in values and int(b) <= min(had[strategy], most) else "" for b in budgets]

    scores = [line([strategy, *cells(strategy, "score", interval)]) for strategy in summary]
    over = [line([strategy, *cells(strategy, "over", interval, had.get("random", 0))]) for strategy in summary]
    cost = [line([strategy, *cells(strategy, "reached", "{:.0%}".format), _or_never(row["trials"]), _or_never(row["seconds"]),
                  f"{row['each_trial']:.2f}"]) for strategy, row in summary.items()]  # fmt: skip
    totals = [line([strategy, *cells(strategy, "total", lambda seeds: f"{statistics.mean(seeds):.3f}"),
                    *(f"{row['end'][key]:.{digits}f}" for key, digits in (("total", 3), ("trials", 0), ("seconds", 0)))])
              for strategy, row in summary.items()]  # fmt: skip
    kernels = len({curve["kernel"] for curve in figures["curves"]})
    whose = f"of {settings['program']}" if settings.get("program") else f"of the split {settings['split']}"
    return "\n\n".join([
        f"DEV={result['device']}, `{name}`: {kernels} kernels {whose}, {settings['seeds']} seeds, at most "
        f"{settings['trials']} trials of each kernel. Time of the best schedule that anyone found over that of the best after so many "
        "trials, hand-coded counting as found at 0 trials: IQM and its 95% interval over seeds and kernels.",
        table(("strategy", *budgets), scores),
        *(["Probability of being faster than random schedules after as many trials (ties count half):",
           table(("strategy", *budgets), over)] if "random" in summary else []),
        "Share of searches within 5% of the best known schedule after so many trials; median trials and wall-clock seconds until then "
        "(never: at most half ever were); seconds a trial, thinking included.",
        table(("strategy", *budgets, "trials", "seconds", "s a trial"), cost),
        "Time of all kernels together over hand-coded after so many trials of each, calls counted, mean over seeds; the same at the "
        "end of the searches, with how many trials and seconds they took a kernel.",
        table(("strategy", *budgets, "at the end", "trials", "seconds"), totals),
    ])  # fmt: skip


def _correction(found: Mapping[str, Any], name: str) -> str:
    """What trials teach of other schedules, one table for each file of records."""
    parts = []
    for records, own in found["records"].items():
        rows = [line([s["corrected by"], str(s["own trials"]), *(f"{s[key]:.3f}" for key in ("pairwise", "top-1", "top-3"))])
                for s in own["scores"]]  # fmt: skip
        parts += [
            f"DEV={found['device']}, `{name}`, on `{records}`: {own['kernels']} kernels, {own['seeds']} draws of the trials that are "
            "told. Corrected by nothing, by a kernel's own trials, or by those and all trials of the other kernels.",
            table(("corrected by", "own trials", "pairwise", "top-1", "top-3"), rows),
        ]
    return "\n\n".join(parts)


def _or_never(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _imagination(result: Mapping[str, Any], name: str) -> str:
    figures = result["figures"]
    settings, summary = figures["settings"], figures["summary"]
    kinds = list(next(iter(next(iter(summary.values())).values())))
    rows = [line([trials, arm, *(interval(row[kind]) if kind in row else "" for kind in kinds)])
            for trials, arms in summary.items() for arm, row in arms.items()]  # fmt: skip
    references = ", ".join(f"{key} {value:.3f}" for key, value in figures["references"].items())
    return "\n\n".join([
        f"DEV={result['device']}, `{name}`: PPO that learns from so many recorded trials, by replaying them or in a simulator fitted to "
        f"them; {settings['env_steps']} environment steps, {settings['seeds']} seeds; IQM of the score on held-out kernels and its "
        f"95% interval. For scale: {references}.",
        table(("trials", "arm", *kinds), rows),
    ])  # fmt: skip


def _speed(found: Mapping[str, Any], name: str) -> str:
    parts = list(next(iter(found["planners"].values()))["shares"])
    rows = [line([planner, f"{row['simulations_per_second']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f})",
                  str(row["simulations"]), f"{row['seconds_per_round']:.1f}", *(f"{row['shares'][part]:.0%}" for part in parts)])
            for planner, row in found["planners"].items()]  # fmt: skip
    return "\n\n".join([
        f"DEV={found['device']}, `{name}`: planners from the root of a held-out kernel, median and range over kernels, and the share of "
        "the time that each part takes (under Python's profiler); the rest is the search itself.",
        table(("planner", "simulations/s", "a round", "its seconds", *parts), rows),
    ])  # fmt: skip


def _own(found: Mapping[str, Any], name: str) -> str:
    """Training steps with tinygrad's own schedules and with tuned ones."""
    rows = []
    for net, own in found["nets"].items():
        (default, tuned), tune = (own["seconds"][way] for way in ("default", "tuned")), own["kernels"]
        ratios = [b / a for a, b in zip(default, tuned, strict=True)]
        rows.append(line([net, *(f"{statistics.median(x) * 1e3:.0f}" for x in (default, tuned)),
                          f"{own['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", str(len(tune["kernels"])),
                          f"{tune['hand_coded_ms']:.0f} -> {tune['tuned_ms']:.0f}", str(sum(k["trials"] for k in tune["kernels"])),
                          f"{tune['seconds']:.0f}"]))  # fmt: skip
    return "\n\n".join([
        f"DEV={found['device']}, `{name}`: the tuner's own nets, tuned by it (`{found['strategy']}`, {found['trials']} trials a kernel on "
        "average at most). Milliseconds of a training step, median of fresh processes in turn, and the ratio with its range; then the kernels of "
        "some steps and of the predictions after them, each timed alone, calls counted.",
        table(("net", "default", "tuned", "ratio", "kernels", "ms of kernels", "trials", "tuning s"), rows),
    ])  # fmt: skip
