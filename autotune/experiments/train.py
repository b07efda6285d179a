"""`python -m autotune.experiments.train with minutes=20`, which is what `make train` runs.

What was trained is held against what it began with, on validation kernels at equal trials: where it is clearly slower it is
kept, but leads only those who name it. Ends with a table on held-out kernels: the trained strategies beside random schedules
at equal trials, beside hand-coded, and beside `mixed` as it was led before this training.
Its policy begins as the one that ships, so that minutes suffice, and its world stays; `with start=` begins from nothing. `with fast` is a
configuration of seconds for tests; `with resume=runs/3/last` goes on from a checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from sacred.run import Run

from agents import checkpoint
from agents.checkpoint import files_of
from agents.ppo import PPOConfig
from autotune import corpus
from autotune.compiler import backend_of
from autotune.data import Dataset, add_shipped
from autotune.errors import UsageError
from autotune.evaluation import ALONE, Comparison, Evaluator, summarise, table, to_json
from autotune.experiments import (
    Session,
    check_counts,
    check_names,
    check_types,
    command_line,
    make_experiment,
    session_of,
)
from autotune.experiments.inputs import digest, keep, sample
from autotune.guide import MAX_SETTING, Guide, checked_config, find_checkpoint
from autotune.kernel import Kernel
from autotune.records.rows import MAX_RIVALS
from autotune.statistics import chance
from autotune.training import TrainConfig, Trainer, gently
from autotune.world import SIMULATORS
from sims import Committee, EnsembleConfig, TreesConfig
from sims.heads import HeadsConfig

experiment = make_experiment("train")
DEFAULTS = TrainConfig()
BEFORE = "before"  # name of the search that is led by what the training began with
NAMED = "named.json"  # in a run: the settings of its parts that the command line named
# of the time: then the comparison with what a training began with ends, and the one on held-out kernels
JUDGED_UNTIL, COMPARED_UNTIL = 0.78, 0.98
SLOWER = 0.05  # a training whose kernels are as slow by chance less often than that is not served: five have to agree


SETTINGS: dict[str, Any] = {**asdict(DEFAULTS), "start": "shipped", "resume": "", "strategies": ["mixed", "policy", "random"],
            "eval_trials": 16, "eval_kernels": 24, "judge_kernels": 24}  # fmt: skip
experiment.add_config(SETTINGS)
experiment.add_named_config("fast", {
    "minutes": 10.0, "start": "", "max_kernels": 6, "per_kernel": 3, "max_updates": 2, "checks": 0, "sim_steps": 20, "use_shipped": False, "draft": True,
    "eval_trials": 2, "eval_kernels": 2, "strategies": ["mixed", "random"],
    "ppo": {"hidden": 16, "n_envs": 4, "steps": 4, "epochs": 1}, "simulator": {"hidden": 16, "members": 2, "batch": 32},
    "heads": {"hidden": 16, "steps": 5}, "reanalyse": 0, "sequential_updates": 1,
})  # fmt: skip


def train(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, then compare on held-out kernels. Returns the figures that a replay must repeat."""
    names = {part: named(session, part) for part in ("simulator", "trees", "heads")}
    config = config_of({**SETTINGS, **settings}, names)  # a run of an earlier version lacks what came later
    kernels = {split: corpus.load(split) for split in corpus.SPLITS}
    data = Dataset(session.renderer)
    shipped = add_shipped(data, session.device, kernels["train"], guided=True) if config.use_shipped else 0
    if not shipped:
        config = replace(config, measure_share=max(config.measure_share, config.measure_share_alone))
    guide = first(session, settings, config, kernels["train"][0])
    if guide is not None:
        config = replace(config, max_updates=guide.agent.updates + config.max_updates)  # of this run
    check_led(config, guide, settings["strategies"])
    trainer = Trainer(config, kernels, data, session.records(), session.measurer, session.renderer, session.device,
                      session.out, session.clock, session.log, guide)  # fmt: skip
    trainer.earlier = earlier(session, settings["resume"])
    trained = trainer.run()
    best = Guide.load(session.out / "best")
    held_out = sample(kernels["held_out"], settings["eval_kernels"], config.seed)
    before = {} if guide is None else {BEFORE: Guide.load(session.out / "start")}
    if before and settings.get("judge_kernels"):  # a run of an earlier version judged nothing
        validation = sample(kernels["validation"], settings["judge_kernels"], config.seed)
        trained["judged"] = judge(session, trainer, best, before, validation, settings["eval_trials"])
    evaluator = Evaluator(session.records, session.measurer, session.renderer, best, settings["strategies"],
                          settings["eval_trials"], config.seed, before)  # fmt: skip
    compared = evaluator.compare_all(
        held_out, over=lambda: session.clock.over("evaluate", COMPARED_UNTIL * trainer.seconds)
    )
    print(
        f"\n{len(compared)} held-out kernels, {settings['eval_trials']} trials each, time over hand-coded:\n{table(compared)}"
    )
    if before:
        print(f"`{BEFORE}` is `mixed`, led by what this training began with")
    figures = {"shipped_rows": shipped, **trained, "checkpoint": digest(session.out / "best.safetensors"),
               "summary": summarise(compared), "kernels": to_json(compared)}  # fmt: skip
    if (session.out / NAMED).exists():  # a run of an earlier version had no such figure to repeat
        figures["settings"] = {part: asdict(config) for part, config in in_force(trainer.guide).items()}
    return figures


