"""Small worlds in numpy, each of which one particular bug makes unlearnable."""

from __future__ import annotations

import math

import numpy as np

from agents.protocol import Observation, Step


class Toy:
    """B copies side by side: time limit, automatic reset, final observations. A subclass gives the world."""

    action_dim = 0
    state_dim: int
    n_actions: int

    def __init__(self, n_envs: int, limit: int):
        self.n_envs, self.limit = n_envs, limit
        self.rng, self.age = np.random.default_rng(0), np.zeros(n_envs, np.int64)

    def begin(self, rows: np.ndarray) -> None:
        """Starts a new episode in rows (indices)."""
        raise NotImplementedError

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step: rewards [B] and terminated [B]."""
        raise NotImplementedError

    def state(self) -> np.ndarray:
        raise NotImplementedError

    def mask(self) -> np.ndarray:
        return np.ones((self.n_envs, self.n_actions), bool)

    def observe(self) -> Observation:
        return Observation(self.state().astype(np.float32), self.mask())

    def reset(self, seed: int) -> Observation:
        self.rng = np.random.default_rng(seed)
        self.age[:] = 0
        self.begin(np.arange(self.n_envs))
        return self.observe()

    def restart(self, rows: np.ndarray) -> Observation:
        """See agents.protocol.Restartable."""
        self.age[rows] = 0
        self.begin(rows)
        return self.observe()

    def step(self, actions: np.ndarray) -> Step:
        if not self.mask()[np.arange(self.n_envs), actions].all():
            raise ValueError("an illegal action was taken")
        reward, terminated = self.advance(actions)
        self.age += 1
        truncated = (self.age >= self.limit) & ~terminated
        final = self.observe() if truncated.any() else None
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            self.restart(ended)
        return Step(self.observe(), reward.astype(np.float32), terminated, truncated, final)


class CartPole(Toy):
    """Barto, Sutton and Anderson 1983, with the constants and the Euler step of Gymnasium's CartPole-v1.

    velocities=False hides both speeds: only an agent with memory can then balance the pole.
    """

    n_actions = 2

    def __init__(self, n_envs: int, velocities: bool = True, limit: int = 500):
        super().__init__(n_envs, limit)
        self.visible = [0, 1, 2, 3] if velocities else [0, 2]
        self.state_dim, self.physics = len(self.visible), np.zeros((n_envs, 4))

    def begin(self, rows: np.ndarray) -> None:
        self.physics[rows] = self.rng.uniform(-0.05, 0.05, (len(rows), 4))

    def state(self) -> np.ndarray:
        return self.physics[:, self.visible]

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, speed, angle, spin = self.physics.T
        gravity, pole, total, half_length, tau = 9.8, 0.1, 1.1, 0.5, 0.02
        sine, cosine = np.sin(angle), np.cos(angle)
        push = (np.where(actions == 1, 10.0, -10.0) + pole * half_length * spin**2 * sine) / total
        turn = (gravity * sine - cosine * push) / (half_length * (4 / 3 - pole * cosine**2 / total))
        slide = push - pole * half_length * turn * cosine / total
        self.physics = np.stack([x + tau * speed, speed + tau * slide, angle + tau * spin, spin + tau * turn], axis=1)
        fallen = (np.abs(self.physics[:, 0]) > 2.4) | (np.abs(self.physics[:, 2]) > 12 * math.pi / 180)
        return np.ones(self.n_envs), fallen


class Identity(Toy):
    """Name the number that is shown. 100 steps, reward 1 each."""

    def __init__(self, n_envs: int, n: int = 4, limit: int = 100):
        super().__init__(n_envs, limit)
        self.state_dim = self.n_actions = n
        self.shown = np.zeros(n_envs, np.int64)

    def begin(self, rows: np.ndarray) -> None:
        self.shown[rows] = self.rng.integers(0, self.n_actions, len(rows))

    def state(self) -> np.ndarray:
        return np.eye(self.n_actions)[self.shown]

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reward = actions == self.shown
        self.begin(np.arange(self.n_envs))
        return reward, np.zeros(self.n_envs, bool)


class MaskedIdentity(Identity):
    """The same with 70 numbers, of which 55 wrong ones are illegal, others at every step. masked=False tells
    the agent nothing of it: an illegal answer is then merely wrong."""

    def __init__(self, n_envs: int, n: int = 70, illegal: int = 55, masked: bool = True, limit: int = 100):
        super().__init__(n_envs, n, limit)
        self.illegal, self.masked = illegal, masked
        self.legal = np.ones((n_envs, n), bool)

    def mask(self) -> np.ndarray:
        return self.legal.copy() if self.masked else super().mask()

    def begin(self, rows: np.ndarray) -> None:
        super().begin(rows)
        order = self.rng.random((len(rows), self.n_actions))
        order[np.arange(len(rows)), self.shown[rows]] = 2.0  # the right answer stays legal
        self.legal[rows] = order.argsort(1).argsort(1) >= self.illegal


class FixedSequence(Toy):
    """Give the same secret sequence every time, seeing nothing: 1/length for each right place. Without memory
    of the place at most 1/length is reached, since no number occurs twice."""

    state_dim = 1

    def __init__(self, n_envs: int, length: int = 5, n: int = 10, secret: int = 7):
        super().__init__(n_envs, limit=10**9)
        self.n_actions, self.secret = n, np.random.default_rng(secret).permutation(n)[:length]

    def begin(self, rows: np.ndarray) -> None:
        pass

    def state(self) -> np.ndarray:
        return np.zeros((self.n_envs, 1))

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (actions == self.secret[self.age]) / len(self.secret), self.age + 1 >= len(self.secret)


class DelayedMemory(Toy):
    """A cue of 0 or 1 is shown at the first step only; naming it at the last step earns 1. Without memory:
    0.5.

    previous=True asks for the cue of the episode before, which nobody can know whose memory is wiped between
    episodes: 0.5."""

    state_dim, n_actions = 3, 2

    def __init__(self, n_envs: int, delay: int = 4, previous: bool = False):
        super().__init__(n_envs, limit=10**9)
        self.delay, self.previous = delay, previous
        self.cue, self.answer = np.zeros(n_envs, np.int64), np.zeros(n_envs, np.int64)

    def reset(self, seed: int) -> Observation:
        self.cue[:] = 0  # a seed is a run, whatever was played before
        return super().reset(seed)

    def begin(self, rows: np.ndarray) -> None:
        before = self.cue[rows].copy()
        self.cue[rows] = self.rng.integers(0, 2, len(rows))
        self.answer[rows] = before if self.previous else self.cue[rows]

    def state(self) -> np.ndarray:
        first, last = self.age == 0, self.age == self.delay
        return np.stack([first & (self.cue == 0), first & (self.cue == 1), last], axis=1)

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = self.age == self.delay
        return last & (actions == self.answer), last


class EndlessReward(Toy):
    """1 at every step for ever, cut every 8 steps: the value is 1 / (1 - gamma), unless truncation is taken
    for an end."""

    state_dim, n_actions = 1, 2

    def __init__(self, n_envs: int, limit: int = 8):
        super().__init__(n_envs, limit)

    def begin(self, rows: np.ndarray) -> None:
        pass

    def state(self) -> np.ndarray:
        return np.ones((self.n_envs, 1))

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(self.n_envs), np.zeros(self.n_envs, bool)


class SparseChain(Toy):
    """Walk n steps without a mistake, each by a secret one of some actions, and earn 1 in the last: what an
    episode of n steps allows just once. A wrong step falls back to the start, and earns 0.2 / n if one stands there.

    The optimum is 1; falling for the distractor earns 0.2; random play gets there once in `walks` ** n episodes, a
    million (after NChain, Strens 2000, and DeepSea, Osband et al. 2020)."""

    def __init__(self, n_envs: int, n: int = 10, walks: int = 4, steps: int | None = None, secret: int = 7):
        super().__init__(n_envs, limit=10**9)
        self.state_dim, self.n_actions, self.n, self.steps = n, walks, n, steps or n
        self.secret = np.random.default_rng(secret).integers(0, walks, n)
        self.place = np.zeros(n_envs, np.int64)

    def begin(self, rows: np.ndarray) -> None:
        self.place[rows] = 0

    def state(self) -> np.ndarray:
        return np.eye(self.n)[np.minimum(self.place, self.n - 1)]

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right = actions == self.secret[self.place]
        reward = np.where(right, 0.0, 0.2 / self.steps) * (self.place == 0)
        self.place = np.where(right, self.place + 1, 0)
        arrived = self.place == self.n
        return reward + arrived, arrived | (self.age + 1 >= self.steps)


class NoisyTV(SparseChain):
    """The same chain, with time for two attempts and one more action, the last: stay, and watch. Next to the place,
    the observation then shows `channels` numbers that were never seen before and mean nothing.

    The optimum is 1. `tv_share` is the share of steps spent watching since the last reset (Burda et al. 2019,
    "Large-scale study of curiosity-driven learning", section 5)."""

    def __init__(self, n_envs: int, n: int = 8, walks: int = 4, channels: int = 4, secret: int = 7):
        super().__init__(n_envs, n, walks, 2 * n, secret)
        self.state_dim, self.n_actions = n + channels, walks + 1
        self.screen = np.zeros((n_envs, channels))
        self.watched = self.played = 0

    @property
    def tv_share(self) -> float:
        return self.watched / max(1, self.played)

    def reset(self, seed: int) -> Observation:
        self.watched = self.played = 0
        return super().reset(seed)

    def begin(self, rows: np.ndarray) -> None:
        super().begin(rows)
        self.screen[rows] = 0

    def state(self) -> np.ndarray:
        return np.concatenate([super().state(), self.screen], axis=1)

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        watching, place = actions == self.n_actions - 1, self.place
        reward, terminated = super().advance(actions)  # which took watching for a wrong step
        self.place = np.where(watching, place, self.place)
        noise = self.rng.standard_normal(self.screen.shape)
        self.screen = np.where(watching[:, None], noise, 0.0)
        self.watched += int(watching.sum())
        self.played += len(actions)
        return np.where(watching, 0.0, reward), terminated


class Stitch(Toy):
    """Two lanes of `length` stages. The secret answer of a stage leads to the high lane, or keeps one there; any other to
    the low one, where everyone begins. To climb costs 1/2, to stay up pays 1, all else nothing.

    Best: climb at once and stay up, `length` - 3/2. Who answers at random gets `chance`, and loses by climbing: what
    makes it pay are right answers later on, which are spread over many episodes."""

    def __init__(self, n_envs: int, length: int = 8, n: int = 4, secret: int = 7):
        super().__init__(n_envs, limit=10**9)
        self.state_dim, self.n_actions, self.length = 2 * length, n, length
        self.secret, self.high = np.random.default_rng(secret).integers(0, n, length), np.zeros(n_envs, bool)

    @property
    def best(self) -> float:
        return self.length - 1.5

    @property
    def chance(self) -> float:
        """After the first stage one stands on the high lane with probability p = 1/n."""
        p = 1 / self.n_actions
        return -p / 2 + (self.length - 1) * (p * p - (1 - p) * p / 2)

    def begin(self, rows: np.ndarray) -> None:
        self.high[rows] = False

    def state(self) -> np.ndarray:
        return np.eye(self.state_dim)[self.age + self.length * self.high]

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right = actions == self.secret[self.age]
        reward = np.where(self.high, 1.0, -0.5) * right
        self.high = right
        return reward, self.age + 1 >= self.length
