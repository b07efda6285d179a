"""Fine-tuning to a program: it goes on learning where a finished training had stopped, and its checkpoint is found."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from shell import autotune, fails, folder
from tiny import kernel_of
from tinygrad import Tensor

from agents.learner import Diverged
from autotune import finetune
from autotune.errors import TrainingError
from autotune.files import DATA
from autotune.finetune import fine_tune
from autotune.guide import Guide, find_checkpoint
from autotune.records import Records
from autotune.training import LEARNING_RATE

__all__ = ["folder"]  # the fixture
KERNELS = [kernel_of(Tensor.empty(24, 32) @ Tensor.empty(32, 16)), kernel_of(Tensor.empty(48, 64).sum(1))]


@pytest.mark.slow
def test_a_finished_training_goes_on(tmp_path: Path):
    guide = Guide.load(DATA / "guide-cpu")
    guide.agent.updates = 10 * guide.agent.config.anneal_updates  # the rate has come down to nothing
    assert guide.agent.lr == 0.0
    updates, before = guide.agent.updates, guide.agent.policy.theta.numpy().copy()
    with closing(Records(tmp_path / "records.db")) as records:
        best = fine_tune(KERNELS, "CPU", records, guide, 1.5, 0, "small", tmp_path)
        assert len(records.kernels()) == len(KERNELS)
    tuned, last = Guide.load(best), Guide.load(best.with_name("last"))  # whichever policy is best: it may be the first
    assert best == tmp_path / "finetuned-small-cpu" / "best" == find_checkpoint(None, "CPU", tmp_path)
    assert last.agent.updates > updates and last.agent.lr == LEARNING_RATE
    moved = np.abs(last.agent.policy.theta.numpy() - before).max()
    assert 0 < moved < 0.5
    assert not list(tmp_path.glob("*/unfinished*"))
    assert tuned.world is not None and tuned.world.agent is not None  # as before


@pytest.mark.slow
def test_the_command_tunes_with_what_was_fine_tuned(folder: Path):
    status, out, err = autotune(
        folder, "tune", "--finetune", "1.5", "--trials", "12", "--records", "fine.db", "small.py", timeout=300.0
    )
    assert status == 0 and "kernels stay as tinygrad runs them" in out, err
    assert (folder / "runs" / "finetuned-small-cpu" / "best.json").exists()
    with closing(Records(folder / "fine.db", read_only=True)) as records:
        (own,) = records.fingerprints()
        made = Counter(t.strategy for _, t in records.all_trials(own) if t.kind == "trial")
    assert (
        sum(n for s, n in made.items() if s.startswith("auto/")) == 12
    )  # what fine-tuning took is not taken from these
    assert made["finetune/mixed"] == 8


def test_what_is_cut_off_is_never_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is interrupted leaves the earlier checkpoint where it was."""
    earlier = tmp_path / "finetuned-small-cpu"
    earlier.mkdir()
    for suffix in (".json", ".safetensors"):
        (earlier / f"best{suffix}").write_bytes((DATA / f"guide-cpu{suffix}").read_bytes())

    def cut(trainer):
        assert trainer.guide.finetuned  # as its checkpoint says
        trainer.save("best")
        raise KeyboardInterrupt

    def diverge(trainer):
        raise Diverged("gradient step 3")

    monkeypatch.setattr(finetune.FineTuner, "run", cut)
    with closing(Records(tmp_path / "records.db")) as records:
        with pytest.raises(KeyboardInterrupt):
            fine_tune(KERNELS, "CPU", records, Guide.load(DATA / "guide-cpu"), 1.0, 0, "small", tmp_path)
        monkeypatch.undo()
        for name in ("measure", "fit", "_tick"):
            monkeypatch.setattr(finetune.FineTuner, name, lambda *_: {})
        monkeypatch.setattr(finetune.FineTuner, "practise", diverge)
        with pytest.raises(TrainingError, match="came to nothing: gradient step 3$"):  # and names no file that is gone
            fine_tune(KERNELS, "CPU", records, Guide.load(DATA / "guide-cpu"), 1.0, 0, "small", tmp_path)
        monkeypatch.setattr(records, "add_fingerprint", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fine_tune(KERNELS, "CPU", records, Guide.load(DATA / "guide-cpu"), 1.0, 0, "small", tmp_path)
    assert not list(tmp_path.glob("*/unfinished*"))
    assert list(tmp_path.glob("*/best.json")) == [earlier / "best.json"]
    assert Guide.load(find_checkpoint(None, "CPU", tmp_path)).agent.lr != LEARNING_RATE


def test_a_strategy_without_a_checkpoint_has_nothing_to_fine_tune(folder: Path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert "nothing to fine-tune" in fails(capsys, 2, "tune", "--finetune", "1", "--strategy", "random", "small.py")
