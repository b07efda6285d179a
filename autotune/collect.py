"""Gather a kernel set's behaviour on this device: `python -m autotune collect`. Resumes where it stopped.

Kernels are visited in a seeded order, again and again, a few schedules at each visit, by one strategy after the other: many
kernels with few schedules each teach more than few kernels with many. Several collectors and tuners may share a records file.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from autotune.compiler import renderer_of
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.measuring.runner import Measurer, Runner, commit, known_of
from autotune.records import History, Records, Trial
from autotune.records.claims import share
from autotune.search import make_strategy

DEFAULT = ("random", "ucb", "greedy", "beam")  # none of them needs to have been trained
STRATEGIES = (
    *DEFAULT,
    "evolution",
    "mixed",
)  # `mixed` gathers where a trained guide would go: what it gets wrong there
VISIT = 8  # trials of a kernel at a time: the preparation of a kernel costs as much as two or three


def collect_kernel(kernel: Kernel, records: Records, measurer: Measurer, device: str, count: int, seed: int,
                   strategy: str = "random", batch: int = 64, guide: Guide | None = None, label: str = "") -> int:  # fmt: skip
    """Measure baselines and schedules of a strategy until `count` trials of this kernel are committed; returns how many were new.
    None of a kernel that cannot even be prepared: each trial would wait for that once more.

    A strategy hears of its trials after each `batch`. `label` is what they are recorded under, in place of its name.
    """
    history = known_of(records, measurer, kernel)
    if _made(history) >= count or not history.runs:  # a run that resumes meets many of the former
        return 0
    search = make_strategy(strategy, kernel, renderer_of(device), seed, guide)
    search.tell(history.trials)
    done = functools.partial(commit_one, records, measurer, kernel, label or strategy, seed)
    missing, new = count - _made(history), 0
    while new < missing and (asked := search.ask(min(batch, missing - new))):
        search.tell(measurer.measure(kernel, asked, None, done))
        new += len(asked)
    return new


def _made(history: History) -> int:
    """All trials, whoever made them: to learn from, all of them count."""
    return sum(trial.kind == "trial" for trial in history.trials)


def commit_one(records: Records, measurer: Measurer, kernel: Kernel, strategy: str, seed: int, trial: Trial) -> None:
    """Store a trial as soon as it is made, with what asked for it."""
    commit(records, measurer, kernel, [replace(trial, strategy=strategy, seed=seed)])


def collect(kernels: Sequence[Kernel], records: Records, runner: Runner, per_kernel: int, strategies: Sequence[str],
            seed: int, minutes: float, guide: Guide | None = None) -> int:  # fmt: skip
    """Visit the kernels until each has `per_kernel` trials, or until the time is up. Returns how many trials were new."""
    deadline, new = time.monotonic() + 60 * minutes, 0
    order = [kernels[i] for i in np.random.default_rng(seed).permutation(len(kernels))]
    places = {kernel.key: place for place, kernel in enumerate(order)}
    done = [_made(records.history(kernel.key, runner.fingerprint)) for kernel in order]

    def in_time() -> bool:
        return time.monotonic() <= deadline

    with tqdm(
        total=per_kernel * len(kernels), initial=sum(done), desc=runner.device, unit="trial", smoothing=0.05
    ) as bar:

        def visit(turn: int, kernel: Kernel) -> None:
            nonlocal new
            if not in_time():
                return
            strategy = strategies[(places[kernel.key] + turn) % len(strategies)]  # each kernel sees them all, in turn
            wanted = min(per_kernel, (turn + 1) * VISIT)
            found = collect_kernel(kernel, records, runner, runner.device, wanted, seed, strategy, VISIT // 2, guide)
            if guide is not None:
                guide.forget()  # what it said of this kernel is not asked for again
            bar.update(found)
            new += found

        for turn in range(-(-per_kernel // VISIT)):
            share(records.absolute, runner.fingerprint, order, functools.partial(visit, turn), in_time)
    return new
