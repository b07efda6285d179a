"""Every trial ever made: what a record is, the file that keeps it, and how files of several machines come together."""

from autotune.records.rows import VERDICTS, fingerprint_id
from autotune.records.schema import SCHEMA
from autotune.records.store import Records, default_path
from autotune.records.trials import BASELINES, BEAM, FINETUNE, Final, History, Trial

__all__ = [
    "BASELINES", "BEAM", "FINETUNE", "SCHEMA", "VERDICTS", "Final", "History", "Records", "Trial", "default_path",
    "fingerprint_id",
]  # fmt: skip
