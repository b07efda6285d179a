"""The results of tools/bench_sims.py: gates, intervals, and a file in which each is kept as soon as it exists."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autotune.statistics import LEVEL, REPETITIONS, bootstrap

# what a simulator must reach on kernels that it never saw: (least, most)
GATES: dict[str, tuple[float, float]] = {
    "pairwise": (0.80, math.inf),  # Pruner: .90 on kernels seen in training
    "spearman_median": (0.70, math.inf),
    "top1": (0.75, math.inf),  # TenSet, TLP: .88-.92
    "top5": (0.95, math.inf),  # TLP: .95-.97
    "mape": (-math.inf, 0.35),  # CDMPP, Tiramisu: .14-.16
    "coverage80": (0.65, 0.95),
    "optimism": (-math.inf, 0.30),
    "roll_out_5": (-math.inf, 0.15),
}
SCORES = ("pairwise", "spearman", "top1", "top5", "mape", "coverage80", "optimism")  # kept for each kernel
Interval = dict[str, float]  # value, low, high
Measure = Callable[[], dict[str, Any]]


class Results:
    """Measured parts by "simulator seed part", in a file where one is given. A run that starts again finds them there."""

    def __init__(self, path: Path | None, about: dict[str, Any], units: dict[str, list[int]] | None = None):
        """`units`: by seed, which loops each of its scores is of, where seeds hold out kernels of their own. Raises SystemExit
        where the file holds results of other data or settings."""
        self.path, self.about, self.units = path, about, units or {}
        self.measured: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}  # by simulator: how many seeds, figures with intervals, which gates it passes
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            differ = [name for name, value in about.items() if found.get(name) != value]
            if differ:
                raise SystemExit(f"{path} holds results of another {', '.join(differ)}: remove it or name another file")
            self.measured = found["measured"]
            self.units = {**found.get("units", {}), **self.units}
            for name in dict.fromkeys(key.split()[0] for key in self.measured):  # gates may have changed
                self._summarise(name)
            self._write(path)

    def keep(self, key: str, measure: Measure) -> bool:
        """Measure what is not there yet; whether it was not."""
        if key in self.measured:
            return False
        self.measured[key] = _plain(measure())
        self._summarise(key.split()[0])
        if self.path is not None:
            self._write(self.path)
        return True

    def _summarise(self, name: str) -> None:
        parts: dict[str, list[Any]] = {}
        units: list[list[int]] = []
        for key, value in self.measured.items():
            simulator, seed, part = key.split()
            if simulator == name:
                parts.setdefault(part, []).append(value)
                if part == "all" and seed in self.units:
                    units.append(self.units[seed])
        self.summary[name] = summarised(parts, units)

    def _write(self, path: Path) -> None:
        """All or nothing: a run may be cut off at any moment. A line for each result."""
        lines = [f'"{name}": {json.dumps(value)}' for name, value in self.about.items()]
        for name, own in (("summary", self.summary), ("units", self.units), ("measured", self.measured)):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in own.items())
            lines.append(f'"{name}": {{\n{inner}\n }}')
        draft = path.with_suffix(".part")
        draft.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
        os.replace(draft, path)


def summarised(parts: Mapping[str, list[Any]], units: list[list[int]] | None = None) -> dict[str, Any]:
    """Of one simulator, from what each seed measured of each part. `units`: see `over`."""
    found: dict[str, Any] = {"seeds": {part: len(values) for part, values in parts.items()}, "curve": {}}
    if "all" in parts:
        seeds = parts["all"]
        found["scores"] = {name: over([seed["kernels"][name] for seed in seeds], units=units) for name in SCORES}
        found["scores"]["spearman_median"] = over([seed["kernels"]["spearman"] for seed in seeds], np.nanmedian, units)
        found |= {group: {name: over([[seed[group][name]] for seed in seeds]) for name in seeds[0][group]}
                  for group in ("roll_out", "null")}  # fmt: skip
        found["scores"]["roll_out_5"] = found["roll_out"]["5"]
        found["passes"] = {name: passes(name, found["scores"][name]) for name in GATES}
    for part, values in parts.items():
        if part != "all":
            own = {name: over([[value[name]] for value in values]) for name in values[0]}
            (found["curve"] if part.isdigit() else found)[part] = own
    return found


def over(scores: list[list[float | None]], statistic: Callable[..., Any] = np.nanmean,
         units: list[list[int]] | None = None) -> Interval | None:  # fmt: skip
    """The statistic of [seeds, kernels], and its 95% interval over both (over seeds alone where there is one column). None:
    nothing could be scored.

    `units` as `scores`, where each seed holds out kernels of its own: what a score is of. Scores of one unit, from another
    machine or another seed, tell little more than one of them, so units are drawn anew, each with all of its scores.
    """
    if units:
        return _over_units(np.array([np.nan if v is None else v for own in scores for v in own]), statistic,
                           np.concatenate(units))  # fmt: skip
    scored = np.full((len(scores), max(map(len, scores))), np.nan)
    for row, values in zip(scored, scores, strict=True):
        row[: len(values)] = [np.nan if v is None else v for v in values]
    scored = scored[np.isfinite(scored).any(axis=1)]
    if not len(scored):
        return None
    return vars(bootstrap(lambda drawn: float(statistic(drawn)), scored)).copy()


def _over_units(scores: np.ndarray, statistic: Callable[..., Any], units: np.ndarray) -> Interval | None:
    """[N] scores of [N] units."""
    if not (scored := np.isfinite(scores)).any():
        return None
    scores, unit = scores[scored], np.unique(units[scored], return_inverse=True)[1]
    rng, n = np.random.default_rng(0), unit.max() + 1
    drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(REPETITIONS)]
    values = [float(statistic(np.repeat(scores, times[unit]))) for times in drawn]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(statistic(scores)), "low": float(low), "high": float(high)}


def passes(gate: str, found: Interval | None) -> bool | None:
    """Whether the figure itself, not its interval, lies within the gate; None: could not be scored."""
    least, most = GATES[gate]
    return None if found is None else least <= found["value"] <= most


def passed(own: Mapping[str, Any]) -> str:
    """How many gates, of those that could be scored."""
    judged = [p for p in own["passes"].values() if p is not None]
    return f"{sum(judged)} of {len(judged)}"


def gate_text(gate: str) -> str:
    least, most = GATES[gate]
    if math.isinf(most):
        return f">= {least:g}"
    return f"<= {most:g}" if math.isinf(least) else f"{least:g} to {most:g}"


def table(summary: Mapping[str, Any]) -> str:
    """For the terminal: a line for each simulator, a star where a gate is passed."""
    lines = [f"{'':12}" + "".join(f"{gate:>17}" for gate in GATES) + f"{'gates':>8}"]
    lines.append(f"{'gate':12}" + "".join(f"{gate_text(gate):>17}" for gate in GATES))
    for name, own in summary.items():
        if "passes" in own:
            cells = [_cell(own["scores"][gate]) + ("*" if own["passes"][gate] else " ") for gate in GATES]
            lines.append(f"{name:12}" + "".join(f"{c:>17}" for c in cells) + f"{passed(own):>8}")
    return "\n".join(lines)


def _cell(found: Interval | None) -> str:
    return "-" if found is None else f"{found['value']:.3f}"


def _plain(value: Any) -> Any:
    """As JSON has it: NaN is null; four digits are enough."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
