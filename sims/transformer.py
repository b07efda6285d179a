"""A causal transformer over what a kernel is and what was done to it: an ensemble in one jitted step.

One net serves two modes. Exact: every action's token holds the summary of the state after it. Latent: summaries are
withheld from some prefix on, and the net goes on from the actions alone; in training they are withheld at random. The
latent state of a causal net is its history, so that is what an embedding holds: tokens, actions and known summaries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from tinygrad import Context, Tensor

from agents import parameters
from agents.checks import check_inside, check_positive
from agents.jitcache import CachedJit, upload
from sims import attention, mlp, theta
from sims.attention import Batch, NetShape
from sims.base import Prediction, Scaling, SimulatorError, Spread, check_features, check_state, per_group
from sims.calibration import calibrate
from sims.descent import cosine, descend
from sims.flat import Affine, Arrays, fit_level
from sims.padding import padded, widened
from sims.paths import Paths, Points, Widths, check_widths
from sims.sampling import BatchSampler, bootstrap

BLOCKS, ROWS = 4, 16  # of one prediction: blocks of rows of one kernel each, so that its context is read once a block
METRICS = ("value_loss", "rank_loss", "reach_loss")


@dataclass(frozen=True)
class TransformerConfig:
    members: int = 5  # enough for a spread (Lakshminarayanan et al. 2017); time grows in proportion
    width: int = 64  # D: a step of 5 members takes 0.22 s on one core
    layers: int = 2  # context and path are a few tokens each
    heads: int = 4  # of 16 numbers: sizes, strides, kinds
    lr: float = 3e-3  # Adam's, after the warm-up; anneals by a cosine; 2e-3 and 5e-3 end alike
    final_lr: float = 0.02  # fraction of lr left at the last step: the end of training averages noise away
    warmup: int = 50  # steps of a rising rate, 0 = none: the first gradients of attention are wild
    weight_decay: float = 0.5  # decoupled, so times lr
    steps: int = 1000  # about four minutes on one core
    kernels: int = 16  # G: kernels of one step, for each member
    rows_per_kernel: int = 8  # R: kernels have about a dozen trials
    fast_bias: float = 1.0  # the fastest row is drawn e times as often as the slowest: the fast end is what is chosen
    rank_coef: float = 0.5  # weight of the pairwise rank loss within a kernel beside the value loss
    reach_coef: float = 0.2  # and of the loss of what is within reach
    gap: float = 0.1375  # log2(1.1): pairs closer than 10 % are timer noise
    anchor: float = 0.1  # how much a kernel's level counts: little, for it is never compared
    huber: float = 1.0  # log2 units: a schedule 2x off is an outlier, not a lesson
    clip: float = 5.0  # standard deviations: unseen extremes must not explode
    withheld: float = 0.5  # fraction of rows whose summaries are withheld from a random prefix on: the latent mode
    level: float = 0.8  # the spread is scaled so that this fraction of out-of-bag rows lies inside
    finetune_lr: float = 3e-4  # for few trials of a new device: near what is known
    seed: int = 0  # of everything random: initial weights, bootstrap, batches

    def __post_init__(self) -> None:
        positive = "members", "width", "layers", "heads", "lr", "steps", "kernels", "huber", "clip"
        check_positive(self, *positive, error=SimulatorError)
        check_inside(self, "level", error=SimulatorError)
        if self.width % self.heads or self.rows_per_kernel < 2:
            raise SimulatorError(f"width must be a multiple of heads, and rows_per_kernel at least 2: {self}")

    @property
    def loss_shape(self) -> mlp.LossShape:
        return mlp.LossShape(self.kernels, self.rows_per_kernel, self.anchor, self.huber, self.rank_coef, self.gap)


@cache
def _train_jit(net: NetShape, shape: mlp.LossShape, reach_coef: float) -> CachedJit:
    """(theta, m, v [M, P], row [3], hyper [4], kernel [M, G], point [M, B], known [M, B], *data of every point): one
    step. Batches are gathered from what lies on the device; nothing is read back.
    """

    def train(*tensors: Tensor) -> Tensor:
        row, hyper, kernel, point, known, context, present = tensors[3:10]
        actions, states, labels = (x[point].contiguous() for x in tensors[10:])
        batch = Batch(context[kernel].contiguous(), present[kernel].contiguous(), actions, states, known)
        p = theta.bind(tensors[0], attention.parameter_shapes(net))
        out = attention.forward(p, batch, net)
        value, rank, far = attention.losses(out, labels, shape)
        loss = (value + shape.rank_coef * rank + reach_coef * far).sum()  # of members: none depends on another
        row.assign(Tensor.stack(value.mean(), rank.mean(), far.mean()))
        return row.realize(*theta.adam(tensors[0], tensors[1], tensors[2], theta.gradient_of(loss, p), hyper))

    sources = attention, mlp, parameters, theta
    return CachedJit(train, "transformer-train", (net, shape, reach_coef), sources)


@cache
def _predict_jit(net: NetShape) -> CachedJit:
    """(theta, *Batch with a leading axis 1) -> [M, BLOCKS * ROWS, T, 2], captured once per shape."""

    def predict(*tensors: Tensor) -> Tensor:
        return attention.forward(theta.bind(tensors[0], attention.parameter_shapes(net)), Batch(*tensors[1:]), net)

    return CachedJit(predict, "transformer-predict", (net, BLOCKS, ROWS), sources=(attention, parameters, theta))


class Transformer:
    """M nets, each trained on its own bootstrap of kernels; see `sims.base.PathSimulator`."""

    def __init__(self, widths: Widths, config: TransformerConfig = TransformerConfig()):
        if min(widths) < 1:
            raise SimulatorError(f"every width must be at least 1, got {widths}")
        self.widths, self.config = widths, config
        token, action, state = (padded(n) for n in (widths.token, widths.action, widths.state))
        self.net = NetShape(config.members, config.width, config.layers, config.heads,
                            widths.tokens, token, widths.steps, action, state)  # fmt: skip
        self._theta: Tensor | None = None  # [M, P]
        self._scaling: dict[str, Scaling] = {}
        self._level: Affine | None = None
        self._spread = Spread()

    # *** learning ***

    def fit(
        self, paths: Paths, *, steps: int | None = None, deadline: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Train from scratch. Stops after `steps`, or after the step at which `deadline()` turns true.

        Returns steps, seconds, rows, kernels, dropped, the mean losses of the last tenth, and what members say of kernels
        they never saw: oob_pairwise (NaN when every kernel was seen by all).
        """
        began, c = time.perf_counter(), self.config
        points = Points.build(paths, self.widths)
        rng = np.random.default_rng(c.seed)
        counts, before = bootstrap(points.rows, c.members, rng), self._scaling
        self._measure(paths)
        start = attention.initial(self.net, rng)
        try:
            losses = self._descend(
                start, paths, points, counts, c.steps if steps is None else steps, c.lr, rng, deadline
            )
        except SimulatorError:
            self._scaling = before  # that of what was learned before, and stays
            raise
        members = self._members(paths.take(points.path))  # [M, P, T, 2]
        at = members[:, np.arange(len(points.path)), points.position, 0]
        self._level = fit_level(paths, points, at.mean(axis=0))
        self._spread, out_of_bag = calibrate(at, points.rows, counts, c.level, reference=members[:, :, 0, 0])
        return {
            "steps": float(len(losses)),
            "seconds": time.perf_counter() - began,
            "rows": float(len(points.path)),
            "kernels": float(points.rows.kernels),
            "dropped": float(points.rows.dropped),
            **dict(zip(METRICS, losses[-max(1, len(losses) // 10) :].mean(axis=0).tolist(), strict=True)),
            "oob_pairwise": out_of_bag,
            "spread_scale": self._spread.scale,
        }

    def finetune(self, paths: Paths, steps: int, deadline: Callable[[], bool] | None = None) -> dict[str, float]:
        """Go on from what was learned with few trials, of a new device or even of one kernel; every member sees all.
        The level is moved by the mean of what it got wrong. The spread stays as it was scaled.
        """
        known, level = self._fitted()
        points = Points.build(paths, self.widths, least=1)
        counts = np.ones((self.config.members, points.rows.kernels), np.int64)
        rng = np.random.default_rng(self.config.seed)
        losses = self._descend(
            known.numpy().copy(), paths, points, counts, steps, self.config.finetune_lr, rng, deadline
        )
        at = np.arange(len(points.path)), points.position
        absolute = self.predict(paths.take(points.path)).absolute[at]
        off = (points.rows.target + points.level[points.rows.kernel] - absolute).mean()
        self._level = replace(level, weights=level.weights + np.append(np.zeros(self.widths.state), off))
        return dict(zip(METRICS, losses[-1].tolist(), strict=True))

    def _measure(self, paths: Paths) -> None:
        """The scaling of every input: tokens place by place, actions and summaries where a path has them."""
        held = np.unique(paths.kernel)
        inside = paths.reached
        sources = {"token": paths.context[held].reshape(len(held), -1), "state": paths.states[inside],
                   "action": paths.actions[inside[:, 1:]] if inside[:, 1:].any() else paths.actions[:, 0]}  # fmt: skip
        self._scaling = {name: Scaling.measure(rows, self.config.clip) for name, rows in sources.items()}

    def _descend(self, start: np.ndarray, paths: Paths, points: Points, counts: np.ndarray, total: int, lr: float,
                 rng: np.random.Generator, deadline: Callable[[], bool] | None) -> np.ndarray:  # fmt: skip
        """Run the optimizer, keep the result; the losses of each step [steps, 3]."""
        c, warmup = self.config, max(1, min(self.config.warmup, total))
        rates = [lr * cosine(t, total, c.final_lr) * min(1.0, t / warmup) for t in range(1, total + 1)]
        jit, batches = _train_jit(self.net, c.loss_shape, c.reach_coef), self._batches(paths, points, counts, rng)
        self._theta, losses = descend(
            jit, start, self._examples(paths, points), batches, rates, c.weight_decay, len(METRICS), deadline
        )
        return losses

    def _batches(
        self, paths: Paths, points: Points, counts: np.ndarray, rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Endless (kernel [M, G], point [M, B], known [M, B]), int32."""
        c, L = self.config, self.widths.steps
        sampler = BatchSampler(points.rows, counts, c.kernels, c.rows_per_kernel, c.fast_bias)
        while True:
            point = sampler.draw(rng)
            cut = (rng.random(point.shape) * points.position[point]).astype(np.int64)  # the root's is always known
            known = np.where(rng.random(point.shape) < c.withheld, cut, L)
            kernel = paths.kernel[points.path[point[:, :: c.rows_per_kernel]]]
            yield kernel.astype(np.int32), point.astype(np.int32), known.astype(np.int32)

    def _examples(self, paths: Paths, points: Points) -> list[np.ndarray]:
        """Everything to learn from, as `_train_jit` has it."""
        own = paths.take(points.path)
        context, present, actions, states = self._inputs(own)
        has = np.isfinite(points.reach)
        labels = [points.position[:, None], points.rows.target[:, None], np.where(has, points.reach, 0.0), has]
        return [context, present, actions, states, np.concatenate(labels, axis=1).astype(np.float32)]

    def _inputs(self, paths: Paths) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(context [K, C, W], present [K, C], actions [N, L, F], states [N, T, S]), scaled and padded, float32."""
        K, C, W = paths.context.shape
        context = self._scaling["token"](paths.context.reshape(K, C * W)).reshape(K, C, W)
        actions, states = self._scaling["action"](paths.actions), self._scaling["state"](paths.states)
        context, actions, states = (
            widened(x, n) for x, n in ((context, self.net.token), (actions, self.net.action), (states, self.net.state))
        )
        return context, paths.present.astype(np.float32), actions, states

    # *** predicting ***

    def predict(self, paths: Paths) -> Prediction:
        """Every prefix, from its true summary."""
        level = self._fitted()[1]
        check_widths(paths, self.widths)
        relative, reachable, spread = (np.where(paths.reached, x, np.nan) for x in self._moments(self._members(paths)))
        absolute = relative + level(paths.states[:, 0])[:, None]
        return Prediction(*(x.astype(np.float32) for x in (relative, absolute, spread, reachable)))

    def _moments(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """members [M, N, T, 2] -> relative, reachable, spread [N, T]. Disagreement is measured from the root: about a
        kernel's level it is no uncertainty.
        """
        apart = members[..., 0] - members[:, :, :1, 0]
        variance = apart.var(axis=0, ddof=1) if len(members) > 1 else np.zeros(apart.shape[1:])
        return members[..., 0].mean(axis=0), members[..., 1].mean(axis=0), self._spread(variance, len(members))

    def _members(self, paths: Paths, known: np.ndarray | None = None) -> np.ndarray:
        """[M, N, T, 2] of each member. known [N]: prefixes beyond it are predicted without their summaries."""
        N, L, learned = len(paths), self.widths.steps, self._theta
        if learned is None:
            raise SimulatorError("used before fit: the simulator has learned nothing yet")
        context, present, actions, states = self._inputs(paths)
        known = np.full(N, L) if known is None else known
        blocks = [rows[at : at + ROWS] for rows in per_group(paths.kernel) for at in range(0, len(rows), ROWS)]
        out = np.zeros((self.config.members, N, L + 1, 2), np.float32)
        jit = _predict_jit(self.net)
        with Context(BEAM=0):
            for at in range(0, len(blocks), BLOCKS):
                part = blocks[at : at + BLOCKS]
                rows = np.stack([np.resize(b, ROWS) for b in part + part[:1] * (BLOCKS - len(part))])  # [BLOCKS, ROWS]
                kernel, flat = paths.kernel[rows[:, 0]], rows.reshape(-1)
                arrays = (context[kernel], present[kernel], actions[flat], states[flat], known[flat].astype(np.int32))
                out[:, flat] = jit(learned, *(upload(a[None]) for a in arrays)).numpy()
        return out

    # *** latent mode ***

    def embed(self, paths: Paths) -> np.ndarray:
        """[N, E]: context, which of its tokens there are, number of actions, last known prefix, actions, summaries."""
        self._fitted()
        check_widths(paths, self.widths)
        N, inside = len(paths), paths.reached[..., None]
        parts = [paths.context[paths.kernel], paths.present[paths.kernel], paths.length, paths.length,
                 paths.actions * inside[:, 1:], paths.states * inside]  # fmt: skip
        return np.concatenate([p.reshape(N, math.prod(p.shape[1:])).astype(np.float32) for p in parts], axis=1)

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The action [N, F] joins the history; an action of zeros is none. What that does to the time, the net says when
        it is asked to judge.
        """
        w = self.widths
        z, a = check_features(embedding, self._size).copy(), check_features(action, w.action)
        at, rows = z[:, self._start - 2].astype(np.int64), np.flatnonzero(a.any(axis=1))
        if (at[rows] >= w.steps).any():
            raise SimulatorError(f"a path of {w.steps} actions is full: there is no room for one more")
        z[rows[:, None], self._start + at[rows, None] * w.action + np.arange(w.action)] = a[rows]
        z[rows, self._start - 2] += 1
        return z

    def judge(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._fitted()
        paths, known = self._unpacked(check_features(embedding, self._size))
        at = np.arange(len(paths)), paths.length
        relative, reachable, spread = (x[at].astype(np.float32) for x in self._moments(self._members(paths, known)))
        return relative, reachable, spread

    @property
    def _start(self) -> int:
        """Where the actions begin in an embedding."""
        return self.widths.tokens * (self.widths.token + 1) + 2

    @property
    def _size(self) -> int:
        w = self.widths
        return self._start + w.steps * w.action + (w.steps + 1) * w.state

    def _unpacked(self, z: np.ndarray) -> tuple[Paths, np.ndarray]:
        """The paths that embeddings [N, E] hold, and the last known prefix of each [N]."""
        w, N, start = self.widths, len(z), self._start
        index: dict[bytes, int] = {}
        kernel = np.array([index.setdefault(row[: start - 2].tobytes(), len(index)) for row in z], np.int64)
        first = np.unique(kernel, return_index=True)[1]
        tokens = z[first, : start - 2]
        at, end = w.tokens * w.token, start + w.steps * w.action
        paths = Paths(
            tokens[:, :at].reshape(len(first), w.tokens, w.token), tokens[:, at:] > 0.5, kernel,
            z[:, start:end].reshape(N, w.steps, w.action), z[:, end:].reshape(N, w.steps + 1, w.state),
            z[:, start - 2].astype(np.int64), np.full((N, w.steps + 1), np.nan),
        )  # fmt: skip
        return paths, z[:, start - 1].astype(np.int64)

    # *** keeping ***

    def state(self) -> Arrays:
        learned, level = self._fitted()
        scaling = {f"{n}.{k}": getattr(s, k).copy() for n, s in self._scaling.items() for k in ("mean", "inverse")}
        parts = {f"level.{k}": np.array(a) for k, a in vars(level).items()}
        return {
            "theta": learned.numpy().copy(),
            "spread": np.array([self._spread.scale, self._spread.typical]),
            **scaling,
            **parts,
        }

    def load_state(self, state: Arrays) -> None:
        w = self.widths
        shapes: dict[str, tuple[int, ...]] = {
            "theta": (self.net.members, parameters.slots(attention.parameter_shapes(self.net))[1]),
            "spread": (2,),
        }
        for name, size in (("token", w.tokens * w.token), ("action", w.action), ("state", w.state)):
            shapes |= {f"{name}.mean": (size,), f"{name}.inverse": (size,)}
        shapes |= {f"level.{k}": shape for k, shape in Affine.shapes(w.state).items()}
        arrays = check_state(state, shapes)
        self._scaling = {
            n: Scaling(arrays[f"{n}.mean"], arrays[f"{n}.inverse"], self.config.clip)
            for n in ("token", "action", "state")
        }
        self._level = Affine(*(arrays[f"level.{k}"] for k in Affine.shapes(w.state)))
        self._spread = Spread(*map(float, arrays["spread"]))
        self._theta = Tensor(arrays["theta"].astype(np.float32)).realize()

    def _fitted(self) -> tuple[Tensor, Affine]:
        if self._theta is None or self._level is None:
            raise SimulatorError("used before fit: the simulator has learned nothing yet")
        return self._theta, self._level
