"""Trials as training data: which states were measured, and how fast they were.

The trials that ship with the package (`trials-BACKEND.jsonl.gz`, training split only) let learning start before this
machine has measured anything; `python -m autotune.data RECORDS` writes them from a records file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autotune import corpus
from autotune.compiler import Renderer, default_device
from autotune.errors import IllegalAction, UsageError
from autotune.kernel import Kernel, schedule_from_json, schedule_to_json
from autotune.records import Records, Trial
from autotune.space import State, apply_to_state, root_state


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
        """Add a kernel's timed trials. Times of different sources (machines) are never compared with each other."""
        group = self._sources.setdefault(f"{source}/{kernel.key}", len(self._sources))
        root = self._roots.setdefault(kernel.key, root_state(kernel, self.renderer))
        for trial in trials:
            if trial.seconds is None or (group, trial.code_hash) in self._codes:
                continue
            state = root
            try:
                for opt in trial.schedule:
                    state = apply_to_state(state, opt)
            except IllegalAction:  # recorded where more was legal, e.g. on a machine with more threads
                continue
            self._codes.add((group, trial.code_hash))
            self.states.append(state)
            self.log_times.append(math.log2(trial.seconds))
            self.groups.append(group)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.log_times), np.array(self.groups)

    def __len__(self) -> int:
        return len(self.states)


def shipped_path(backend: str) -> Path:
    return corpus.DATA / f"trials-{backend.lower()}.jsonl.gz"


def add_shipped(dataset: Dataset, backend: str, kernels: Sequence[Kernel]) -> int:
    """Add the trials that ship for a backend; returns how many rows they gave (0 where none ship)."""
    path, before = shipped_path(backend), len(dataset)
    if not path.exists():
        return 0
    by_key = {k.key: k for k in kernels}
    with gzip.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            if row["kernel"] in by_key:
                dataset.add(
                    by_key[row["kernel"]], [_trial_from_row(row["kernel"], t) for t in row["trials"]], "shipped"
                )
    return len(dataset) - before


def _trial_from_row(key: str, row: list) -> Trial:
    schedule, micros, code_hash, kind = row
    return Trial(key, schedule_from_json(schedule), "ok", (micros * 1e-6,), code_hash=code_hash, kind=kind)


def export_trials(records: Records, path: Path) -> int:
    """Write the timed trials of training kernels: medians in microseconds, one line a kernel. Returns how many trials."""
    training = {k.key for k in corpus.load("train")}
    fingerprints = records.fingerprints()
    count = 0
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for kernel in records.kernels():
            if kernel.key not in training:
                raise UsageError(
                    f"{records.path} holds {kernel.name}, which is no training kernel: nothing held out may ship"
                )
            for fingerprint in fingerprints:
                trials = [t for t in records.history(kernel.key, fingerprint).trials if t.seconds is not None]
                rows = [
                    [schedule_to_json(t.schedule), float(f"{(t.seconds or 0) * 1e6:.4g}"), t.code_hash, t.kind]
                    for t in trials
                ]
                if rows:
                    line = {"kernel": kernel.key, "fingerprint": fingerprint, "trials": rows}
                    file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
                    count += len(rows)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m autotune.data", description="write the trials that ship with the package"
    )
    parser.add_argument("records", type=Path)
    args = parser.parse_args()
    path = shipped_path(default_device())
    print(f"{export_trials(Records(args.records, read_only=True), path)} trials in {path.name}")


if __name__ == "__main__":
    main()
