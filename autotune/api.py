"""The one call of a user's program: tune what was captured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from autotune.budget import Budget
from autotune.capture import Program
from autotune.compiler import default_device, renderer_of, without_beam
from autotune.errors import UsageError
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel
from autotune.measuring.runner import Runner
from autotune.records import Records, default_path
from autotune.report import Report
from autotune.search import DEFAULT, NEEDS_GUIDE, STRATEGIES
from autotune.tuner import Tuner


def tune(
    kernels: Program | Sequence[Kernel], *, records: str | os.PathLike[str] | Records | None = None, trials: int = 16,
    seconds: float | None = None, strategy: str = DEFAULT, checkpoint: str | os.PathLike[str] | Guide | None = None,
    seed: int = 0, progress: bool = True, beam: int = 0,
) -> Report:  # fmt: skip
    """Tune kernels (those of `capture()`, or a list) on the device that DEV names, and return a Report.

    `trials` times the number of kernels is allowed in all, `seconds` bounds the wall time; what is on record already is not spent
    again. `beam` lets a beam search of that width go on where the trials end. Without a checkpoint a learned strategy takes the
    newest of this backend, else one that ships. Raises AutotuneError subclasses only.
    """
    check_checkpoint(checkpoint, strategy)
    with without_beam():  # neither what runs here nor our own nets shall be searched by tinygrad's BEAM
        device = default_device()
        chosen = kernels.for_device(device) if isinstance(kernels, Program) else list(kernels)
        calls = kernels.calls if isinstance(kernels, Program) else {k.key: 1 for k in chosen}
        renderer = renderer_of(device)
        guide = checkpoint if isinstance(checkpoint, Guide) else guide_for(strategy, checkpoint, device)
        with contextlib.ExitStack() as stack:
            opened = records if isinstance(records, Records) else stack.enter_context(
                contextlib.closing(Records(records or default_path())))  # fmt: skip
            runner = stack.enter_context(contextlib.closing(Runner(device)))
            opened.add_fingerprint(runner.fields)
            tuner = Tuner(opened, runner, renderer, trials=trials, strategy=strategy, guide=guide, seed=seed, progress=progress,
                          beam=beam)  # fmt: skip
            budget = Budget(trials * len(chosen), seconds)
            results, done = tuner.run(chosen, calls, budget)
            stopped, left = "" if done else "seconds", tuner.left(chosen, budget)
            return Report(device, budget.elapsed(), runner.compiled, results, stopped, left)


def guide_for(strategy: str, named: str | os.PathLike[str] | None, device: str) -> Guide | None:
    """The checkpoint that is named, else the one that `find_checkpoint` finds; None for a strategy that uses none. Raises UsageError."""
    path = Path(named) if named else None
    return Guide.load(find_checkpoint(path, device)) if strategy in NEEDS_GUIDE else None


def check_checkpoint(checkpoint: str | os.PathLike[str] | Guide | None, strategy: str) -> None:
    """Raises UsageError for a checkpoint that is named for a strategy which uses none."""
    if checkpoint and strategy in STRATEGIES and strategy not in NEEDS_GUIDE:
        raise UsageError(f"strategy {strategy!r} uses no checkpoint, so there is nothing to name one for")
