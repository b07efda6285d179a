"""The tables of docs/benchmarks.md, from the runs of `experiments.curves` on programs that were kept in `benchmarks/` (`bench-*.tar.xz`,
tools/keep_run.py): each strategy beside beam search to its end, and beside random schedules; and from those of 64 trials a kernel, of which
the figures alone were kept (`curves-*-64-*.json`).
"""

from __future__ import annotations

import json
import math
import sqlite3
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tables import interval, line, table

from autotune.curves import CLOSE, Curve, profile
from autotune.experiments.kept import unpack

SHOWN = ("1", "4", "10", "16", "32", "64")  # budgets of the tables
PROFILED = 10  # trials at which performance profiles are drawn ...
FAR = "curves-*-64-*.json"
Preparing = Mapping[
    str, Mapping[str, tuple[float, float]]
]  # by device and kernel key: seconds, the first time and each further one
RATIOS = (1.02, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0)  # ... and the points of them that are tabled
# trials a kernel, whom they are held against, with how many of its trials, and the ratio that is asked for
BARS = ((10, "beam", math.inf, 1.0), (10, "random", 128, 1.0), (64, "beam", math.inf, 0.85), (64, "random", 256, 0.90))


def benchmarks(folder: Path) -> str:
    """An overview, what more trials come to, then every program, one after another."""
    paths = sorted(folder.glob("bench-*.tar.xz"))
    preparing = preparing_of(folder)
    overview = _overview([result_of(path) for path in paths], preparing)
    return "\n\n".join([overview, *_far(folder, preparing), *(_program(path, preparing) for path in paths)])


def result_of(path: Path) -> dict[str, Any]:
    """Its result.json; `machine` is the processor on which it was measured."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder))
        result = json.loads((Path(folder) / "result.json").read_text())
        with closing(sqlite3.connect(Path(folder) / "records.db")) as records:
            [fields] = records.execute(
                "SELECT fields FROM fingerprints WHERE id = ?", (result["fingerprint"],)
            ).fetchone()
    return {**result, "machine": json.loads(fields)["model"]}


def title(result: Mapping[str, Any]) -> str:
    return f"{result['figures']['settings']['program']}, DEV={result['device']} on {result['machine']}"


def curves_of(result: Mapping[str, Any], preparing: Preparing) -> list[Curve]:
    """The searches of a run; to their seconds comes what preparing a kernel costs, and what it costs each time that a search comes
    back to it. Raises SystemExit where that was not measured."""
    calls, costs = result["figures"]["calls"], preparing.get(result["device"], {})
    if missing := set(calls) - set(costs):
        raise SystemExit(f"what preparing costs is not known of {len(missing)} kernels of a run with DEV={result['device']}: measure it with "
                         "tools/bench_preparing.py on all runs that are kept")  # fmt: skip
    return [_prepared(Curve(**c), costs[c["kernel"]], len(calls)) for c in result["figures"]["curves"]]


def _prepared(curve: Curve, cost: tuple[float, float], kernels: int) -> Curve:
    (first, again), visits = cost, curve.visits(kernels)
    return replace(curve, seconds=[s + first + (n - 1) * again for s, n in zip(curve.seconds, visits, strict=True)])


def preparing_of(folder: Path) -> Preparing:
    """What tools/bench_preparing.py has measured."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("preparing-*.json"))]
    return {one["device"]: {key: (s, one["again"][key]) for key, s in one["seconds"].items()} for one in found}


def _program(path: Path, preparing: Preparing) -> str:
    result = result_of(path)
    figures = result["figures"]
    settings, summary, calls = figures["settings"], figures["summary"], figures["calls"]
    curves = curves_of(result, preparing)
    seeds = {name: len({c.seed for c in curves if c.strategy == name}) for name in summary}
    shown = [b for b in SHOWN if b in next(iter(summary.values()))["total"]]
    budgets = budgets_of(settings)  # beyond it a strategy would have gone on
    rows = [line([name, str(seeds[name]), *(_range(row["total"][b]) if int(b) <= budgets[name] else "" for b in shown),
                  f"{row['end']['total']:.3f}", f"{row['end']['trials']:.0f}", f"{row['end']['seconds']:.0f}",
                  f"{row['spent']['10']['seconds']:.1f}" if budgets[name] >= 10 else ""])
            for name, row in summary.items()]  # fmt: skip
    profiles = [line([name, *(f"{profile(curves, name, PROFILED, ratio):.2f}" for ratio in RATIOS)])
                for name in summary if budgets[name] >= PROFILED]  # fmt: skip
    scores = [
        line([name, *(interval(row["score"][b]) if int(b) <= budgets[name] else "" for b in shown)])
        for name, row in summary.items()
    ]
    return "\n\n".join([
        f"### {title(result)}",
        f"`{path.name}`: {len(calls)} kernels, each at least {settings['least']:.0%} of the time of the program. Seconds of all of them, "
        "calls counted, over hand-coded, after so many trials of each (mean over seeds, and their range); then at the end of the "
        "searches, with their trials and wall-clock seconds a kernel, and the seconds of the first ten (without preparing the kernel).",
        table(("strategy", "seeds", *shown, "at the end", "trials", "seconds", "to 10"), rows),
        "Time of the best schedule that anyone found over that of the best after so many trials, IQM over seeds and kernels with its "
        "95% interval:",
        table(("strategy", *shown), scores),
        f"![{settings['program']}](../benchmarks/{path.name.replace('.tar.xz', '.svg')})",
        f"Performance profile after {PROFILED} trials: the share of searches that have come to at most so many times the best schedule that "
        "anyone found.",
        table(("strategy", *(f"{ratio:.2f}" for ratio in RATIOS)), profiles),
        "Seconds over those of the other, of whose seeds each kernel's median counts: all calls together (the median run, and the range of all), "
        "the geometric mean over kernels (median over seeds), the worst kernel of all seeds, and how many kernels are faster, within 5%, slower (by "
        "their medians).",
        table(("strategy", "trials", "other", "its trials", "all", "bar", "geometric", "worst", "won", "tied", "lost", "seconds over its, preparing included"),
              [row for name in summary for row in _held_against(name, curves, calls, budgets)]),
        _answers(curves),
    ])  # fmt: skip


