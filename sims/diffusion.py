"""A diffusion simulator: the next embedding and the log-time together, drawn given the embedding and the action.

Denoising diffusion (Ho et al. 2020) with the cosine schedule (Nichol & Dhariwal 2021), a net that predicts the clean
value, and a few deterministic steps back (DDIM; Song et al. 2021). The spread of the samples is the spread of the answer:
no ensemble, and no bell shape assumed. "No action" is an action of zeros: it says how fast a schedule is as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from tinygrad import Context, Tensor

from agents import parameters
from agents.checks import check_inside, check_positive
from agents.jitcache import CachedJit, upload
from sims import denoise, mlp, theta
from sims.base import Scaling, SimulatorError, centre, check_features, check_state
from sims.calibration import scale_of
from sims.descent import cosine, descend
from sims.flat import Arrays, StateSimulator
from sims.padding import padded
from sims.paths import Paths, Points, Widths
from sims.ridge import principal

CHUNK = 1024  # samples drawn in one call: any N is served by one captured JIT


@dataclass(frozen=True)
class DiffusionConfig:
    size: int = 32  # E: components kept of the scaled summary, each of unit variance
    hidden: int = 128  # as in the ensemble of nets without diffusion
    layers: int = 2  # hidden layers
    noise_steps: int = 12  # S of the way back; 8 to 16 are enough where few numbers are drawn
    samples: int = 16  # drawn for each prediction: the error of their mean is a quarter of the spread
    lr: float = 2e-3  # Adam's; anneals by a cosine
    final_lr: float = 0.02  # fraction of lr left at the last step
    weight_decay: float = 1.0  # decoupled, so times lr; kernels are few, and less overfits them
    steps: int = 2000  # a few dozen passes over some ten thousand transitions
    batch: int = 512  # transitions of one step
    still: float = 0.5  # fraction of a batch in which nothing is done: the exact mode
    clip: float = 5.0  # standard deviations: unseen extremes must not explode
    level: float = 0.8  # the spread is scaled so that this fraction of held-out rows lies inside
    time_coef: float = 8.0  # weight of the time beside one component of the embedding
    seed: int = 0  # of everything random: initial weights, batches, and the noise that predictions start from

    def __post_init__(self) -> None:
        positive = "size", "hidden", "layers", "noise_steps", "samples", "lr", "steps", "batch", "clip"
        check_positive(self, *positive, error=SimulatorError)
        check_inside(self, "level", error=SimulatorError)


@cache
def _train_jit(widths: tuple[int, ...], time_coef: float) -> CachedJit:
    """(theta, m, v [1, P], row [1], hyper [4], point [B], noise and ticks [B, X + CLOCK], given [N, I], clean [N, X]): one
    step on rows gathered from what lies on the device.
    """

    def train(*tensors: Tensor) -> Tensor:
        row, hyper, point, drawn = tensors[3:7]
        given, clean = (x[point].contiguous() for x in tensors[7:])
        p, X = theta.bind(tensors[0], denoise.parameter_shapes(widths)), clean.shape[1]
        loss = denoise.loss_of(p, clean, given, drawn[:, :X].contiguous(), drawn[:, X:].contiguous(), time_coef)
        row.assign(loss.reshape(1))
        return row.realize(*theta.adam(tensors[0], tensors[1], tensors[2], theta.gradient_of(loss, p), hyper))

    return CachedJit(train, "diffusion-train", (widths, time_coef), sources=(denoise, mlp, parameters, theta))


@cache
def _back_jit(widths: tuple[int, ...]) -> CachedJit:
    """(theta, x [CHUNK, X], given [CHUNK, I], ticks [CHUNK, CLOCK], coefs [2]): x becomes a step less noisy, in place."""

    def back(*tensors: Tensor) -> Tensor:
        p = theta.bind(tensors[0], denoise.parameter_shapes(widths))
        return tensors[1].assign(denoise.step_back(p, *tensors[1:]).contiguous()).realize()

    return CachedJit(back, "diffusion-back", (widths, CHUNK), sources=(denoise, parameters, theta))


class Diffusion(StateSimulator):
    """Draws (what the linear dynamics got wrong of the next embedding, relative log2 time), scaled to unit variance."""

    def __init__(self, widths: Widths, config: DiffusionConfig = DiffusionConfig()):
        super().__init__(widths, config.size)
        self.config = config
        self._drawn = config.size + 1  # X
        wide = self._drawn + config.size + widths.action + denoise.CLOCK
        self._widths = (padded(wide), *[config.hidden] * config.layers, padded(self._drawn))
        noise = np.random.default_rng(config.seed).standard_normal((config.samples, self._drawn))
        self._noise = (noise - noise.mean(axis=0)) / max(
            1e-6, noise.std(axis=0).mean()
        )  # the same for every prediction
        self._own: Arrays = {}
        self._theta: Tensor | None = None

    # *** learning ***

    def _fit_encoder(self, states: np.ndarray) -> None:
        scaling = Scaling.measure(states, self.config.clip)
        z = scaling(states)
        mean, axes = principal(z, self.config.size)
        deviation = ((z - mean) @ axes).std(axis=0)
        axes = axes / np.where(deviation > 1e-4, deviation, 1.0)
        self._own = {"mean": scaling.mean, "inverse": scaling.inverse, "origin": mean, "axes": axes}

    def _encode(self, states: np.ndarray) -> np.ndarray:
        own = self._own
        scaled = Scaling(own["mean"], own["inverse"], self.config.clip)(states)
        return ((scaled - own["origin"]) @ own["axes"]).astype(np.float32)

    def _learn(
        self, paths: Paths, points: Points, steps: int | None, deadline: Callable[[], bool] | None
    ) -> dict[str, float]:
        """A tenth of the kernels, on whatever devices, is held out, to scale the spread on."""
        began, c, rows = time.perf_counter(), self.config, points.rows
        rng = np.random.default_rng(c.seed)
        order = rows.unit[rng.permutation(rows.kernels)]
        units = order[np.sort(np.unique(order, return_index=True)[1])]  # each once
        held = units[: len(units) // 10]
        own = ~np.isin(rows.unit[rows.kernel], held)
        actions = Scaling.measure(paths.actions[paths.reached[:, 1:]], c.clip)
        self._own |= {"action.mean": actions.mean, "action.inverse": actions.inverse, "calibration": np.ones(1)}
        losses = self._descend(*self._examples(paths, points, own), c.steps if steps is None else steps, rng, deadline)
        if len(held):
            mean, std = self._time(self._encode(rows.features[~own]))
            error = centre(rows.target[~own] - mean, rows.kernel[~own])
            self._own["calibration"] = np.array([scale_of(error, std, c.level)])
        return {
            "steps": float(len(losses)),
            "seconds": time.perf_counter() - began,
            "rows": float(len(own)),
            "kernels": float(rows.kernels),
            "dropped": float(rows.dropped),
            "loss": float(losses[-max(1, len(losses) // 10) :].mean()),
            "spread_scale": float(self._own["calibration"][0]),
        }

    def _examples(self, paths: Paths, points: Points, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """(given [N, E + F], clean [N, X], how many of the first rows do nothing), from the points where `own` [P]."""
        path, position, target = points.path[own], points.position[own], points.rows.target[own]
        moved = position > 0
        z = self._encode(paths.states[path, position])
        before = self._encode(paths.states[path, position - 1])[moved]
        actions = paths.actions[path, position - 1][moved]
        off = z[moved] - self._parts["dynamics"](before, actions)  # type: ignore[call-arg]
        deviation = np.append(off.std(axis=0) + 1e-3, target.std() + 1e-3)
        self._own["drawn"] = deviation
        still = np.concatenate([np.zeros_like(z), target[:, None]], axis=1)
        clean = np.concatenate([still, np.concatenate([off, target[moved, None]], axis=1)]) / deviation
        given = np.concatenate([self._given(z, np.zeros((len(z), actions.shape[1]))), self._given(before, actions)])
        return given, clean.astype(np.float32), len(z)

    def _given(self, z: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[N, E + F]: no action is all zero, also when scaled."""
        scaled = Scaling(self._own["action.mean"], self._own["action.inverse"], self.config.clip)(action)
        return np.concatenate([z, scaled * action.any(axis=1, keepdims=True)], axis=1).astype(np.float32)

    def _descend(self, given: np.ndarray, clean: np.ndarray, still: int, total: int, rng: np.random.Generator,
                 deadline: Callable[[], bool] | None) -> np.ndarray:  # fmt: skip
        """Run the optimizer, keep the result; the loss of each step."""
        c = self.config
        rates = [c.lr * cosine(t, total, c.final_lr) for t in range(1, total + 1)]
        start, batches = denoise.initial(self._widths, rng), self._batches(still, len(given), rng)
        jit = _train_jit(self._widths, c.time_coef)
        self._theta, losses = descend(jit, start, (given, clean), batches, rates, c.weight_decay, 1, deadline)
        return losses[:, 0]

    def _batches(self, still: int, count: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (point [B] int32, noise and ticks [B, X + CLOCK]): of `count` points the first `still` do nothing."""
        c, alpha = self.config, denoise.kept(self.config.noise_steps)
        while True:
            nothing = rng.random(c.batch) < c.still
            point = np.where(nothing, rng.integers(0, still, c.batch), rng.integers(still, count, c.batch))
            a = alpha[rng.integers(1, c.noise_steps + 1, c.batch)]
            noise = rng.standard_normal((c.batch, self._drawn), np.float32)
            yield point.astype(np.int32), np.concatenate([noise, denoise.clock(a)], axis=1)

    # *** predicting ***

    def samples(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[N, samples, X]: the next embedding and the relative log2 time, after an action [N, F] (zeros: none)."""
        N, S, X, learned = len(embedding), self.config.samples, self._drawn, self._theta
        if learned is None:
            raise SimulatorError("used before fit: the simulator has learned nothing yet")
        given = np.repeat(self._given(embedding, action), S, axis=0)
        noise = np.tile(self._noise, (N, 1)).astype(np.float32)
        out, jit, alpha = (
            np.zeros((N * S, X), np.float32),
            _back_jit(self._widths),
            denoise.kept(self.config.noise_steps),
        )
        ticks = np.repeat(denoise.clock(alpha[:0:-1])[:, None], CHUNK, axis=1)  # [steps, CHUNK, CLOCK]
        with Context(BEAM=0):
            ways = [[upload(a) for a in pair] for pair in zip(ticks, denoise.coefficients(alpha), strict=True)]
            for at in range(0, N * S, CHUNK):
                part = [np.zeros((CHUNK, a.shape[1]), np.float32) for a in (noise, given)]
                count = min(CHUNK, N * S - at)
                part[0][:count], part[1][:count] = noise[at : at + count], given[at : at + count]
                x, known = (upload(a) for a in part)
                for way in ways:
                    jit(learned, x, known, *way)
                out[at : at + count] = x.numpy()[:count]
        drawn = out.reshape(N, S, X) * self._own["drawn"]
        middle = self._parts["dynamics"](embedding, action)  # type: ignore[call-arg]
        drawn[..., :-1] += middle[:, None]
        return drawn.astype(np.float32)

    def advance(self, embedding: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The mean of the samples; an action of zeros changes nothing."""
        self._check_fitted()
        z, a = check_features(embedding, self.size), check_features(action, self.widths.action)
        return np.where(a.any(axis=1, keepdims=True), self.samples(z, a)[..., :-1].mean(axis=1), z).astype(np.float32)

    def _time(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        times = self.samples(embedding, np.zeros((len(embedding), self.widths.action), np.float32))[..., -1]
        return times.mean(axis=1), times.std(axis=1) * self._own["calibration"][0]

    # *** keeping ***

    def _own_state(self) -> Arrays:
        return {f"own.{name}": np.array(a) for name, a in self._own.items()} | {"theta": self._theta.numpy().copy()}  # type: ignore[union-attr]

    def _load_own(self, state: Arrays) -> None:
        S, E, F = self.widths.state, self.size, self.widths.action
        shapes: parameters.Shapes = {
            "mean": (S,), "inverse": (S,), "origin": (S,), "axes": (S, E), "action.mean": (F,), "action.inverse": (F,),
            "calibration": (1,), "drawn": (E + 1,),
        }  # fmt: skip
        size = parameters.slots(denoise.parameter_shapes(self._widths))[1]
        own = check_state(state, {f"own.{name}": shape for name, shape in shapes.items()} | {"theta": (1, size)})
        self._own = {name: own[f"own.{name}"] for name in shapes}
        self._theta = Tensor(own["theta"].astype(np.float32)).realize()
