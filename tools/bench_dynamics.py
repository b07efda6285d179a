"""States a second on exact dynamics, one core: a step, the legality mask and the summary, in batches and one by one.

    DEV=CPU python tools/bench_dynamics.py --json benchmarks/dynamics-speed-cpu.json

Run it on a machine that does nothing else. Random walks over the training kernels, many kernels in each batch; a state
that was met before does not count. Choosing the actions is not timed, picking the rows that go on is (as part of a step).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from autotune import corpus
from autotune.batch import Batch
from autotune.compiler import default_device, renderer_of
from autotune.features import summary
from autotune.space import MAX_STEPS, State, legal_mask, root_state, step

BATCHES = (1, 16, 64, 128, 256, 512, 1024)
BAR, BARRED = 10_000, 64  # states a second, in batches of this size and more
PARTS = ("step", "mask", "summary")


class Timer:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.seconds, self.started = dict.fromkeys(PARTS, 0.0), 0.0

    def begin(self) -> None:
        self.started = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.started
        self.started = now

    def figures(self, distinct: int, states: int) -> dict[str, Any]:
        """Rate of distinct states, and microseconds of each part for a state."""
        total = sum(self.seconds.values())
        parts = {f"{part}_us": 1e6 * s / states for part, s in self.seconds.items()}
        return {"states_per_second": distinct / total, "distinct": distinct, "states": states, **parts}


def batched(roots: Batch, size: int, seconds: float) -> dict[str, Any]:
    rng, timer, states, seen = np.random.default_rng(size), Timer(), 0, set()
    while sum(timer.seconds.values()) < seconds:
        batch = roots.take(rng.integers(len(roots), size=size))
        mask = batch.legal_mask()
        for _ in range(MAX_STEPS):
            going = np.flatnonzero(mask[:, :-1].any(1))
            if not len(going):
                break
            rows = np.resize(going, size)  # where some have ended, others go on twice, with other actions
            actions = (mask[rows, :-1] * rng.random((size, mask.shape[1] - 1))).argmax(1)
            timer.begin()
            batch = batch.take(rows).step(actions)
            timer.end("step")
            mask = batch.legal_mask()
            timer.end("mask")
            batch.summary()
            timer.end("summary")
            states += size
            seen |= {(int(s), *taken) for s, taken in zip(batch.start, batch.taken.tolist(), strict=True)}
    return timer.figures(len(seen), states)


def one_by_one(roots: list[State], seconds: float) -> dict[str, Any]:
    """The same with `autotune.space` and `autotune.features`."""
    rng, timer, states, seen = np.random.default_rng(0), Timer(), 0, set()
    while sum(timer.seconds.values()) < seconds:
        state = roots[rng.integers(len(roots))]
        mask = legal_mask(state)
        while mask[:-1].any():
            action = int(rng.choice(np.flatnonzero(mask[:-1])))
            timer.begin()
            state = step(state, action)
            timer.end("step")
            mask = legal_mask(state)
            timer.end("mask")
            summary(state)
            timer.end("summary")
            states += 1
            seen.add((state.kernel.key, state.schedule))
    return timer.figures(len(seen), states)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each batch size (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    args = parser.parse_args()
    device = default_device()
    states = [root_state(k, renderer_of(device)) for k in corpus.load("train")]
    started = time.perf_counter()
    roots = Batch.of(states)
    made = 1e6 * (time.perf_counter() - started) / len(states)
    rows = {"scalar": one_by_one(states, args.seconds)} | {str(n): batched(roots, n, args.seconds) for n in BATCHES}
    print(f"{device}, {len(states)} kernels; Batch.of {made:.0f} us for each\n")
    print(f"{'batch':>8} {'states/s':>9} {'distinct':>9}" + "".join(f"{part + ' us':>12}" for part in PARTS))
    for name, row in rows.items():
        share = row["distinct"] / row["states"]
        print(
            f"{name:>8} {row['states_per_second']:9.0f} {share:9.1%}"
            + "".join(f"{row[p + '_us']:12.1f}" for p in PARTS)
        )
    slowest = min(rows[str(n)]["states_per_second"] for n in BATCHES if n >= BARRED)
    met = slowest >= BAR
    print(
        f"\ndistinct states a second in batches of {BARRED} and more: bar {BAR}, figure {slowest:.0f}: {'met' if met else 'MISSED'}"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"device": device, "kernels": len(states), "of_us": made, "batches": rows}, indent=1) + "\n"
        )
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
