"""Gumbel search (Danihelka et al. 2022, "Policy improvement by planning with Gumbel"), batched over B roots in numpy.

A pure function of `root`, `recurrent_fn` and the noise. What an embedding is, only `recurrent_fn` knows: a row of an
array for a learned model, any object where the true world is searched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from agents.networks import ILLEGAL

CONSIDERED = 16  # the paper's; actions that the root looks at, at most
VISITS, SCALE = 50, 0.1  # the paper's c_visit, and its c_scale for values rescaled to [0, 1]
Embeddings = np.ndarray | Sequence[Any]  # [B, ...], or B objects
Backup = Literal["mean", "max"]


class SearchError(ValueError):
    """A root, or a model's answer, from which nothing can be chosen. Names the row."""


class Root(NamedTuple):
    prior_logits: np.ndarray  # [B, A]
    value: np.ndarray  # [B]
    embedding: Embeddings
    mask: np.ndarray  # [B, A] bool, True = legal


class Recurrent(NamedTuple):
    """What follows an action. After a discount of 0 nothing does: value, mask and logits are not looked at."""

    reward: np.ndarray  # [B]
    discount: np.ndarray  # [B]
    prior_logits: np.ndarray  # [B, A]
    value: np.ndarray  # [B]
    mask: np.ndarray  # [B, A] bool
    embedding: Embeddings


RecurrentFn = Callable[[Embeddings, np.ndarray], Recurrent]  # (embeddings, actions [B]), always all B rows


class Leaf(NamedTuple):
    """A node, all of which were the leaf of a simulation once."""

    path: tuple[int, ...]  # actions from the root
    embedding: Any
    ended: bool  # the episode is over there: a complete candidate
    total: float  # discounted rewards on the way


class SearchResult(NamedTuple):
    action: np.ndarray  # [B] int32
    policy_target: np.ndarray  # [B, A], 0 for illegal actions
    value: np.ndarray  # [B], of the root after the search
    visits: np.ndarray  # [B, A] int64, of the root's actions
    q: np.ndarray  # [B, A], of the root's actions; those not visited take v_mix
    tree: Tree

    def leaves(self, row: int) -> list[Leaf]:
        """Every node that one root's search has looked at, in that order."""
        return [self.tree.leaf(row, int(node)) for node in np.flatnonzero(self.tree.parent[row] >= 0)]


