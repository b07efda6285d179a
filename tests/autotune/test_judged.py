"""A training is held against what it began with: where it is clearly slower, nobody is led by it who does not name it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_first_policy import trainer_of
from test_never_worse import CPU, Adversary
from tiny import kernel_of
from tinygrad import Tensor

from autotune.evaluation import Comparison, Evaluator
from autotune.experiments.train import BEFORE, beside, judge
from autotune.files import DATA
from autotune.guide import Guide, find_checkpoint
from autotune.records import Records
from autotune.training import Clock

KERNELS = [kernel_of(Tensor.empty(24, n) @ Tensor.empty(n, 16)) for n in (8, 16, 24, 32, 40, 48)]


def comparison(ratio: float) -> Comparison:
    names = "mixed", BEFORE
    return Comparison(KERNELS[0], 1, 4.0, {"mixed": 2.0 * ratio, BEFORE: 2.0}, dict.fromkeys(names, ()),
                      dict.fromkeys(names, True), dict.fromkeys(names, 16))  # fmt: skip


def judged(out: Path, compared: Sequence[Comparison], monkeypatch: pytest.MonkeyPatch) -> dict:
    """Of a run in `out` whose comparison ended so."""
    guide = Guide.load(DATA / "guide-cpu")
    trainer = trainer_of(out, guide)
    trainer.finished, trainer.best = True, 0.0
    trainer.save("best", guide)
    monkeypatch.setattr(Evaluator, "__init__", lambda *_: None)
    monkeypatch.setattr(Evaluator, "compare_all", lambda *_, **__: list(compared))
    session = SimpleNamespace(out=out, records=None, measurer=None, renderer=CPU, clock=Clock())
    return judge(session, trainer, guide, {BEFORE: guide}, KERNELS, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratios", "slower"), [
    ([1.1] * 5, True), ([1.3, 1.02, 1.1, 1.2, 1.05, 0.99], True),  # clearly
    ([1.1] * 4, False), ([1.3, 1.02, 1.1, 1.2, 0.99], False), ([], False),  # too few to tell
    ([1.3, 0.8, 1.2, 0.9, 1.1], False), ([0.9] * 6, False), ([1.0] * 6, False)])  # fmt: skip
def test_who_is_clearly_slower_is_passed_over(ratios, slower, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "1"
    figures = judged(out, [comparison(r) for r in ratios], monkeypatch)
    served = find_checkpoint(None, "CPU", tmp_path)
    assert figures["slower"] == slower and served == (DATA / "guide-cpu" if slower else out / "best")
    assert (
        find_checkpoint(out / "best", "CPU", tmp_path) == out / "best" and Guide.load(out / "best").memory is not None
    )
    told = capsys.readouterr().out
    assert (f"those who name {out / 'best'}" in told) == slower
    assert (f"{len(ratios)} validation kernels" in told) == ("ratio" in figures) == bool(ratios)


def test_the_ratio_by_hand():
    """Geometric: twice and half the time are as long as before. The other way round it is the inverse."""
    assert beside([comparison(2.0), comparison(0.5)]) == (
        pytest.approx(1.0),
        0.75,
    )  # of ++, +-, -+ and -- three are as high
    slow = beside([comparison(1.2), comparison(1.25), comparison(1.44)])
    fast = beside([comparison(1 / 1.2), comparison(1 / 1.25), comparison(1 / 1.44)])
    assert slow == (pytest.approx((1.2 * 1.25 * 1.44) ** (1 / 3)), 1 / 8)
    assert fast == (pytest.approx(1 / slow[0]), 1.0)


@pytest.mark.parametrize(("clock", "kernels"), [({}, 6), ({"judge": 3}, 2)])
def test_two_searches_by_one_guide_take_the_same_time(clock, kernels, tmp_path: Path):
    """Each search begins from empty records, of its own; and as time ends, so does the comparison."""
    guide = Guide.load(DATA / "guide-cpu")
    trainer = trainer_of(tmp_path, guide)
    with ExitStack() as stack:
        files: dict[str, Records] = {}

        def records(name: str) -> Records:
            return files.setdefault(name, stack.enter_context(closing(Records(tmp_path / f"{name}.db"))))

        session = SimpleNamespace(out=tmp_path, records=records, measurer=Adversary(0, 0.0, 0.0), renderer=CPU,
                                  clock=Clock(clock))  # fmt: skip
        figures = judge(session, trainer, guide, {BEFORE: guide}, KERNELS, 3)  # type: ignore[arg-type]
    assert set(files) == {"judge-mixed", f"judge-{BEFORE}", "judge-final"}
    assert [k["trials"] for k in figures["kernels"]] == kernels * [{"mixed": 3, BEFORE: 3}]
    assert figures["ratio"] == figures["by_chance"] == 1.0 and not figures["slower"] and trainer.serves
