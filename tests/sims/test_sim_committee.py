"""Nets and trees together: each as it would be alone, and their mean no worse than either."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sims import (
    Committee,
    DiffusionConfig,
    EnsembleConfig,
    SimulatorError,
    TransformerConfig,
    Trees,
    TreesConfig,
    metrics,
)
from sims.base import TrainingRows
from sims.toys import WIDTH, World

TREES = TreesConfig(rounds=120)


@pytest.fixture(scope="module")
def committee(train: World, small: EnsembleConfig) -> tuple[Committee, dict[str, float]]:
    fresh = Committee(WIDTH, small, TREES)
    return fresh, fresh.fit(train.features, train.log_time, train.group)


def test_its_members_are_those_of_both(committee, fitted, train: World, held_out: World) -> None:
    trees = Trees(WIDTH, TREES)
    trees.fit(train.features, train.log_time, train.group)
    alone = [fitted[0].predict_members(held_out.features), trees.predict_members(held_out.features)]
    np.testing.assert_array_equal(committee[0].predict_members(held_out.features), np.concatenate(alone))
    assert {**committee[1], **fitted[1]}.keys() == committee[1].keys() == fitted[1].keys()


def test_together_they_are_no_worse_than_either_and_know_their_spread(committee, held_out: World) -> None:
    def score(simulator) -> float:
        return metrics.pairwise_accuracy(simulator.predict(held_out.features)[0], held_out.log_time, held_out.group)

    whole, told = committee
    assert score(whole) > max(score(whole.nets), score(whole.trees)) - 0.02
    assert abs(told["oob_pairwise"] - score(whole)) < 0.06
    said = whole.predict(held_out.features, held_out.group)
    assert 0.65 < metrics.evaluate(*said, held_out.log_time, held_out.group)["coverage80"] < 0.95


def test_steps_shorten_both(train: World, small: EnsembleConfig) -> None:
    short = Committee(WIDTH, small, TREES)
    told = short.fit(train.features, train.log_time, train.group, steps=7)  # of 350
    assert told["steps"] == 7 and short.trees.state()["value"].shape[1] == 3  # 2.4 of 120


def test_each_member_has_kernels_of_its_own(train: World, small: EnsembleConfig) -> None:
    """Of one seed: a tree that had those of a net would err where it errs."""
    rows = TrainingRows.build(train.features, train.log_time, train.group, WIDTH)
    counts, _ = Committee(WIDTH, small, TREES).learn(rows, 1, None)
    assert len(np.unique(counts, axis=0)) == len(counts) == small.members + TREES.members


def test_more_steps_than_configured_make_no_more_trees(train: World, small: EnsembleConfig) -> None:
    longer = Committee(WIDTH, replace(small, steps=3), replace(TREES, rounds=5))
    longer.fit(train.features, train.log_time, train.group, steps=6)
    assert longer.trees.state()["value"].shape[1] == 5


def test_a_deadline_leaves_the_trees_the_share_of_the_nets(train: World, small: EnsembleConfig) -> None:
    """It is over after 7 of the nets' 350 steps: the trees are those of `steps=7`, and nobody asks about the time any more."""
    short, cut = (Committee(WIDTH, small, TREES) for _ in range(2))
    short.fit(train.features, train.log_time, train.group, steps=7)
    asked = iter([*[False] * 6, True])
    told = cut.fit(train.features, train.log_time, train.group, deadline=lambda: next(asked))
    assert told["steps"] == 7 and cut.trees.state()["value"].shape[1] == 3
    np.testing.assert_array_equal(cut.trees.state()["value"], short.trees.state()["value"])


def test_the_trees_have_no_level_of_their_own(small: EnsembleConfig) -> None:
    with pytest.raises(SimulatorError, match=r"TreesConfig\.level \(0\.9\) is not used here"):
        Committee(WIDTH, small, replace(TREES, level=0.9))
    assert Committee(WIDTH, replace(small, level=0.9), replace(TREES, level=0.9)).level == 0.9
    assert Committee(WIDTH, replace(small, level=0.9), TREES).level == 0.9


def test_state_round_trip(committee, held_out: World, small: EnsembleConfig) -> None:
    copy = Committee(WIDTH, small, TREES)
    copy.load_state(committee[0].state())
    for ours, theirs in zip(copy.predict(held_out.features), committee[0].predict(held_out.features), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda s: s.pop("spread"), "wrong names"),
        (lambda s: s.update(extra=s["spread"]), "wrong names"),
        (lambda s: s.update(spread=s["spread"][:1]), "'spread' has shape"),
        (lambda s: s.update(spread=s["spread"] * np.nan), "'spread' holds NaN"),
        (lambda s: s.pop("nets.mean"), "wrong names"),
        (lambda s: s.update({"nets.extra": s["spread"]}), "wrong names"),
        (lambda s: s.pop("trees.value"), "no trees"),
        (lambda s: s.update({"trees.extra": s["spread"]}), "wrong names"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(
    committee, held_out: World, small: EnsembleConfig, harm, message
) -> None:
    """Part of it is right, and not what stands: to take over only that would show."""
    copy, state = Committee(WIDTH, small, TREES), committee[0].state()
    copy.load_state(state)
    before = copy.predict(held_out.features)
    state |= {"nets.p0": 2 * state["nets.p0"], "trees.threshold": state["trees.threshold"] / 2}
    harm(state)
    with pytest.raises(SimulatorError, match=message):
        copy.load_state(state)
    for ours, theirs in zip(copy.predict(held_out.features), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_before_fit(small: EnsembleConfig) -> None:
    with pytest.raises(SimulatorError, match="before fit"):
        Committee(WIDTH, small, TREES).predict(np.zeros((1, WIDTH)))


@pytest.mark.parametrize("config", [EnsembleConfig, TreesConfig, TransformerConfig, DiffusionConfig])
@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, float("nan")])
def test_a_share_that_no_interval_can_hold_is_refused(config, level):
    """1 asks for an infinite spread, 0 for none: known before anything is fitted."""
    with pytest.raises(SimulatorError, match=f"level must be between 0 and 1, not {level}"):
        config(level=level)
