"""MuZero's three functions (Schrittwieser et al. 2020), as pure functions of one flat parameter vector:

    representation  e_0 = h(s)
    dynamics        e_{k+1}, r, end = g(e_k, a)
    prediction      policy, value, legal actions = f(e_k)

An action is known by a key [K]: a learned row of its own, plus one made of its features where the observation has any.
In a latent state nobody knows the features: the keys of the root serve everywhere below it, in training as in search."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor

from agents.networks import orthogonal, tanh
from agents.parameters import Parameters

KEY = 16  # width of an action's key; keys are most of what the search carries along


class Prediction(NamedTuple):
    logits: Tensor  # [..., A], not masked
    value: Tensor  # [..., bins] logits
    legal: Tensor  # [..., A] logits


class Unrolled(NamedTuple):
    """What the network says of K actions taken from one real state."""

    prediction: Prediction  # [K+1, B, ...]
    reward: Tensor  # [K, B]
    end: Tensor  # [K, B] logits
    guess: Tensor  # [K, B, H], what the latent states after each action should represent


class MuZeroNet(Parameters):
    """The three functions as one network."""

    def __init__(self, state_dim: int, n_actions: int, action_dim: int, hidden: int, bins: int, seed: int):
        self.dims = state_dim, n_actions, action_dim, hidden, bins
        self.n_actions, self.hidden, self.bins = n_actions, hidden, bins
        super().__init__(seed)

    def initial(self, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Orthogonal weights, zero biases. Small gains where a first guess should be none: policy and value begin
        uniform, reward, end and legality undecided."""
        D, A, F, H, bins = self.dims
        trunk = math.sqrt(2)
        layers = {"encoder1": (D, H, trunk), "encoder2": (H, H, trunk), "dynamics1": (H + KEY, H, trunk),
                  "dynamics2": (H, H, 1.0), "outcome": (H, 2, 0.1), "value": (H, bins, 0.01), "policy": (H, A, 0.01),
                  "reward": (H, A, 0.1), "legal": (H, A, 0.1), "consistency": (H, H, 1.0)}  # fmt: skip
        arrays = {}
        for name, (rows, columns, gain) in layers.items():
            arrays[f"{name}.weight"], arrays[f"{name}.bias"] = orthogonal(rng, rows, columns, gain), np.zeros(columns)
        arrays["policy.query"] = orthogonal(rng, H, KEY, 0.01)
        arrays["reward.query"] = orthogonal(rng, H, KEY, 0.1)
        arrays["action.table"] = orthogonal(rng, A, KEY, trunk)
        if F:
            arrays["action.row"] = orthogonal(rng, F, KEY, trunk)
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    @staticmethod
    def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def represent(self, state: Tensor) -> Tensor:
        """[N, D] -> [N, H]."""
        p = self.parameters
        return tanh(self._linear(p, "encoder2", tanh(self._linear(p, "encoder1", state))))

    def keys(self, state: Tensor, actions: Tensor | None) -> Tensor:
        """k_a = tanh(table_a + W row_a) [B, A, K]; state [B, D] says only how many rows, actions [B, A, F]."""
        p = self.parameters
        keys = p["action.table"].unsqueeze(0).expand(state.shape[0], -1, -1)
        if actions is not None:
            B, A, F = actions.shape
            keys = keys + (actions.reshape(B * A, F) @ p["action.row"]).reshape(B, A, KEY)
        return tanh(keys)

    def dynamics(self, latent: Tensor, keys: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h = tanh(W [e, k_a]); e' = tanh(e + W h); r = w . h + w_a . e + b_a + q(e) . k_a: the next latent state [B, H],
        reward [B] and logit of the end [B]. latent [B, H], keys [B, A, K], action [B]. By the products, what an action is
        worth in a state is learned from tens of steps; by h alone from hundreds."""
        p = self.parameters
        chosen = action.unsqueeze(1) == Tensor.arange(self.n_actions)  # [B, A]
        key = chosen.unsqueeze(2).where(keys, 0.0).sum(1)  # [B, K]
        h = tanh(self._linear(p, "dynamics1", latent.cat(key, dim=1))).contiguous()
        outcome = self._linear(p, "outcome", h)
        worth = chosen.where(self._linear(p, "reward", latent), 0.0).sum(1) + ((latent @ p["reward.query"]) * key).sum(
            1
        )
        return tanh(latent + self._linear(p, "dynamics2", h)).contiguous(), outcome[:, 0] + worth, outcome[:, 1]

    def predict(self, latent: Tensor, keys: Tensor) -> Prediction:
        """logit_a = w_a . e + b_a + q(e) . k_a; latent [..., B, H], keys [B, A, K]."""
        p = self.parameters
        query = (latent @ p["policy.query"]).unsqueeze(-2)  # [..., B, 1, K]
        logits = self._linear(p, "policy", latent) + (query * keys).sum(-1)
        return Prediction(logits, self._linear(p, "value", latent), self._linear(p, "legal", latent))

    def unroll(self, state: Tensor, action: Tensor, actions: Tensor | None) -> Unrolled:
        """state [B, D], action [K, B], actions [B, A, F]. The gradient is halved at each step (appendix G)."""
        first, keys = self.represent(state).contiguous(), self.keys(state, actions).contiguous()
        latent, steps = first, []
        for k in range(action.shape[0]):
            steps.append(self.dynamics(0.5 * latent + 0.5 * latent.detach(), keys, action[k]))
            latent = steps[-1][0]
        following, reward, end = (Tensor.stack(*column) for column in zip(*steps, strict=True))
        following = following.contiguous()  # [K, B, H]
        every = first.unsqueeze(0).cat(following).contiguous()  # [K+1, B, H]
        return Unrolled(self.predict(every, keys), reward, end, self._linear(self.parameters, "consistency", following))
