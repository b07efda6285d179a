"""What tuning came to: for programs (`to_json`) and for people (`table`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.kernel import Kernel, Schedule, schedule_to_json


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

    @property
    def hand_coded_seconds(self) -> float:
        return sum(k.hand_coded_seconds * k.calls for k in self.kernels)

    @property
    def tuned_seconds(self) -> float:
        return sum(k.tuned_seconds * k.calls for k in self.kernels)

    def to_json(self) -> dict[str, Any]:
        """The contract of `tune --json`."""
        rows = [{"key": k.kernel.key, "name": k.kernel.name, "calls": k.calls, "hand_coded_ms": k.hand_coded_seconds * 1e3,
                 "tuned_ms": k.tuned_seconds * 1e3, "trials": k.trials,
                 "schedule": None if k.schedule is None else schedule_to_json(k.schedule), "verdicts": k.verdicts}
                for k in self.kernels]  # fmt: skip
        return {"device": self.device, "seconds": self.seconds, "compiled": self.compiled, "kernels": rows,
                "hand_coded_ms": self.hand_coded_seconds * 1e3, "tuned_ms": self.tuned_seconds * 1e3}  # fmt: skip

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
        return "\n".join(lines)


def _short(opt: Sequence[Any]) -> str:
    return f"{opt[0]}:{'' if opt[1] is None else opt[1]}:{'' if opt[2] is None else opt[2]}"
