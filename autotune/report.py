"""What tuning came to: for programs (`to_json`) and for people (`table`)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.measuring.bench import PROTOCOL
from autotune.records import BASELINES, History, Records


class Gain(NamedTuple):
    """What one part of the search came to: how many trials, and seconds off the best schedule before each of them."""

    trials: int = 0
    seconds: float = 0.0


def gains(history: History) -> dict[str, Gain]:
    """By the strategy and the part of it that proposed each trial, in the order in which they came in. By single timings, from
    the better of both baselines on: all together they are what was gained, as far as the final timing confirms it."""
    good = history.good
    known = [t.seconds for t in good if t.kind in BASELINES and t.seconds is not None]
    best, timed = min(known, default=None), {id(t) for t in good}
    found: dict[str, Gain] = {}
    for trial in history.trials:
        if trial.kind in ("trial", "answer"):
            before = found.get(trial.strategy, Gain())
            won = 0.0
            if id(trial) in timed and best is not None and trial.seconds is not None and trial.seconds < best:
                won, best = best - trial.seconds, trial.seconds
            found[trial.strategy] = Gain(before.trials + 1, before.seconds + won)
    return found


def refusal(history: History) -> str:
    """Why a kernel cannot be searched: what became of hand-coded, where it has no time to be beaten. Empty: it can be."""
    baselines = history.baselines
    hand = baselines.get("hand_coded")
    trial = hand or next(reversed(baselines.values()), None)
    if trial is None or (hand is None and trial.seconds is not None):
        return "its baselines are not on record: run the same command again"
    if trial.seconds is not None:
        return ""
    return f"{trial.verdict}: {(trial.detail.splitlines() or ['nothing is told'])[0][:100]}"


@dataclass
class KernelResult:
    """What tuning one kernel came to. Times in seconds; `tuned_seconds` is hand-coded's where no winner was accepted."""

    kernel: Kernel
    calls: int
    hand_coded_seconds: float
    tuned_seconds: float
    trials: int
    schedule: Schedule | None  # None: stays as tinygrad would run it
    verdicts: dict[str, int]
    gains: dict[str, Gain] = field(default_factory=dict)  # by part of the search
    refused: str = ""  # why it was not searched: hand-coded could not be measured

    @property
    def ratio(self) -> float:
        return _ratio(self.tuned_seconds, self.hand_coded_seconds)

    def to_json(self) -> dict[str, Any]:
        """What `tune --json` and `report --json` both tell."""
        schedule = None if self.schedule is None else schedule_to_json(self.schedule)
        return {"key": self.kernel.key, "name": self.kernel.name, "hand_coded_ms": self.hand_coded_seconds * 1e3,
                "tuned_ms": self.tuned_seconds * 1e3, "trials": self.trials, "schedule": schedule, "verdicts": self.verdicts}  # fmt: skip


def result_of(records: Records, fingerprint: str, kernel: Kernel, calls: int = 1) -> KernelResult:
    """What tuning a kernel on a device came to: what is served of it, whatever was refused since."""
    history = records.history(kernel.key, fingerprint)
    hand = 0.0 if history.hand_coded is None else history.hand_coded.seconds or 0.0
    served = records.served(fingerprint, PROTOCOL, kernel.key).get(kernel.key)
    final = served or records.final(kernel.key, fingerprint)
    if final is not None and final.protocol >= PROTOCOL:
        hand = statistics.median(final.hand_coded)
    tuned, schedule = (hand, None) if served is None else (statistics.median(served.tuned), served.schedule)
    verdicts = Counter(t.verdict for t in history.trials if t.kind == "trial")
    refused = "" if served is not None and not history.trials else refusal(history)  # some files hold verdicts alone
    return KernelResult(kernel, calls, hand, tuned, history.spent, schedule, dict(verdicts), gains(history), refused)


