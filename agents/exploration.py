"""Exploration: what an agent does while it learns, as changes to the distribution that it samples from.

Each change maps log-probabilities [B, A] to log-probabilities [B, A] over the same legal actions, and the one
sampled from is the one whose log-probability is stored: an importance ratio is always against what was done.

    switch                       where              default (off)   annealed over
    weight of the entropy bonus  PPOConfig          entropy 0.01    anneal_updates, to entropy_end
    temperature                  ExplorationConfig  temperature 1   temperature_updates, to temperature_end
    action noise                 ExplorationConfig  noise 0         noise_updates, to noise_end
    sticky actions               ExplorationConfig  sticky 0        -
    count-based UCB              ExplorationConfig  ucb 0           - (by itself: counts grow)
    intrinsic rewards            agents.bonuses     no Curious      - (by themselves: errors shrink, counts grow)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from agents.checkpoint import check_shapes
from agents.checks import check_below_one, check_fraction, check_least, check_positive
from agents.learner import NetworkAgent, annealed, sample
from agents.networks import ILLEGAL
from agents.protocol import Observation
from agents.rollout import Action, Learner, Rollout


@dataclass(frozen=True)
class ExplorationConfig:
    """Every switch is off by default. Raises ValueError for a number out of its range."""

    temperature: float = 1.0  # of the policy, at the start; above 1 is flatter
    temperature_end: float = 1.0  # and at the end of the annealing
    temperature_updates: int = 0  # updates over which it is annealed; 0 = never
    noise: float = 0.0  # share of a uniform choice among the legal actions, at the start
    noise_end: float = 0.0  # and at the end of the annealing
    noise_updates: int = 0  # updates over which it is annealed; 0 = never
    sticky: float = 0.0  # probability of the episode's previous action once more, where it is legal
    ucb: float = 0.0  # weight of the count bonus, which is added to log pi
    ucb_bits: int = 12  # 2^bits rows of counters: all the memory that counting takes
    ucb_digits: int = 2  # decimals of an observation that tell it from another

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "temperature_end")
        check_fraction(self, "noise", "noise_end")
        check_least(self, ucb=0, temperature_updates=0, noise_updates=0)
        check_below_one(self, "sticky")
        if not 1 <= self.ucb_bits <= 24:
            raise ValueError(f"ucb_bits must be from 1 to 24, not {self.ucb_bits}")


# *** distributions: log-probabilities [B, A] float32, illegal actions at ILLEGAL, so that exp gives exactly 0 ***


def normalise(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """log softmax over the legal actions. scores [B, A], mask [B, A] bool -> [B, A]."""
    legal = np.where(mask, scores.astype(np.float64), -np.inf)
    total = np.logaddexp.reduce(legal, axis=1, keepdims=True)
    return np.where(mask, legal - total, ILLEGAL).astype(np.float32)


def temper(log_probs: np.ndarray, mask: np.ndarray, temperature: float) -> np.ndarray:
    """pi^(1 / temperature), normalised (Boltzmann exploration); 1 changes nothing."""
    return log_probs if temperature == 1 else normalise(log_probs / temperature, mask)


def mix(log_probs: np.ndarray, other: np.ndarray, share: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(1 - share) pi + share q, for q = other [B, A] (probabilities) and share [B, 1]; 0 leaves a row as it is."""
    with np.errstate(divide="ignore"):  # log 0 = -inf is what is meant
        mixed = np.logaddexp(np.log(1 - share) + log_probs, np.log(share * other))
    return np.where(mask & (share > 0), mixed, log_probs).astype(np.float32)


def add_noise(log_probs: np.ndarray, mask: np.ndarray, share: float) -> np.ndarray:
    """(1 - share) pi + share uniform over the legal actions (epsilon-greedy's noise, on a policy)."""
    if share == 0:
        return log_probs
    return mix(log_probs, mask / mask.sum(1, keepdims=True), np.full((len(mask), 1), share), mask)