def judge(session: Session, trainer: Trainer, best: Guide, before: Mapping[str, Guide], kernels: Sequence[Kernel],
          trials: int) -> dict[str, Any]:  # fmt: skip
    """Hold `mixed`, led by what was trained, against the same led by what the training began with. Where it is clearly slower, the
    checkpoint says so, and `find_checkpoint` passes it over."""
    evaluator = Evaluator(lambda name: session.records(f"judge-{name}"), session.measurer, session.renderer, best, ["mixed"],
                          trials, trainer.config.seed, before)  # fmt: skip
    compared = evaluator.compare_all(kernels, over=lambda: session.clock.over("judge", JUDGED_UNTIL * trainer.seconds))
    figures: dict[str, Any] = {"summary": summarise(compared), "kernels": to_json(compared), "slower": False}
    if compared:
        ratio, by_chance = beside(compared)
        figures |= {"ratio": ratio, "by_chance": by_chance, "slower": by_chance <= SLOWER}
        print(f"\n{len(compared)} validation kernels: led by what was trained, {ratio:.3f} of the time of what it began with "
              f"(as slow or slower by chance: {by_chance:.2f})")  # fmt: skip
    if figures["slower"]:
        trainer.serves = False
        trainer.save("best", best)
        print(f"so it leads only those who name {session.out / 'best'}")
    return figures


def beside(compared: Sequence[Comparison]) -> tuple[float, float]:
    """Geometric mean of the times after this training over those before; and how often it is as high by chance, where neither is
    faster."""
    ratios = np.log([c.seconds["mixed"] / c.seconds[BEFORE] for c in compared])  # [kernels]
    return float(np.exp(ratios.mean())), chance(ratios)


def in_force(guide: Guide) -> dict[str, Any]:
    """What a training goes by, whatever config.json says: a policy that goes on is taught more gently, and a checkpoint that is
    resumed keeps its own settings."""
    nets, trees = guide.simulator.nets.config, guide.simulator.trees.config
    return {"ppo": guide.agent.config, "simulator": nets, "trees": trees}


def first(session: Session, settings: dict[str, Any], config: TrainConfig, kernel: Kernel) -> Guide | None:
    """What a training begins with: all of a checkpoint (`resume`), or policy and world of one (`start`), or nothing."""
    if settings["resume"]:
        if settings["start"] not in ("", SETTINGS["start"]):
            raise UsageError(
                "a training that is resumed goes on from its own checkpoint: leave out `start`, or `resume`"
            )
        guide = Guide.load(source := keep(Path(settings["resume"]), session.out / "start"))
        learned = checkpoint.load(source)[1].get("backend", session.device)
        if backend_of(learned) != backend_of(session.device):
            raise UsageError(
                f"{settings['resume']} was trained on {learned}, and this is {session.device}: set DEV={learned}"
            )
        for part, config in in_force(guide).items():
            _not_heard(part, config, asked_for(session, part, settings.get(part, {})))
        own = guide.agent.config
        if own.anneal_updates and guide.agent.updates >= own.anneal_updates:
            guide.agent.config = gently(own)
            _not_heard("ppo", guide.agent.config, {name: settings["ppo"][name] for name in named(session, "ppo")})
        return guide
    if not settings["start"]:
        return None
    shipped = settings["start"] == "shipped"
    source = find_checkpoint(None, session.device, runs=None) if shipped else Path(settings["start"])
    known = Guide.load(keep(source, session.out / "start"))
    guide = Guide.new(kernel, session.renderer, config.ppo, config.simulator, config.trees, config.seed)
    try:
        guide.agent.start_from(known.agent)
    except ValueError as error:
        raise UsageError(f"cannot start from {source}: {error}; begin from nothing with `start=`") from None
    guide.agent.config = replace(gently(config.ppo), **asked_for(session, "ppo", asdict(config.ppo)))
    guide.policy_first, guide.finetuned = known.policy_first, known.finetuned
    if config.keep_world and config.world:
        guide.world = known.world
    return guide