def table_of(results: Sequence[KernelResult], calls: bool = True) -> str:
    """For people: one line a kernel, the slowest first. Calls belong to a program, and are not on record."""
    head = f"{'kernel':34} {'calls ' * calls}{'hand-coded':>11} {'tuned':>9} {'ratio':>6} {'trials':>6}  schedule"
    lines = [head, "-" * len(head)]
    for r in sorted(results, key=lambda r: -r.hand_coded_seconds * r.calls):
        words = "as tinygrad" if r.schedule is None else " ".join(map(_short, schedule_to_json(r.schedule))) or "plain"
        figures = _figures(r.hand_coded_seconds, r.tuned_seconds, r.trials)
        lines.append(f"{r.kernel.name[:34]:34} {f'{r.calls:5d} ' * calls}{figures}  {words}")
    return "\n".join(lines)


@dataclass
class Report:
    """The result of a tuning run; totals are weighted by calls."""

    device: str
    seconds: float
    compiled: int
    kernels: list[KernelResult]
    stopped: str = ""  # why not everything was done: "" or "seconds"
    left: int = 0  # trials that were allowed and were not made

    @property
    def hand_coded_seconds(self) -> float:
        return sum(k.hand_coded_seconds * k.calls for k in self.kernels)

    @property
    def tuned_seconds(self) -> float:
        return sum(k.tuned_seconds * k.calls for k in self.kernels)

    @property
    def gains(self) -> dict[str, Gain]:
        """By part of the search: trials of all kernels, and seconds won, calls counted."""
        found: dict[str, Gain] = {}
        for kernel in self.kernels:
            for part, gain in kernel.gains.items():
                before = found.get(part, Gain())
                found[part] = Gain(before.trials + gain.trials, before.seconds + gain.seconds * kernel.calls)
        return found

    def to_json(self) -> dict[str, Any]:
        """The contract of `tune --json`."""
        rows = [
            {**k.to_json(), "calls": k.calls, "gflop": k.kernel.operations / 1e9, "refused": k.refused}
            for k in self.kernels
        ]
        parts = {part: {"trials": gain.trials, "ms": gain.seconds * 1e3} for part, gain in self.gains.items()}
        return {"device": self.device, "seconds": self.seconds, "compiled": self.compiled, "kernels": rows, "gains": parts,
                "stopped": self.stopped, "left": self.left, "hand_coded_ms": self.hand_coded_seconds * 1e3, "tuned_ms": self.tuned_seconds * 1e3}  # fmt: skip

    def table(self) -> str:
        """For people: one line a kernel, the total below."""
        calls, trials = sum(k.calls for k in self.kernels), sum(k.trials for k in self.kernels)
        figures = _figures(self.hand_coded_seconds, self.tuned_seconds, trials)
        lines = [
            table_of(self.kernels),
            f"{'sum over calls':34} {calls:5d} {figures}",
            "by single timings, calls counted:",
        ]
        lines += [
            f"  {part:24} {gain.trials:6d} trials won {gain.seconds * 1e3:9.3f} ms" for part, gain in self.gains.items()
        ]
        left = sum(k.schedule is None for k in self.kernels)
        lines.append(f"  {left} of {len(self.kernels)} kernels stay as tinygrad runs them")
        lines += [f"  {k.kernel.name} could not be measured ({k.refused})" for k in self.kernels if k.refused]
        return "\n".join(lines)


def _ratio(tuned: float, hand_coded: float) -> float:
    return tuned / hand_coded if hand_coded else 1.0


def _figures(hand_coded: float, tuned: float, trials: int) -> str:
    """Columns of a table; times in seconds."""
    return f"{hand_coded * 1e3:8.3f} ms {tuned * 1e3:6.3f} ms {_ratio(tuned, hand_coded):6.2f} {trials:6d}"


def _short(opt: Sequence[Any]) -> str:
    return f"{opt[0]}:{'' if opt[1] is None else opt[1]}:{'' if opt[2] is None else opt[2]}"
