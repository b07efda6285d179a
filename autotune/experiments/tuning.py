"""`python -m autotune.experiments.tuning with program=resnet trials=16`: tune an example network, as a run to be replayed."""

from __future__ import annotations

import math
import sys
from typing import Any

from sacred.run import Run

from autotune.api import check_checkpoint
from autotune.budget import Budget
from autotune.experiments import (
    Session,
    check_limit,
    check_names,
    check_types,
    command_line,
    finished,
    make_experiment,
)
from autotune.experiments.inputs import keep_guide, program_of
from autotune.guide import Guide
from autotune.report import Report
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


def tune_program(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """Tune one program from empty records; the figures that a replay must repeat."""
    check_types(DEFAULTS, settings)
    check_limit(settings, "seconds")
    check_names("strategy", [settings["strategy"]], STRATEGIES)
    check_checkpoint(settings["checkpoint"], settings["strategy"])
    program = program_of(session, settings["program"])
    guide = Guide.load(keep_guide(session, settings["checkpoint"])) if settings["strategy"] in NEEDS_GUIDE else None
    tuner = Tuner(session.records(), session.measurer, session.renderer, trials=settings["trials"],
                  strategy=settings["strategy"], guide=guide, seed=settings["seed"])  # fmt: skip
    kernels = list(program.kernels.values())
    recorded = session.clock.recorded
    budget = Budget(settings["trials"] * len(kernels), settings["seconds"])
    if recorded:
        budget.stop_after, budget.answers = recorded["trials"], recorded.get("answers")
    results, _ = tuner.run(kernels, program.calls, budget)
    session.clock.ended |= {"trials": budget.spent, "answers": budget.answered}
    report = Report(session.device, budget.elapsed(), session.measurer.compiled, results)
    print(report.table())
    figures = report.to_json()
    del figures["seconds"]
    return figures


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> float:
    figures = finished(_run, _config, tune_program)
    return figures["tuned_ms"] / figures["hand_coded_ms"] if figures["hand_coded_ms"] else math.nan


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
