"""What tools/bench_sims.py measures of one simulator: each function fits or asks it, and returns plain numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from sims import Paths, PathSimulator, checks, metrics
from sims.base import per_group
from sims.paths import Points

DEPTHS = range(1, 9)  # of the roll-outs
BATCHES = (1, 256)  # schedules judged in one call
IDLE_TRIALS, IDLE_SHARE = 500, 0.2  # to learn the null action from, and how many of them hold one
REPEATS, SECONDS = 5, 0.3  # a call is timed so often and so long at least; the median counts
Make = Callable[[], PathSimulator]


def whole(make: Make, train: Paths, held: Paths, idle: np.ndarray) -> dict[str, Any]:
    """Fitted on all of `train`: scores of each held-out kernel, roll-outs, and the null action."""
    simulator = make()
    simulator.fit(train)
    return {
        "kernels": scores(simulator, held),
        "roll_out": {str(d): loss for d, loss in metrics.roll_out_loss(simulator, held, DEPTHS).items()},
        "null": checks.null_action(simulator, held, idle),
    }


def scores(simulator: PathSimulator, held: Paths) -> dict[str, list[float]]:
    """By name, a score for each kernel; each of its measured prefixes counts once. NaN: cannot be scored."""
    prediction, points = simulator.predict(held), Points.build(held, held.widths)
    at, kernel = (points.path, points.position), points.rows.kernel
    relative, absolute, spread = (array[at] for array in prediction[:3])
    measured = points.rows.target + points.level[kernel]
    found = []
    for rows in per_group(kernel):
        args, one = (relative[rows], spread[rows], measured[rows]), np.zeros(len(rows), int)
        found.append(metrics.evaluate(*args, one) | {"mape": metrics.mape(absolute[rows], measured[rows], one)})
        if not np.isfinite(spread[rows]).all():  # it does not know its spread
            found[-1]["coverage80"] = float("nan")
    names = [name for name in found[0] if name != "spearman_median"]  # of a single kernel it is `spearman`
    return {name: [f[name] for f in found] for name in names}


def cost(make: Make, train: Paths, held: Paths) -> dict[str, float]:
    """Seconds to fit all of `train`, and microseconds a schedule, by batch: to predict all its prefixes, and to imagine one
    more action and judge it.
    """
    simulator, began = make(), time.perf_counter()
    simulator.fit(train)
    found = {"trials": float(len(train)), "train_seconds": time.perf_counter() - began}
    able = held.take(held.length > 0)
    for batch in BATCHES:
        some = able.take(np.resize(np.arange(len(able)), batch))
        root, action = simulator.embed(some.cut(0)), some.actions[:, 0]
        found[f"predict_us_{batch}"] = 1e6 / batch * _median_seconds(partial(simulator.predict, some))
        step = partial(_imagined, simulator, root, action)
        found[f"step_us_{batch}"] = 1e6 / batch * _median_seconds(step)
    return found


def _imagined(simulator: PathSimulator, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
    return simulator.judge(simulator.advance(embedding, action))[0]


def _median_seconds(call: Callable[[], object]) -> float:
    call()  # captures and caches
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def learned(make: Make, train: Paths, held: Paths, trials: int, seed: int) -> dict[str, float]:
    """Fitted on that many trials: pairwise accuracy and top-1 on the held-out kernels."""
    simulator, some = make(), drawn(train, trials, np.random.default_rng(seed))
    simulator.fit(some)
    found = scores(simulator, held)
    return {"trials": len(some)} | {name: float(np.nanmean(found[name])) for name in ("pairwise", "top1")}


def drawn(paths: Paths, trials: int, rng: np.random.Generator) -> Paths:
    """All paths of as few random kernels as make up that many trials; more trials hold the kernels of fewer."""
    order = rng.permutation(np.unique(paths.kernel))
    counts = np.bincount(paths.kernel)[order]
    return paths.take(np.isin(paths.kernel, order[: int(np.searchsorted(np.cumsum(counts), trials)) + 1]))


def noisy(make: Make, train: Paths, held: Paths, seed: int) -> dict[str, float]:
    """The noisy television (`sims.checks.noisy_tv`)."""
    return checks.noisy_tv(make, train, held, np.random.default_rng(seed))


def idled(
    make: Make, train: Paths, held: Paths, idle: np.ndarray, held_idle: np.ndarray, seed: int
) -> dict[str, float]:
    """How fast the null action is learned: fitted on few trials, some of them with an action that changes nothing, how far
    it and a real one move the time on the held-out kernels. idle [K, F] is of the kernels of `train`.
    """
    simulator, rng = make(), np.random.default_rng(seed)
    few = drawn(train, IDLE_TRIALS, rng)
    simulator.fit(checks.with_idle(few, idle, IDLE_SHARE, rng))
    found = checks.null_action(simulator, held, held_idle)
    return {"trials": len(few), "idle": found["idle"], "real": found["real"]}
