"""`python -m autotune.experiments.evaluate with checkpoint=runs/1/best`: strategies on held-out kernels, nothing trained."""

from __future__ import annotations

import sys
from typing import Any

from sacred.run import Run

from autotune import corpus
from autotune.evaluation import ALONE, Evaluator, summarise, table, to_json
from autotune.experiments import Session, check_names, check_types, command_line, finished, make_experiment
from autotune.experiments.inputs import keep_guide, sample
from autotune.guide import Guide

experiment = make_experiment("evaluate")
DEFAULTS: dict[str, Any] = {
    "checkpoint": "",  # empty: the newest of `make train`, else the one that ships; "shipped": that one in any case
    "split": "held_out",  # or validation
    "kernels": 24,  # drawn from the split
    "trials": 16,  # for each kernel and strategy
    "strategies": ["mixed", "policy", "random"],
    "minutes": 30.0,  # stops after the kernel under way
    "seed": 0,
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"kernels": 2, "trials": 2, "strategies": ["mixed", "random"]})


def evaluate(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare strategies on a split. The checkpoint is copied into the run, so that a replay finds it."""
    settings = {**DEFAULTS, **settings}  # a run of an earlier version lacks what came later
    check_types(DEFAULTS, settings)
    check_names("strategy", settings["strategies"], ALONE)
    kernels = sample(corpus.load(settings["split"]), settings["kernels"], settings["seed"])
    guide = Guide.load(keep_guide(session, settings["checkpoint"]))
    evaluator = Evaluator(session.records, session.measurer, session.renderer, guide, settings["strategies"],
                          settings["trials"], settings["seed"])  # fmt: skip
    compared = evaluator.compare_all(kernels, over=lambda: session.clock.over("evaluate", 60 * settings["minutes"]))
    print(table(compared))
    return {"summary": summarise(compared), "kernels": to_json(compared)}


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    return finished(_run, _config, evaluate)["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
