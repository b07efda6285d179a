"""A guide's policy, trained further on the kernels of one program (fine-tuned), or from nothing (a specialist).

Simulator, world and memory stay as they are: what ships has taught them, and fitting them again takes minutes. What they get
wrong of these kernels the trials made here correct, as they do in a search.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from agents.ppo import PPO
from autotune.compiler import Renderer, backend_of, renderer_of
from autotune.corrected import Corrected
from autotune.data import Dataset
from autotune.features import ACTION_WIDTH
from autotune.guide import FINETUNED, Guide
from autotune.kernel import Kernel
from autotune.measuring.runner import Measurer, Runner
from autotune.records import FINETUNE, Records
from autotune.search.acquisition import BATCH
from autotune.space import N_ACTIONS, State
from autotune.training import Clock, Log, TrainConfig, Trainer, gently

MEASURE_SHARE = 0.3  # of the time goes to schedules that the guide chooses, before its policy practises
CHECK_KERNELS = 8
LABEL = f"{FINETUNE}/"  # of its trials in the records, before what made them


class FineTuner(Trainer):
    """Trains a guide's policy and nothing else, on kernels of which trials are made here."""

    strategy, batch = "mixed", BATCH  # these trials teach where a search will go, and are told to that search

    def __init__(self, guide: Guide, kernels: Sequence[Kernel], minutes: float, seed: int, records: Records,
                 measurer: Measurer, renderer: Renderer, device: str, out: Path, clock: Clock, log: Log):  # fmt: skip
        config = TrainConfig(minutes=minutes, seed=seed, measure_share=MEASURE_SHARE, train_share=1.0, check_kernels=CHECK_KERNELS,
                             max_updates=guide.agent.updates + TrainConfig.max_updates, world="")  # fmt: skip
        guide.finetuned = True
        both = {"train": list(kernels), "validation": list(kernels)}
        super().__init__(
            config, both, Dataset(renderer), records, measurer, renderer, device, out, clock, log, guide, LABEL
        )

    @property
    def left(self) -> str:
        """Nothing: the checkpoint that it began with is as it was."""
        return ""

    def measure(self) -> None:
        """As in `Trainer`; what is on record of kernels that there was no time for counts, too."""
        super().measure()
        for kernel in self.train_kernels:
            self._learn_of(kernel)

    def fit(self) -> dict[str, float]:
        """The trials so far correct what is believed; nothing is fitted."""
        self.corrected = Corrected(self.guide, self.train_kernels, self.data)
        return {}

    def check(self) -> None:
        """As in `Trainer`; the next one is left out where it would take longer than there is time."""
        began = self.clock.elapsed()
        super().check()
        self.fitting = self.clock.elapsed() - began

    def believed(self, states: Sequence[State]) -> np.ndarray:
        """As in `Trainer`, of the trees alone, corrected."""
        return self.corrected.members(states)

    def remember(self) -> None:
        """The memory stays; the best checkpoint is served from now on."""
        self.finished = True
        self.save("best", Guide.load(self.out / "best"))


def gentle(guide: Guide) -> Guide:
    """A guide whose policy goes on learning where its training had ended."""
    guide.agent.config = gently(guide.agent.config)
    return guide


def specialist(guide: Guide, seed: int) -> Guide:
    """The same guide with a policy that knows nothing yet, and no other."""
    own = guide.agent.config  # a checkpoint holds one shape for both policies
    config = replace(TrainConfig().ppo, hidden=own.hidden, memory=own.memory, anneal_updates=0)
    guide.agent = PPO(guide.state_dim, N_ACTIONS, ACTION_WIDTH, config, seed)
    if guide.world is not None:
        guide.world.agent = None
    return guide


def fine_tune(
    kernels: Sequence[Kernel],
    device: str,
    records: Records,
    guide: Guide,
    minutes: float,
    seed: int,
    name: str,
    runs: Path = Path("runs"),
) -> Path:
    """Train `guide` for some minutes; returns the checkpoint, `RUNS/finetuned-NAME-BACKEND/best`, which replaces an earlier one at the
    end.

    `find_checkpoint` finds it as the newest from then on, but for experiments. Raises TrainingError where learning diverges.
    """
    final, renderer = runs / f"{FINETUNED}{name}-{backend_of(device).lower()}", renderer_of(device)
    final.mkdir(parents=True, exist_ok=True)
    # deeper than `find_checkpoint` looks: what is cut off is never served; and no other run's
    out = Path(tempfile.mkdtemp(prefix="unfinished-", dir=final))
    try:
        with contextlib.closing(Runner(device)) as runner:
            records.add_fingerprint(runner.fields)
            FineTuner(
                gentle(guide), kernels, minutes, seed, records, runner, renderer, device, out, Clock(), lambda *_: None
            ).run()
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    for file in out.iterdir():
        os.replace(file, final / file.name)
    out.rmdir()
    return final / "best"
