"""Schedules chosen by what actions are worth (`value`), or by the policy among those that are worth enough (`filter`).

An action is worth its reward and what lies beyond: the fall of the simulator's log-time, and the critic's value of where
it leads, which has practised in the same simulator. STOP is worth 0. `value` takes the best, `filter` drops what is worth
much less than the best and lets the policy choose among the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.networks import ILLEGAL
from agents.planning import with_stop
from autotune.episodes import look, stacked
from autotune.search.policy import PolicySearch
from autotune.space import MAX_STEPS, STOP_INDEX, State, step

LOOKED = (
    8  # actions of each state, fastest by the simulator, of which the critic is asked; of others it would change little
)
SOFTNESS = 0.25  # log2 units: at temperature 1 an action worth that much less is 1/e as likely
MARGIN = 0.5  # log2 units below the best at which `filter` drops an action


class ValueSearch(PolicySearch):
    """Best value: its greedy schedule first, then samples."""

    def episodes(self, starts: Sequence[State], temperature: float | np.ndarray) -> list[list[State]]:
        """n_envs episodes from `starts` in turn, as `episodes.sample_episodes`; temperature 0 is greedy."""
        n = self.guide.agent.config.n_envs
        heat = np.broadcast_to(temperature, n)
        paths = [[starts[i % len(starts)]] for i in range(n)]
        going = list(range(n))
        for _ in range(MAX_STEPS + 1):
            ends = {paths[i][-1].schedule: paths[i][-1] for i in going}
            logits = dict(zip(ends, self._logits(list(ends.values())), strict=True))  # of equal states once
            still = []
            for i in going:
                own = logits[paths[i][-1].schedule]
                action = int((own + heat[i] * self.rng.gumbel(size=own.shape)).argmax())
                if action != STOP_INDEX:
                    paths[i].append(step(paths[i][-1], action))
                    still.append(i)
            going = still
            if not going:
                break
        return paths

    def worth(self, states: Sequence[State]) -> np.ndarray:
        """Log2 speedup to be had by way of each action [N, A]; ILLEGAL outside the mask."""
        found = np.full((len(states), len(look(states[0], self.looked)[1])), float(ILLEGAL))
        found[:, STOP_INDEX] = 0.0
        steps = [(i, int(a), step(s, int(a))) for i, s in enumerate(states)
                 for a in np.flatnonzero(look(s, self.looked)[1][:-1])]  # fmt: skip
        if not steps:
            return found
        before, after = self.guide.predict(states)[0], self.guide.predict([child for _, _, child in steps])[0]
        for (i, action, _), time in zip(steps, after, strict=True):
            found[i, action] = before[i] - time
        best = {(i, a) for i in range(len(states)) for a in np.argsort(-found[i])[:LOOKED]}
        beyond = [(i, a, child) for i, a, child in steps if (i, a) in best]
        for (i, action, _), value in zip(beyond, self._values([child for _, _, child in beyond]), strict=True):
            found[i, action] += value
        return found

    def _logits(self, states: Sequence[State]) -> np.ndarray:
        """From which actions are drawn [N, A]."""
        return self.worth(states) / SOFTNESS

    def _policy(self, states: Sequence[State]) -> tuple[np.ndarray, np.ndarray]:
        """The agent's log-probabilities [N, A] and values [N], with a fresh memory: a state tells what was done."""
        agent = self.guide.agent
        n, log_probs, values = agent.config.n_envs, [], []
        for at in range(0, len(states), n):
            rows = [look(s, self.looked) for s in states[at : at + n]]
            padded = rows + rows[:1] * (n - len(rows))  # always the shape that is captured
            found = agent.evaluate(stacked(padded), agent.initial_hidden(n), np.ones(n, np.float32))
            log_probs.append(found[0][: len(rows)])
            values.append(found[1][: len(rows)])
        return np.concatenate(log_probs), np.concatenate(values)

    def _values(self, states: Sequence[State]) -> np.ndarray:
        """What the critic says lies beyond each state [N]."""
        return with_stop(self._policy(states)[1], np.stack([look(s, self.looked)[1] for s in states]))


class FilterSearch(ValueSearch):
    """The policy, without the moves of low value."""

    def _logits(self, states: Sequence[State]) -> np.ndarray:
        worth = self.worth(states)
        return np.where(worth >= worth.max(1, keepdims=True) - MARGIN, self._policy(states)[0], ILLEGAL)
