"""Gradient-boosted trees: a schedule's log2 time relative to its kernel, in steps that cannot run away where nothing was measured.

Friedman 2001 with histograms, and squares of errors within each kernel: what moves all schedules of a kernel is no error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agents.checks import check_inside, check_positive
from sims.bagged import Bagged, Deadline
from sims.base import SimulatorError, TrainingRows, check_features, check_state
from sims.sampling import bootstrap

CHUNK = 256  # rows predicted at a time: what is compared stays in the cache
EVERY = 5  # trees, of which one says what is alike: the others say it, too
NEVER = 1e30  # threshold of a node that does not split: everything goes left


@dataclass(frozen=True)
class TreesConfig:
    members: int = 5  # each of its own bootstrap of kernels, for a spread
    rounds: int = 300  # trees of a member; with the rate, where more gained nothing
    rate: float = 0.08  # of each tree's correction (shrinkage)
    depth: int = 6  # splits above a leaf
    bins: int = 64  # thresholds of a feature that are tried, at quantiles
    least: int = 10  # rows in a leaf
    ridge: float = 5.0  # rows that say 0 in each leaf
    rows: float = 0.5  # share of the rows that a tree sees (Friedman 2002)
    columns: float = 0.5  # share of the features
    level: float = 0.8  # the spread is scaled so that this fraction of out-of-bag rows lies inside
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        positive = "members", "rounds", "rate", "depth", "least", "ridge", "rows", "columns"
        check_positive(self, *positive, error=SimulatorError)
        check_inside(self, "level", error=SimulatorError)
        if max(self.rows, self.columns) > 1:
            raise SimulatorError(f"shares of rows ({self.rows}) and columns ({self.columns}) are at most 1")
        if not 2 <= self.bins <= 256 or self.depth > 12:
            raise SimulatorError("bins are 2 to 256, depth is at most 12")


class Tree(NamedTuple):
    """Complete, numbered by rows: the children of node n are 2 n + 1 and 2 n + 2. I = 2^depth - 1 inner nodes."""

    feature: np.ndarray  # [I] int64
    threshold: np.ndarray  # [I] float32: right where the feature is above
    value: np.ndarray  # [I + 1] float32, of each leaf


class Trees(Bagged):
    """M boosted sequences of trees, each trained on its own bootstrap of kernels."""

    def __init__(self, input_dim: int, config: TreesConfig = TreesConfig()):
        super().__init__(input_dim, config.level)
        self.config = config
        self._forest: Tree | None = None  # arrays [M, T, ...] of all trees

    def learn(
        self, rows: TrainingRows, steps: int | None, deadline: Deadline | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """As in `Bagged`: a step is a tree of each member."""
        rng = np.random.default_rng([self.config.seed, 1])  # beside nets of the same seed the kernels shall be others
        counts = bootstrap(rows, self.config.members, rng)  # [M, K]
        rounds = self.config.rounds if steps is None else steps
        trees = _boosted(rows, counts[:, rows.kernel], self.config, rounds, rng, deadline)
        self._forest = Tree(
            *(np.array([[of[m][part] for of in trees] for m in range(len(counts))]) for part in range(3))
        )
        return counts, {"steps": float(len(trees))}

    def predict_members(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> each member's prediction [M, N] float32."""
        if self._forest is None:
            raise SimulatorError("predict before fit: the simulator has learned nothing yet")
        x = check_features(features, self.input_dim)
        members, rounds = self._forest.feature.shape[:2]
        flat = Tree(*(part.reshape(members * rounds, -1) for part in self._forest))  # [M * T, ...]
        out = np.zeros((members, len(x)), np.float32)
        for at in range(0, len(x), CHUNK):
            values = _answers(flat, x[at : at + CHUNK])  # [n, M * T]
            out[:, at : at + CHUNK] = values.reshape(len(values), members, rounds).sum(axis=2).T
        return out

    def leaves(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> the leaf of each in one tree of EVERY [N, T] uint8 or uint16: what comes to the same leaf is alike."""
        if self._forest is None:
            raise SimulatorError("leaves before fit: the simulator has learned nothing yet")
        x = check_features(features, self.input_dim)
        some = Tree(*(part.reshape(-1, part.shape[-1])[::EVERY] for part in self._forest))
        return np.concatenate([_leaf(some, x[at : at + CHUNK]) for at in range(0, len(x), CHUNK)]).astype(
            np.min_scalar_type(some.value.shape[1])
        )

    def state(self) -> dict[str, np.ndarray]:
        """All that was learned, as arrays of floats."""
        if self._forest is None:
            raise SimulatorError("state before fit: the simulator has learned nothing yet")
        named = {name: part.astype(np.float32) for name, part in self._forest._asdict().items()}
        return named | {"spread": self._spread_state()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave; another shape, a missing name or a feature that there is not is a SimulatorError, and
        changes nothing."""
        rounds = state["value"].shape[1] if "value" in state and state["value"].ndim == 3 else 0
        if rounds < 1:
            raise SimulatorError("the state holds no trees")
        leaves = 1 << self.config.depth
        inner = (self.config.members, rounds, leaves - 1)
        shapes = {"feature": inner, "threshold": inner, "value": (*inner[:2], leaves), "spread": (2,)}
        arrays = check_state(state, shapes)
        feature = arrays["feature"].astype(np.int64)
        if feature.min() < 0 or feature.max() >= self.input_dim:
            raise SimulatorError(f"a tree asks for a feature that is none of the {self.input_dim}")
        self._forest = Tree(feature, *(arrays[name].astype(np.float32) for name in ("threshold", "value")))
        self._load_spread(arrays["spread"])


def _answers(trees: Tree, x: np.ndarray) -> np.ndarray:
    """What each of T trees says of each row: x [n, D] -> [n, T]."""
    return trees.value.take(_leaf(trees, x) + np.arange(len(trees.value)) * trees.value.shape[1])


def _leaf(trees: Tree, x: np.ndarray) -> np.ndarray:
    """To which leaf of each of T trees each row comes: x [n, D] -> [n, T]."""
    inner = trees.feature.shape[1]
    first, row = np.arange(len(trees.feature)) * inner, np.arange(len(x))[:, None] * x.shape[1]
    node = np.zeros((len(x), len(trees.feature)), np.int64)
    for _ in range((inner + 1).bit_length() - 1):
        at = first + node
        right = x.take(row + trees.feature.take(at)) > trees.threshold.take(at)
        node = 2 * node + 1 + right
    return node - inner


def _edges(x: np.ndarray, bins: int) -> np.ndarray:
    """Thresholds of each feature [D, bins - 1], ascending, that part its distinct values evenly; where it has few, all that part
    them. The last one is repeated where there are fewer."""
    found = np.zeros((x.shape[1], bins - 1), np.float32)
    for own, column in zip(found, x.T, strict=True):
        values = np.unique(column)
        parting = (
            (values[1:] + values[:-1]) / 2 if len(values) <= bins else np.quantile(values, np.arange(1, bins) / bins)
        )
        some = np.unique(parting.astype(np.float32)) if len(parting) else values  # a constant parts nothing
        own[:] = np.pad(some, (0, bins - 1 - len(some)), mode="edge")
    return found


def _binned(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many thresholds lie below each value: x [N, D] -> [N, D] uint8."""
    return np.stack([np.searchsorted(own, column) for own, column in zip(edges, x.T, strict=True)], axis=1).astype(
        np.uint8
    )


def _boosted(rows: TrainingRows, counts: np.ndarray, config: TreesConfig, rounds: int, rng: np.random.Generator,
             deadline: Deadline | None) -> list[list[Tree]]:  # fmt: skip
    """`rounds` times a tree for each member: its correction of what the ones before leave of the rows' targets within their
    kernels. counts [M, N]: how often a member drew a row."""
    edges = _edges(rows.features, config.bins)
    bins, width = np.ascontiguousarray(_binned(rows.features, edges).T), rows.features.shape[1]  # [D, N]
    thresholds = np.append(edges, np.full((width, 1), NEVER, np.float32), axis=1)  # [D, bins]
    own = [np.flatnonzero(drawn) for drawn in counts]
    features = [rows.features[drawn] for drawn in own]
    said = [np.zeros(len(drawn)) for drawn in own]  # by the trees so far
    grown = []
    for _ in range(rounds):
        trees = []
        for member, drawn in enumerate(own):
            error = _within(rows.target[drawn] - said[member], rows.kernel[drawn])
            some, columns = _some(rng, len(drawn), config.rows), _some(rng, width, config.columns)
            weight = counts[member, drawn[some]]
            found = _grow(bins[np.ix_(columns, drawn[some])], weight * error[some], weight, config)
            feature = columns[found.feature]
            tree = Tree(feature, thresholds[feature, found.threshold], (config.rate * found.value).astype(np.float32))
            said[member] += _answers(Tree(*(part[None] for part in tree)), features[member])[:, 0]
            trees.append(tree)
        grown.append(trees)
        if deadline is not None and deadline():
            break
    return grown


def _some(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """A share of the numbers below `count`, one at least, ascending."""
    return np.sort(rng.choice(count, max(1, round(share * count)), replace=False))


def _within(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Values [N] less the mean of their kernel [N]."""
    place = np.unique(kernel, return_inverse=True)[1]
    return values - (np.bincount(place, values) / np.bincount(place))[place]


def _grow(bins: np.ndarray, error: np.ndarray, weight: np.ndarray, config: TreesConfig) -> Tree:
    """One tree, level by level, for weighted errors [n] of rows with bins [C, n]; its thresholds are bins yet: right where the
    bin is above, `config.bins - 1` where a node does not split."""
    width, count = bins.shape
    node, numbers = np.zeros(count, np.int64), np.arange(count)
    sums = _tiled(width, error, weight)
    features, cuts = [], []
    for level in range(config.depth):
        feature, cut = _splits(bins, node, 1 << level, sums, config)
        features.append(feature)
        cuts.append(cut)
        node = 2 * node + (bins[feature[node], numbers] > cut[node])
    leaves = 1 << config.depth
    value = np.bincount(node, error, leaves) / (np.bincount(node, weight, leaves) + config.ridge)
    return Tree(np.concatenate(features), np.concatenate(cuts), value)


def _tiled(width: int, *values: np.ndarray) -> list[np.ndarray]:
    """Each [n] once for each of `width` features [C * n]."""
    return [np.tile(one.astype(np.float64), width) for one in values]


def _splits(bins: np.ndarray, node: np.ndarray, nodes: int, sums: Sequence[np.ndarray],
            config: TreesConfig) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The split of each node that takes most from the squared errors: (feature [nodes], bin [nodes]). `sums`: errors and weights
    [C * n]. One feature after the other, so that what is added up stays in the cache."""
    shape = (len(bins), nodes, config.bins)
    place = (np.arange(len(bins))[:, None] * nodes + node) * config.bins + bins  # [C, n]
    errors, weights = (
        np.bincount(place.ravel(), values, math.prod(shape)).reshape(shape).swapaxes(0, 1).cumsum(axis=2)
        for values in sums
    )  # [nodes, C, bins]
    rest, lighter = errors[:, :, -1:] - errors, weights[:, :, -1:] - weights
    ridge = config.ridge
    gain = errors**2 / (weights + ridge) + rest**2 / (lighter + ridge)
    gain -= errors[:, :, -1:] ** 2 / (weights[:, :, -1:] + ridge)
    gain = np.where((weights >= config.least) & (lighter >= config.least), gain, 0.0).reshape(nodes, -1)
    best = gain.argmax(axis=1)
    cut = np.where(gain[np.arange(nodes), best] > 0, best % config.bins, config.bins - 1)
    return best // config.bins, cut
