"""What experiments begin with: checkpoints and programs, copied into the run, so that a replay finds them; and samples of kernels."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from agents.checkpoint import files_of
from autotune.capture import Program
from autotune.errors import UsageError
from autotune.experiments import Session
from autotune.guide import find_checkpoint
from autotune.kernel import Kernel, kernel_from_json, kernel_to_json
from autotune.programs import captured
from autotune.script import kernels_of_script


def keep(checkpoint: Path, target: Path) -> Path:
    """Copy a checkpoint into the run, so that a replay finds it; the copy, unless it stands there already."""
    for source, copy in zip(files_of(checkpoint), files_of(target), strict=True):
        if not copy.exists():
            if not source.exists():
                raise UsageError(f"no checkpoint {source}; name one that `make train` wrote, like runs/1/best")
            shutil.copy(source, copy)
    return target


def keep_guide(session: Session, named: str) -> Path:
    """The checkpoint in the run's own directory; a replay finds it there already."""
    target = session.out / "guide"
    if target.with_suffix(".json").exists():
        return target
    if named == "shipped":
        return keep(find_checkpoint(None, session.device, runs=None), target)
    return keep(find_checkpoint(Path(named) if named else None, session.device, finetuned=False), target)


def program_of(session: Session, name: str) -> Program:
    """The program's kernels: from the run's directory where they stand already (a replay), else captured now."""
    path = session.out / "program.json"
    if not path.exists():
        seen = kernels_of_script(Path(name), session.device) if name.endswith(".py") else captured(name)
        rows = [[seen.calls[k.key], kernel_to_json(k)] for k in seen.for_device(session.device)]
        path.write_text(json.dumps(rows))
    program = Program()
    for calls, data in json.loads(path.read_text()):
        kernel = kernel_from_json(data)
        program.kernels[kernel.key], program.calls[kernel.key], program.devices[kernel.key] = (
            kernel,
            calls,
            {session.device},
        )
    return program


def sample(kernels: list[Kernel], count: int, seed: int) -> list[Kernel]:
    """`count` kernels in a seeded order."""
    order = np.random.default_rng([seed, 2]).permutation(len(kernels))
    return [kernels[i] for i in order[:count]]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
