"""Episodes of a trained policy on the exact dynamics: no environment, no trial, only what it would do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.ppo import PPO
from agents.protocol import Observation
from autotune.features import View, observe
from autotune.kernel import Schedule
from autotune.space import MAX_STEPS, STOP_INDEX, State, legal_mask, step

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # (vector [D], mask [A], actions [A, F]) of a state
Seen = dict[tuple[str, Schedule], Row]  # by kernel and schedule: worth keeping


def sample_episodes(
    agent: PPO,
    starts: Sequence[State],
    rng: np.random.Generator,
    temperature: float | np.ndarray,
    seen: Seen,
    view: View = observe,
) -> list[list[State]]:
    """n_envs episodes, started from `starts` in turn: the states that each passed through, the start first.

    One temperature for all, or one for each [n_envs]; 0 is greedy. An episode that does not start at a root begins with a
    fresh memory: the state alone tells what was done.
    """
    n = agent.config.n_envs
    paths = [[starts[i % len(starts)]] for i in range(n)]
    done = np.zeros(n, dtype=bool)
    hidden, reset = agent.initial_hidden(n), np.ones(n, np.float32)
    for _ in range(MAX_STEPS + 1):
        rows = [look(p[-1], seen, view) for p in paths]
        if not any(mask[:STOP_INDEX].any() for (_, mask, _), ended in zip(rows, done, strict=True) if not ended):
            break  # there is nothing left to decide
        observation = stacked(rows)
        masks = observation.mask
        offered = masks if agent.config.masked else np.ones_like(masks)
        log_probs, _, hidden = agent.evaluate(observation._replace(mask=offered), hidden, reset)
        noise = rng.gumbel(size=log_probs.shape) * np.reshape(temperature, (-1, 1))  # [n_envs, A]
        for i, action in enumerate((log_probs + noise).argmax(1)):
            if action == STOP_INDEX or not masks[i, action]:
                done[i] = True
            elif not done[i]:
                paths[i].append(step(paths[i][-1], int(action)))
        reset = np.zeros(n, np.float32)
        if done.all():
            break
    return paths


def look(state: State, seen: Seen, view: View = observe) -> Row:
    """What a policy is shown of a state: taken from `seen`, and put there where it is missing."""
    key = (state.kernel.key, state.schedule)
    if key not in seen:
        mask = legal_mask(state)
        vector, actions = view(state, mask)
        seen[key] = (vector, mask, actions)
    return seen[key]


def stacked(rows: Sequence[Row]) -> Observation:
    """What `look` says of some states, as one observation of them all."""
    return Observation(*map(np.stack, zip(*rows, strict=True)))