def stick(log_probs: np.ndarray, mask: np.ndarray, previous: np.ndarray, probability: float) -> np.ndarray:
    """(1 - p) pi + p [a = previous] where the previous action is legal, else pi. previous [B], -1 = there is none.

    Machado et al. 2018 let the environment repeat; here it is the agent, so the mixture is known and is what is
    stored.
    """
    if probability == 0:
        return log_probs
    again = (np.arange(mask.shape[1]) == previous[:, None]) & mask  # [B, A], at most one a row
    return mix(log_probs, again, probability * again.any(1, keepdims=True), mask)


def optimistic(log_probs: np.ndarray, mask: np.ndarray, counts: np.ndarray, c: float) -> np.ndarray:
    """pi exp(c sqrt(log N(s) / (1 + N(s, a)))), normalised: UCB1's bonus (Auer et al. 2002) as a preference.

    counts [B, A] are N(s, a), how often each action was taken where the rows' observations were seen, and N(s) their
    sum over actions; a state that is new changes nothing.
    """
    if c == 0:
        return log_probs
    visits = np.log(np.maximum(counts.sum(1, keepdims=True, dtype=np.float64), 1))  # [B, 1]
    return normalise(log_probs + c * np.sqrt(visits / (1 + counts)), mask)


class StateCounts:
    """How often observations were seen, in columns (one for each action, say): 2^bits rows, however many there are.

    An observation is rounded to `digits` decimals, then hashed by multiply-shift (Dietzfelbinger et al. 1997), with
    factors drawn from the seed. Two that collide share a row: novelty is understated there, never overstated.
    """

    def __init__(self, state_dim: int, columns: int, bits: int, digits: int, seed: int):
        self.bits, self.digits = bits, digits
        # odd, so that no observation of one number is lost; saved with the counts, which mean nothing without them
        self.factors = np.random.default_rng(seed).integers(0, 2**64, state_dim, np.uint64) | np.uint64(1)
        self.table = np.zeros((2**bits, columns), np.uint32)

    def rows(self, state: np.ndarray) -> np.ndarray:
        """[..., D] -> [...]: where in the table."""
        limit = 2.0**31  # of a rounded number; beyond it all are one
        whole = np.rint(np.clip(state * 10.0**self.digits, -limit, limit)).astype(np.int64).view(np.uint64)
        return ((whole * self.factors).sum(-1) >> np.uint64(64 - self.bits)).astype(np.int64)  # sums wrap: modulo 2^64

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """[..., D] -> [..., columns]."""
        return self.table[self.rows(state)]

    def add(self, state: np.ndarray, column: np.ndarray | int = 0) -> None:
        """Counts every observation of [..., D] once, in its column [...]."""
        np.add.at(self.table.reshape(-1), self.rows(state) * self.table.shape[1] + column, 1)

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        return {f"{prefix}counts": self.table.copy(), f"{prefix}factors": self.factors.copy()}

    def load(self, tensors: Mapping[str, np.ndarray], prefix: str) -> None:
        self.table, self.factors = tensors[f"{prefix}counts"].copy(), tensors[f"{prefix}factors"].copy()


# *** agents around agents ***


class Wrapper:
    """A Learner around another one; whatever is not changed here is the other one's, its attributes too."""

    name: str
    rng: np.random.Generator
    updates: int

    def __init__(self, agent: Learner):
        self.agent: Any = agent

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "agent":  # not set yet, as in a copy that is being made
            raise AttributeError(attribute)
        return getattr(self.agent, attribute)

    def initial_hidden(self, n: int) -> np.ndarray:
        return self.agent.initial_hidden(n)

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        return self.agent.act(observation, hidden, reset, temperature)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return self.agent.value(observation, hidden, reset)

    def update(self, rollout: Rollout) -> dict[str, float]:
        return self.agent.update(rollout)

    def own_state(self) -> dict[str, np.ndarray]:
        """What it adds to the other one's state."""
        return {}

    def load_own_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The opposite of `own_state`, for arrays whose shapes were checked."""

    def settings(self) -> dict[str, Any]:
        """How it was set, as JSON: a run is not resumed with other ones (see agents.training)."""
        return {}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self.agent.state()
        return tensors | self.own_state(), meta | {"wrappers": meta.get("wrappers", {}) | self.settings()}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape differs; nothing is changed then."""
        check_shapes(tensors, {name: array.shape for name, array in self.own_state().items()}, self.name)
        self.agent.load_state(tensors, meta)
        self.load_own_state(tensors)


