"""A guide of one program: trained further on its own kernels, from trials made here and all that ship."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from autotune import corpus
from autotune.compiler import renderer_of
from autotune.data import Dataset, add_shipped
from autotune.guide import FINETUNED, Guide
from autotune.kernel import Kernel
from autotune.measuring.runner import Runner
from autotune.records import Records
from autotune.training import Clock, TrainConfig, Trainer, gently

MEASURE_SHARE = 0.3  # of the time goes to random schedules of the program's kernels
CHECK_KERNELS = 8


def fine_tune(
    kernels: Sequence[Kernel],
    device: str,
    records: Records,
    guide: Guide | None,
    minutes: float,
    seed: int,
    name: str,
    runs: Path = Path("runs"),
) -> Path:
    """Train `guide` (None: a new one) for some minutes; returns the checkpoint, `RUNS/finetuned-NAME/best`, which replaces an
    earlier one at the end.

    `find_checkpoint` finds it as the newest from then on, but for experiments. Its world stays as it was. Raises UsageError
    where the minutes do not suffice for trials to learn from.
    """
    final, renderer = runs / f"{FINETUNED}{name}", renderer_of(device)
    out = final / "unfinished"  # deeper than `find_checkpoint` looks: what is cut off is never served
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    runner, data = Runner(device), Dataset(renderer)
    records.add_fingerprint(runner.fields)
    add_shipped(data, device, corpus.load("train"), guided=True)
    done = guide.agent.updates if guide else 0
    config = TrainConfig(minutes=minutes, seed=seed, measure_share=MEASURE_SHARE, train_share=1.0, check_kernels=CHECK_KERNELS,
                         max_updates=done + TrainConfig.max_updates, world="")  # fmt: skip
    if guide is not None:
        guide.agent.config = gently(guide.agent.config)
    trainer = Trainer(config, {"train": list(kernels), "validation": list(kernels)}, data, records, runner, renderer, device, out,
                      Clock(), lambda *_: None, guide, "finetune/")  # fmt: skip
    try:
        trainer.run()
    finally:
        runner.close()
    for file in out.iterdir():
        os.replace(file, final / file.name)
    out.rmdir()
    return final / "best"
