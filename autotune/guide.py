"""What has been learned, as one checkpoint: agent, committee, world and memory, with the vocabulary that they speak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agents import checkpoint
from agents.learner import without_moments
from agents.ppo import PPO, PPOConfig
from autotune import files
from autotune.compiler import Renderer, backend_of
from autotune.errors import TRAIN, CodecError, UsageError
from autotune.features import ACTION_WIDTH, observe, summary
from autotune.kernel import Kernel, Schedule
from autotune.memory import Memory
from autotune.space import N_ACTIONS, VOCABULARY, State, legal_mask, root_of, root_state
from autotune.strict import MAX_INT, parse, shown
from autotune.world import World
from sims import Committee, EnsembleConfig, TreesConfig
from sims.bagged import Bagged
from sims.padding import padded

LARGEST = float(np.finfo(np.float32).max)  # of any learned number
MAX_SETTING = 1_000_000  # of any number in a config
FINETUNED = "finetuned-"  # begins the names of their directories under `runs/`
REMEMBERED = 1 << 17  # states whose predictions are kept, at 1 KB each: a training passes through more
FEATURES = 2  # version of autotune.features: another version's numbers mean other things


Arrays = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
Value = TypeVar("Value", int, float, bool)
Config = TypeVar("Config", PPOConfig, EnsembleConfig, TreesConfig)


class Guide:
    """A PPO-LSTM agent, and a committee of nets and trees as its simulator; a world and a memory, where it has them."""

    def __init__(self, state_dim: int, summary_dim: int, ppo: PPOConfig, sim: EnsembleConfig, trees: TreesConfig,
                 seed: int):  # fmt: skip
        self.agent = PPO(state_dim, N_ACTIONS, ACTION_WIDTH, ppo, seed)
        self.simulator = Committee(summary_dim, sim, trees)
        self.state_dim, self.summary_dim, self.seed = state_dim, summary_dim, seed
        self.world: World | None = None  # to plan in without the compiler
        self.memory: Memory | None = None  # of recorded kernels and their fastest schedules
        # whether the policy's answer is tried before the trees', which few trials have taught little
        self.policy_first = False
        # whether its policy has practised on a program's kernels, on which it is no fair rival then
        self.finetuned = False
        self._predicted: dict[Bagged, dict[tuple[str, Schedule], np.ndarray]] = {}  # by who was asked: [M]
        self._leaves: dict[tuple[str, Schedule], np.ndarray] = {}  # [T]

    @staticmethod
    def new(kernel: Kernel, renderer: Renderer, ppo: PPOConfig, sim: EnsembleConfig, trees: TreesConfig,
            seed: int) -> Guide:  # fmt: skip
        """An untrained guide; a kernel is needed only to count the features."""
        state = root_state(kernel, renderer)
        return Guide(len(observe(state, legal_mask(state))[0]), len(summary(state)), ppo, sim, trees, seed)

    def fit(
        self, states: Sequence[State], log_times: np.ndarray, groups: np.ndarray, **options: Any
    ) -> dict[str, float]:
        """Fit the simulator to measured states: log2 seconds [N] of kernels `groups` [N]."""
        keys = np.unique([s.kernel.key for s in states], return_inverse=True)[1]
        features = np.stack([summary(s) for s in states])
        metrics = self.simulator.fit(features, log_times, groups, unit=keys, **options)
        self.forget()
        return metrics

    def forget(self) -> None:
        """What was predicted so far: it holds no longer, or whoever comes next is to pay for its own thinking."""
        self._predicted.clear()
        self._leaves.clear()

    def predict(self, states: Sequence[State]) -> tuple[np.ndarray, np.ndarray]:
        """(mean [N], spread [N]) of log2 time relative to each kernel's un-optimized state."""
        members = self.members(states)
        return members.mean(0), members.std(0)

    def members(self, states: Sequence[State], asked: Bagged | None = None) -> np.ndarray:
        """Each member's log2 time relative to the kernel's un-optimized state [M, N]; remembered. `asked`: the committee's nets or
        its trees alone."""
        judge = self.simulator if asked is None else asked
        known = self._predicted.setdefault(judge, {})
        return relative(states, known, lambda missing: judge.predict_members(np.stack([summary(s) for s in missing])))

    def believed(self, states: Sequence[State]) -> np.ndarray:
        """What a search goes by (but `value` and `filter`): `members` of the committee's trees alone [M, N]. Its nets, which a policy
        practises with, too, expect too much of the very schedules that a search looks for."""
        return self.members(states, self.simulator.trees)

    def leaves(self, states: Sequence[State]) -> np.ndarray:
        """To which leaves of the committee's trees some states come [N, T], by which they are alike; remembered."""
        if len(self._leaves) > REMEMBERED:
            self._leaves.clear()
        missing = {key: s for s in states if (key := (s.kernel.key, s.schedule)) not in self._leaves}
        if missing:
            found = self.simulator.trees.leaves(np.stack([summary(s) for s in missing.values()]))
            self._leaves.update(zip(missing, found, strict=True))
        return np.stack([self._leaves[s.kernel.key, s.schedule] for s in states])

    def save(self, path: Path, extra: dict[str, Any], moments: bool = True) -> None:
        """Write PATH.safetensors and PATH.json; without Adam's `moments` where nobody goes on with the training from there."""
        tensors, meta = self.agent.state()
        named = {f"agent.{k}": v for k, v in tensors.items()} | {
            f"simulator.{k}": v for k, v in self.simulator.state().items()
        }
        world: dict[str, Any] = {}
        if self.world is not None:
            arrays, world = self.world.state()
            named |= {f"world.{k}": v for k, v in arrays.items()}
        if self.memory is not None:
            named |= {f"memory.{k}": v for k, v in self.memory.state().items()}
        description = {"vocabulary": VOCABULARY, "world": world, "features": FEATURES, "state_dim": self.state_dim,
                       "summary_dim": self.summary_dim, "seed": self.seed, "ppo": asdict(self.agent.config),
                       "simulator": asdict(self.simulator.nets.config), "trees": asdict(self.simulator.trees.config),
                       "policy_first": self.policy_first, "finetuned": self.finetuned, "agent": meta, **extra}  # fmt: skip
        checkpoint.save(path, named if moments else without_moments(named), description)

    @staticmethod
    def load(path: Path) -> Guide:
        """Raises UsageError for a checkpoint that is missing, damaged, or of another vocabulary or feature version."""
        try:
            tensors, meta = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            raise UsageError(str(error)) from None
        if meta.get("vocabulary") != VOCABULARY or meta.get("features") != FEATURES:
            spoken = f"{shown(meta.get('vocabulary'))}, features {shown(meta.get('features'))}"
            raise UsageError(f"checkpoint {path} speaks another vocabulary ({spoken}; this program {VOCABULARY}, features "
                             f"{FEATURES}): train a new one with `{TRAIN}`")  # fmt: skip
        try:
            agent, simulator = _part(tensors, "agent."), _part(tensors, "simulator.")
            ppo, sim = checked_config(PPOConfig(), meta["ppo"]), checked_config(EnsembleConfig(), meta["simulator"])
            trees = checked_config(TreesConfig(), meta["trees"])
            state_dim, summary_dim = (_checked(0, meta[name]) for name in ("state_dim", "summary_dim"))
            seed = _checked(0, meta["seed"], MAX_INT - 1)
            _check_sizes(agent, simulator, state_dim, summary_dim, ppo, sim)
            guide = Guide(state_dim, summary_dim, ppo, sim, trees, seed)
            guide.agent.load_state(agent, meta["agent"])
            guide.simulator.load_state(simulator)
            guide.policy_first, guide.finetuned = (
                _checked(False, meta.get(name, False)) for name in ("policy_first", "finetuned")
            )
            if memory := _part(tensors, "memory."):
                guide.memory = Memory.load(memory, state_dim)
            if meta.get("world"):
                guide.world = World.load(_part(tensors, "world."), meta["world"], summary_dim, ppo)
        except (KeyError, TypeError, ValueError, ArithmeticError, checkpoint.CheckpointError) as error:
            raise UsageError(
                f"checkpoint {path} does not fit this program: {shown(str(error))}; train a new one with `{TRAIN}`"
            ) from None
        return guide


