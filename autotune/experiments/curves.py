"""`python -m autotune.experiments.curves`: how many trials each strategy needs, on kernels that were never trained on.

Each search starts from empty records and ends after `trials`; see `autotune/curves.py` for what they share. `with
part=runs/3` goes on from what an earlier run has measured and finished; since the figures hold seconds, that is also how it
is repeated, and not by `replay`. `docs/simulators.md` holds the table.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sacred.run import Run
from tqdm import tqdm

from autotune import corpus
from autotune.curves import Curve, Shared, search, summarise, table
from autotune.experiments import Session, command_line, make_experiment, session_of
from autotune.experiments.evaluate import keep_guide
from autotune.experiments.train import sample
from autotune.guide import Guide

experiment = make_experiment("curves")
experiment.add_config({
    "checkpoint": "",  # empty: the newest of `make train`, else the shipped one
    "split": "held_out",  # or validation
    "kernels": 8,  # drawn from the split
    "trials": 64,  # of each search
    "strategies": ["mixed", "planner", "muzero", "sequential", "policy", "evolution", "random"],
    "seeds": 5,
    "part": "",  # directory of an earlier run, whose trials and finished searches are taken over
})  # fmt: skip
experiment.add_named_config("fast", {"kernels": 2, "trials": 3, "strategies": ["mixed", "random"], "seeds": 2})


def compare(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """All searches; each is kept in a file of its own as soon as it is done."""
    if settings["part"]:
        for path in [*Path(settings["part"]).glob("curve-*.json"), *Path(settings["part"]).glob("records.db")]:
            shutil.copy(path, session.out / path.name)
    guide = Guide.load(keep_guide(session, settings["checkpoint"]))
    kernels = sample(corpus.load(settings["split"]), settings["kernels"], 0)
    jobs = [(k, name, seed) for seed in range(settings["seeds"]) for k in kernels for name in settings["strategies"]]
    curves = []
    for kernel, name, seed in tqdm(jobs, desc="searches"):
        path = session.out / f"curve-{name}-{seed}-{kernel.key[:16]}.json"
        if not path.exists():
            shared = Shared(kernel, session.records(), session.measurer)
            found = search(kernel, shared, name, session.renderer, seed, guide, settings["trials"])
            path.write_text(json.dumps(asdict(found)))
        curves.append(Curve(**json.loads(path.read_text())))
    summary = summarise(curves)
    print(table(summary))
    return {"summary": summary, "settings": {k: v for k, v in settings.items() if k != "part"},
            "curves": [asdict(c) for c in curves]}  # fmt: skip


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    with session_of(_run) as session:
        return session.finish(compare(session, dict(_config)))["figures"]["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