def earlier(session: Session, resumed: str) -> Guide | None:
    """The best policy of a run whose `last` is resumed: what comes after it is held against it. A replay finds it in the run, if it
    is of a version that kept it."""
    source, target = Path(resumed).parent / "best", session.out / "start-best"
    if Path(resumed).name == "last" and session.clock.recorded is None and files_of(source)[0].exists():
        keep(source, target)
    return Guide.load(target) if files_of(target)[0].exists() else None


def check_led(config: TrainConfig, guide: Guide | None, strategies: Sequence[str]) -> None:
    """Raises UsageError for searches that what is trained could not lead, or that are too many for one table: that would be known
    at the end alone."""
    own = None if guide is None else guide.world
    kept = config.keep_world and not config.sequential_updates
    stays = own is not None and (not config.world or (kept and own.kind == config.world))  # as in `Trainer.learn_world`
    led = {
        "muzero": stays or bool(config.world),
        "sequential": own.agent is not None if stays and own else bool(config.world and config.sequential_updates),
    }
    for name in strategies:
        if not led.get(name, True):
            raise UsageError(f"`{name}` needs more than is trained: set world=linear and sequential_updates=300")
    rivals = len(strategies) + (guide is not None) + 2  # hand-coded twice
    if rivals > MAX_RIVALS:
        raise UsageError(f"{len(strategies)} strategies are too many for one table: it holds {MAX_RIVALS - 3}")


def asked_for(session: Session, part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a part's settings that the command line named, be they the defaults, and those that are other than the defaults: a
    named configuration gave them, or the run is of a version that did not keep what was named."""
    given = named(session, part)
    return {name: value for name, value in settings.items() if name in given or value != SETTINGS[part][name]}


def named(session: Session, part: str) -> list[str]:
    """Settings of a part that the command line named; none where that was not kept."""
    path = session.out / NAMED
    return json.loads(path.read_text()).get(part, []) if path.exists() else []


def _not_heard(part: str, own: Any, asked: Mapping[str, Any]) -> None:
    """Raises UsageError for what was asked for and a resumed checkpoint has otherwise: it goes on with its own."""
    for name, value in asked.items():
        if value != getattr(own, name):
            raise UsageError(f"{part}.{name}={value}: a checkpoint that is resumed goes on with its own "
                             f"({getattr(own, name)}); leave it out, or begin with `start=`")  # fmt: skip


def config_of(settings: dict[str, Any], names: Mapping[str, Sequence[str]] = MappingProxyType({})) -> TrainConfig:
    """`names` are the settings of each part that the command line named. Raises UsageError for a value that no part accepts: now,
    and not when its turn comes."""
    parts: dict[str, Any] = {
        "ppo": PPOConfig(),
        "simulator": EnsembleConfig(),
        "trees": TreesConfig(),
        "heads": HeadsConfig(),
    }
    check_types(SETTINGS, settings)
    check_types(SETTINGS["heads"], settings["heads"])
    check_counts(settings, "validate_every", "sim_steps")
    flat = {f.name: settings[f.name] for f in fields(TrainConfig) if f.name not in parts}
    seed = {"seed": flat["seed"] % MAX_SETTING}  # a larger one could not be read again
    given = {name for name in parts if settings[name].get("seed") or "seed" in names.get(name, ())}
    own = {name: seed if name != "ppo" and name not in given else {} for name in parts}
    try:
        config = TrainConfig(
            **flat, **{name: replace(part, **{**settings[name], **own[name]}) for name, part in parts.items()}
        )
        for name in ("ppo", "simulator", "trees"):
            checked_config(parts[name], settings[name])  # else the checkpoint could not be read
        Committee(1, config.simulator, config.trees)  # what does not fit together
    except (TypeError, ValueError) as error:
        raise UsageError(f"bad configuration: {error}") from None
    check_names("strategy", settings["strategies"], ALONE)
    if config.world:
        check_names("simulator", [config.world], SIMULATORS)
    elif config.sequential_updates:
        raise UsageError("sequential_updates are of a policy that sees a world: name a simulator with `world=`")
    if config.simulator.steps != EnsembleConfig.steps:
        raise UsageError(f"simulator.steps={config.simulator.steps} is not heard: set sim_steps")
    return config


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    with session_of(_run) as session:
        given = _run.meta_info["config_updates"].items()
        (session.out / NAMED).write_text(json.dumps({part: list(of) for part, of in given if isinstance(of, dict)}))
        return session.finish(train(session, dict(_config)))["figures"]["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
