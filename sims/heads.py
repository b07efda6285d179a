"""Which actions are legal, and which are likely, from a simulator's embedding: the half of MuZero's prediction function
that a simulator of times lacks.

An action is known by a key, made of what it is (its place in the vocabulary) and of what it does to this kernel (its row).
Keys belong to a kernel, queries to an embedding, and a logit is their product.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from tinygrad import Context, Tensor

from agents import networks, parameters
from agents.checks import check_positive
from agents.jitcache import CachedJit, upload
from agents.networks import ILLEGAL, orthogonal
from sims import mlp, theta
from sims.base import Scaling, SimulatorError, check_features, check_state, per_group
from sims.descent import descend
from sims.padding import padded, widened

ROWS = 16  # embeddings of one forward pass
Sizes = tuple[int, int, int, int, int]  # E, A, F, H, K, padded


@dataclass(frozen=True)
class HeadsConfig:
    hidden: int = 128  # H: width of what is made of an embedding
    key: int = 16  # K: MuZero's agents need no more to tell actions apart
    lr: float = 3e-3  # AdamW's, at the start; anneals to a tenth
    weight_decay: float = 0.1  # decoupled, so times lr
    steps: int = 1000  # the losses are flat by then
    kernels: int = 16  # G: kernels of a step
    positions: int = 16  # R: positions of each of them
    legal_coef: float = (
        1.0  # weight of legality beside the prior: a search that believes in illegal actions plans nonsense
    )
    clip: float = 5.0  # standard deviations: unseen extremes must not explode
    seed: int = 0  # of weights and batches

    def __post_init__(self) -> None:
        positive = "hidden", "key", "lr", "steps", "kernels", "positions", "clip"
        check_positive(self, *positive, error=SimulatorError)


def shapes_of(sizes: Sizes) -> parameters.Shapes:
    E, A, F, H, K = sizes
    both = {f"{head}.{name}": shape for head in ("prior", "legal")
            for name, shape in (("query", (H, K)), ("weight", (H, A)), ("bias", (A,)))}  # fmt: skip
    return {"hidden.weight": (E, H), "hidden.bias": (H,), "table": (A, K), "row": (F, K), **both}


def forward(p: dict[str, Tensor], z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """logit_a = w_a . h + b_a + q(h) . k_a of prior and legality: z [G, R, E], rows [G, A, F] -> two of [G, R, A]."""
    h = (z @ p["hidden.weight"] + p["hidden.bias"]).relu().contiguous()  # [G, R, H]
    keys = (rows @ p["row"] + p["table"]).clip(-4, 4).contiguous().transpose(1, 2)  # [G, K, A]
    # what flows back is realized at each fork, or it would be computed again for each element that it flows to
    h, keys = h.contiguous_backward(), keys.contiguous_backward()
    queries = {n: (h @ p[f"{n}.query"]).contiguous().contiguous_backward() for n in ("prior", "legal")}
    prior, legal = (
        (h @ p[f"{n}.weight"] + p[f"{n}.bias"] + query @ keys).contiguous_backward() for n, query in queries.items()
    )
    return prior, legal


@cache
def _train_jit(sizes: Sizes, legal_coef: float) -> CachedJit:
    def train(
        w: Tensor, m: Tensor, v: Tensor, row: Tensor, hyper: Tensor, kernel: Tensor, at: Tensor, *data: Tensor
    ) -> Tensor:
        """kernel [G], at [G, R]: what is gathered from z [P, E], rows [K, A, F], mask and target [P, A] on the device."""
        z, mask, target = (x[at].contiguous() for x in (data[0], data[2], data[3]))  # of bools a gather would be a sum
        rows, bound = data[1][kernel].contiguous(), theta.bind(w, shapes_of(sizes))
        prior, legal = forward({name: x[0] for name, x in bound.items()}, z, rows)
        log_probs = (mask > 0).where(prior, ILLEGAL).log_softmax(-1)
        prior_loss = -(target * (mask > 0).where(log_probs, 0.0)).sum(-1).mean()
        legal_loss = legal.binary_crossentropy_logits(mask)
        row.assign(Tensor.stack(prior_loss, legal_loss))
        gradient = theta.gradient_of(prior_loss + legal_coef * legal_loss, bound)
        return row.realize(*theta.adam(w, m, v, gradient, hyper))

    sources = networks, mlp, parameters, theta, sys.modules[__name__]
    return CachedJit(train, "heads-train", (sizes, legal_coef), sources)


@cache
def _predict_jit(sizes: Sizes) -> CachedJit:
    def predict(w: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        p = {name: x[0] for name, x in theta.bind(w, shapes_of(sizes)).items()}
        return Tensor.stack(*forward(p, z, rows)).contiguous()  # [2, 1, ROWS, A]

    return CachedJit(predict, "heads-predict", (sizes, ROWS), sources=(parameters, theta, sys.modules[__name__]))


class Heads:
    """Learns from positions [P]: an embedding each, the kernel that it is of, which actions are legal, and how likely a
    good search would take them.
    """

    def __init__(self, embedding: int, n_actions: int, action: int, config: HeadsConfig = HeadsConfig()):
        self.config, self.widths = config, (embedding, n_actions, action)
        E, A, F = (padded(n) for n in self.widths)
        self.sizes: Sizes = (E, A, F, config.hidden, config.key)
        self._theta: Tensor | None = None  # [1, P]
        self._fits = 0  # so far; of loaded heads one, at least
        self._scaling = {n: Scaling(np.zeros(w, np.float32), np.zeros(w, np.float32), config.clip)
                         for n, w in (("embedding", embedding), ("action", action))}  # fmt: skip

    def fit(self, z: np.ndarray, kernel: np.ndarray, rows: np.ndarray, mask: np.ndarray, target: np.ndarray,
            steps: int | None = None) -> dict[str, float]:  # fmt: skip
        """z [P, E], kernel [P] (an index of rows [K, A, F]), mask [P, A] bool, target [P, A] that sums to 1 over legal
        actions. From scratch the first time, afterwards on from what was learned. Raises SimulatorError.
        """
        c, (E, A, F) = self.config, self.widths
        z, total = check_features(z, E), c.steps if steps is None else steps
        if not len(z) or mask.shape != (len(z), A) or target.shape != mask.shape or rows.shape[1:] != (A, F):
            raise SimulatorError(f"heads need z [P, {E}], mask and target [P, {A}], rows [K, {A}, {F}], P > 0; got "
                                 f"{list(z.shape)}, {list(mask.shape)}, {list(target.shape)}, {list(rows.shape)}")  # fmt: skip
        if not np.allclose((target * mask).sum(1), 1, atol=1e-3):
            raise SimulatorError("a target must sum to 1 over the legal actions of its position")
        rng = np.random.default_rng(c.seed)
        if self._theta is None:
            self._scaling = {
                "embedding": Scaling.measure(z, c.clip),
                "action": Scaling.measure(rows.reshape(-1, F), c.clip),
            }
            start = self._initial(rng)
        else:
            start = self._theta.numpy().copy()
            rng = np.random.default_rng([c.seed, self._fits])  # other batches each time
        rates = [c.lr * (1 - 0.9 * (t - 1) / total) for t in range(1, total + 1)]
        jit, data = _train_jit(self.sizes, c.legal_coef), self._examples(z, rows, mask, target)
        self._theta, losses = descend(jit, start, data, self._batches(rng, kernel), rates, c.weight_decay, 2)
        self._fits += 1
        return dict(zip(("prior_loss", "legal_loss"), losses[-max(1, total // 10) :].mean(0).tolist(), strict=True))

    def __call__(self, z: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(prior logits, legality logits) [N, A] of embeddings z [N, E] of one kernel, whose rows are [A, F]."""
        if self._theta is None:
            raise SimulatorError("used before fit: the heads have learned nothing yet")
        A, keys = self.widths[1], self._keys(rows[None])
        scaled, out = self._embedded(z), np.zeros((2, len(z), A), np.float32)
        jit = _predict_jit(self.sizes)
        with Context(BEAM=0):
            for at in range(0, len(z), ROWS):
                part = np.zeros((1, ROWS, self.sizes[0]), np.float32)
                count = min(ROWS, len(z) - at)
                part[0, :count] = scaled[at : at + count]
                out[:, at : at + count] = jit(self._theta, upload(part), upload(keys)).numpy()[:, 0, :count, :A]
        return out[0], out[1]

    def state(self) -> dict[str, np.ndarray]:
        if self._theta is None:
            raise SimulatorError("used before fit: the heads have learned nothing yet")
        scaling = {f"{n}.{k}": getattr(s, k) for n, s in self._scaling.items() for k in ("mean", "inverse")}
        return {"theta": self._theta.numpy().copy(), **scaling}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """A SimulatorError (a name, a shape, a NaN) changes nothing."""
        E, _, F = self.widths
        shapes: parameters.Shapes = {"theta": (1, parameters.slots(shapes_of(self.sizes))[1])}
        shapes |= {f"{n}.{k}": (w,) for n, w in (("embedding", E), ("action", F)) for k in ("mean", "inverse")}
        arrays = {name: array.astype(np.float32) for name, array in check_state(state, shapes).items()}
        self._scaling = {
            n: Scaling(arrays[f"{n}.mean"], arrays[f"{n}.inverse"], self.config.clip) for n in self._scaling
        }
        self._theta = upload(arrays["theta"])
        self._fits = max(1, self._fits)

    def _initial(self, rng: np.random.Generator) -> np.ndarray:
        """theta [1, P]: both heads begin near 0, so the prior is even and legality undecided."""
        slots, size = parameters.slots(shapes_of(self.sizes))
        out = np.zeros((1, size), np.float32)
        for name, shape in shapes_of(self.sizes).items():
            if len(shape) == 2:
                gain = 0.1 if name.startswith(("prior", "legal")) else 1.0
                out[0, slots[name][0] : slots[name][1]] = orthogonal(rng, *shape, gain).reshape(-1)
        return out

    def _examples(self, z: np.ndarray, rows: np.ndarray, mask: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
        """All of them scaled and padded, float32."""
        labels = (widened(label.astype(np.float32), self.sizes[1]) for label in (mask, target))
        return [self._embedded(z), self._keys(rows), *labels]

    def _batches(self, rng: np.random.Generator, kernel: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (kernel [G], position [G, R]) int32, both drawn with replacement."""
        members, c = per_group(kernel), self.config
        while True:
            groups = [members[i] for i in rng.integers(len(members), size=c.kernels)]
            at = np.stack([g[rng.integers(len(g), size=c.positions)] for g in groups])
            yield kernel[at[:, 0]].astype(np.int32), at.astype(np.int32)

    def _embedded(self, z: np.ndarray) -> np.ndarray:
        """Scaled and padded [N, E]."""
        return widened(self._scaling["embedding"](check_features(z, self.widths[0])), self.sizes[0])

    def _keys(self, rows: np.ndarray) -> np.ndarray:
        """Scaled and padded along both axes: [K, A, F]."""
        scaled = widened(self._scaling["action"](rows), self.sizes[2])
        return np.pad(scaled, ((0, 0), (0, self.sizes[1] - scaled.shape[1]), (0, 0)))