def with_stop(value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Learned values [B] of states in which the last action is STOP, which ends the episode and pays nothing: never below 0, and 0
    where the mask [B, A] offers nothing else."""
    return np.where(mask[:, :-1].any(1), np.maximum(value, 0.0), 0.0)


def considered_visits(considered: int, simulations: int) -> list[int]:
    """Sequential halving (Karnin et al. 2013): how often an action must have been visited to be visited next, for each
    simulation. Of m actions each phase keeps the better half, and visits them max(1, n / (ceil(log2 m) kept)) times."""
    phases = max(1, math.ceil(math.log2(considered)))
    sequence: list[int] = []
    kept, visits = considered, 0
    while len(sequence) < simulations:
        for _ in range(max(1, simulations // (phases * kept))):
            sequence += [visits] * kept
            visits += 1
        kept = max(min(2, considered), kept // 2)
    return sequence[:simulations]


@dataclass
class Tree:
    """N = n + 1 nodes for each root: node 0 is the root, node k was made by simulation k - 1, unless that one ended
    where an episode does; then there is no node k."""

    backup: Backup
    spread: float
    mask: np.ndarray  # [B, N, A] bool
    open: np.ndarray  # [B, N, A] bool: legal, and not all below it is known to its ends
    log_prior: np.ndarray  # [B, N, A], ILLEGAL outside the mask
    child: np.ndarray  # [B, N, A] node, -1 = not visited
    visits: np.ndarray  # [B, N, A] of actions; a node's own are 1 + their sum
    q: np.ndarray  # [B, N, A] reward + discount * value of the child, where visited
    raw: np.ndarray  # [B, N] the model's value
    value: np.ndarray  # [B, N] what was backed up
    parent: np.ndarray  # [B, N] -1 = the root, or no node
    action: np.ndarray  # [B, N] that led there
    reward: np.ndarray  # [B, N] on the way there
    discount: np.ndarray  # [B, N] 0 = the episode ended there
    embeddings: list[Embeddings]  # [N] batches

    @classmethod
    def of(cls, root: Root, simulations: int, backup: Backup, spread: float) -> Tree:
        (B, A), N = root.mask.shape, simulations + 1
        numbers = lambda *shape: np.zeros((B, N, *shape))  # noqa: E731
        counts = lambda *shape: np.zeros((B, N, *shape), np.int64)  # noqa: E731
        tree = cls(
            backup, spread, mask=counts(A).astype(bool), open=counts(A).astype(bool), log_prior=numbers(A),
            child=counts(A) - 1, visits=counts(A), q=numbers(A), raw=numbers(), value=numbers(),
            parent=counts() - 1, action=counts(), reward=numbers(), discount=numbers(), embeddings=[root.embedding],
        )  # fmt: skip
        tree._place(np.arange(B), 0, root.prior_logits, root.value, root.mask)
        return tree

    # *** choosing ***

    def completed_q(self, rows: np.ndarray, node: np.ndarray | int) -> np.ndarray:
        """q of visited actions, and for the others (appendix D)

            v_mix = (v + N sum pi q / sum pi) / (N + 1),   sums over visited actions, N all visits

        of a node of each of R rows: [R, A]."""
        visits, q = self.visits[rows, node], self.q[rows, node]
        seen = visits > 0
        # a visited action's prior may be 0 to the last digit
        prior = np.where(seen, np.exp(self.log_prior[rows, node]).clip(np.finfo(float).tiny), 0.0)
        total = visits.sum(1)
        mean = (prior * q).sum(1) / np.where(total > 0, prior.sum(1), 1.0)
        mixed = (self.raw[rows, node] + total * mean) / (total + 1)
        return np.where(seen, q, mixed[:, None])

    def improved(self, rows: np.ndarray, node: np.ndarray | int) -> np.ndarray:
        """logits + sigma(q), sigma(q) = (c_visit + max N) c_scale q, where q is rescaled to [0, 1] over the legal
        actions (eq. 8 and section 5); [R, A], -inf where illegal."""
        q, mask = self.completed_q(rows, node), self.mask[rows, node]
        low = np.where(mask, q, np.inf).min(1, keepdims=True)
        high = np.where(mask, q, -np.inf).max(1, keepdims=True)
        scale = (VISITS + self.visits[rows, node].max(1, keepdims=True)) * SCALE
        rescaled = (q - low) / np.maximum(high - low, self.spread)
        return np.where(mask, self.log_prior[rows, node] + scale * rescaled, -np.inf)

    def policy(self, rows: np.ndarray, node: np.ndarray | int) -> np.ndarray:
        """softmax(logits + sigma(q)): [R, A]."""
        logits = self.improved(rows, node)
        weight = np.exp(logits - logits.max(1, keepdims=True))
        return weight / weight.sum(1, keepdims=True)

    def root_action(self, gumbel: np.ndarray, visits: np.ndarray) -> np.ndarray:
        """argmax g + logits + sigma(q) among the actions with so many visits [B]; [B]."""
        score = gumbel + self.improved(np.arange(len(gumbel)), 0)
        return np.where(self.visits[:, 0] == visits[:, None], score, -np.inf).argmax(1)

    def inner_action(self, rows: np.ndarray, node: np.ndarray) -> np.ndarray:
        """argmax pi' - N_a / (1 + N), so that visits come to follow pi' = softmax(logits + sigma(q)) (eq. 14); [R].

        With max-backup only among open actions, while there are any: looking twice at one end tells nothing new, and
        by that rule alone most simulations would."""
        visits, mask = self.visits[rows, node], self.mask[rows, node]
        if self.backup == "max":
            mask = np.where(self.open[rows, node].any(1, keepdims=True), self.open[rows, node], mask)
        score = self.policy(rows, node) - visits / (1 + visits.sum(1, keepdims=True))
        return np.where(mask, score, -np.inf).argmax(1)

    def descend(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From the root by `action` [B] down to an action that was not visited, or that ends the episode: the node [B]
        and that action [B]."""
        node, rows = np.zeros_like(action), np.arange(len(action))
        while len(rows):
            child = self.child[rows, node[rows], action[rows]]
            onward = (child >= 0) & (self.discount[rows, child] != 0)
            rows, child = rows[onward], child[onward]
            node[rows], action[rows] = child, self.inner_action(rows, child)
        return node, action

    # *** growing ***

    def gather(self, node: np.ndarray) -> Embeddings:
        """The embedding of a node [B] of each row."""
        found = [self.embeddings[n][row] for row, n in enumerate(node)]
        return np.stack(found) if isinstance(self.embeddings[0], np.ndarray) else found

    def expand(self, new: int, parent: np.ndarray, action: np.ndarray, recurrent_fn: RecurrentFn) -> np.ndarray:
        """Makes node `new` in all rows whose action was not visited. Returns the node [B] where each row now stands."""
        rows, child = np.arange(len(parent)), self.child[np.arange(len(parent)), parent, action]
        fresh = np.flatnonzero(child < 0)
        if not len(fresh):
            self.embeddings.append(())
            return child
        found = recurrent_fn(self.gather(parent), action)
        self.embeddings.append(found.embedding)
        _finite(found.reward, fresh, "reward")
        _finite(found.discount, fresh, "discount")
        at, by = parent[fresh], action[fresh]
        self.child[fresh, at, by] = new
        self.parent[fresh, new], self.action[fresh, new] = at, by
        self.reward[fresh, new], self.discount[fresh, new] = found.reward[fresh], found.discount[fresh]
        self._place(fresh[found.discount[fresh] != 0], new, found.prior_logits, found.value, found.mask)
        return self.child[rows, parent, action]

    def _place(self, rows: np.ndarray, node: int, logits: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        """What the model says of a node of these rows. Raises SearchError where nothing can be chosen by it."""
        _finite(value, rows, "value")
        _finite(np.where(mask, logits, 0), rows, "prior_logits")
        stuck = ~mask[rows].any(1)
        if stuck.any():
            raise SearchError(f"row {rows[int(stuck.argmax())]}: no action is legal at node {node}")
        mask, logits = mask[rows], np.where(mask, logits, ILLEGAL)[rows].astype(np.float64)
        self.mask[rows, node] = self.open[rows, node] = mask
        log_prior = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.log_prior[rows, node] = np.where(mask, log_prior, ILLEGAL)
        self.raw[rows, node] = self.value[rows, node] = value[rows]

    def back_up(self, node: np.ndarray) -> None:
        """Tells all nodes above `node` [B] what was found there; see `search`."""
        rows, node = np.arange(len(node)), node.copy()
        total = self.value[rows, node]  # of a new node; found again, an episode's end: 0
        while len(rows := rows[self.parent[rows, node[rows]] >= 0]):
            below = node[rows]
            above, by = self.parent[rows, below], self.action[rows, below]
            reward, discount = self.reward[rows, below], self.discount[rows, below]
            self.q[rows, above, by] = reward + discount * self.value[rows, below]
            self.visits[rows, above, by] += 1
            self.open[rows, above, by] &= self.open[rows, below].any(1)
            visits = self.visits[rows, above]
            if self.backup == "max":
                value = np.where(visits > 0, self.q[rows, above], -np.inf).max(1)
            else:
                total[rows] = reward + discount * total[rows]
                value = self.value[rows, above]
                value = value + (total[rows] - value) / (1 + visits.sum(1))
            self.value[rows, above] = value
            node[rows] = above

    # *** looking ***

    def leaf(self, row: int, node: int) -> Leaf:
        path: list[int] = []
        total, at = 0.0, node
        while self.parent[row, at] >= 0:
            path.insert(0, int(self.action[row, at]))
            total = self.reward[row, at] + self.discount[row, at] * total
            at = self.parent[row, at]
        ended = bool(self.discount[row, node] == 0)
        return Leaf(tuple(path), self.embeddings[node][row], ended, float(total))


def _finite(x: np.ndarray, rows: np.ndarray, what: str) -> None:
    bad = ~np.isfinite(x[rows]).all(tuple(range(1, x.ndim)))
    if bad.any():
        raise SearchError(f"row {rows[int(bad.argmax())]}: {what} is not finite")


def search(root: Root, recurrent_fn: RecurrentFn, simulations: int, gumbel: np.ndarray | None = None,
           considered: int = CONSIDERED, backup: Backup = "mean", spread: float = 1e-8) -> SearchResult:  # fmt: skip
    """`simulations` simulations from each root, and what to do there. Raises SearchError.

    The root's top m = min(considered, legal, n) actions by g + logits share the simulations by sequential halving; the
    one that remains is `action`. `gumbel` [B, A] is the noise g that samples them without replacement; None: no noise,
    the best are taken. With 0 simulations the action is argmax g + logits: a sample of the prior.

    backup="mean": a node's value is the average of its own value and all returns found below: what the paper proves
    to improve on the prior, and what evens out a learned model's errors. backup="max": it is the largest q of the
    actions visited below, the best that can be reached, and below the root what is known to its ends is not looked at again:
    for deterministic worlds whose rewards are to be trusted.

    A range of q below `spread` is not blown up to [0, 1]: where values are noise yet, the paper's rule would take the
    noise for certain.
    """
    if root.mask.dtype != np.bool_ or root.prior_logits.shape != root.mask.shape:
        raise SearchError(f"the mask must be bool {root.prior_logits.shape}, not {root.mask.dtype} {root.mask.shape}")
    tree, rows = Tree.of(root, simulations, backup, spread), np.arange(len(root.mask))
    g = np.zeros(root.mask.shape) if gumbel is None else gumbel
    most = min(considered, simulations)
    table = np.array([considered_visits(m, simulations) for m in range(1, most + 1)], np.int64)  # [m, n]
    visits = table[np.minimum(root.mask.sum(1), most) - 1] if simulations else np.zeros((len(rows), 0), np.int64)
    for i in range(simulations):
        parent, action = tree.descend(tree.root_action(g, visits[:, i]))
        tree.back_up(tree.expand(i + 1, parent, action, recurrent_fn))
    seen = np.where(root.mask, tree.visits[:, 0], 0)
    action = tree.root_action(g, seen.max(1)).astype(np.int32)
    return SearchResult(action, tree.policy(rows, 0), tree.value[:, 0].copy(), seen, tree.completed_q(rows, 0), tree)
