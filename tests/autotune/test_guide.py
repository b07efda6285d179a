"""Checkpoints of the guide: they come back whole, and one that lies about its sizes or numbers is refused in one line."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from agents import checkpoint
from agents.ppo import PPOConfig
from autotune import guide as guide_module
from autotune.compiler import renderer_of
from autotune.errors import UsageError
from autotune.experiments.inputs import keep_guide
from autotune.files import DATA
from autotune.guide import FEATURES, Guide, find_checkpoint
from autotune.space import VOCABULARY, state_after
from sims import EnsembleConfig, TreesConfig

SHAPES = {"nets.p0": (2, 16, 4), "nets.p1": (2, 1, 4), "nets.p2": (2, 4, 4), "nets.p3": (2, 1, 4), "nets.p4": (2, 4, 1),
          "nets.p5": (2, 1, 1), "nets.mean": (6,), "nets.inverse": (6,), "nets.spread": (2,), "trees.feature": (2, 3, 3),
          "trees.threshold": (2, 3, 3), "trees.value": (2, 3, 4), "trees.spread": (2,), "spread": (2,)}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(arrays, meta data) of a small guide, as it would be after training."""
    guide = Guide(
        8,
        6,
        PPOConfig(hidden=4, n_envs=2),
        EnsembleConfig(members=2, hidden=4, layers=2),
        TreesConfig(members=2, depth=2),
        0,
    )
    rng = np.random.default_rng(0)
    guide.simulator.load_state({name: rng.random(shape) for name, shape in SHAPES.items()})
    path = tmp_path_factory.mktemp("guide") / "small"
    guide.save(path, {"backend": "CPU"})
    return checkpoint.load(path)


def test_a_guide_comes_back_whole(saved, tmp_path):
    checkpoint.save(tmp_path / "a", *saved)
    guide = Guide.load(tmp_path / "a")
    guide.save(tmp_path / "b", {"backend": "CPU"})
    arrays, meta = checkpoint.load(tmp_path / "b")
    assert meta == saved[1] and arrays.keys() == saved[0].keys()
    assert all(np.array_equal(arrays[name], array) for name, array in saved[0].items())


def test_what_was_predicted_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch):
    """And is the same when it is asked for again."""
    shipped = Guide.load(DATA / "guide-cpu")
    kernel, cpu = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48)), renderer_of("CPU")
    states = [state_after(kernel, schedule, cpu) for schedule in ((U2,), (U4,), (U2, U2), (U4, U2))]
    before = shipped.members(states), shipped.leaves(states)
    monkeypatch.setattr(guide_module, "REMEMBERED", 2)
    for state in states * 2:
        shipped.members([state])
        shipped.leaves([state])
        assert len(shipped._predicted[shipped.simulator]) <= 4 and len(shipped._leaves) <= 3
    np.testing.assert_allclose(shipped.members(states), before[0], atol=1e-5)
    np.testing.assert_array_equal(shipped.leaves(states), before[1])


@pytest.mark.parametrize("flag", ["policy_first", "finetuned"])
def test_what_is_said_of_a_guide_comes_back_and_is_false_where_nothing_is_said(saved, tmp_path, flag):
    for said, expected in ({flag: True}, True), ({flag: False}, False), ({}, False):
        meta = {name: value for name, value in saved[1].items() if name != flag} | said
        checkpoint.save(tmp_path / "a", saved[0], meta)
        guide = Guide.load(tmp_path / "a")
        guide.save(tmp_path / "b", {"backend": "CPU"})
        assert getattr(guide, flag) is checkpoint.load(tmp_path / "b")[1][flag] is expected


@pytest.mark.parametrize("seed", [20_261_231, 2**63 - 1])
def test_a_guide_of_any_seed_comes_back(saved, tmp_path, seed):
    checkpoint.save(tmp_path / "a", saved[0], {**saved[1], "seed": seed})
    assert Guide.load(tmp_path / "a").seed == seed


def edit(*path, value):
    """Change one value of the meta data."""

    def change(arrays: dict, meta: dict) -> None:
        for name in path[:-1]:
            meta = meta[name]
        meta[path[-1]] = value

    return change


def swap(name: str, make):
    return lambda arrays, meta: arrays.__setitem__(name, make(arrays[name]))


