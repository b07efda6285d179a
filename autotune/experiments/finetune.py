"""`python -m autotune.experiments.finetune with program=net.py`: a guide practises on the kernels of one program.

Its checkpoint, `runs/N/finetuned/best`, is used only where it is named: `curves with program=net.py
"strategies=['auto', 'auto-tuned']" "guides=[['auto-tuned', 'runs/N/finetuned/best']]"` says what it is worth. `with anew=True` makes a specialist: its policy
begins from nothing. What `tune --finetune` does is the same, without a record of how it went.
"""

from __future__ import annotations

import sys
from typing import Any

from sacred.run import Run

from autotune.experiments import Session, check_types, command_line, finished, make_experiment
from autotune.experiments.inputs import digest, keep_guide, program_of
from autotune.finetune import FineTuner, gentle, specialist
from autotune.guide import Guide

experiment = make_experiment("finetune")
DEFAULTS: dict[str, Any] = {
    "program": "resnet",  # one of programs.PROGRAMS, or a script
    "minutes": 3.0,
    "checkpoint": "",  # empty: the newest of `make train`, else the one that ships; "shipped": that one in any case
    "anew": False,  # whether its policy begins from nothing
    "seed": 0,
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"program": "matmul", "minutes": 0.5})


def practise(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune one guide; the figures that a replay must repeat."""
    settings = {**DEFAULTS, **settings}  # a run of an earlier version lacks what came later
    check_types(DEFAULTS, settings)
    program, seed = program_of(session, settings["program"]), settings["seed"]
    known = Guide.load(keep_guide(session, settings["checkpoint"]))
    guide = specialist(known, seed) if settings["anew"] else gentle(known)
    out = session.out / "finetuned"
    out.mkdir(exist_ok=True)
    session.clock.restart()  # what a script took to run is not taken from the minutes
    tuner = FineTuner(guide, list(program.kernels.values()), settings["minutes"], seed, session.records(), session.measurer,
                      session.renderer, session.device, out, session.clock, session.log)  # fmt: skip
    figures = tuner.run()
    return {**figures, "checkpoint": digest(out / "best.safetensors")}


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    return finished(_run, _config, practise)


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
