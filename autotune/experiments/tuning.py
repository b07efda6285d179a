"""`python -m autotune.experiments.tuning with program=resnet trials=16`: tune an example network, as a run to be replayed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from sacred.run import Run

from autotune.budget import Budget
from autotune.capture import Program
from autotune.experiments import Session, check_names, check_types, command_line, make_experiment, session_of
from autotune.experiments.evaluate import keep_guide
from autotune.guide import Guide
from autotune.kernel import kernel_from_json, kernel_to_json
from autotune.programs import captured
from autotune.report import Report
from autotune.script import kernels_of_script
from autotune.search import NEEDS_GUIDE, STRATEGIES
from autotune.tuner import Tuner

experiment = make_experiment("tuning")
DEFAULTS: dict[str, Any] = {
    "program": "resnet",  # one of programs.PROGRAMS, or a script
    "trials": 16,  # times the number of distinct kernels
    "seconds": None,  # of wall time; None: no limit
    "strategy": "mixed",
    "checkpoint": "",  # empty: the newest of `make train`, else the shipped one
    "seed": 0,
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"program": "matmul", "trials": 2, "strategy": "random"})


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


def tune_program(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """Tune one program from empty records; the figures that a replay must repeat."""
    check_types(DEFAULTS, settings)
    check_names("strategy", [settings["strategy"]], STRATEGIES)
    program = program_of(session, settings["program"])
    guide = Guide.load(keep_guide(session, settings["checkpoint"])) if settings["strategy"] in NEEDS_GUIDE else None
    tuner = Tuner(session.records(), session.measurer, session.renderer, trials=settings["trials"],
                  strategy=settings["strategy"], guide=guide, seed=settings["seed"])  # fmt: skip
    kernels = list(program.kernels.values())
    recorded = session.clock.recorded
    budget = Budget(
        settings["trials"] * len(kernels), settings["seconds"], stop_after=recorded["trials"] if recorded else None
    )
    results, _ = tuner.run(kernels, program.calls, budget)
    session.clock.ended["trials"] = budget.spent
    report = Report(session.device, budget.elapsed(), budget.spent, results)
    print(report.table())
    figures = report.to_json()
    del figures["seconds"]
    return figures


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> float:
    with session_of(_run) as session:
        figures = session.finish(tune_program(session, dict(_config)))["figures"]
        return figures["tuned_ms"] / figures["hand_coded_ms"] if figures["hand_coded_ms"] else math.nan


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
