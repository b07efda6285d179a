"""Trials as training data: which states were measured, and how fast they were.

The trials that ship with the package (`trials-BACKEND.jsonl.gz`, training split only) let learning start before this
machine has measured anything; `python -m autotune.data RECORDS` writes them from a records file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autotune import corpus, files
from autotune.compiler import Renderer, backend_of, default_device
from autotune.errors import IllegalAction, UsageError, status_of
from autotune.kernel import Kernel, schedule_from_json, schedule_to_json
from autotune.records import Records, Trial
from autotune.space import MAX_STEPS, State, after, root_state


@dataclass
class Dataset:
    """Measured states of many kernels. A binary that was measured twice counts once."""

    renderer: Renderer
    states: list[State] = field(default_factory=list)
    log_times: list[float] = field(default_factory=list)  # log2 seconds
    groups: list[int] = field(default_factory=list)  # kernel index; each source of trials has its own
    _sources: dict[str, int] = field(default_factory=dict)
    _roots: dict[str, State] = field(default_factory=dict)
    _codes: set[tuple[int, str]] = field(default_factory=set)

    def add(self, kernel: Kernel, trials: Iterable[Trial], source: str) -> None:
        """Add a kernel's timed trials, but for schedules of more than MAX_STEPS actions, which hand-coded may be: no path holds them.
        Times of different sources (machines) are never compared with each other."""
        group = self._sources.setdefault(f"{source}/{kernel.key}", len(self._sources))
        root = self._roots.setdefault(kernel.key, root_state(kernel, self.renderer))
        for trial in trials:
            if trial.seconds is None or len(trial.schedule) > MAX_STEPS or (group, trial.code_hash) in self._codes:
                continue
            try:
                state = after(root, trial.schedule)
            except IllegalAction:  # recorded where more was legal, e.g. on a machine with more threads
                continue
            self._codes.add((group, trial.code_hash))
            self.states.append(state)
            self.log_times.append(math.log2(trial.seconds))
            self.groups.append(group)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(log2 seconds [N], groups [N] int)"""
        return np.array(self.log_times), np.array(self.groups)

    def __len__(self) -> int:
        return len(self.states)


def shipped_path(backend: str, guided: bool = False) -> Path:
    """Where trials of a backend ship: those of random schedules, or those that a guide has asked for (`guided`)."""
    return files.DATA / f"{'guided' if guided else 'trials'}-{backend.lower()}.jsonl.gz"


def add_shipped(dataset: Dataset, backend: str, kernels: Sequence[Kernel], guided: bool = False) -> int:
    """Add the trials that ship for a backend; returns how many rows they gave (0 where none ship).

    `guided` adds those that a guide has asked for, too. They teach what a guide gets wrong; but simulators are not to be
    compared on schedules that one of them has chosen.
    """
    before, by_key = len(dataset), {k.key: k for k in kernels}
    for path in (shipped_path(backend), *([shipped_path(backend, guided=True)] if guided else [])):
        for row in files.read_lines(path) if path.exists() else []:
            if row["kernel"] in by_key:
                trials = [_trial_from_row(row["kernel"], t) for t in row["trials"]]
                dataset.add(by_key[row["kernel"]], trials, f"{path.stem} {row.get('source', 1)} {row['fingerprint']}")
    return len(dataset) - before


def shipped_trials(device: str, renderer: Renderer) -> Dataset:
    """All trials of training kernels that ship for a device, a guide's among them. Raises UsageError where there are none."""
    dataset = Dataset(renderer)
    if not add_shipped(dataset, device, corpus.load("train"), guided=True):
        raise UsageError(f"no trials ship for {device}: there is nothing to learn from")
    return dataset


def shipped_kernels(backend: str) -> set[str]:
    """Keys of the kernels of which trials ship for a backend."""
    paths = [path for guided in (False, True) if (path := shipped_path(backend, guided)).exists()]
    return {line["kernel"] for path in paths for line in files.read_lines(path)}


def _trial_from_row(key: str, row: list) -> Trial:
    schedule, micros, code_hash, kind = row
    return Trial(key, schedule_from_json(schedule), "ok", (micros * 1e-6,), code_hash=code_hash, kind=kind)


def export_trials(stores: Sequence[Records], path: Path, backend: str, keep: bool = False, skip: bool = False) -> int:
    """Write the timed trials of training kernels on devices of `backend`: medians in microseconds, one line for a kernel and a
    device. Returns how many trials.

    `keep`: what `path` holds stays, as an earlier source, whose times are not compared with those of the new one. `skip`:
    other kernels than training kernels are left out; else they are a UsageError.
    """
    training = {k.key for k in corpus.load("train")}
    lines = files.read_lines(path) if keep and path.exists() else []
    source = 1 + max((line.get("source", 1) for line in lines), default=0)
    for records in stores:
        for kernel in records.kernels():
            if kernel.key in training:
                lines += _rows_of(records, kernel, source, backend)
            elif not skip:
                raise UsageError(
                    f"{records.path} holds {kernel.name}, which is no training kernel: nothing held out may ship"
                )
    files.write_lines(lines, path)
    return sum(len(line["trials"]) for line in lines)


def _rows_of(records: Records, kernel: Kernel, source: int, backend: str) -> list[dict[str, Any]]:
    """One line for each device of a backend on which the kernel was timed. What was refuted later is left out."""
    lines = []
    for fingerprint, fields in records.fingerprints().items():
        if fields.get("backend") != backend:
            continue
        rows = [
            [schedule_to_json(t.schedule), float(f"{t.seconds * 1e6:.4g}"), t.code_hash, t.kind]
            for t in records.history(kernel.key, fingerprint).good
            if t.seconds is not None
        ]
        if rows:
            lines.append({"kernel": kernel.key, "fingerprint": fingerprint, "source": source, "trials": rows})
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m autotune.data", description="write the trials that ship with the package"
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument(
        "--guided", action="store_true", help="they are trials that a guide, or beam searches, have asked for"
    )
    parser.add_argument("--keep", action="store_true", help="add to what ships already")
    parser.add_argument("--skip", action="store_true", help="leave out kernels that are no training kernels")
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: _ship(args), "nothing was written")


def _ship(args: argparse.Namespace) -> None:
    backend = backend_of(default_device())
    path = shipped_path(backend, args.guided)
    stores = [Records(file, read_only=True) for file in args.records]
    print(f"{export_trials(stores, path, backend, args.keep, args.skip)} trials in {path.name}")


if __name__ == "__main__":
    sys.exit(main())
