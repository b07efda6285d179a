"""Jobs of an experiment in several processes, each kept in a file of its own as soon as it is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotune.compiler import without_beam
from autotune.errors import UsageError

Job = tuple[Any, ...]


def run_jobs(function: Callable[..., dict[str, Any]], jobs: Sequence[Job], settings: dict[str, Any], out: Path,
             label: str) -> list[dict[str, Any]]:  # fmt: skip
    """`function(*job, settings)` of each job, in the order of `jobs`; `settings["processes"]` of them side by side.

    What an earlier run has left in `settings["part"]` is not done again; that its settings were the same is not checked. Where one
    fails, or the user interrupts, those not begun are given up. Raises UsageError where `part` is no run's directory.
    """
    if settings["part"]:
        if not (part := Path(settings["part"])).is_dir():
            raise UsageError(f"no run {part} to go on from; `part` names one of `runs/`")
        for path in part.glob("job-*.json"):
            shutil.copy(path, out / path.name)
    file = {job: out / f"job-{'-'.join(map(str, job))}.json" for job in jobs}
    todo = [job for job in jobs if not file[job].exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings["processes"], spawn, initializer=_end_with_parent) as pool:
        running = {pool.submit(_alone, function, *job, settings): job for job in todo}
        try:
            for done in tqdm(as_completed(running), total=len(todo), desc=label):
                file[running[done]].write_text(json.dumps(done.result()))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else those not begun would be done, and thrown away
            raise
    return [json.loads(file[job].read_text()) for job in jobs]


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
