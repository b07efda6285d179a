"""Jobs of an experiment on a recording in several processes, each kept in a file of its own as soon as it is done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agents.checkpoint import replacing
from autotune.compiler import default_device, without_beam
from autotune.errors import UsageError
from autotune.experiments import without
from autotune.recorded import recorded_path

Job = tuple[Any, ...]
# settings that say which jobs there are, and how they are run; `seed` is what sacred draws, which no job asks for
NOT_OF_A_JOB = ("agents", "arms", "trials", "seeds", "seed", "processes", "part")


def run_jobs(function: Callable[..., dict[str, Any]], jobs: Sequence[Job], settings: dict[str, Any], out: Path,
             label: str) -> list[dict[str, Any]]:  # fmt: skip
    """`function(*job, settings)` of each job, in the order of `jobs`; `settings["processes"]` of them side by side.

    What an earlier run has left in `settings["part"]` is not done again where its settings, device and recording were the same;
    what cannot be read, or does not say of what it is, counts as not done. Where a job fails, or the user interrupts, those not
    begun are given up. Raises UsageError where `part` is no run's directory.
    """
    source = source_of(settings)
    if settings["part"]:
        if not (part := Path(settings["part"])).is_dir():
            raise UsageError(f"no run {part} to go on from; `part` names one of `runs/`")
        found = list(part.glob("job-*.json"))
        for path in (alike := [path for path in found if _is_of(path, source)]):
            shutil.copy(path, out / path.name)
        if other := len(found) - len(alike):
            print(f"{other} jobs of {part} are not of these settings, this device and its recording", file=sys.stderr)
    file = {job: out / f"job-{'-'.join(map(str, job))}.json" for job in jobs}
    todo = [job for job in jobs if not _is_of(file[job], source)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings["processes"], spawn, initializer=_end_with_parent) as pool:
        running = {pool.submit(_alone, function, *job, settings): job for job in todo}
        try:
            for done in tqdm(as_completed(running), total=len(todo), desc=label):
                kept = {"source": source, "result": done.result()}
                with replacing(file[running[done]]) as draft:
                    draft.write_text(json.dumps(kept))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else those not begun would be done, and thrown away
            raise
    return [json.loads(file[job].read_text())["result"] for job in jobs]


def source_of(settings: dict[str, Any]) -> str:
    """A digest of all that the result of a job depends on but the code: settings, device, and what is recorded of it."""
    device = default_device()
    heard = without(settings, *NOT_OF_A_JOB)
    total = hashlib.sha256(json.dumps([device, heard], sort_keys=True).encode())
    if (path := recorded_path(device)).exists():
        total.update(path.read_bytes())
    return total.hexdigest()


def _is_of(path: Path, source: str) -> bool:
    """Whether a file holds a job of this source: not where it cannot be read, nor where it is of a version that kept no source."""
    try:
        kept = json.loads(path.read_text())
        return bool(kept["source"] == source and "result" in kept)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with without_beam():  # a worker has its settings from the environment
        return function(*arguments)


def _end_with_parent() -> None:
    """In a worker: end at once when the run is killed, rather than at the end of a job of minutes."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