WRONG = {
    "a width that no array has": edit("ppo", "hidden", value=10**6),
    "a width beyond all reason": edit("ppo", "hidden", value=10**12),
    "a wider state": edit("state_dim", value=10**6),
    "no state": edit("state_dim", value=0),
    "more members": edit("simulator", "members", value=10**6),
    "more layers": edit("simulator", "layers", value=10**6),
    "fewer layers": edit("simulator", "layers", value=1),
    "a wider simulator": edit("simulator", "hidden", value=8),
    "another summary": edit("summary_dim", value=7),
    "negative": edit("simulator", "steps", value=-1),
    "nan": edit("ppo", "clip", value=math.nan),
    "infinity": edit("ppo", "lr", value=math.inf),
    "text": edit("ppo", "lr", value="0.1"),
    "a flag for a number": edit("ppo", "n_envs", value=True),
    "a number for a flag": edit("ppo", "memory", value=1),
    "a number for who comes first": edit("policy_first", value=1),
    "unknown setting": edit("ppo", "code", value="x"),
    "no settings": edit("ppo", value=[]),
    "no minibatch": edit("ppo", "minibatches", value=0),
    "batch that does not divide": edit("simulator", "rows_per_kernel", value=3),
    "seed is a list": edit("seed", value=[]),
    "no random state": edit("agent", "rng", value={}),
    "random state of another kind": edit("agent", "rng", "state", value={"state": "x", "inc": 1}),
    "updates is text": edit("agent", "updates", value="many"),
    "agent is a list": edit("agent", value=[]),
    "array is missing": lambda arrays, meta: arrays.pop("agent.parameter/value.bias"),
    "a feature that there is not": swap("simulator.trees.feature", lambda a: a + 6),
    "no trees": lambda arrays, meta: arrays.pop("simulator.trees.value"),
    "deeper trees": edit("trees", "depth", value=3),
    "trees beyond all reason": edit("trees", "depth", value=10**5),
    "nan in a tree": swap("simulator.trees.threshold", lambda a: a * math.nan),
    "no settings of trees": edit("trees", value=None),
    "nan in an array": swap("agent.adam_v/value.bias", lambda a: a * math.nan),
    "infinite in single precision": swap("simulator.spread", lambda a: a * 1e300),
    "whole numbers": swap("agent.parameter/value.bias", lambda a: a.astype(np.int64)),
    "array of another shape": swap("agent.parameter/encoder1.weight", lambda a: a[:1]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_guide_that_does_not_fit_is_refused_in_one_line(saved, tmp_path, case):
    arrays, meta = dict(saved[0]), copy.deepcopy(saved[1])
    WRONG[case](arrays, meta)
    checkpoint.save(tmp_path / "bad", arrays, meta)
    with pytest.raises(UsageError, match="does not fit this program: .*train a new one") as caught:
        Guide.load(tmp_path / "bad")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_another_vocabulary_is_told_briefly(saved, tmp_path):
    for vocabulary in ("of another time" * 100, ["a"] * 10**5, None):
        checkpoint.save(tmp_path / "alien", saved[0], {**saved[1], "vocabulary": vocabulary})
        with pytest.raises(UsageError, match="speaks another vocabulary") as caught:
            Guide.load(tmp_path / "alien")
        assert len(str(caught.value)) < 400


def test_other_features_are_told_as_such(saved, tmp_path):
    checkpoint.save(tmp_path / "older", saved[0], {**saved[1], "features": FEATURES - 1})
    with pytest.raises(UsageError, match=f"features {FEATURES - 1}; this program .*, features {FEATURES}"):
        Guide.load(tmp_path / "older")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"backend": 5}', '{"backend": "CPU"}', "[" * 100_000, '{"draft": NaN}']
)
def test_a_description_that_says_nothing_is_passed_over(tmp_path, text):
    """`find_checkpoint` looks at the JSON of every run."""
    good = {"backend": "CPU:1", "draft": False, "vocabulary": VOCABULARY, "features": FEATURES, "finished": True}
    older = json.dumps({**good, "features": FEATURES - 1})
    for name, content in {"1": json.dumps(good), "2": text, "3": older}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.json").write_text(content)
    assert find_checkpoint(None, "CPU", tmp_path) == tmp_path / "1" / "best"


def test_a_comparison_passes_over_what_was_fine_tuned(tmp_path, monkeypatch):
    """It has practised on the kernels that it would be judged on; for tuning it is the newest like any other."""
    monkeypatch.chdir(tmp_path)
    good = {"backend": "CPU", "draft": False, "vocabulary": VOCABULARY, "features": FEATURES, "finished": True}

    def make(name: str, time: int) -> Path:
        best = Path("runs") / name / "best"
        best.parent.mkdir(parents=True)
        best.with_suffix(".json").write_text(json.dumps(good))
        best.with_suffix(".safetensors").write_bytes(name.encode())
        os.utime(best.with_suffix(".json"), (time, time))
        return best

    def kept(name: str) -> bytes:
        Path(name).mkdir()
        session = SimpleNamespace(out=tmp_path / name, device="CPU")
        return keep_guide(session, "").with_suffix(".safetensors").read_bytes()

    tuned = make("finetuned-resnet", 2)
    assert find_checkpoint(None, "CPU") == tuned
    assert kept("alone") == (DATA / "guide-cpu.safetensors").read_bytes()
    make("1", 1)
    assert find_checkpoint(None, "CPU") == tuned and kept("beside") == b"1"
    heir = make("2", 3)  # of a training that went on from it
    heir.with_suffix(".json").write_text(json.dumps({**good, "finetuned": True}))
    os.utime(heir.with_suffix(".json"), (3, 3))
    assert find_checkpoint(None, "CPU") == heir and kept("later") == b"1"


def test_a_checkpoint_is_loaded_without_initial_weights(monkeypatch: pytest.MonkeyPatch):
    """All of them would be replaced; on a busy machine the decompositions that make them took ten seconds."""

    def decompose(*_: object) -> None:
        raise AssertionError("initial weights are drawn")

    monkeypatch.setattr(np.linalg, "qr", decompose)
    guide = Guide.load(DATA / "guide-cpu")
    assert guide.world is not None and guide.world.agent is not None
    for agent in (guide.agent, guide.world.agent):
        assert np.abs(agent.policy.theta.numpy()).max() > 0.1
