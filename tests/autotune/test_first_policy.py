"""What a training begins with, and that the best policy is never lost on the way: no minutes are needed to see that."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import U2, U4, kernel_of
from tinygrad import Tensor

from agents.ppo import PPOConfig
from autotune import training
from autotune.compiler import renderer_of
from autotune.data import Dataset
from autotune.errors import TrainingError, UsageError
from autotune.experiments.train import SETTINGS, first
from autotune.files import DATA
from autotune.guide import Guide, find_checkpoint
from autotune.measuring.bench import PROTOCOL
from autotune.records import Records, Trial
from autotune.training import LEARNING_RATE, Clock, TrainConfig, Trainer
from sims import SimulatorError

KERNEL = kernel_of(Tensor.empty(24, 32) @ Tensor.empty(32, 16))


@pytest.fixture(scope="module")
def shipped() -> Guide:
    return Guide.load(DATA / "guide-cpu")


def theta(guide: Guide) -> np.ndarray:
    return guide.agent.policy.theta.numpy().copy()


def begun(out: Path, start: str, **settings) -> Guide | None:
    session = SimpleNamespace(out=out, device="CPU", renderer=renderer_of("CPU"))
    return first(session, {"resume": "", "start": start}, TrainConfig(**settings), KERNEL)


def test_the_policy_is_the_one_that_ships_and_all_else_is_new(tmp_path: Path, shipped: Guide):
    guide = begun(tmp_path, "shipped", keep_world=False)
    assert np.array_equal(theta(guide), theta(shipped))
    assert guide.agent.updates == 0 and guide.agent.lr == LEARNING_RATE and not guide.agent.trained.m.numpy().any()
    assert guide.world is None and guide.memory is None
    assert (tmp_path / "start.safetensors").exists()  # for a replay, whatever ships by then
    assert not guide.policy_first and not guide.finetuned
    shipped.policy_first = shipped.finetuned = True
    shipped.save(tmp_path / "bold", {"backend": "CPU"})
    shipped.policy_first = shipped.finetuned = False
    (tmp_path / "bolder").mkdir()
    bolder = begun(tmp_path / "bolder", str(tmp_path / "bold"))
    assert bolder.policy_first and bolder.finetuned
    (tmp_path / "next").mkdir()
    assert np.array_equal(theta(begun(tmp_path / "next", str(tmp_path / "start"))), theta(shipped))


@pytest.mark.parametrize(("settings", "learned"), [
    ({}, 0), ({"keep_world": False}, 1), ({"world": "transformer"}, 1), ({"sequential_updates": 1}, 1), ({"world": ""}, 0)])  # fmt: skip
def test_the_world_stays_with_its_policy_unless_another_is_asked_for(settings: dict, learned: int, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    guide, made = begun(tmp_path, "shipped", **settings), []
    kept = settings.get("keep_world", True) and settings.get("world", "linear")
    assert (guide.world is not None and guide.world.agent is not None) == bool(
        kept
    )  # whom `auto` asks beside the other one
    guide.world = Guide.load(DATA / "guide-cpu").world  # as that of a training that is resumed
    trainer = trainer_of(tmp_path, guide)
    trainer.config = replace(TrainConfig(), **settings)
    monkeypatch.setattr(training.World, "learn", lambda kind, *_, **__: made.append(kind))
    monkeypatch.setattr(Trainer, "_practise_in", lambda *_: None)
    monkeypatch.setattr(Trainer, "_tick", lambda *_: None)
    monkeypatch.setattr(Trainer, "save", lambda *_: None)
    monkeypatch.setattr(training.Guide, "load", lambda _: SimpleNamespace())
    trainer.learn_world()
    assert made == learned * [settings.get("world", "linear")]


def test_it_may_begin_from_nothing_but_not_from_another_shape(tmp_path: Path):
    assert begun(tmp_path, "") is None
    with pytest.raises(UsageError, match="begin from nothing with `start=`"):
        begun(tmp_path, "shipped", ppo=PPOConfig(hidden=16))


def trainer_of(out: Path, guide: Guide, kernels: int = 1) -> Trainer:
    cpu, own = renderer_of("CPU"), [KERNEL] * kernels
    return Trainer(TrainConfig(world=""), {"train": own, "validation": own}, Dataset(cpu), None, None, cpu, "CPU", out,
                   Clock(), lambda *_: None, guide)  # type: ignore[arg-type]  # fmt: skip


def test_each_validation_kernel_counts_once(tmp_path: Path, shipped: Guide, monkeypatch: pytest.MonkeyPatch):
    """One more than a batch of episodes: the last one's episodes begin again until the batch is full."""
    trainer = trainer_of(tmp_path, shipped, shipped.agent.config.n_envs + 1)
    judged: list[int] = []
    monkeypatch.setattr(Trainer, "potential", lambda _, states: judged.append(len(states)) or np.zeros(len(states)))
    assert trainer._score(shipped.agent) == 0.0 and judged == [shipped.agent.config.n_envs + 1]


