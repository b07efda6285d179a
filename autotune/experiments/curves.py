"""`python -m autotune.experiments.curves`: how many trials each strategy needs, on kernels that were never trained on.

Each search starts from empty records and ends after `trials`; see `autotune/curves.py` for what they share. `with
part=runs/3` goes on from what an earlier run has measured and finished; since the figures hold seconds, that is also how it
is repeated, and not by `replay`. `docs/simulators.md` holds the table.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sacred.run import Run
from tqdm import tqdm

from autotune import corpus
from autotune.curves import Curve, Shared, search, summarise, table
from autotune.errors import UsageError
from autotune.experiments import Session, command_line, make_experiment, session_of
from autotune.experiments.evaluate import keep_guide
from autotune.experiments.train import sample
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.programs import captured

experiment = make_experiment("curves")
experiment.add_config({
    "checkpoint": "",  # empty: the newest of `make train`, else the shipped one
    "split": "held_out",  # or validation
    "kernels": 8,  # drawn from the split
    "program": "",  # one of programs.PROGRAMS, whose kernels are taken in place of the split's ...
    "least": 0.01,  # ... but those that take less than this share of its time
    "trials": 64,  # of each search ...
    "more": {},  # ... but of these strategies', by name
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
    if unknown := set(settings["more"]) - set(settings["strategies"]):
        raise UsageError(f"more trials for {', '.join(sorted(unknown))}, which is not among the strategies")
    guide = Guide.load(keep_guide(session, settings["checkpoint"]))
    kernels, calls = kernels_of(session, settings)
    jobs = [(k, name, seed) for seed in range(settings["seeds"]) for k in kernels for name in settings["strategies"]]
    curves = []
    for kernel, name, seed in tqdm(jobs, desc="searches"):
        budget = settings["more"].get(name, settings["trials"])
        path = session.out / f"curve-{name}-{seed}-{budget}-{kernel.key[:16]}.json"
        if not path.exists():
            shared = Shared(kernel, session.records(), session.measurer)
            found = search(kernel, shared, name, session.renderer, seed, guide, budget)
            path.write_text(json.dumps(asdict(found)))
        curves.append(Curve(**json.loads(path.read_text())))
    summary = summarise(curves, calls=calls)
    print(table(summary))
    return {"summary": summary, "calls": calls, "settings": {k: v for k, v in settings.items() if k != "part"},
            "curves": [asdict(c) for c in curves]}  # fmt: skip


def kernels_of(session: Session, settings: dict[str, Any]) -> tuple[list[Kernel], dict[str, int]]:
    """What is searched, and how often each kernel is called. Of a program those that matter, most total time first."""
    if not settings["program"]:
        kernels = sample(corpus.load(settings["split"]), settings["kernels"], 0)
        return kernels, {k.key: 1 for k in kernels}
    program = captured(settings["program"])
    shared = {
        k: Shared(k, session.records(), session.measurer) for k in tqdm(program.for_device(session.device), "baselines")
    }
    seconds = {k: program.calls[k.key] * 2.0**s.hand_coded for k, s in shared.items() if math.isfinite(s.hand_coded)}
    least = settings["least"] * sum(seconds.values())
    kernels = sorted((k for k, t in seconds.items() if t >= least), key=lambda k: -seconds[k])
    return kernels, {k.key: program.calls[k.key] for k in kernels}


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    with session_of(_run) as session:
        return session.finish(compare(session, dict(_config)))["figures"]["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
