"""Settings of a training: bad ones are named, and what the command line named is heard."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import add_one

from autotune.compiler import renderer_of
from autotune.errors import UsageError
from autotune.experiments import command_line, replay, train
from autotune.experiments.inputs import keep
from autotune.files import DATA
from autotune.guide import Guide
from autotune.training import LEARNING_RATE


@pytest.mark.parametrize(("changed", "message"), [
    ({"minutes": "20m"}, "bad setting minutes: '20m' stands where something like 20.0"),
    ({"minutes": "x"}, "bad setting minutes: 'x'"),
    ({"minutes": -1}, "bad setting minutes: -1"),
    ({"per_kernel": "a"}, "bad setting per_kernel: 'a' stands where something like 8"),
    ({"per_kernel": 1.5}, "bad setting per_kernel: 1.5"),
    ({"draft": 1}, "bad setting draft: 1 stands where something like False"),
    ({"checks": True}, "bad setting checks: True"),
    ({"ppo": 3}, "bad setting ppo: 3"),
    ({"heads": {"steps": "x"}}, "bad setting steps: 'x'"),
    ({"validate_every": 0}, "bad setting validate_every: 0"),
    ({"sim_steps": 0}, "bad setting sim_steps: 0"),
    ({"simulator": {**train.SETTINGS["simulator"], "steps": 3000}}, "simulator.steps=3000 is not heard: set sim_steps"),
    ({"world": "", "sequential_updates": 3}, "sequential_updates are of a policy that sees a world"),
    ({"eval_trials": "x"}, "bad setting eval_trials: 'x'"),
])  # fmt: skip
def test_bad_settings_of_a_training_are_named(changed: dict, message: str):
    assert train.config_of({**train.SETTINGS, "minutes": 20}).minutes == 20  # a whole number is a number, too
    with pytest.raises(UsageError, match=message):
        train.config_of({**train.SETTINGS, **changed})


def test_the_seed_is_of_everything_random():
    """A part that was given one keeps it."""
    parts = ("simulator", "trees", "heads")
    seeds = lambda **changed: [getattr(train.config_of({**train.SETTINGS, **changed}), part).seed for part in parts]  # noqa: E731
    assert seeds() == [0, 0, 0] and seeds(seed=5) == seeds(seed=3_000_005) == [5, 5, 5]
    assert seeds(seed=5, trees={**train.SETTINGS["trees"], "seed": 2}) == [5, 2, 5]
    assert train.config_of({**train.SETTINGS, "seed": 5}, {"trees": ["seed"]}).trees.seed == 0  # it was given that one


@pytest.mark.parametrize(("changed", "led", "strategies", "message"), [
    ({"world": ""}, None, ["muzero"], "`muzero` needs more than is trained"),
    ({}, None, ["sequential"], "`sequential` needs more than is trained"),
    ({"keep_world": False}, "agent", ["sequential"], "`sequential` needs more"),
    ({"world": "transformer"}, "agent", ["sequential"], "`sequential` needs more"),
    ({}, "agent", ["random"] * 14, "14 strategies are too many for one table: it holds 13"),
    ({}, None, ["muzero", "random"], ""), ({"sequential_updates": 1}, None, ["sequential"], ""),
    ({"world": ""}, "agent", ["muzero", "sequential"], ""), ({}, "agent", ["muzero", "sequential"] + ["random"] * 11, ""),
])  # fmt: skip
def test_searches_that_could_not_be_led_are_refused_before_the_training(changed, led, strategies, message):
    world = None if led is None else SimpleNamespace(kind="linear", agent=led)
    guide, config = SimpleNamespace(world=world) if world else None, replace(train.DEFAULTS, **changed)
    if not message:
        return train.check_led(config, guide, strategies)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        train.check_led(config, guide, strategies)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["", "shipped", "runs/1/best"])
def test_a_start_beside_a_checkpoint_that_is_resumed_is_refused(start: str, tmp_path: Path):
    """The default is not: nobody has asked for it."""
    keep(DATA / "guide-cpu", tmp_path / "last")
    (tmp_path / "last.json").write_text("")  # what is needed lies in the other file
    settings = {"resume": str(tmp_path / "last"), "start": start}
    if start != "runs/1/best":
        assert begins(tmp_path / "run", settings, {}).agent.updates > 0
        return
    with pytest.raises(UsageError, match="leave out `start`, or `resume`"):
        begins(tmp_path / "run", settings, {})


def test_the_best_of_a_run_that_is_resumed_is_found_beside_its_last(tmp_path: Path):
    session = SimpleNamespace(out=tmp_path / "out", clock=SimpleNamespace(recorded=None))
    session.out.mkdir()
    assert train.earlier(session, "") is None and train.earlier(session, str(tmp_path / "last")) is None  # type: ignore[arg-type]
    keep(DATA / "guide-cpu", tmp_path / "best")
    assert train.earlier(session, str(tmp_path / "best")) is None  # type: ignore[arg-type]
    found = train.earlier(session, str(tmp_path / "last"))  # type: ignore[arg-type]
    assert found is not None and found.agent.updates == Guide.load(DATA / "guide-cpu").agent.updates
    shutil.rmtree(session.out), session.out.mkdir()
    session.clock.recorded = {}
    assert train.earlier(session, str(tmp_path / "last")) is None  # type: ignore[arg-type]  # a replay of a run without


def test_a_training_goes_on_where_it_began(tmp_path: Path):
    session = SimpleNamespace(out=tmp_path, device="CL")
    with pytest.raises(UsageError, match="was trained on CPU, and this is CL: set DEV=CPU"):
        train.first(session, {"resume": str(DATA / "guide-cpu"), "start": "shipped"}, train.DEFAULTS, kernel=None)  # type: ignore[arg-type]


# **** settings of a training that the command line names ****


def begins(out: Path, settings: dict, names: dict[str, list[str]] | None) -> Guide:
    """What a training begins with; `names` is what its command line named, None: a run of a version that did not keep it."""
    out.mkdir()
    if names is not None:
        (out / "named.json").write_text(json.dumps(names))
    session, settings = (
        SimpleNamespace(out=out, device="CPU", renderer=renderer_of("CPU")),
        {**train.SETTINGS, **settings},
    )
    begun = train.first(session, settings, train.config_of(settings), add_one())  # type: ignore[arg-type]
    assert begun is not None
    return begun


@pytest.mark.parametrize(("names", "lr", "anneal", "entropy"), [
    ({"ppo": ["lr"]}, 5e-4, 0, 0.005),  # as by default, and asked for
    ({"ppo": ["lr", "anneal_updates", "entropy"]}, 5e-4, 600, 0.02),
    ({"trees": ["members"]}, LEARNING_RATE, 0, 0.005), ({}, LEARNING_RATE, 0, 0.005), (None, LEARNING_RATE, 0, 0.005),
])  # fmt: skip
def test_a_setting_is_heard_though_it_is_the_default(names, lr: float, anneal: int, entropy: float, tmp_path: Path):
    own = begins(tmp_path / "run", {}, names).agent.config
    assert (own.lr, own.anneal_updates, own.entropy) == (lr, anneal, entropy)


def test_a_setting_of_a_named_configuration_is_heard(tmp_path: Path):
    """And so it was of runs that did not keep what was named."""
    changed = {"ppo": {**train.SETTINGS["ppo"], "lr": 3e-4}}
    for i, names in enumerate(({}, None)):
        assert begins(tmp_path / str(i), changed, names).agent.config.lr == 3e-4


@pytest.mark.parametrize(("updates", "names", "refused"), [
    (300, {"ppo": ["lr"]}, "ppo.lr=0.0005: a checkpoint that is resumed goes on with its own \\(0.0003\\)"),
    (300, {"ppo": ["entropy"]}, ""),  # its own is the same
    (300, {"trees": ["members"]}, ""),
    (600, {"ppo": ["anneal_updates"]}, "ppo.anneal_updates=600: .* goes on with its own \\(0\\)"),  # all that is over
    (300, {"ppo": ["anneal_updates"]}, ""), (600, {}, ""), (600, None, ""),
])  # fmt: skip
def test_what_is_asked_of_a_resumed_checkpoint_is_refused_though_it_is_the_default(updates: int, names, refused: str,
                                                                                   tmp_path: Path):  # fmt: skip
    known = Guide.load(DATA / "guide-cpu")
    known.agent.config = replace(known.agent.config, lr=3e-4, lr_end=0.0, anneal_updates=600, entropy=0.02)
    known.agent.updates = updates
    known.save(tmp_path / "known", {"backend": "CPU"})
    settings = {"resume": str(tmp_path / "known")}
    if not refused:
        assert begins(tmp_path / "run", settings, names).agent.updates == updates
        return
    with pytest.raises(UsageError, match=refused):
        begins(tmp_path / "run", settings, names)


@pytest.fixture
def idle(tmp_path: Path, monkeypatch) -> list:
    """Runs go to `tmp_path`; nothing is trained or measured. The list is of the earlier best that each training was told."""
    found: list = []

    class Idle(train.Trainer):
        def run(self) -> dict:
            found.append(self.earlier)
            keep(self.out / "start", self.out / "best")
            return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Trainer", Idle)
    monkeypatch.setattr(train, "Evaluator", lambda *_: SimpleNamespace(compare_all=lambda *_, **__: []))
    for name in ("summarise", "to_json", "table"):
        monkeypatch.setattr(train, name, lambda compared: [])
    return found


@pytest.mark.parametrize(("more", "judged"), [([], True), (["judge_kernels=0"], False)])
def test_a_training_is_held_against_its_beginning_unless_it_is_told_not_to(
    more: list[str], judged: bool, tmp_path: Path, idle
):
    assert command_line(train.experiment, ["with", "minutes=1", "use_shipped=False", *more]) == 0
    figures = json.loads((tmp_path / "runs" / "1" / "result.json").read_text())["figures"]
    assert ("judged" in figures) == judged and len(idle) == 1


def test_a_run_keeps_what_its_command_line_named_and_its_result_what_it_went_by(tmp_path: Path, monkeypatch, idle):
    """And so does its replay; that of a run which kept neither goes as it went then."""
    arguments = ["with", "ppo.lr=5e-4", "trees={'members': 4}", "minutes=1", "use_shipped=False"]
    assert command_line(train.experiment, arguments) == 0
    run = tmp_path / "runs" / "1"
    assert json.loads((run / "named.json").read_text()) == {"ppo": ["lr"], "trees": ["members"]}
    result, wanted = (json.loads((run / f"{name}.json").read_text()) for name in ("result", "config"))
    went = result["figures"]["settings"]
    assert went["ppo"] == {**wanted["ppo"], "anneal_updates": 0, "entropy": 0.005} and went["ppo"]["lr"] == 5e-4
    assert went["trees"]["members"] == 4 and set(went) == {"ppo", "simulator", "trees"}
    monkeypatch.setattr(replay, "WITHOUT_DEVICE", ("train",))
    assert replay.main(run, live=False) == 0
    (run / "named.json").unlink()
    del result["figures"]["settings"]
    (run / "result.json").write_text(json.dumps(result))
    assert replay.main(run, live=False) == 0


def test_a_training_hears_of_the_best_before_and_of_what_it_could_not_lead(tmp_path: Path, capsys, idle):
    found = idle
    keep(DATA / "guide-cpu", tmp_path / "last"), keep(DATA / "guide-cpu", tmp_path / "best")
    arguments = ["with", "minutes=1", "use_shipped=False", "trees={'members': 4}"]
    assert command_line(train.experiment, [*arguments[:3], "resume=last"]) == 0
    assert command_line(train.experiment, arguments) == 0
    assert [earlier is None for earlier in found] == [False, True]
    assert command_line(train.experiment, [*arguments, "start=", "strategies=['sequential']"]) == 2
    assert len(found) == 2 and "`sequential` needs more than is trained" in capsys.readouterr().err
