"""Sanity checks of any simulator of paths: what changes nothing moves no time, and what is random draws nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sims.base import PathSimulator, SimulatorError
from sims.flat import transitions
from sims.metrics import pairwise_accuracy
from sims.paths import Paths, Points

NOISY = 0.10  # fraction of the training kernels whose times are made random


def null_action(simulator: PathSimulator, paths: Paths, idle: np.ndarray | None = None) -> dict[str, float]:
    """How far an imagined action moves the relative time: mean absolute, log2 units. The less the better, but for `real`.

    real: the last action of each measured schedule, for scale. zero: a row of zeros after each of them; a simulator may
    know by its make that this is none. same: the steps of `paths` after which the summary is as before, `same_count` of
    them. idle: with idle [K, F], for each kernel a row of an action that would change nothing, such as a split by one,
    after each measured schedule that has room for it; where none was learned from (`with_idle`), it must be told from its
    neighbours. What the data do not have is NaN. Raises SimulatorError where no schedule with an action is measured.
    """
    ends = paths.take(np.isfinite(paths.log_time[np.arange(len(paths)), paths.length]) & (paths.length > 0))
    if not len(ends):
        raise SimulatorError("no measured schedule has an action: there is nothing to hold the null action against")
    row, step = transitions(paths)
    same = (paths.states[row, step] == paths.states[row, step + 1]).all(axis=1)
    row, step = row[same], step[same]
    last, room = ends.length - 1, ends.take(ends.length < paths.widths.steps)
    found = {
        "real": _moved(simulator, ends.cut(last), ends.actions[np.arange(len(ends)), last]),
        "zero": _moved(simulator, ends, np.zeros((len(ends), paths.widths.action), np.float32)),
        "same": _moved(simulator, paths.take(row).cut(step), paths.actions[row, step]),
        "same_count": float(len(row)),
    }
    return found if idle is None else found | {"idle": _moved(simulator, room, idle[room.kernel])}


def with_idle(paths: Paths, idle: np.ndarray, fraction: float, rng: np.random.Generator) -> Paths:
    """Paths to learn the null action from: a `fraction` of those with room have idle [K, F] of their kernel put in at a
    random place, after which summary and time are as before.
    """
    L = paths.widths.steps
    chosen, at = (rng.random(len(paths)) < fraction) & (paths.length < L), rng.integers(0, paths.length + 1)
    place = np.arange(L + 1)
    rows, source = np.arange(len(paths))[:, None], place - (chosen[:, None] & (place > at[:, None]))  # [N, L + 1]
    actions = paths.actions[rows, source[:, :L]]
    actions[chosen, at[chosen]] = idle[paths.kernel[chosen]]
    return replace(paths, actions=actions, states=paths.states[rows, source], log_time=paths.log_time[rows, source],
                   length=paths.length + chosen)  # fmt: skip


def _moved(simulator: PathSimulator, before: Paths, actions: np.ndarray) -> float:
    if not len(before):
        return float("nan")
    z = simulator.embed(before)
    return float(np.abs(simulator.judge(simulator.advance(z, actions))[0] - simulator.judge(z)[0]).mean())


def noisy_tv(
    make: Callable[[], PathSimulator], paths: Paths, held: Paths, rng: np.random.Generator, fraction: float = NOISY
) -> dict[str, float]:
    """Fit a simulator where the times of a `fraction` of the kernels are random, and one without these kernels.

    pairwise and pairwise_without: the accuracy of the two on the kernels `held`. spread_ratio: what the first one says of
    its uncertainty on the random kernels, over the same on the other kernels it was fitted on: where it is large, a
    curious acquisition would be drawn to noise that it can never learn (Burda et al. 2018, Large-scale study of
    curiosity-driven learning: a television with random channels). NaN where a simulator does not know its spread.
    """
    unit = paths.units[paths.kernel]  # the same kernel on another device would still tell its times
    units = np.unique(unit)
    chosen = rng.permutation(units)[: max(1, round(fraction * len(units)))]
    noisy = np.unique(paths.kernel[np.isin(unit, chosen)])
    simulator, without = make(), make()
    told = shuffled(paths, noisy, rng)
    simulator.fit(told)
    without.fit(paths.take(~np.isin(paths.kernel, noisy)))
    points = Points.build(told, told.widths)
    spread = simulator.predict(told).spread[points.path, points.position]
    random = np.isin(told.kernel[points.path], noisy)
    return {
        "kernels": float(len(chosen)),
        "pairwise": _pairwise(simulator, held),
        "pairwise_without": _pairwise(without, held),
        "spread_ratio": float(spread[random].mean() / spread[~random].mean()),
    }


def shuffled(paths: Paths, kernels: np.ndarray, rng: np.random.Generator) -> Paths:
    """The times of each of these kernels, shuffled among its own measured prefixes: random, and spread as before.

    A prefix that several paths share has one time on all of them.
    """
    prefixes, log_time = paths.prefixes(), paths.log_time.copy()
    measured = paths.reached & np.isfinite(log_time)
    for kernel in kernels:
        own = measured & (paths.kernel == kernel)[:, None]
        _, first, which = np.unique(prefixes[own], return_index=True, return_inverse=True)
        log_time[own] = rng.permutation(log_time[own][first])[which]
    return replace(paths, log_time=log_time)


def _pairwise(simulator: PathSimulator, paths: Paths) -> float:
    points = Points.build(paths, paths.widths)
    predicted = simulator.predict(paths).relative[points.path, points.position]
    return pairwise_accuracy(predicted, points.rows.target, points.rows.kernel)