def _range(values: Sequence[float]) -> str:
    middle = statistics.mean(values)
    return f"{middle:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def budgets_of(settings: Mapping[str, Any]) -> dict[str, float]:
    """Trials of each strategy's searches."""
    return {name: dict(settings["more"]).get(name, settings["trials"]) for name in settings["strategies"]}


class Held(NamedTuple):
    """One strategy held against another: times over the other's, whose own are medians over its seeds, and wall-clock over its."""

    totals: list[float]  # of each seed: all calls together
    geometric: float  # mean over kernels, median over seeds
    worst: float  # of all kernels and seeds
    counts: tuple[int, int, int]  # kernels that are faster, within 5%, slower, by their medians over seeds
    seconds: float

    def total(self, digits: int = 2) -> str:
        """The median run's, and the range of all."""
        low, middle, high = min(self.totals), statistics.median(self.totals), max(self.totals)
        return f"{middle:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(self.totals) > 1 else "")


def _held(name: str, curves: Sequence[Curve], calls: Mapping[str, int], trials: float, other: str, its: float) -> Held:
    runs, theirs = _runs(name, curves, trials), _times(other, curves, its)
    ratios = [{k: run[k] / theirs[k] for k in run} for run in runs]  # of each seed
    totals = [sum(calls[k] * run[k] for k in run) / sum(calls[k] * theirs[k] for k in run) for run in runs]
    middles = [statistics.median(own[k] for own in ratios) for k in ratios[0]]
    won, lost = (sum(sign * math.log2(r) > CLOSE for r in middles) for sign in (-1, 1))
    seconds = _seconds(name, curves, trials) / _seconds(other, curves, its)
    counts = won, len(middles) - won - lost, lost
    geometric = statistics.median(statistics.geometric_mean(own.values()) for own in ratios)
    return Held(totals, geometric, max(max(own.values()) for own in ratios), counts, seconds)


def _held_against(
    name: str, curves: Sequence[Curve], calls: Mapping[str, int], budgets: Mapping[str, float]
) -> list[str]:
    """A line for each bar of the mission whose trials were searched."""
    rows = []
    for trials, other, its, bar in _bars(curves):
        if name in ("beam", "random", "recipe") or trials > budgets[name]:
            continue
        if other not in budgets or (math.isfinite(its) and its > budgets[other]):
            continue
        held = _held(name, curves, calls, trials, other, its)
        rows.append(line([name, f"{trials:.3g}", other, "all" if math.isinf(its) else str(its), held.total(3),
                          "" if bar is None else f"{bar:.2f}", f"{held.geometric:.3f}", f"{held.worst:.2f}",
                          *map(str, held.counts), f"{held.seconds:.2f}"]))  # fmt: skip
    return rows


def _overview(results: Sequence[Mapping[str, Any]], preparing: Preparing) -> str:
    """What `auto` comes to in each program that was searched with all three, at the trials of the first bar, and with its first
    schedule alone."""
    rows = []
    for result in results:
        figures, curves = result["figures"], curves_of(result, preparing)
        budgets = budgets_of(figures["settings"])
        if not {"auto", "beam"} <= set(budgets) or budgets.get("random", 0) < 128:
            continue
        trials = _bars(curves)[0][0]
        beam, random = (_held("auto", curves, figures["calls"], trials, other, its)
                        for other, its in (("beam", math.inf), ("random", 128)))  # fmt: skip
        first = [_answered(curves, name) for name in ("auto", "recipe")]
        rows.append(line([title(result), str(len(figures["calls"])),
                          f"{figures['summary']['beam']['end']['trials']:.0f}", f"{trials:.3g}", beam.total(), random.total(),
                          f"{beam.seconds:.2f}", f"{beam.worst:.2f}", f"{random.worst:.2f}",
                          *(f"{statistics.geometric_mean(good):.2f}" if good else "" for good in first)]))  # fmt: skip
    head = ("program", "kernels", "BEAM=4's trials", "`auto`'s", "time over BEAM=4's (bar 1.00)", "over 128 random schedules' (1.00)",
            "wall-clock over BEAM=4's, preparing included (0.25)", "worst kernel of all seeds over BEAM=4's (1.05)", "over random's",
            "first schedule, speed over hand-coded (1.3)", "best fixed recipe's")  # fmt: skip
    return table(head, rows)


