"""Shared by the agents' tests: one small agent and one small world, so that all of them live on one capture."""

import numpy as np
import pytest

from agents.ppo import PPO, PPOConfig
from agents.protocol import Observation, Step
from agents.rollout import Rollouts, evaluate

SMALL = PPOConfig(steps=4, n_envs=2, hidden=8, epochs=2, gamma=0.9, lr=1e-2, lr_end=1e-2, max_grad_norm=0.1)


class Noise:
    """Random states, masks, features and rewards. All episodes last 2 steps: even rows terminate, odd ones are
    cut. So a rollout of 4 steps holds ends of both kinds."""

    state_dim, n_actions, action_dim = 3, 4, 2

    def __init__(self, n_envs=2):
        self.n_envs, self.odd = n_envs, np.arange(n_envs) % 2 == 1

    def look(self):
        mask = self.rng.random((self.n_envs, 4)) < 0.6
        mask[:, 2] = True
        draw = lambda *shape: self.rng.standard_normal((self.n_envs, *shape)).astype(np.float32)  # noqa: E731
        return Observation(draw(3), mask, draw(4, 2))

    def reset(self, seed):
        self.rng, self.age = np.random.default_rng(seed), 0
        return self.look()

    def step(self, actions):
        self.age += 1
        ended = np.full(self.n_envs, self.age % 2 == 0)
        reward = self.rng.standard_normal(self.n_envs).astype(np.float32)
        return Step(self.look(), reward, ended & ~self.odd, ended & self.odd, self.look() if ended.any() else None)


@pytest.fixture(scope="session")
def cache_dir(private_cache):
    directory = private_cache / "jit"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def make(cache_dir):
    """make(seed) -> a small PPO; all of them share one capture. make.rollout(agent, seed) -> experience in Noise."""

    def make(seed=0, config=SMALL):
        return PPO(3, 4, 2, config, seed, cache_dir)

    make.config = SMALL
    make.env = Noise
    make.rollout = lambda agent, seed=0: Rollouts(Noise(), agent, seed).collect(4)[0]
    return make


@pytest.fixture(scope="session")
def train(cache_dir):
    """train(env, config, steps) -> agent, wrapped if wished, trained on about `steps` steps; train.score -> its mean greedy return."""

    def train(env, config, steps, seed=0, wrap=lambda agent: agent):
        agent = wrap(PPO(env.state_dim, env.n_actions, env.action_dim, config, seed, cache_dir))
        rollouts = Rollouts(env, agent, seed)
        for _ in range(steps // (config.steps * config.n_envs)):
            agent.update(rollouts.collect(config.steps)[0])
        return agent

    def score(env, agent, episodes=50, temperature=0.0):
        return float(np.mean([e.total for e in evaluate(env, agent, episodes, seed=10_000, temperature=temperature)]))

    train.score = score
    return train


@pytest.fixture(scope="session")
def reference():
    """The whole network and its loss again, in float64 numpy, one time step after another."""
    return Reference


class Reference:
    @staticmethod
    def forward(p, state, mask, actions, hidden, reset):
        """[T, B, ...] -> log_probs [T, B, A], values [T, B], hidden [B, 2H]."""
        sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
        H = hidden.shape[1] // 2
        h, c = hidden[:, :H].astype(np.float64), hidden[:, H:].astype(np.float64)
        log_probs, values = [], []
        for t in range(len(state)):
            x = np.tanh(state[t] @ p["encoder1.weight"] + p["encoder1.bias"])
            x = np.tanh(x @ p["encoder2.weight"] + p["encoder2.bias"])
            keep = reset[t][:, None] == 0
            h, c = np.where(keep, h, 0), np.where(keep, c, 0)
            i, f, o, u = np.split(x @ p["lstm.input"] + h @ p["lstm.recurrent"] + p["lstm.bias"], 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
            h = sigmoid(o) * np.tanh(c)
            key = np.einsum("baf,fk->bak", actions[t], p["pointer.action"])
            query = h @ p["pointer.context"] + p["pointer.bias"]
            score = np.tanh(key + query[:, None]) @ p["pointer.score"][:, 0]
            logits = np.where(mask[t], h @ p["policy.weight"] + p["policy.bias"] + score, -np.inf)
            top = logits.max(1, keepdims=True)
            log_probs.append(logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True)))
            values.append((h @ p["value.weight"] + p["value.bias"])[:, 0])
        return np.array(log_probs), np.array(values), np.concatenate([h, c], axis=1)

    @staticmethod
    def loss(p, r, advantage, target, config):
        """The PPO loss of a rollout, and its parts by name."""
        log_probs, values, _ = Reference.forward(p, r.state, r.mask, r.actions, r.hidden, r.reset)
        chosen = np.take_along_axis(log_probs, r.action[..., None], 2)[..., 0]
        ratio, clipped = np.exp(chosen - r.log_prob), np.exp(chosen - r.log_prob)
        clipped = np.minimum(np.maximum(clipped, 1 - config.clip), 1 + config.clip)
        parts = {
            "policy_loss": -np.minimum(ratio * advantage, clipped * advantage).mean(),
            "value_loss": ((values - target) ** 2).mean() / 2,
            "entropy": np.mean(
                [
                    -sum(q * np.log(q) for q in row if q > 0)
                    for row in np.exp(log_probs).reshape(-1, log_probs.shape[-1])
                ]
            ),
            "kl": (ratio - 1 - np.log(ratio)).mean(),
            "ratio": ratio.mean(),
            "clip_fraction": (np.abs(ratio - 1) > config.clip).mean(),
        }
        total = parts["policy_loss"] + config.value_coef * parts["value_loss"] - config.entropy * parts["entropy"]
        return total, parts
