"""The timing protocol's own figures: does it say the same thing twice, how small a difference does it see, what does it cost?

    DEV=CL python tests/proofs/protocol.py --json benchmarks/measuring-protocol-cl.json

Run it on a machine that does nothing else. Three parts: a kernel of each length is compared with itself, in a fresh process
each time, as winners are; pairs of schedules are compared again and again; and the wall time of trials is split up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.kernel import Kernel, Schedule
from autotune.measuring.noise import kernel_of_size
from autotune.measuring.runner import NOISE_FLOOR, Runner, commit, judge
from autotune.records import Records, Trial
from autotune.search.random import RandomSearch

SIZES = (1 << 12, 1 << 17, 1 << 20)  # elements of the kernels that are compared with themselves
DIFFERENCES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.15, 0.20)
SEEN = 0.95  # of all comparisons: then a difference counts as one that can be told apart
GAPS = (1.02, 1.05, 1.10)  # wanted ratios between the two schedules of a pair
MAX_OVERHEAD = 0.15  # of a trial's wall time
MAX_DIFFER = 0.10  # of the comparisons of a kernel with itself: said to differ
MIN_AGREEMENT = 0.90  # of the comparisons of a pair: the same verdict
PARTS = ("compile", "reference", "verify", "time", "overhead")


def winner_of(times: Sequence[tuple[float, ...]]) -> str:
    """The verdict of one comparison [a, b, b]: which is faster beyond the noise, or neither."""
    a, b, control = times
    return "a" if judge(KERNEL, (), (a, b, control)).accepted else "b" if _b_wins(a, b, control) else "tie"


def _b_wins(a: tuple[float, ...], b: tuple[float, ...], control: tuple[float, ...]) -> bool:
    noise = max(NOISE_FLOOR, abs(statistics.median(b) / statistics.median(control) - 1))
    return max(statistics.median(b), statistics.median(control)) < statistics.median(a) * (1 - noise)


KERNEL = corpus.load("train")[0]  # only its key is looked at, by `judge`


def agreement(verdicts: Sequence[str]) -> float:
    """The share of the most frequent verdict."""
    return Counter(verdicts).most_common(1)[0][1] / len(verdicts)


def smallest_difference(runs: Sequence[Sequence[tuple[float, ...]]]) -> float | None:
    """The least difference that would be seen in SEEN of the A/A/A runs, had one side been that much faster."""
    for difference in DIFFERENCES:
        wins = [winner_of(([s * (1 - difference) for s in a], b, c)) == "a" for a, b, c in runs]
        if statistics.mean(wins) >= SEEN:
            return difference
    return None


def itself(runner: Runner, size: int, count: int) -> dict[str, Any]:
    """A kernel against itself, `count` times."""
    kernel = kernel_of_size(size, runner.device)
    hand = runner.baselines(kernel)[-1].schedule
    runs = [runner.duel(kernel, [hand] * 3) for _ in tqdm(range(count), desc=f"{size} elements")]
    medians = [[statistics.median(side) for side in run] for run in runs]
    ratios = sorted(abs(a / b - 1) for a, b, _ in medians)
    return {"seconds": statistics.median(m for run in medians for m in run), "comparisons": count,
            "said to differ": sum(winner_of(run) != "tie" for run in runs), "median difference": statistics.median(ratios),
            "95 % of differences below": ratios[min(count - 1, int(0.95 * count))], "largest difference": ratios[-1],
            "smallest difference seen": smallest_difference(runs)}  # fmt: skip


def pairs_of(runner: Runner, kernel: Kernel) -> list[tuple[float, Schedule, Schedule]]:
    """Pairs of schedules about GAPS apart, of twenty random ones."""
    drawn = RandomSearch(kernel, renderer_of(runner.device), 0).ask(20)
    found = sorted((t.seconds, t.schedule) for t in runner.measure(kernel, drawn, None) if t.seconds is not None)
    every = [(slow[0] / fast[0], fast[1], slow[1]) for i, fast in enumerate(found) for slow in found[i + 1 :]]
    return [min(every, key=lambda pair, gap=gap: abs(pair[0] - gap)) for gap in GAPS]  # type: ignore[misc]


def pair(runner: Runner, kernel: Kernel, fast: Schedule, slow: Schedule, count: int) -> dict[str, Any]:
    runs = [runner.duel(kernel, [fast, slow, slow]) for _ in tqdm(range(count), desc="pair")]
    verdicts = [winner_of(run) for run in runs]
    ratios = [statistics.median(b) / statistics.median(a) for a, b, _ in runs]
    return {"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios), "comparisons": count,
            "same verdict": agreement(verdicts), "verdicts": dict(Counter(verdicts))}  # fmt: skip


class Clocked(Runner):
    """A runner that knows where its time goes."""

    def __init__(self, device: str):
        super().__init__(device)
        self.spent = dict.fromkeys(PARTS, 0.0)

    def _compile_all(self, kernel: Kernel, schedules: Sequence[Schedule]) -> list[dict[str, Any]]:
        return self._clocked("compile", partial(super()._compile_all, kernel, schedules))

    def _prepare(self, child: Any, kernel: Kernel, seed: int) -> None:
        self._clocked("reference", partial(super()._prepare, child, kernel, seed))

    def _time(self, kernel: Kernel, schedule: Schedule, answer: dict[str, Any], cutoff: float | None) -> Trial:
        trial = super()._time(kernel, schedule, answer, cutoff)
        self.spent["compile"] += trial.compile_seconds - answer["compile_seconds"]  # loading: some drivers compile then
        return trial

    def _clocked(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.spent[part] += time.perf_counter() - started


def shares(device: str, kernels: Sequence[Kernel], trials: int) -> dict[str, Any]:
    """Where the wall time of trials goes, commits to a records file included."""
    with TemporaryDirectory() as folder, closing(Records(Path(folder) / "r.db")) as records:
        runner, wall, count = Clocked(device), 0.0, 0
        records.add_fingerprint(runner.fields)
        runner.baselines(kernels[0])  # the children are started, as they are in all trials but the first
        runner.spent = dict.fromkeys(PARTS, 0.0)
        for kernel in tqdm(kernels, desc="shares"):
            drawn = RandomSearch(kernel, renderer_of(device), 0).ask(trials)

            def done(trial: Trial, kernel: Kernel = kernel) -> None:
                commit(records, runner, kernel, [trial])

            started = time.perf_counter()
            for i in range(0, len(drawn), 4):
                found = runner.measure(kernel, drawn[i : i + 4], None, done)
                count += len(found)
                runner.spent["verify"] += sum(t.verify_seconds for t in found)
                runner.spent["time"] += sum(t.timing_seconds for t in found)
            wall += time.perf_counter() - started
        runner.close()
    runner.spent["overhead"] = wall - sum(runner.spent.values())
    return {"trials": count, "seconds a trial": wall / count,
            "shares": {part: runner.spent[part] / wall for part in PARTS}}  # fmt: skip


def missed(found: dict[str, Any]) -> list[str]:
    """The bars that the figures miss, each in a line."""
    overhead = found["trial"]["shares"]["overhead"]
    differ = sum(f["said to differ"] for f in found["itself"]) / sum(f["comparisons"] for f in found["itself"])
    lines = []
    if overhead > MAX_OVERHEAD:
        lines.append(f"overhead is {overhead:.1%} of a trial, at most {MAX_OVERHEAD:.0%}")
    if differ > MAX_DIFFER:
        lines.append(f"of a kernel against itself {differ:.1%} were said to differ, at most {MAX_DIFFER:.0%}")
    lines += [f"the pair of ratio {f['ratio']:.3f} has the same verdict in {f['same verdict']:.0%}, at least {MIN_AGREEMENT:.0%}"
              for f in found["pairs"] if f["same verdict"] < MIN_AGREEMENT]  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="comparisons of each pair")
    parser.add_argument("--itself", type=int, default=30, help="comparisons of each kernel with itself")
    parser.add_argument("--kernels", type=int, default=24, help="whose trials are split up")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = default_device()
    found: dict[str, Any] = {"device": device}
    train = corpus.load("train")
    kernels = train[:: max(1, len(train) // args.kernels)][: args.kernels]
    found["trial"] = shares(device, kernels, 8)
    with closing(Runner(device)) as runner:
        found["itself"] = [itself(runner, size, args.itself) for size in SIZES]
        matmul = next(k for k in train if k.family == "matmul" and 1e7 < k.work[0] < 1e8)
        found["pairs"] = [pair(runner, matmul, a, b, args.count) for _, a, b in pairs_of(runner, matmul)]
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    for text in (lines := missed(found)):
        print(f"MISSED: {text}")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
