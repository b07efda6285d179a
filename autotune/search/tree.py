"""A tree of measured schedules, each one action longer than one that is measured, or was asked for before: `ucb` and `greedy`.

A node's worth is the best log-speedup measured in its subtree (transitions are deterministic, so a maximum and no mean),
rescaled to [0, 1] over the tree. Descending from the root takes the child with the largest

    worth + c sqrt(ln(visits of the parent) / visits)       UCB1 (Auer et al. 2002)

until a node has fewer children than WIDENING sqrt(visits) (progressive widening, Coulom 2007): there a legal action that
was not tried yet is taken at random. `greedy` is c = 0. All prefixes of what is asked for are measured first, hand-coded's and
those of others' trials, too, so a recording of such a search is a closed world in which an episode may stop anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.compiler import Renderer
from autotune.kernel import Kernel, Schedule
from autotune.records import Trial
from autotune.space import ACTION_INDEX, State, legal_mask, root_state, step

EXPLORATION = 0.5  # c above, on worths of [0, 1]
WIDENING = 2.0


@dataclass
class Node:
    """One schedule: what was measured of it, and what was tried from there."""

    state: State
    untried: list[int]
    children: dict[int, Node] = field(default_factory=dict)
    visits: int = 0
    best: float = math.inf  # the least log2 seconds in the subtree; infinite: none is known yet
    failed: bool = False  # then nothing is built on it
    tried: bool = False  # whether it was asked for, or had a trial; a baseline is none
    closed: bool = False  # whether nothing is left to try from here


class TreeSearch:
    """Grows a tree of measured schedules by upper confidence bounds."""

    def __init__(self, kernel: Kernel, renderer: Renderer, seed: int, exploration: float = EXPLORATION):
        self.rng = kernel.rng(seed)
        self.exploration = exploration
        self.times: dict[Schedule, float] = {}  # log2 seconds of all that was told, and not refuted since
        self.fastest, self.slowest = math.inf, -math.inf
        self.asked: set[Schedule] = set()
        self.root = self._node(root_state(kernel, renderer))

    def ask(self, count: int) -> list[Schedule]:
        """Up to `count` new schedules; fewer, or none, where the tree cannot grow any more."""
        asked: list[Schedule] = []
        while len(asked) < count and (path := self._descend()):
            for node in path:
                node.visits += 1
            path[-1].tried = True
            asked.append(path[-1].state.schedule)
        self.asked.update(asked)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what became of schedules, also of those that were never asked for."""
        for trial in trials:
            if (path := self._walk(trial.schedule)) is None or (trial.kind == "recheck" and trial.verdict == "ok"):
                continue
            leaf = path[-1]
            leaf.tried |= trial.kind == "trial"
            if trial.schedule not in self.asked and trial.kind != "recheck":
                for node in path:
                    node.visits += 1
            if trial.seconds is None:
                leaf.failed = bool(trial.schedule)  # the root is always built on
                self.times.pop(trial.schedule, None)  # of another program, if it had one
            else:
                self.times[trial.schedule] = math.log2(trial.seconds)
            for node in reversed(path):
                below = [child.best for child in node.children.values()]
                node.best = min([self.times.get(node.state.schedule, math.inf), *below])
        if self.times:
            self.fastest, self.slowest = min(self.times.values()), max(self.times.values())

    def _node(self, state: State) -> Node:
        legal = np.flatnonzero(legal_mask(state)[:-1])
        return Node(state, [int(a) for a in self.rng.permutation(legal)])

    def _descend(self) -> list[Node] | None:
        """The path to a new node, or to one that has had no trial; None where nothing is left to try. A dead end is closed, and the
        descent begins anew."""
        while True:
            path = [self.root]
            while not self._grows(node := path[-1]):
                if not (open_children := [c for c in node.children.values() if _open(c)]):
                    break
                path.append(max(open_children, key=lambda child: self._bound(child, node)))
                if not path[-1].tried:
                    return path
            if node.untried:
                action = node.untried.pop()
                child = node.children[action] = self._node(step(node.state, action))
                return [*path, child]
            if node is self.root:
                return None
            node.closed = True

    def _grows(self, node: Node) -> bool:
        return bool(node.untried) and len(node.children) < WIDENING * math.sqrt(max(1, node.visits))

    def _bound(self, child: Node, parent: Node) -> float:
        spread = self.slowest - self.fastest
        worth = (self.slowest - child.best) / spread if spread > 0 and child.best < math.inf else 0.0
        return worth + self.exploration * math.sqrt(math.log(max(1, parent.visits)) / max(1, child.visits))

    def _walk(self, schedule: Schedule) -> list[Node] | None:
        """The path of a schedule, made where it is missing; None where it holds an action that is not offered."""
        path = [self.root]
        for opt in schedule:
            node, action = path[-1], ACTION_INDEX.get(opt)
            if action is None or (action not in node.children and action not in node.untried):
                return None
            if action not in node.children:
                node.untried.remove(action)
                node.children[action] = self._node(step(node.state, action))
            path.append(node.children[action])
        return path


def _open(node: Node) -> bool:
    return not (node.failed or node.closed) and bool(not node.tried or node.untried or node.children)
