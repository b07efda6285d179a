"""tools/carry.py and tools/learn_world.py: what is asked for is learned anew, everything else stays."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from agents import checkpoint
from agents.learner import without_moments
from autotune import corpus
from autotune.compiler import renderer_of
from autotune.data import Dataset, add_shipped
from autotune.errors import UsageError
from autotune.files import DATA
from autotune.guide import Guide
from autotune.memory import Memory
from sims.heads import HeadsConfig

SOURCE = DATA / "guide-cpu"


def part(arrays, prefix):
    return {name: array for name, array in arrays.items() if name.startswith(prefix)}


@pytest.fixture
def few(monkeypatch):
    """Twelve training kernels in place of all."""
    kernels = corpus.load("train")[:12]
    monkeypatch.setattr(corpus, "load", lambda split: kernels)
    return kernels


@pytest.fixture
def hasty(tmp_path):
    """The guide that ships, but that it fits its nets and trees in seconds."""
    guide = Guide.load(SOURCE)
    nets, trees = guide.simulator.nets, guide.simulator.trees
    nets.config, trees.config = replace(nets.config, steps=20), replace(trees.config, rounds=5)
    about = json.loads(SOURCE.with_suffix(".json").read_text())
    guide.save(tmp_path / "hasty", {name: about[name] for name in ("backend", "draft", "updates", "validation")})
    return tmp_path / "hasty"


def test_policies_stay_and_simulators_and_memory_are_of_the_devices_trials(tool, few, hasty, cl, tmp_path):
    told = tool("carry").carry(hasty, tmp_path / "carried", "CL", policy_first=True)
    data = Dataset(renderer_of("CL"))
    assert told["rows"] == add_shipped(data, "CL", few, guided=True) and told["kernels"] <= 12
    (before, _), (after, about) = checkpoint.load(hasty), checkpoint.load(tmp_path / "carried")
    before = without_moments(before)  # nobody goes on with the training from there
    for kept in ("agent.", "world."):
        assert part(before, kept) and part(before, kept).keys() == part(after, kept).keys()
        assert all(np.array_equal(after[name], array) for name, array in part(before, kept).items())
    assert any(not np.array_equal(after[name], array) for name, array in part(before, "simulator.").items())
    learned = Memory.learn(data).state()
    assert learned and all(np.array_equal(after[f"memory.{name}"], array) for name, array in learned.items())
    description = json.loads((tmp_path / "carried.json").read_text())
    assert (description["backend"], description["carried_from"]) == ("CL", "CPU") and about["updates"] > 0
    assert Guide.load(tmp_path / "carried").policy_first and not Guide.load(hasty).policy_first


@pytest.mark.parametrize("kind", ["linear", "ensemble"])
def test_another_world_is_learned_and_all_else_stays(tool, few, tmp_path, kind):
    """What was learned for planning differs; it is read again as a world of that kind, without a policy of its view."""
    world = tool("learn_world").learn_world(SOURCE, tmp_path / "other", kind, "CPU", 0, 5, HeadsConfig(steps=5))
    (before, _), (after, _) = checkpoint.load(SOURCE), checkpoint.load(tmp_path / "other")
    before = without_moments(before)
    for kept in ("agent.", "simulator.", "memory."):
        assert part(before, kept) and part(before, kept).keys() == part(after, kept).keys()
        assert all(np.array_equal(after[name], array) for name, array in part(before, kept).items())
    found = Guide.load(tmp_path / "other").world
    assert found.kind == kind == world.kind and found.agent is None
    heads = part(after, "world.heads.")
    assert any(not np.array_equal(array, before.get(name)) for name, array in heads.items())
    assert all(np.array_equal(heads[f"world.heads.{name}"], array) for name, array in world.heads.state().items())


@pytest.mark.parametrize(("name", "more"), [("carry", ()), ("learn_world", ("linear",))])
def test_a_device_of_which_no_trials_ship_is_a_clear_error_and_writes_nothing(
    tool, few, tmp_path, monkeypatch, name, more
):
    monkeypatch.setattr("autotune.data.add_shipped", lambda *_, **__: 0)
    with pytest.raises(UsageError, match="no trials ship for CPU"):
        getattr(tool(name), name)(SOURCE, tmp_path / "carried", *more, "CPU")
    assert not list(tmp_path.iterdir())