@pytest.mark.parametrize(("score", "best"), [(1.0, 300), (-1.0, 500)])
def test_the_best_of_a_run_that_is_resumed_is_best_until_one_is_better(score, best, tmp_path: Path, monkeypatch):
    """Judged by the simulator of now. No update is made."""
    guide, earlier = (Guide.load(DATA / "guide-cpu") for _ in range(2))
    guide.agent.updates, earlier.agent.updates = 500, 300
    monkeypatch.setattr(Trainer, "_score", lambda _, agent: score if agent.updates == 300 else 0.0)
    trainer = trainer_of(tmp_path, guide)
    trainer.config = replace(trainer.config, max_updates=500)
    trainer.earlier = earlier
    trainer.practise()
    assert [Guide.load(tmp_path / name).agent.updates for name in ("best", "last")] == [best, 500]


def test_a_simulator_that_cannot_be_fitted_is_told(tmp_path: Path, shipped: Guide, monkeypatch: pytest.MonkeyPatch):
    def fit(*_, **__):
        raise SimulatorError("training diverged")

    trainer = trainer_of(tmp_path, shipped)
    trainer.data.add(KERNEL, [Trial(KERNEL.key, (), "ok", (1.0,))], "here")
    monkeypatch.setattr(Guide, "fit", fit)
    monkeypatch.setattr(Trainer, "_tick", lambda *_: None)
    with pytest.raises(TrainingError, match="could not be fitted .training diverged."):
        trainer.fit()


def test_the_best_policy_outlives_worse_ones_and_a_new_simulator(
    tmp_path: Path, shipped: Guide, monkeypatch: pytest.MonkeyPatch
):
    """Scores by hand. The policy that was best under one simulator is judged again by the next, and keeps its place until one
    is better under that."""
    guide = Guide.load(DATA / "guide-cpu")
    trainer = trainer_of(tmp_path, guide)
    scores = {0: 3.0, 1: 2.0, 2: 2.5}  # by how far the parameters were moved
    moved = theta(shipped)[0]
    monkeypatch.setattr(Trainer, "_score", lambda _, agent: scores[round(agent.policy.theta.numpy()[0] - moved)])

    def move(by: float) -> None:
        new = theta(shipped)
        new[0] += by
        guide.agent.policy.theta.assign(Tensor(new)).realize()

    trainer.validate()
    move(1.0)
    trainer.validate()
    assert np.array_equal(theta(Guide.load(tmp_path / "best")), theta(shipped))
    assert not np.array_equal(theta(Guide.load(tmp_path / "last")), theta(shipped))
    sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("best", "last")}
    assert sizes["best"] < 0.8 * sizes["last"]  # nobody goes on with the training from there
    scores[0] = 2.2  # under a new simulator, which is told apart by its spread
    guide.simulator._spread = replace(guide.simulator._spread, scale=2.0)
    trainer.judge_again()
    best = Guide.load(tmp_path / "best")
    assert trainer.best == 2.2 and best.simulator._spread.scale == 2.0
    assert np.array_equal(theta(best), theta(shipped))
    trainer.validate()
    assert trainer.best == 2.2
    move(2.0)
    trainer.validate()
    assert trainer.best == 2.5 and theta(Guide.load(tmp_path / "best"))[0] != theta(shipped)[0]