class Explorer(Wrapper):
    """An agent that explores as a configuration says: policy -> UCB -> temperature -> noise -> sticky.

    With every switch off it is the agent itself, bit for bit. Nothing is explored at temperature 0. A PPO's
    `first_ratio_error` then tells how far what is done is from the policy. `seed` draws the hash of the counts. Raises TypeError for
    an agent that acts otherwise than by its policy, as MuZero does: it explores by itself.
    """

    def __init__(self, agent: NetworkAgent, config: ExplorationConfig | None = None, seed: int = 0):
        super().__init__(agent)
        inner: Learner = agent
        while isinstance(inner, Wrapper):
            if isinstance(inner, Explorer):
                raise TypeError("an Explorer inside of an Explorer would not be heard: set all switches in one")
            inner = inner.agent
        if type(inner).act is not NetworkAgent.act:
            raise TypeError(f"{agent.name} does not act by its policy alone, which an Explorer would have it do")
        self.exploration = c = config or ExplorationConfig()
        state_dim, n_actions, _ = agent.dims
        self.counts = StateCounts(state_dim, n_actions, c.ucb_bits, c.ucb_digits, seed) if c.ucb else None

    # With sticky actions the hidden state has one more column, 1 + the previous action (0 = none): each environment
    # then carries its own, like the rest of its memory, and an evaluation in between disturbs nothing.

    def initial_hidden(self, n: int) -> np.ndarray:
        hidden = self.agent.initial_hidden(n)
        return np.pad(hidden, ((0, 0), (0, 1))) if self.exploration.sticky else hidden

    def inner(self, hidden: np.ndarray) -> np.ndarray:
        """The other agent's part of the hidden state."""
        return hidden[:, :-1] if self.exploration.sticky else hidden

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Samples from what `explore` makes of the agent's behaviour; see NetworkAgent.act."""
        log_probs, value, after = self.agent.evaluate(observation, self.inner(hidden), reset)
        if temperature:
            previous = np.where(reset, 0, hidden[:, -1]).astype(np.int64) - 1 if self.exploration.sticky else None
            log_probs = self.explore(self.agent.behaviour(log_probs, observation.mask), observation, previous)
        action, log_prob = sample(log_probs, self.rng, temperature)
        if self.exploration.sticky:
            after = np.concatenate([after, (action[:, None] + 1).astype(np.float32)], axis=1)  # [B, 2H + 1]
        return Action(action, log_prob, value, after)

    def explore(self, log_probs: np.ndarray, observation: Observation, previous: np.ndarray | None) -> np.ndarray:
        """All switches, one after another: [B, A] -> [B, A]. previous [B] is needed where actions are sticky."""
        c, mask, updates = self.exploration, observation.mask, self.updates
        if self.counts is not None:
            log_probs = optimistic(log_probs, mask, self.counts(observation.state), c.ucb)
        temperature = annealed(c.temperature, c.temperature_end, updates, c.temperature_updates)
        noise = annealed(c.noise, c.noise_end, updates, c.noise_updates)
        log_probs = add_noise(temper(log_probs, mask, temperature), mask, noise)
        return log_probs if previous is None else stick(log_probs, mask, previous, c.sticky)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return self.agent.value(observation, self.inner(hidden), reset)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """The agent's own update. Counted is only what was learned from, so that looking does not count."""
        metrics = self.agent.update(replace(rollout, hidden=self.inner(rollout.hidden)))
        if self.counts is not None:
            self.counts.add(rollout.state, rollout.action)
        return metrics

    def settings(self) -> dict[str, Any]:
        return asdict(self.exploration)

    def own_state(self) -> dict[str, np.ndarray]:
        return {} if self.counts is None else self.counts.state("explorer/")

    def load_own_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        if self.counts is not None:
            self.counts.load(tensors, "explorer/")