def relative(states: Sequence[State], known: dict[tuple[str, Schedule], np.ndarray],
             ask: Callable[[Sequence[State]], np.ndarray]) -> np.ndarray:  # fmt: skip
    """What `ask` says of some states less what it says of their kernels' un-optimized ones [M, N]; `known` remembers its answers."""
    if len(known) > REMEMBERED:
        known.clear()
    wanted = {(s.kernel.key, s.schedule): s for s in states}
    for state in states:
        wanted.setdefault((state.kernel.key, ()), root_of(state))
    missing = [s for key, s in wanted.items() if key not in known]
    if missing:
        known.update(zip(((s.kernel.key, s.schedule) for s in missing), ask(missing).T, strict=True))
    return np.stack([known[s.kernel.key, s.schedule] - known[s.kernel.key, ()] for s in states], axis=1)


def _part(tensors: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _checked(default: Value, value: Any, most: int = MAX_SETTING) -> Value:
    """A stored number or flag of the default's type, 0 to `most`. Raises ValueError."""
    good = type(value) is type(default) or (type(value) is int and type(default) is float)
    if not good or not 0 <= value <= most:
        raise ValueError(f"{shown(value)} stands where something like {default} should")
    return value


def checked_config(default: Config, stored: Any) -> Config:
    """A config of stored values; what is not stored keeps its default. Raises ValueError or TypeError for what no checkpoint may
    hold."""
    known = asdict(default)
    if not isinstance(stored, dict) or not set(stored) <= set(known):
        raise ValueError("the config has fields that this program does not know")
    return replace(default, **{name: _checked(known[name], value) for name, value in stored.items()})


def _check_sizes(agent: Arrays, simulator: Arrays, state_dim: int, summary_dim: int, ppo: PPOConfig,
                 sim: EnsembleConfig) -> None:  # fmt: skip
    """The widths must be those of arrays in the file: nothing larger than the file is made. Raises CheckpointError."""
    width = ppo.hidden
    encoder: Shapes = {"parameter/encoder1.weight": (state_dim, width), "parameter/encoder2.weight": (width, width)}
    checkpoint.check_shapes(agent, encoder, "the agent")
    nets = _part(simulator, "nets.")
    first: Shapes = {"mean": (summary_dim,), "p0": (sim.members, padded(summary_dim), sim.hidden)}
    hidden: Shapes = {f"p{2 * i}": (sim.members, sim.hidden, sim.hidden) for i in range(1, min(sim.layers, len(nets)))}
    checkpoint.check_shapes(nets, {**first, **hidden}, "the simulator")
    if min(state_dim, summary_dim) < 1 or len(nets) != 2 * (sim.layers + 1) + 3:
        raise checkpoint.CheckpointError("a size is 0, or the simulator has not as many layers as it says")
    arrays = [*agent.values(), *simulator.values()]
    if not all(array.dtype.kind == "f" and (np.abs(array) < LARGEST).all() for array in arrays):
        raise checkpoint.CheckpointError("it holds numbers that are none, or too large")


def find_checkpoint(named: Path | None, device: str, runs: Path | None = Path("runs"), finetuned: bool = True) -> Path:
    """The named checkpoint, else the newest of `make train` for this backend (`runs`, None: not looked for), else the one that
    ships for it, else for CPU.

    `finetuned`: those of `--finetune` count, too. Not in a comparison: they have practised on the kernels of a program.

    A guide of another backend proposes worse, and never harms: what it proposes is verified and timed like anything else.
    Raises UsageError where there is none. Whether a named one can be read is found out by loading it.
    """
    if named is not None:
        return named
    backend = backend_of(device)
    trained = [p for p in runs.glob("*/best.json") if _serves(p, backend, finetuned)] if runs else []
    shipped = [
        p for name in (backend.lower(), "cpu") if (p := files.DATA / f"guide-{name}").with_suffix(".json").exists()
    ]
    if trained:
        return max(trained, key=lambda p: p.stat().st_mtime).with_suffix("")
    if shipped:
        return shipped[0]
    raise UsageError(f"no checkpoint for {backend}: run `DEV={backend} {TRAIN}`, or name one")


def _serves(description: Path, backend: str, finetuned: bool) -> bool:
    """Whether a checkpoint was trained for this backend, by a version that saw the same features, to the end, not in a test run of
    seconds, and was not found to be slower than what it began with."""
    try:
        meta = parse(description.read_text())
        current = meta["vocabulary"] == VOCABULARY and meta["features"] == FEATURES
        # earlier versions said it by the directory alone
        practised = meta.get("finetuned", description.parent.name.startswith(FINETUNED))
        whole = meta.get("finished", True) and meta.get("serves", True) and not meta["draft"]
        return current and whole and (finetuned or not practised) and backend_of(str(meta["backend"])) == backend
    except (OSError, ValueError, KeyError, TypeError, CodecError):
        return False
