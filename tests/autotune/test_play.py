"""How agents are judged on recorded kernels: by what they do with each when they first come to it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import add_one

from agents.protocol import Observation
from agents.rollout import Action
from agents.zoo import Kind
from autotune.compiler import renderer_of
from autotune.env import Task
from autotune.experiments import agents
from autotune.space import MAX_STEPS, STOP_INDEX


class Halting:
    """Row 0 stops at once, whatever it is shown; the others take the first action that is legal, for as long as there is one."""

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 0), np.float32)

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        chosen = observation.mask.argmax(1).astype(np.int32)
        chosen[0] = STOP_INDEX
        return Action(chosen, *(np.zeros(len(chosen), np.float32),) * 2, hidden)

    def value(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray) -> np.ndarray:
        return np.zeros(len(reset), np.float32)


def test_a_kernel_is_judged_by_the_episode_that_was_begun_first(monkeypatch: pytest.MonkeyPatch):
    """Of kernels a, b, c row 0 plays a, c, a, b while row 1 is at its first b, eight actions long."""
    monkeypatch.setattr(agents, "ENVS", 2)
    kernels = [add_one(2**n) for n in (12, 13, 14)]
    task = Task(kernels, renderer_of("CPU"), potential=lambda states: np.zeros(len(states)))
    chosen = agents.play(Halting(), Kind(lambda s: None), task, 0.0)  # type: ignore[arg-type,return-value]
    assert [len(chosen[k.key]) for k in kernels] == [0, MAX_STEPS, 0]
