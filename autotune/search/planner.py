"""Gumbel search on the exact dynamics with a learned cost (`planner`): look at a thousand schedules, measure eight.

The world is exact: `step` and the legality mask, no compiler. The cost is learned: an action is paid what it takes from the
simulator's log-time, so the value of a state is the log-speedup still within reach of it, and the policy's critic, which
has practised in the same simulator, says what lies below a leaf. Priors are the policy's. The rows of one search share the
root and differ in their Gumbel noise, in the temperature of their priors, and in the member of the committee's trees that they
believe, which is Thompson sampling on plans instead of candidates. Whatever any row looked at joins the pool of `mixed`, which
chooses from it what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.networks import ILLEGAL
from agents.planning import Recurrent, Root, search, with_stop
from autotune.compiler import Renderer
from autotune.episodes import look, stacked
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.search.mixed import MixedSearch
from autotune.space import STOP_INDEX, State, step
from sims.correction import Correction

SIMULATIONS, CONSIDERED = 8, 4  # for each action of each row, and actions that share them
STEPS = 8  # actions that each row takes
TEMPERATURES = (1.0, 3.0, 10.0)  # of the rows' priors, in turn: a policy that is too sure would make them all alike


class Node(NamedTuple):
    """What a search carries along: the state, the policy's memory, and the log2 time that this row believes."""

    state: State
    hidden: np.ndarray  # [2H]
    log_time: float


class PlannerSearch(MixedSearch):
    """`mixed`, with its pool grown by planning."""

    directs = False  # all that is measured was planned, or bred

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide, simulations: int = SIMULATIONS):
        super().__init__(kernel, renderer, seed, guide)
        self.simulations = simulations
        self.rows = guide.agent.config.n_envs
        self.temperatures = np.resize(TEMPERATURES, self.rows)
        self.planned: Correction | None = None  # what trials correct while a plan is made: nothing is told meanwhile

    def _grow(self) -> None:
        """One search from the root; another from the prefixes of the fastest schedules so far, where there are any."""
        self._plan([self.root])
        if prefixes := self._continued():
            self._plan(prefixes)

    def _plan(self, starts: Sequence[State]) -> None:
        """Episodes from `starts` in turn, each step of which is searched for; an episode that has ended begins again. The
        pool keeps all that any search looked at."""
        self.planned = self._correction()
        states = [starts[i % len(starts)] for i in range(self.rows)]
        for state in states:
            self._propose(state, "planner")
        hidden = self.guide.agent.initial_hidden(self.rows)
        root = first = self._look(states, hidden, np.ones(self.rows, np.float32))
        for _ in range(STEPS):
            noise = self.rng.gumbel(size=root.mask.shape)
            result = search(root, self._follow, self.simulations, noise, CONSIDERED, backup="max")
            for row in range(self.rows):
                for leaf in result.leaves(row):
                    self._propose(leaf.embedding.state, "planner")
            after = self._follow(root.embedding, result.action)
            for node in after.embedding:  # without simulations it is no leaf of the search
                self._propose(node.state, "planner")
            root = _merged(after.discount == 0, first, after)

    def _look(self, states: Sequence[State], hidden: np.ndarray, reset: np.ndarray) -> Root:
        """What policy, critic and the committee's trees say of some states; row i believes member i mod M."""
        observation = stacked([look(s, self.looked) for s in states])
        log_probs, value, after = self.guide.agent.evaluate(observation, hidden, reset)
        # no failure pushes back its like here: how alike two states are is measured by those beside them, and a reward is not
        members = self._members(states) + self._moved(self.planned, states)  # [M, B]
        times = members[np.arange(len(states)) % len(members), np.arange(len(states))]
        nodes = [Node(s, h, float(t)) for s, h, t in zip(states, after, times, strict=True)]
        logits = log_probs / self.temperatures[:, None]
        mask = observation.mask
        return Root(np.where(mask, logits, ILLEGAL), with_stop(value, mask), nodes, mask)

    def _follow(self, nodes: Sequence[Any] | np.ndarray, actions: np.ndarray) -> Recurrent:
        """The rules of KernelVectorEnv: STOP pays nothing and ends; any other action pays the fall of the log-time."""
        stopped = actions == STOP_INDEX
        states = [n.state if a == STOP_INDEX else step(n.state, int(a)) for n, a in zip(nodes, actions, strict=True)]
        hidden = np.stack([n.hidden for n in nodes])
        found = self._look(states, hidden, np.zeros(len(nodes), np.float32))
        reward = np.array([n.log_time for n in nodes]) - [n.log_time for n in found.embedding]
        return Recurrent(np.where(stopped, 0.0, reward), np.where(stopped, 0.0, 1.0), found.prior_logits, found.value,
                         found.mask, found.embedding)  # fmt: skip


def _merged(ended: np.ndarray, first: Root, after: Recurrent) -> Root:
    """What comes next of each row [B]: `first` where the episode has ended."""
    nodes = [f if e else a for e, f, a in zip(ended, first.embedding, after.embedding, strict=True)]
    return Root(np.where(ended[:, None], first.prior_logits, after.prior_logits), np.where(ended, first.value, after.value),
                nodes, np.where(ended[:, None], first.mask, after.mask))  # fmt: skip