@pytest.mark.parametrize(
    ("minutes", "fitting", "checks"), [(1.5, 60.0, 0), (1.5, 15.0, 1), (1.5, 5.0, 2), (10.0, 60.0, 2)]
)
def test_a_check_that_would_end_late_is_not_made(
    minutes: float, fitting: float, checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A training whose PPO begins after 60 s: of 1.5 minutes 30 s are left for it, so checks are due after 70 and 80 s; of 10 minutes
    each is long done by the end."""
    guide, made = Guide.load(DATA / "guide-cpu"), []
    trainer = trainer_of(tmp_path, guide)
    trainer.config = replace(trainer.config, minutes=minutes, train_share=1.0)
    trainer.fitting = fitting
    now = [60.0]

    def update(rollout: object) -> dict[str, float]:
        guide.agent.updates, now[0] = guide.agent.updates + 1, now[0] + 1.0
        return {}

    monkeypatch.setattr(trainer.clock, "elapsed", lambda: now[0])
    monkeypatch.setattr(guide.agent, "update", update)
    monkeypatch.setattr(training, "Rollouts", lambda *_: SimpleNamespace(collect=lambda steps: (None, [])))
    monkeypatch.setattr(Trainer, "validate", lambda _: None)
    monkeypatch.setattr(Trainer, "_tick", lambda *_: None)
    monkeypatch.setattr(Trainer, "check", lambda _: made.append(now[0]))
    trainer.practise()
    assert len(made) == checks and all(at + fitting < 60.0 * minutes for at in made)


def test_settings_of_a_policy_that_ships_are_heard_and_of_a_resumed_checkpoint_refused(tmp_path: Path):
    session = SimpleNamespace(out=tmp_path, device="CPU", renderer=renderer_of("CPU"))
    ppo = replace(TrainConfig().ppo, lr=3e-4, anneal_updates=77)
    begun = first(session, {"resume": "", "start": "shipped"}, TrainConfig(ppo=ppo), KERNEL)
    plain = first(session, {"resume": "", "start": "shipped"}, TrainConfig(), KERNEL)
    assert begun is not None and (begun.agent.config.lr, begun.agent.config.anneal_updates) == (3e-4, 77)
    assert plain is not None and (plain.agent.config.lr, plain.agent.config.anneal_updates) == (LEARNING_RATE, 0)
    assert begun.agent.config.entropy == plain.agent.config.entropy == ppo.entropy_end
    settings = {
        "resume": str(DATA / "guide-cpu"),
        "start": "",
        **{k: dict(SETTINGS[k]) for k in ("ppo", "simulator", "trees")},
    }
    assert first(session, settings, TrainConfig(), KERNEL) is not None
    settings["trees"]["members"] = 7
    with pytest.raises(UsageError, match="trees.members=7: a checkpoint that is resumed goes on with its own"):
        first(session, settings, TrainConfig(), KERNEL)


def test_a_finished_training_is_resumed_at_a_rate_at_which_something_is_learned(tmp_path: Path):
    """Its own has been annealed to nothing; one that was cut off goes on as it was."""
    for updates, rate in ((600, LEARNING_RATE), (300, 2.5e-4)):
        guide = Guide.load(DATA / "guide-cpu")
        guide.agent.config = replace(guide.agent.config, lr=5e-4, lr_end=0.0, anneal_updates=600)
        guide.agent.updates = updates
        guide.save(tmp_path / f"after-{updates}", {"backend": "CPU"})
        out = tmp_path / str(updates)
        out.mkdir()
        settings = {"resume": str(tmp_path / f"after-{updates}"), "start": ""}
        resumed = first(SimpleNamespace(out=out, device="CPU"), settings, TrainConfig(), KERNEL)
        assert resumed is not None and resumed.agent.updates == updates and resumed.agent.lr == pytest.approx(rate)


def test_a_policy_of_the_worlds_view_has_the_shape_that_the_checkpoint_says(
    tmp_path: Path, shipped: Guide, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the settings of a resumed training are."""
    trainer = trainer_of(tmp_path, shipped)
    trainer.config = replace(trainer.config, ppo=PPOConfig(hidden=16), sequential_updates=0)
    made: list[PPOConfig] = []
    world = SimpleNamespace(new_agent=lambda config: made.append(config) or shipped.agent, view=shipped.world.view)
    trainer._practise_in(world)  # type: ignore[arg-type]
    assert made[0].hidden == shipped.agent.config.hidden and made[0].memory == shipped.agent.config.memory


def test_what_was_refuted_is_no_example(tmp_path: Path, shipped: Guide):
    trainer = trainer_of(tmp_path, shipped)
    with closing(Records(tmp_path / "r.db")) as records:
        trainer.records, trainer.measurer = records, SimpleNamespace(fingerprint="f" * 16)
        for schedule, seconds in (((U2,), 2e-6), ((U4,), 1e-6)):
            records.add_trial("f" * 16, Trial(KERNEL.key, schedule, "ok", (seconds,), code_hash=str(seconds)), PROTOCOL)
        records.add_trial("f" * 16, Trial(KERNEL.key, (U4,), "wrong_output", kind="recheck"), PROTOCOL)
        trainer._learn_of(KERNEL)
    assert [state.schedule for state in trainer.data.states] == [(U2,)]


def test_a_checkpoint_is_served_once_it_has_all_its_parts(tmp_path: Path):
    """A training that runs, or was cut off, takes no one's guide away."""
    guide, out = Guide.load(DATA / "guide-cpu"), tmp_path / "runs" / "1"
    out.mkdir(parents=True)
    trainer = trainer_of(out, guide)
    trainer.best = 1.0  # as after a validation
    trainer.save("best")
    assert find_checkpoint(None, "CPU", tmp_path / "runs") == DATA / "guide-cpu"
    trainer.data.add(KERNEL, [Trial(KERNEL.key, (U2,), "ok", (1e-6,))], "here")
    trainer.remember()
    assert find_checkpoint(None, "CPU", tmp_path / "runs") == out / "best"
