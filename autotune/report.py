"""What tuning came to: for programs (`to_json`) and for people (`table`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.records import BASELINES, History


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
    trial = baselines.get("hand_coded") or next(reversed(baselines.values()), None)
    if trial is None or trial.seconds is not None:
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
        return self.tuned_seconds / self.hand_coded_seconds if self.hand_coded_seconds else 1.0


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
        rows = [{"key": k.kernel.key, "name": k.kernel.name, "calls": k.calls, "hand_coded_ms": k.hand_coded_seconds * 1e3,
                 "tuned_ms": k.tuned_seconds * 1e3, "gflop": k.kernel.operations / 1e9, "trials": k.trials,
                 "schedule": None if k.schedule is None else schedule_to_json(k.schedule), "verdicts": k.verdicts,
                 "refused": k.refused}
                for k in self.kernels]  # fmt: skip
        parts = {part: {"trials": gain.trials, "ms": gain.seconds * 1e3} for part, gain in self.gains.items()}
        return {"device": self.device, "seconds": self.seconds, "compiled": self.compiled, "kernels": rows, "gains": parts,
                "stopped": self.stopped, "left": self.left, "hand_coded_ms": self.hand_coded_seconds * 1e3, "tuned_ms": self.tuned_seconds * 1e3}  # fmt: skip

    def table(self) -> str:
        """For people: one line a kernel, the total below."""
        head = f"{'kernel':34} {'calls':>5} {'hand-coded':>11} {'tuned':>9} {'ratio':>6} {'trials':>6}  schedule"
        lines = [head, "-" * len(head)]
        for k in sorted(self.kernels, key=lambda k: -k.hand_coded_seconds * k.calls):
            schedule = (
                "as tinygrad"
                if k.schedule is None
                else " ".join(_short(o) for o in schedule_to_json(k.schedule)) or "plain"
            )
            lines.append(f"{k.kernel.name[:34]:34} {k.calls:5d} {k.hand_coded_seconds * 1e3:8.3f} ms {k.tuned_seconds * 1e3:6.3f} ms "
                         f"{k.ratio:6.2f} {k.trials:6d}  {schedule}")  # fmt: skip
        total = self.tuned_seconds / self.hand_coded_seconds if self.hand_coded_seconds else 1.0
        lines.append(f"{'sum over calls':34} {sum(k.calls for k in self.kernels):5d} {self.hand_coded_seconds * 1e3:8.3f} ms "
                     f"{self.tuned_seconds * 1e3:6.3f} ms {total:6.2f} {sum(k.trials for k in self.kernels):6d}")  # fmt: skip
        lines.append("by single timings, calls counted:")
        lines += [
            f"  {part:24} {gain.trials:6d} trials won {gain.seconds * 1e3:9.3f} ms" for part, gain in self.gains.items()
        ]
        left = sum(k.schedule is None for k in self.kernels)
        lines.append(f"  {left} of {len(self.kernels)} kernels stay as tinygrad runs them")
        lines += [f"  {k.kernel.name} could not be measured ({k.refused})" for k in self.kernels if k.refused]
        return "\n".join(lines)


def _short(opt: Sequence[Any]) -> str:
    return f"{opt[0]}:{'' if opt[1] is None else opt[1]}:{'' if opt[2] is None else opt[2]}"
