"""Running programs with their tuned schedules: in this process, in a script, or through tinygrad's own BEAM cache."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tinygrad.helpers import CACHELEVEL, diskcache_get, diskcache_put

from autotune.compiler import (
    KernelInfo,
    Renderer,
    UOp,
    apply_opt,
    canonical,
    default_device,
    fingerprint,
    on_device,
    renderer_of,
    root_scheduler,
    settings,
    substitute_schedules,
    targets,
)
from autotune.errors import IllegalAction, RecordsError, UsageError
from autotune.kernel import Kernel, Schedule
from autotune.measuring.bench import PROTOCOL
from autotune.records import History, Records, default_path, fingerprint_id

Settings = tuple[str, ...]  # the device, and the values of those that change code


class Applied:
    """Counts what happened while schedules were applied."""

    def __init__(self) -> None:
        self.tuned = 0  # kernels that took a tuned schedule, each once for a device
        self.plain = 0  # those of which there is none; kernels on views at any offset are not looked up, and in neither


@contextlib.contextmanager
def apply(records: str | os.PathLike[str] | Records | None = None) -> Iterator[Applied]:
    """While active, kernels with an accepted schedule for this very device and settings are compiled with it.

    Everything else runs as tinygrad would run it. A TinyJit keeps the schedules that it was captured with. Of open records
    the file is opened once more: the program may compile in another thread than the one that they belong to.
    """
    path = records.absolute if isinstance(records, Records) else records or default_path()
    winners: dict[Settings, dict[str, Schedule]] = {}
    chosen: dict[tuple[UOp, Settings], Schedule | None] = {}
    applied = Applied()

    def schedule_of(raw: UOp, renderer: Renderer, device: str) -> Schedule | None:
        now = device, targets(), *settings().values()  # a Context inside the block may change them
        if (raw, now) not in chosen:
            if now not in winners:
                winners[now] = _winners(opened, device)
            chosen[raw, now] = _found(winners[now], raw, renderer)
            applied.tuned += chosen[raw, now] is not None
            applied.plain += chosen[raw, now] is None
        return chosen[raw, now]

    with contextlib.closing(Records(path, read_only=True)) as opened, substitute_schedules(schedule_of):
        yield applied


def _winners(records: Records, device: str) -> dict[str, Schedule]:
    """What is served on a device; nothing, and a line that says why, where the file is damaged."""
    try:
        return records.winners(fingerprint_id(fingerprint(device)), PROTOCOL)
    except RecordsError as error:
        print(f"autotune: {error}; the program runs as tinygrad would run it", file=sys.stderr)
        return {}


def _found(winners: Mapping[str, Schedule], raw: UOp, renderer: Renderer) -> Schedule | None:
    """The schedule on record for a kernel. None where there is none, or where tinygrad would refuse it after all: no program
    shall fail because of a record."""
    if not winners:
        return None
    try:
        kernel = Kernel.from_ast(canonical(raw, renderer))
    except IllegalAction:
        return None
    schedule = winners.get(kernel.key)
    return schedule if schedule is not None and _is_legal(schedule, kernel, renderer) else None


def _is_legal(schedule: Schedule, kernel: Kernel, renderer: Renderer) -> bool:
    """Whether tinygrad takes a schedule that is on record: a file of another machine, or a damaged one, may hold any."""
    try:
        functools.reduce(apply_opt, schedule, root_scheduler(kernel.ast, renderer))
    except IllegalAction:
        return False
    return True


def export_beam(records: Records, width: int) -> int:
    """Write all accepted schedules into tinygrad's BEAM cache under `width`; returns how many.

    Kernels without an accepted schedule, or with one that tinygrad refuses, get their hand-coded one, so that BEAM=`width`
    searches nothing at all; but those that could not be measured, of which nothing is known, and those of which the cache holds
    what BEAM has found itself: nothing that an earlier export can have put there, and nothing refuted.
    """
    device = default_device()
    renderer, own = renderer_of(device), fingerprint_id(fingerprint(device))
    winners = records.winners(own, PROTOCOL)
    exported = 0
    for kernel in records.kernels():
        history, accepted = records.history(kernel.key, own), records.accepted(kernel.key, own)
        schedule = _to_export(kernel, history, winners.get(kernel.key), accepted, width, renderer)
        if schedule is not None:
            write_beam_cache(kernel.ast, schedule, width, renderer)
            exported += 1
    return exported


def _to_export(kernel: Kernel, history: History, winner: Schedule | None, accepted: set[Schedule], width: int,
               renderer: Renderer) -> Schedule | None:  # fmt: skip
    if winner is not None and _is_legal(winner, kernel, renderer):
        return winner
    hand = history.hand_coded
    if hand is None or not _is_legal(hand.schedule, kernel, renderer):
        return None
    own = {hand.schedule} | accepted | history.refuted
    return None if read_beam_cache(kernel.ast, width, renderer) - own else hand.schedule


# **** tinygrad's own BEAM cache ****


def write_beam_cache(ast: UOp, schedule: Schedule, width: int, renderer: Renderer) -> None:
    """Put a schedule where tinygrad's BEAM=`width` looks first, so that BEAM serves it and searches nothing. Raises UsageError
    where tinygrad keeps no cache."""
    if CACHELEVEL < 1:
        raise UsageError("tinygrad keeps no cache while CACHELEVEL is 0, so nothing can be exported: set another")
    for key in _beam_keys(ast, width, renderer):
        diskcache_put("beam_search", key, list(schedule))


def read_beam_cache(ast: UOp, width: int, renderer: Renderer) -> set[Schedule]:
    """What BEAM=`width` would be served of this kernel: nothing, or what it has found, or what was put there."""
    found = (diskcache_get("beam_search", key) for key in _beam_keys(ast, width, renderer))
    return {tuple(schedule) for schedule in found if schedule is not None}


def _beam_keys(ast: UOp, width: int, renderer: Renderer) -> list[dict[str, Any]]:
    searched = on_device(ast, renderer).replace(arg=KernelInfo(beam=width))
    key = {"ast": root_scheduler(searched, renderer).ast.key, "amt": width, "device": renderer.target.device,
           "suffix": renderer.suffix}  # fmt: skip
    return [{**key, "allow_test_size": allow_test_size} for allow_test_size in (True, False)]
