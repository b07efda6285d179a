"""The command that gathers what is to be learned from: `collect`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import numpy as np

from autotune import corpus
from autotune.card import card_of
from autotune.collect import collect
from autotune.compiler import default_device, without_beam
from autotune.data import shipped_kernels
from autotune.errors import UsageError
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel
from autotune.measuring.runner import Runner
from autotune.programs import captured
from autotune.records import Records
from autotune.script import check_script, kernels_of_script, say
from autotune.search import NEEDS_GUIDE

SPLIT = "train"  # of the corpus, where none is named


def collect_command(args: argparse.Namespace) -> int:
    """Measure until there is enough or the time is up, then print the data card of everything on record."""
    device = default_device()
    if args.script is not None and args.program is not None:
        raise UsageError("--script or --program, not both")
    if args.unseen and (args.script or args.program):
        raise UsageError("--unseen is for the corpus: no trials ship of a script's or a program's kernels")
    if args.split is not None and (args.script or args.program):
        raise UsageError("--split is of the corpus: a script's or a program's kernels have none")
    guided = NEEDS_GUIDE.intersection(args.strategies)
    if args.checkpoint is not None and not guided:
        raise UsageError(f"{' '.join(args.strategies)}: none of these strategies uses a checkpoint; name one that does")
    if args.script is not None:
        check_script(args.script)
    with (
        contextlib.closing(Records(args.records)) as records,
        contextlib.closing(Runner(device)) as runner,
        without_beam(),  # neither the script nor our own nets shall be searched by BEAM
    ):
        records.add_fingerprint(runner.fields)
        kernels = _some(_kernels(args, device), args.kernels, args.seed)
        guide = Guide.load(find_checkpoint(args.checkpoint, device)) if guided else None
        new = collect(kernels, records, runner, args.per_kernel, args.strategies, args.seed, args.minutes, guide)
        say(f"{new} new trials of {len(kernels)} kernels in {args.records}; the same command goes on from there")
        print(card_of(records, runner.fingerprint).table(), flush=True)
    return 0


def _kernels(args: argparse.Namespace, device: str) -> Sequence[Kernel]:
    if args.program is not None:
        return captured(args.program).for_device(device)
    if args.script is None:
        shipped = shipped_kernels(device) if args.unseen else set()
        return [k for k in corpus.load(args.split or SPLIT) if k.key not in shipped]
    return kernels_of_script(args.script, device).for_device(device)


def _some(kernels: Sequence[Kernel], count: int | None, seed: int) -> Sequence[Kernel]:
    """`count` of them, in the order in which they stand; all where there are no more, or for None."""
    drawn = np.random.default_rng(seed).permutation(len(kernels))[:count]
    return [kernels[i] for i in sorted(drawn)]
