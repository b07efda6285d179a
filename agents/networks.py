"""Masked recurrent actor-critic, as a pure function of one flat parameter vector."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor

from agents.parameters import Parameters

ILLEGAL = -1e9  # finite: an infinity would turn 0 * inf into NaN in the entropy
POINTER = 32  # width of the per-action score; [T, B, A, POINTER] is the largest array of an update


class Output(NamedTuple):
    logits: Tensor  # [..., A], illegal actions at ILLEGAL
    value: Tensor  # [...]
    hidden: Tensor  # [B, 2H], h and c side by side


def orthogonal(rng: np.random.Generator | None, rows: int, columns: int, gain: float) -> np.ndarray:
    """[rows, columns] float32 with orthonormal rows or columns, times gain (Saxe et al. 2014). Zeros without `rng`, where the
    shape alone is asked for."""
    if rng is None:
        return np.zeros((rows, columns), np.float32)
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))  # makes the distribution uniform over orthogonal matrices
    return (gain * (q if rows >= columns else q.T)).astype(np.float32)


def tanh(x: Tensor) -> Tensor:
    """tanh x. The gradient of tinygrad's own is 0 times an exponential that overflows below -44: NaN, unless its rewrites
    happen to meet the product in a form that they simplify. Beyond 10 it is 1 to float32's last digit."""
    return x.clip(-10.0, 10.0).tanh()


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp -x), for the same reason within 30, where it is 0 or 1 up to 1e-13."""
    return x.clip(-30.0, 30.0).sigmoid()


def log_softmax(logits: Tensor) -> Tensor:
    """log pi [..., A] over legal actions: illegal ones sit at ILLEGAL and add exactly 0 to the sum."""
    return logits.log_softmax(-1)


def entropy(log_probs: Tensor, mask: Tensor) -> Tensor:
    """H = -sum_a pi_a log pi_a over legal actions. [..., A], bool [..., A] -> [...]."""
    return -(log_probs.exp() * mask.where(log_probs, 0.0)).sum(-1)


class LSTMPolicy(Parameters):
    """Encoder (two tanh layers) -> LSTM -> policy and value heads; with action features also a pointer head.

    memory=False leaves the LSTM out and passes the hidden state through: the control of every claim about
    memory."""

    def __init__(
        self, state_dim: int, n_actions: int, action_dim: int = 0, hidden: int = 128, seed: int = 0, memory: bool = True
    ):
        self.state_dim, self.n_actions, self.action_dim = state_dim, n_actions, action_dim
        self.hidden, self.memory = hidden, memory
        self.dims = state_dim, n_actions, action_dim, hidden, memory
        super().__init__(seed)

    def initial(self, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Orthogonal weights, zero biases. Gains sqrt 2 (trunk), 0.01 (policy), 1 (value): Andrychowicz et
        al. 2021."""
        D, A, F, H, trunk = self.state_dim, self.n_actions, self.action_dim, self.hidden, math.sqrt(2)
        arrays = {
            "encoder1.weight": orthogonal(rng, D, H, trunk),
            "encoder1.bias": np.zeros(H),
            "encoder2.weight": orthogonal(rng, H, H, trunk),
            "encoder2.bias": np.zeros(H),
        }
        if self.memory:
            arrays["lstm.input"] = np.concatenate([orthogonal(rng, H, H, 1.0) for _ in range(4)], axis=1)
            arrays["lstm.recurrent"] = np.concatenate([orthogonal(rng, H, H, 1.0) for _ in range(4)], axis=1)
            # an open forget gate at the start: Jozefowicz et al. 2015
            arrays["lstm.bias"] = np.concatenate([np.zeros(H), np.ones(H), np.zeros(2 * H)])
        arrays |= {
            "value.weight": orthogonal(rng, H, 1, 1.0),
            "value.bias": np.zeros(1),
            "policy.weight": orthogonal(rng, H, A, 0.01),
            "policy.bias": np.zeros(A),
        }
        if F:
            arrays |= {
                "pointer.action": orthogonal(rng, F, POINTER, trunk),
                "pointer.context": orthogonal(rng, H, POINTER, trunk),
                "pointer.bias": np.zeros(POINTER),
                "pointer.score": orthogonal(rng, POINTER, 1, 0.01),
            }
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def step(self, state: Tensor, mask: Tensor, actions: Tensor | None, hidden: Tensor, reset: Tensor) -> Output:
        """One step: state [B, D], mask [B, A], actions [B, A, F], hidden [B, 2H], reset [B] (1 where an
        episode begins)."""
        out = self.unroll(
            state.unsqueeze(0),
            mask.unsqueeze(0),
            None if actions is None else actions.unsqueeze(0),
            hidden,
            reset.unsqueeze(0),
        )
        return Output(out.logits.squeeze(0), out.value.squeeze(0), out.hidden)

    def unroll(self, state: Tensor, mask: Tensor, actions: Tensor | None, hidden: Tensor, reset: Tensor) -> Output:
        """T steps from one hidden state: state [T, B, D], mask [T, B, A], actions [T, B, A, F], hidden [B,
        2H], reset [T, B]."""
        p, (T, B) = self.parameters, state.shape[:2]
        x = state.reshape(T * B, self.state_dim)
        x = tanh(x @ p["encoder1.weight"] + p["encoder1.bias"])
        x = tanh(x @ p["encoder2.weight"] + p["encoder2.bias"])
        if self.memory:
            x, hidden = self._lstm(p, x.reshape(T, B, self.hidden), hidden, reset)
        value = (x @ p["value.weight"] + p["value.bias"]).reshape(T, B)
        logits = (x @ p["policy.weight"] + p["policy.bias"]).reshape(T, B, self.n_actions)
        if actions is not None:
            logits = logits + self._pointer(p, x, actions)
        return Output(mask.where(logits, ILLEGAL), value, hidden)

    def _lstm(self, p: dict[str, Tensor], x: Tensor, hidden: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """i, f, o = sigmoid(.), u = tanh(.) of W_x x + W_h h + b; c' = f c + i u; h' = o tanh(c') (Hochreiter
        and Schmidhuber 1997, with forget gates). x [T, B, H], hidden [B, 2H], reset [T, B] -> [T*B, H], [B,
        2H]. The only place where memory is wiped."""
        T, B, H = x.shape
        projected = (x.reshape(T * B, H) @ p["lstm.input"] + p["lstm.bias"]).reshape(T, B, 4, H)
        h, c, outputs = hidden[:, :H], hidden[:, H:], []
        for t in range(T):
            keep = (1 - reset[t]).reshape(B, 1)
            gates = projected[t] + ((h * keep) @ p["lstm.recurrent"]).reshape(B, 4, H)
            i, f, o, u = sigmoid(gates[:, 0]), sigmoid(gates[:, 1]), sigmoid(gates[:, 2]), tanh(gates[:, 3])
            # realized here, or the next step's kernels would compute them again
            c = (f * (c * keep) + i * u).contiguous()
            h = (o * tanh(c)).contiguous()
            outputs.append(h)
        return Tensor.stack(*outputs).reshape(T * B, H), h.cat(c, dim=1)

    def _pointer(self, p: dict[str, Tensor], h: Tensor, actions: Tensor) -> Tensor:
        """score_a = v . tanh(W_a a + W_c h + b): additive attention (Bahdanau et al. 2015). h [T*B, H],
        actions [T, B, A, F] -> [T, B, A]."""
        T, B, A, F = actions.shape
        # tinygrad's gradient of W_a would be one kernel that computes all tanhs again for each of F rows, ten times as slow
        # as the whole update: what flows back is realized before, first by rows of [T*B], then summed over them
        weight = p["pointer.action"].expand(T * B, F, POINTER).contiguous_backward()
        keys = actions.reshape(T * B, A, F) @ weight  # [T*B, A, POINTER]
        query = (h @ p["pointer.context"] + p["pointer.bias"]).reshape(T * B, 1, POINTER)
        # realized: fused with the heads' sums, hundreds of tanhs were unrolled into one kernel, most of a capture
        blend = tanh((keys + query).contiguous_backward()).contiguous()
        return (blend.reshape(T * B * A, POINTER) @ p["pointer.score"]).reshape(T, B, A)
