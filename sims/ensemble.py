"""A bootstrapped ensemble of MLPs: mean and spread of a schedule's log2 time, relative to its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
from tinygrad import Context, Tensor

from agents.checks import check_inside, check_positive
from agents.jitcache import CachedJit, upload
from sims import mlp
from sims.bagged import Bagged, Deadline
from sims.base import Scaling, SimulatorError, TrainingRows, check_features, check_learned, check_state
from sims.descent import cosine, hyper
from sims.padding import padded, widened
from sims.sampling import BatchSampler, bootstrap

CHUNK = 256  # rows of one prediction: any N is served by one captured JIT


@dataclass(frozen=True)
class EnsembleConfig:
    members: int = 5  # enough for a spread (Lakshminarayanan et al. 2017); time grows in proportion
    hidden: int = 128  # wider gained nothing on a few thousand rows
    layers: int = 2  # hidden layers: features are hand-made already
    lr: float = 1e-3  # Adam's usual rate; anneals by a cosine
    final_lr: float = 0.02  # fraction of lr left at the last step: the end of training averages noise away
    weight_decay: float = 4.0  # decoupled, so times lr; kernels are few, and less overfits them
    steps: int = 1500  # a few dozen passes over some thousand rows
    batch: int = 512  # rows of one step, for each member
    rows_per_kernel: int = 16  # R: 120 pairs per kernel, and batch / R kernels against each other's noise
    fast_bias: float = 1.0  # the fastest row is drawn e times as often as the slowest: the fast end is what is chosen
    rank_coef: float = 0.5  # weight of the pairwise rank loss within a kernel beside the value loss
    gap: float = 0.1375  # log2(1.1): pairs closer than 10 % are timer noise
    anchor: float = 0.1  # how much a kernel's level counts: little, for it is never compared
    huber: float = 1.0  # log2 units: a schedule 2x off is an outlier, not a lesson
    clip: float = 5.0  # standard deviations: unseen extremes must not explode
    level: float = 0.8  # the spread is scaled so that this fraction of out-of-bag rows lies inside
    seed: int = 0  # of everything random: initial weights, bootstrap, batches

    def __post_init__(self) -> None:
        positive = "members", "hidden", "layers", "lr", "steps", "batch", "rows_per_kernel", "huber", "clip"
        check_positive(self, *positive, error=SimulatorError)
        check_inside(self, "level", error=SimulatorError)
        if self.batch % self.rows_per_kernel or self.rows_per_kernel < 2:
            raise SimulatorError(
                f"batch ({self.batch}) must be a multiple of rows_per_kernel "
                f"({self.rows_per_kernel}), which must be at least 2"
            )

    @property
    def loss_shape(self) -> mlp.LossShape:
        return mlp.LossShape(
            self.batch // self.rows_per_kernel,
            self.rows_per_kernel,
            self.anchor,
            self.huber,
            self.rank_coef,
            self.gap,
        )


@cache
def _train_jit(sizes: tuple[int, ...], shape: mlp.LossShape) -> CachedJit:
    """train_step on flat arguments (params, m, v, x, y, hyper), captured once per shape and shared by all
    ensembles: everything that changes is an argument. `sizes` is the number of members, then the widths.
    """
    count = 2 * (len(sizes) - 2)

    def train(*tensors: Tensor) -> Tensor:
        params, first, second = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        x, y, hyper = tensors[3 * count :]
        return mlp.train_step(params, first, second, x, y, hyper, shape)

    return CachedJit(train, "ensemble-train", (sizes, shape), sources=(mlp,))


@cache
def _predict_jit(sizes: tuple[int, ...]) -> CachedJit:
    """(params, x [1, CHUNK, D]) -> [M, CHUNK], captured once per shape."""

    def predict(*tensors: Tensor) -> Tensor:
        return mlp.forward(list(tensors[:-1]), tensors[-1])

    return CachedJit(predict, "ensemble-predict", (sizes, CHUNK), sources=(mlp,))


class Ensemble(Bagged):
    """M networks, each trained on its own bootstrap of kernels, all in one jitted step."""

    def __init__(self, input_dim: int, config: EnsembleConfig = EnsembleConfig()):
        super().__init__(input_dim, config.level)
        self.config = config
        self._width = padded(input_dim)
        self._widths = [self._width] + [config.hidden] * config.layers + [1]
        self._sizes = (config.members, *self._widths)
        self._params: list[np.ndarray] | None = None
        self._tensors: list[Tensor] = []
        self._scaling = Scaling(np.zeros(input_dim, np.float32), np.zeros(input_dim, np.float32), config.clip)

    def learn(
        self, rows: TrainingRows, steps: int | None, deadline: Deadline | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """As in `Bagged`; tells steps and the mean losses of the last tenth (value_loss, rank_loss)."""
        total = self.config.steps if steps is None else steps
        rng = np.random.default_rng(self.config.seed)
        scaling = Scaling.measure(rows.features, self.config.clip)
        counts = bootstrap(rows, self.config.members, rng)
        params = mlp.initial(self.config.members, self._widths, rng)
        sampler = BatchSampler(
            rows, counts, self.config.loss_shape.kernels, self.config.rows_per_kernel, self.config.fast_bias
        )
        batches = sampler.batches(rng, self._prepared(rows.features, scaling))
        losses = self._descend(params, islice(batches, total), total, deadline)
        self._scaling = scaling
        last = losses[-max(1, len(losses) // 10) :].mean(axis=0)
        return counts, {"steps": float(len(losses)), "value_loss": float(last[0]), "rank_loss": float(last[1])}

    def predict_members(self, features: np.ndarray) -> np.ndarray:
        """features [N, D] -> each member's prediction [M, N] float32."""
        if self._params is None:
            raise SimulatorError("predict before fit: the simulator has learned nothing yet")
        x = self._prepared(check_features(features, self.input_dim), self._scaling)
        out = np.zeros((self.config.members, len(x)), np.float32)
        jit = _predict_jit(self._sizes)
        with Context(BEAM=0):
            for at in range(0, len(x), CHUNK):
                part = np.zeros((1, CHUNK, self._width), np.float32)
                count = min(CHUNK, len(x) - at)
                part[0, :count] = x[at : at + count]
                out[:, at : at + count] = jit(*self._tensors, upload(part)).numpy()[:, :count]
        return out

    def state(self) -> dict[str, np.ndarray]:
        """All that was learned, as arrays: parameters p0.., feature scaling, spread scale."""
        if self._params is None:
            raise SimulatorError("state before fit: the simulator has learned nothing yet")
        named = {f"p{i}": p.copy() for i, p in enumerate(self._params)}
        return named | {
            "mean": self._scaling.mean.copy(),
            "inverse": self._scaling.inverse.copy(),
            "spread": self._spread_state(),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state()` gave; another shape or a missing name is a SimulatorError, and changes
        nothing.
        """
        shapes = {f"p{i}": p.shape for i, p in enumerate(self._initial_shapes())}
        shapes |= {"mean": (self.input_dim,), "inverse": (self.input_dim,), "spread": (2,)}
        arrays = check_state(state, shapes)
        self._scaling = Scaling(
            arrays["mean"].astype(np.float32), arrays["inverse"].astype(np.float32), self.config.clip
        )
        self._load_spread(arrays["spread"])
        self._keep([arrays[f"p{i}"].astype(np.float32) for i in range(2 * (self.config.layers + 1))])

    def _initial_shapes(self) -> list[np.ndarray]:
        return mlp.initial(self.config.members, self._widths, np.random.default_rng(0))

    def _keep(self, params: list[np.ndarray]) -> None:
        self._params = params
        self._tensors = [upload(p) for p in params]

    def _prepared(self, features: np.ndarray, scaling: Scaling) -> np.ndarray:
        """Standardise and clip [N, D], then zero-pad the width: [N, width] float32."""
        return widened(scaling(features), self._width)

    def _descend(
        self,
        params: list[np.ndarray],
        batches: Iterator[tuple[np.ndarray, np.ndarray]],
        total: int,
        deadline: Deadline | None,
    ) -> np.ndarray:
        """Run the optimizer over the batches, keep the result; the losses (value, rank) of each step, [steps,
        2]. A SimulatorError where it diverged: what was learned before is then kept.
        """
        c, losses = self.config, []
        jit = _train_jit(self._sizes, c.loss_shape)
        with Context(BEAM=0, TRAINING=1):
            w, m, v = (
                [Tensor(a).realize() for a in arrays]
                for arrays in (params, [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params])
            )
            for t, (x, y) in enumerate(batches, 1):
                given = (x, y, hyper(c.lr * cosine(t, total, c.final_lr), c.weight_decay, t))
                losses.append(jit(*w, *m, *v, *(upload(a) for a in given)).numpy())
                if deadline is not None and deadline():
                    break
            learned = [p.numpy().copy() for p in w]
        check_learned(np.array(losses), *learned)
        self._keep(learned)
        return np.array(losses)
