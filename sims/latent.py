"""A simulator's latent dynamics as a world to plan in (MuZero: Schrittwieser et al. 2020): where an action leads and what is
still within reach from there says the simulator, what is legal and likely say heads on its embedding. Nothing asks the
compiler, but for where a plan begins.
"""

from __future__ import annotations

import numpy as np

from agents.networks import ILLEGAL
from agents.planning import CONSIDERED, Embeddings, Recurrent, Root, SearchResult, search, with_stop
from sims.base import PathSimulator, SimulatorError
from sims.heads import Heads
from sims.paths import Paths

SPREAD = 1.0  # log2 units: in a search, times nearer than a factor of 2 are not blown up to the whole range


class LatentWorld:
    """One kernel; the last action is STOP. An embedding of the search is [z, log-time, number of actions] [E + 2]."""

    def __init__(self, simulator: PathSimulator, heads: Heads, rows: np.ndarray, steps: int):
        """rows [A, F]: what each action does to this kernel; that of STOP is all zero. steps: actions at most."""
        if rows[-1].any():
            raise SimulatorError("the last action must be STOP, whose row is all zero")
        self.simulator, self.heads, self.rows, self.steps = simulator, heads, rows, steps
        self.stop = len(rows) - 1

    def root(self, starts: Paths, mask: np.ndarray) -> Root:
        """Where paths [B] of this kernel end; mask [B, A] is what is legal there, exactly."""
        z = self.simulator.embed(starts)
        prior, value, _, node = self._look(z, starts.length)
        return Root(np.where(mask, prior, ILLEGAL), with_stop(value, mask), node, mask)

    def recurrent(self, embedding: Embeddings, action: np.ndarray) -> Recurrent:
        """STOP pays nothing and ends; any other action pays by how much log2 of the time falls."""
        nodes = np.asarray(embedding)
        stopped, depth = action == self.stop, nodes[:, -1]
        z = nodes[:, :-2].copy()
        going = np.flatnonzero(~stopped & (depth < self.steps))
        if len(going):
            z[going] = self.simulator.advance(z[going], self.rows[action[going]])
        prior, value, legal, after = self._look(z, depth + ~stopped)
        mask = legal > 0
        mask[after[:, -1] >= self.steps] = False  # a path is full
        mask[:, self.stop] = True  # to stop is always legal
        reward = np.where(stopped, 0.0, nodes[:, -2] - after[:, -2])
        return Recurrent(reward, np.where(stopped, 0.0, 1.0), prior, with_stop(value, mask), mask, after)

    def plan(self, starts: Paths, mask: np.ndarray, simulations: int, noise: np.ndarray | None = None,
             considered: int = CONSIDERED) -> SearchResult:  # fmt: skip
        """A Gumbel search from where each path ends. A learned model errs, so its values are averaged (`backup="mean"`)."""
        return search(self.root(starts, mask), self.recurrent, simulations, noise, considered, "mean", SPREAD)

    def _look(self, z: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(prior logits [B, A], log-speedup within reach [B], legality logits [B, A], embeddings of the search)."""
        relative, reachable, _ = self.simulator.judge(z)
        prior, legal = self.heads(z, self.rows)
        node = np.concatenate([z, np.stack([relative, depth], axis=1)], axis=1).astype(np.float32)
        return prior, relative - reachable, legal, node


def reanalyse(
    world: LatentWorld, starts: Paths, mask: np.ndarray, simulations: int, rng: np.random.Generator
) -> np.ndarray:
    """Fresh targets [B, A] for the heads' prior: what a search with the present heads makes of it (Schrittwieser et al. 2021,
    with the policy targets of Danihelka et al. 2022).
    """
    return world.plan(starts, mask, simulations, rng.gumbel(size=mask.shape)).policy_target