def _far(folder: Path, preparing: Preparing) -> list[str]:
    """`auto` at the trials of the second bar, in each program of which there is a file."""
    (trials, _, _, beam_bar), (_, _, draws, random_bar) = BARS[-2:]
    head = ("program", "kernels", "seeds of `auto`", "after 16 trials, time over BEAM=4's", f"after {trials} ({beam_bar:.2f})",
            f"over {draws} random schedules' ({random_bar:.2f})", "the fastest of all searches over BEAM=4's",
            "worst kernel over BEAM=4's", "wall-clock over BEAM=4's, preparing included", "file")  # fmt: skip
    rows = []
    for path in sorted(folder.glob(FAR)):
        result = json.loads(path.read_text())
        figures = result["figures"]
        curves, calls = curves_of(result, preparing), figures["calls"]
        before, beam = (_held("auto", curves, calls, n, "beam", math.inf) for n in (16, trials))
        random = _held("auto", curves, calls, trials, "random", draws)
        fastest = {key: min(2.0 ** c.best_after(math.inf) for c in curves if c.kernel == key) for key in calls}
        beams = _times("beam", curves, math.inf)
        limit = sum(calls[key] * fastest[key] for key in calls) / sum(calls[key] * beams[key] for key in calls)
        seeds = len({c.seed for c in curves if c.strategy == "auto"})
        rows.append(line([figures["settings"]["program"], str(len(calls)), str(seeds), before.total(), beam.total(),
                          random.total(), f"{limit:.2f}", f"{beam.worst:.2f}", f"{beam.seconds:.2f}", f"`{path.name}`"]))  # fmt: skip
    return [f"{trials} trials of each kernel:", table(head, rows)] if rows else []


def _bars(curves: Sequence[Curve]) -> list[tuple[float, str, float, float | None]]:
    """BARS; but where a tenth of beam search's trials is less than 10, the bars of 10 are asked for after so many."""
    searched = [len(c.times) for c in curves if c.strategy == "beam"]
    few = statistics.mean(searched) / 10 if searched else 10.0
    found: list[tuple[float, str, float, float | None]] = []
    for trials, other, its, bar in BARS:
        if trials == 10 and few < 10:
            found += [(few, other, its, bar), (trials, other, its, None)]
        else:
            found.append((trials, other, its, bar))
    return found


def _runs(name: str, curves: Sequence[Curve], trials: float) -> list[dict[str, float]]:
    """Of each seed: seconds of each kernel after so many trials."""
    found: dict[int, dict[str, float]] = {}
    for c in curves:
        if c.strategy == name:
            found.setdefault(c.seed, {})[c.kernel] = 2.0 ** c.best_after(trials)
    return list(found.values())


def _times(name: str, curves: Sequence[Curve], trials: float) -> dict[str, float]:
    """Seconds of each kernel after so many trials, median over seeds."""
    runs = _runs(name, curves, trials)
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _seconds(name: str, curves: Sequence[Curve], trials: float) -> float:
    """Wall-clock a kernel, mean."""
    return statistics.mean(c.spent_after(trials) for c in curves if c.strategy == name)


def _answered(curves: Sequence[Curve], name: str) -> list[float]:
    """Speed over hand-coded of a strategy's first schedules, of those that ran."""
    return [2.0 ** (c.hand_coded - c.times[0]) for c in curves
            if c.strategy == name and c.times and c.times[0] is not None]  # fmt: skip


def _answers(curves: Sequence[Curve]) -> str:
    """Zero trials: what a strategy's first schedule is by itself, before anything falls back."""
    rows = []
    for name in ("auto", "policy", "sequential", "recipe"):
        asked = sum(c.strategy == name and len(c.times) > 0 for c in curves)
        if good := _answered(curves, name):
            rows.append(line([name, f"{statistics.geometric_mean(good):.3f}", f"{min(good):.2f}",
                              f"{asked - len(good)} of {asked}"]))  # fmt: skip
    return "\n\n".join([
        "A single answer, before anything falls back: speed over hand-coded of the first schedule (geometric mean over kernels and seeds; "
        "the worst), and how many failed, which are not counted in.",
        table(("strategy", "speed", "worst", "failed"), rows),
    ]) if rows else ""  # fmt: skip
