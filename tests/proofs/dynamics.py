"""Random schedules over the corpus, step by step: do the batched dynamics, the scalar ones and tinygrad agree on all of them?

    python tests/proofs/dynamics.py --steps 100000 --json benchmarks/dynamics.json

After every step the loops of `autotune.batch` (kinds and sizes) are held against the Scheduler to which tinygrad applied
the same Opt, and all of the state, its mask and its summary against `autotune.space` and `autotune.features`. Legality is
tried on tinygrad for a few actions of every state, since all 202 take longer than everything else. A walk's last state is
read again from tinygrad's AST, strides included. CUDA is tinygrad's Python renderer for sm_80 with CUDA's limits.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from common import conclude
from tinygrad import Context
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import CUDARenderer
from tinygrad.runtime.ops_python import PythonRenderer
from tqdm import tqdm

from autotune import corpus, space
from autotune.batch import KINDS, NONE, Batch
from autotune.compiler import Renderer, Scheduler, apply_opt, renderer_of, root_scheduler
from autotune.errors import DeviceError, IllegalAction
from autotune.features import summary
from autotune.kernel import Kernel
from autotune.space import ACTIONS, MAX_STEPS, State, legal_mask, root_state, step

TARGETS = ("CPU", "CL", "CUDA")
WALKS = 128  # side by side
TRIED = 4  # actions of each state whose legality is tried on tinygrad
ASKED = 0.01  # share of the steps for which the batch may have asked tinygrad
TF32_EVERY = 4  # of so many rounds, one allows it: then the corpus's float32 kernels have tensor cores


def renderer(target: str) -> Renderer:
    if target != "CUDA":
        return renderer_of(target)
    python = PythonRenderer(Target.parse("PYTHON::sm_80"))
    python.shared_max, python.global_max = CUDARenderer.shared_max, CUDARenderer.global_max
    return python


def renderers(named: Sequence[str] | None) -> tuple[dict[str, Renderer], list[str]]:
    """Of each target, and a line about each that is left out: one of TARGETS that cannot be opened here. Raises DeviceError for
    one that was named."""
    opened: dict[str, Renderer] = {}
    left_out: list[str] = []
    for target in named or TARGETS:
        try:
            opened[target] = renderer(target)
        except DeviceError as error:
            if named:
                raise
            left_out.append(f"{target} left out: {error}")
    return opened, left_out


DIFFERENCES = ("loops unlike tinygrad's", "legality unlike tinygrad's", "strides unlike tinygrad's", "states unlike space.py's",
               "masks unlike space.py's", "summaries unlike features.py's")  # fmt: skip


class Comparison:
    """Counts what was compared, and keeps the first differences in words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []

    def differ(self, what: str, state: State, detail: Any) -> None:
        self.counts[what] += 1
        if self.counts[what] <= 3:
            self.notes.append(f"{what}: {state.kernel.name}, {state.schedule}: {detail}")

    def loops(self, batch: Batch, states: Sequence[State], schedulers: Sequence[Scheduler]) -> None:
        for row, (state, scheduler) in enumerate(zip(states, schedulers, strict=True)):
            axes = [values[row].tolist() for values in batch.axes]
            ours = [(KINDS[kind], size, factor, *flags, strides[: len(state.accesses)])
                    for kind, size, factor, _, *flags, strides in zip(*axes, strict=True) if kind != NONE]  # fmt: skip
            scalar = [
                (a.kind, a.size, a.factor, a.threadable, a.groupable, a.masked, list(a.strides)) for a in state.axes
            ]
            if [axis[:2] for axis in ours] != [(r.arg[-1], int(r.vmax) + 1) for r in scheduler.rngs]:
                self.differ("loops unlike tinygrad's", state, ours)
            if ours != scalar:
                self.differ("states unlike space.py's", state, (ours, scalar))

    def numbers(self, batch: Batch, states: Sequence[State]) -> np.ndarray:
        """Masks and summaries; returns the masks [B, A]."""
        mask, features = batch.legal_mask(), batch.summary()
        for row, state in enumerate(states):
            wrong = np.flatnonzero(mask[row] != legal_mask(state))
            if len(wrong):
                self.differ("masks unlike space.py's", state, [ACTIONS[i] for i in wrong])
            expected = summary(state)
            if not np.allclose(features[row], expected, rtol=1e-6, atol=1e-6):
                self.differ("summaries unlike features.py's", state, np.abs(features[row] - expected).argmax())
        return mask

    def legality(
        self, batch: Batch, states: Sequence[State], schedulers: Sequence[Scheduler], rng: random.Random
    ) -> None:
        """Half of the actions tried are thought legal, half are any."""
        for row, (state, scheduler) in enumerate(zip(states, schedulers, strict=True)):
            legal = np.flatnonzero(batch.legal[row]).tolist()
            some = rng.sample(legal, min(TRIED // 2, len(legal))) + rng.sample(range(len(ACTIONS) - 1), TRIED // 2)
            for action in some:
                self.counts["actions tried on tinygrad"] += 1
                if accepts(scheduler, action) != batch.legal[row, action]:
                    self.differ("legality unlike tinygrad's", state, ACTIONS[action])

    def ends(self, states: Sequence[State], schedulers: Sequence[Scheduler]) -> None:
        """`space.py`'s states at the end of walks, with which the batch agrees, against tinygrad's ASTs."""
        for state, scheduler in zip(states, schedulers, strict=True):
            again = space._state_of(state.kernel, state.schedule, scheduler)
            if all(a.is_linear for a in again.accesses):
                self.counts["ends with strides read again"] += 1
                if [a.strides for a in state.axes] != [a.strides for a in again.axes]:
                    self.differ("strides unlike tinygrad's", state, again.axes)


def accepts(scheduler: Scheduler, action: int) -> bool:
    try:
        apply_opt(scheduler, ACTIONS[action])
    except IllegalAction:
        return False
    return True


def walk(kernels: Sequence[Kernel], renderer: Renderer, rng: np.random.Generator, found: Comparison) -> None:
    """One random schedule of each kernel, all side by side, every step compared."""
    states = [root_state(k, renderer) for k in kernels]
    schedulers = [root_scheduler(k.ast, renderer) for k in kernels]
    batch, tries = Batch.of(states), random.Random(int(rng.integers(1 << 32)))
    for _ in range(MAX_STEPS + 1):
        mask = found.numbers(batch, states)[:, :-1]
        going = mask.any(1)
        found.ends(list(compress(states, ~going)), list(compress(schedulers, ~going)))
        if not going.any():
            return
        actions = (mask * rng.random(mask.shape)).argmax(1)[going]
        batch = batch.take(going).step(actions)
        states = [step(s, int(a)) for s, a in zip(compress(states, going), actions, strict=True)]
        schedulers = [apply_opt(s, ACTIONS[a]) for s, a in zip(compress(schedulers, going), actions, strict=True)]
        found.loops(batch, states, schedulers)
        found.legality(batch, states, schedulers, tries)
        found.counts.update(f"steps by {ACTIONS[a].op.name}" for a in actions)
        found.counts["steps"] += len(actions)


def rounds(kernels: Sequence[Kernel], rng: np.random.Generator) -> Iterator[list[Kernel]]:
    """All kernels without end, each time in another order, WALKS at once."""
    while True:
        order = rng.permutation(len(kernels))
        yield from ([kernels[i] for i in order[n : n + WALKS]] for n in range(0, len(order), WALKS))


def prove(target: str, own: Renderer, steps: int, seed: int, deadline: float) -> Comparison:
    """Walks over the whole corpus until there are that many steps."""
    found, rng = Comparison(), np.random.default_rng([seed, *target.encode()])
    with Context(NUM_CPU_THREADS=8), tqdm(total=steps, desc=target) as bar:  # THREAD is legal, whatever the machine
        for turn, kernels in enumerate(rounds(corpus.load(), rng)):
            with Context(ALLOW_TF32=turn % TF32_EVERY == 0):
                walk(kernels, own, rng, found)
            bar.update(found.counts["steps"] - bar.n)
            if found.counts["steps"] >= steps or time.monotonic() > deadline:
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="for each target (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", help=f"default: those of {', '.join(TARGETS)} that can be opened here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="for each target: then the steps left are missing")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: dict[str, tuple[int, int]] = {}
    try:
        opened, notes = renderers(args.targets)
    except DeviceError as error:
        raise SystemExit(str(error)) from None
    for target, own in opened.items():
        found = prove(target, own, args.steps, args.seed, time.monotonic() + 60 * args.minutes)
        steps, asked = found.counts["steps"], found.counts["steps by TC"]
        figures |= {
            f"{target}: {name}": count for name, count in sorted(found.counts.items()) if name not in DIFFERENCES
        }
        bars |= {f"{target}: {name}": (found.counts[name], 0) for name in DIFFERENCES}
        bars |= {f"{target}: steps missing": (max(0, args.steps - steps), 0)}
        bars |= {f"{target}: steps that asked tinygrad": (asked, int(ASKED * steps))}
        notes += [f"{target}: {note}" for note in found.notes]
    raise SystemExit(conclude(args.json, figures, bars, notes))


if __name__ == "__main__":
    main()
