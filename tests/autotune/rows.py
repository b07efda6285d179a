"""Rows of records for the tests that keep some."""

from __future__ import annotations

from tiny import U4, add_one

from autotune.compiler import Opt, OptOps
from autotune.records import Final, Records, Trial

FIELDS = {"backend": "CPU", "model": "some machine"}
OTHER = {**FIELDS, "model": "another machine"}
TC = Opt(OptOps.TC, 0, (-1, 2, 1))


def trial(schedule=(U4,), samples=(3e-6, 1e-6, 2e-6), verdict="ok", **more) -> Trial:
    return Trial(add_one().key, schedule, verdict, samples, **more)


def fill(records: Records, *trials: Trial) -> str:
    own = records.add_fingerprint(FIELDS)
    for t in trials:
        records.add_trial(own, t, 1)
    return own


def final(accepted: bool, schedule=(U4,), kernel: str = "k") -> Final:
    return Final(kernel, schedule, (1.0, 2.0, 3.0), (4.0, 4.0), (4.0,), accepted)
