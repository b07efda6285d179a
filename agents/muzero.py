"""MuZero (Schrittwieser et al. 2020) with Gumbel search (Danihelka et al. 2022): acts by planning in a world that it has
learned itself. As in EfficientZero (Ye et al. 2021), latent states are also taught to agree with what was seen, and all
targets are made fresh, by searching from stored states with the present network."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor

from agents import losses, muzero_networks, networks, parameters
from agents.checks import check_fraction, check_least, check_positive
from agents.jitcache import CachedJit
from agents.learner import LearnerConfig, NetworkAgent, Trained, check_rollout, to_tensors
from agents.losses import weighted_mean
from agents.muzero_networks import KEY, MuZeroNet, Unrolled
from agents.networks import ILLEGAL
from agents.planning import CONSIDERED, Backup, Embeddings, Recurrent, Root, SearchResult, search
from agents.protocol import Observation
from agents.replay import Replay
from agents.returns import known_steps, lambda_returns
from agents.rollout import Action, Rollout

METRICS = ("policy_loss", "value_loss", "reward_loss", "end_loss", "legal_loss", "consistency_loss")


@dataclass(frozen=True)
class MuZeroConfig(LearnerConfig):
    """Raises ValueError for a number out of its range."""

    memory: bool = False  # it has no LSTM: what it sees must be all there is to know
    lr: float = 3e-3  # Adam's, at the start; as DQN's
    lr_end: float = 3e-4  # not 0: what is found late must still be learned
    max_grad_norm: float = 10.0  # cross-entropies have bounded gradients already
    simulations: int = 16  # of a search; 0 = acts by its policy alone, which then learns nothing
    considered: int = CONSIDERED  # actions that a search begins with, at most
    backup: Backup = "mean"  # a learned model errs, and "max" believes its luckiest error
    spread: float = 1.0  # values nearer than a factor of 2 are not blown up in a search: untrained ones are noise
    explore: float = 0.25  # share of the uniform policy in the prior it acts by, at the start: the paper's root noise
    explore_end: float = 0.0  # and at the end of the annealing
    unroll: int = 5  # the paper's; latent steps that a gradient step looks ahead
    bins: int = 121  # of the value's distribution: 15 to a factor of 2 in time
    low: float = -2.0  # value of the first bin: four times slower
    high: float = 6.0  # and of the last: 64 times faster
    lam: float = 1.0  # of the lambda-return: episodes are short, so their returns are known
    replay: int = 32  # rollouts kept
    save_replay: bool = True  # False: small checkpoints, but a resumed run differs from an uninterrupted one
    batch: int = 32  # sequences searched again for each rollout, and windows of a gradient step
    gradient_steps: int = 8  # for each rollout
    value_coef: float = 0.25  # Reanalyse's; the value shares its trunk with all the others
    reward_coef: float = 1.0  # of the squared error, and of the end's
    legal_coef: float = 1.0  # a search that believes in illegal actions plans nonsense
    consistency_coef: float = 1.0  # of agreeing with what is seen next

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory:
            raise ValueError("memory must be False: MuZero has no LSTM")
        check_positive(self, "considered", "spread", "unroll", "replay", "batch", "gradient_steps")
        check_least(self, simulations=0, bins=2)
        check_fraction(self, "lam", "explore", "explore_end")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low} and {self.high}")
        if self.backup not in ("mean", "max"):
            raise ValueError(f"backup must be mean or max, not {self.backup!r}")


class Batch(NamedTuple):
    """Windows of K steps; where `here` or `going` is 0, what stands there is of another episode."""

    state: Tensor  # [K+1, B, D]
    mask: Tensor  # [K+1, B, A] bool
    policy: Tensor  # [K+1, B, A], of a search
    value: Tensor  # [K+1, B], for the value
    here: Tensor  # [K+1, B], 1 where the state belongs to the window's episode
    action: Tensor  # [K, B] int32
    reward: Tensor  # [K, B]
    terminated: Tensor  # [K, B]
    going: Tensor  # [K, B], 1 where the step does
    actions: Tensor | None = None  # [B, A, F], of the first state


# *** values ***


def two_hot(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """[...] -> [..., bins]: the weights on the two bins next to x, clipped to [low, high], whose mean is x."""
    place = (x.clip(low, high) - low) * ((bins - 1) / (high - low))
    return (1 - (place.unsqueeze(-1) - Tensor.arange(bins)).abs()).relu()


def value_targets(
    reward: np.ndarray, terminated: np.ndarray, ended: np.ndarray, value: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    """The lambda-return G_t of each step, and its own value v_t where what follows was not stored. All [T, B]."""
    known = known_steps(terminated, ended) > 0
    following = np.roll(value, -1, axis=0)  # of the last step it is never looked at: that one is unknown, or an end
    return lambda_returns(np.where(known, reward, value), gamma * (known & ~terminated), following, lam)


# *** the loss ***


def correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(a - m_a) . (b - m_b) / |a - m_a| |b - m_b| over the last axis, m the weighted means over the others. Not centred,
    it would be best where all states are represented alike. a, b [K, B, H], weight [K, B] -> [K, B]."""
    w = weight.unsqueeze(-1) / weight.sum().maximum(1e-8)
    a, b = (x - (w * x).sum((0, 1)) for x in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1) + 1e-8).sqrt()


def muzero_loss(out: Unrolled, seen: Tensor, b: Batch, c: MuZeroConfig) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and METRICS, each a mean over the steps of the window that belong to its episode.

        L = - sum_a pi_a log p_a  - c_v sum_i two_hot(G)_i log v_i  + c_r ((r' - r)^2 + BCE(end))
            + c_l mean_a BCE(legal_a)  - c_c correlation(guess, stop(seen))

    seen [K, B, H]: the representation of the states that followed, through which no gradient flows (SimSiam: Chen and
    He 2021)."""
    log_probs = b.mask.where(out.prediction.logits, ILLEGAL).log_softmax(-1)
    log_values = out.prediction.value.log_softmax(-1)
    end = out.end.binary_crossentropy_logits(b.terminated, reduction="none")
    legal = out.prediction.legal.binary_crossentropy_logits(b.mask.float(), reduction="none").mean(-1)
    policy_loss = weighted_mean(-(b.policy * b.mask.where(log_probs, 0.0)).sum(-1), b.here)
    value_loss = weighted_mean(-(two_hot(b.value, c.bins, c.low, c.high) * log_values).sum(-1), b.here)
    reward_loss = weighted_mean((out.reward - b.reward).square(), b.going)
    end_loss, legal_loss = weighted_mean(end, b.going), weighted_mean(legal, b.here)
    consistency_loss = -weighted_mean(correlation(out.guess, seen.detach(), b.here[1:]), b.here[1:])
    loss = policy_loss + c.value_coef * value_loss + c.reward_coef * (reward_loss + end_loss)
    loss = loss + c.legal_coef * legal_loss + c.consistency_coef * consistency_loss
    return loss, (policy_loss, value_loss, reward_loss, end_loss, legal_loss, consistency_loss)


# *** the agent ***


class MuZero(NetworkAgent):
    """`initial` and `recurrent` serve any planner (see agents.planning). One seed gives one run."""

    name = "MuZero"
    config: MuZeroConfig
    policy: MuZeroNet

    def __init__(
        self,
        state_dim: int,
        n_actions: int,
        action_dim: int = 0,
        config: MuZeroConfig | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        c = config or MuZeroConfig()
        super().__init__(state_dim, n_actions, action_dim, c, seed, cache_dir)
        modules = (networks, parameters, muzero_networks, losses, sys.modules[__name__])
        frozen = (c.bins, c.low, c.high, c.value_coef, c.reward_coef, c.legal_coef, c.consistency_coef)
        self.trained = Trained(self.policy, self._loss, METRICS, c, "muzero", frozen, modules, cache_dir)
        self.parts = {"": self.trained}
        numbers = (*self.policy.dims, c.low, c.high)
        self._initial = CachedJit(self._initial_fn, "muzero-initial", numbers, modules, cache_dir)
        self._recurrent = CachedJit(self._recurrent_fn, "muzero-recurrent", numbers, modules, cache_dir)
        T, D, A, F = c.steps, state_dim, n_actions, action_dim
        shapes = {"state": (T, D), "mask": (T, A), **dict.fromkeys(("action", "reward", "terminated", "ended"), (T,))}
        self.replay = Replay(c.replay * c.n_envs, {**shapes, **({"actions": (T, A, F)} if F else {})})

    def network(self, seed: int) -> MuZeroNet:
        return MuZeroNet(*self.dims, self.config.hidden, self.config.bins, seed)

    # *** the model ***

    def initial(self, observation: Observation) -> Root:
        """An embedding is the latent state, then the keys of all actions, side by side [B, H + A K]."""
        state, mask, actions = observation
        A = self.policy.n_actions
        out = self._initial(self.policy.theta, *to_tensors(state, actions)).numpy().copy()
        return Root(out[:, :A], out[:, A], out[:, A + 1 :], mask)

    def recurrent(self, embedding: Embeddings, action: np.ndarray) -> Recurrent:
        """Legal is what the network thinks more likely than not; if nothing is, the likeliest."""
        embedding, A, H = np.asarray(embedding), self.policy.n_actions, self.policy.hidden
        out = self._recurrent(self.policy.theta, *to_tensors(embedding, action.astype(np.int32))).numpy().copy()
        logits, legal, value, reward, end, latent = np.split(out, np.cumsum([A, A, 1, 1, 1]), axis=1)
        mask = (legal > 0) | (legal == legal.max(1, keepdims=True))
        following = np.concatenate([latent, embedding[:, H:]], axis=1)
        return Recurrent(reward[:, 0], self.config.gamma * (end[:, 0] < 0), logits, value[:, 0], mask, following)

    def _initial_fn(self, theta: Tensor, state: Tensor, actions: Tensor | None = None) -> Tensor:
        """[B, A + 1 + H + A K]: what `initial` returns, side by side."""
        net = self.policy.bind(theta)
        latent, keys = net.represent(state).contiguous(), net.keys(state, actions).contiguous()
        found = net.predict(latent, keys)
        value = self._mean(found.value).unsqueeze(1)
        return found.logits.cat(value, latent, keys.reshape(state.shape[0], -1), dim=1).contiguous()

    def _recurrent_fn(self, theta: Tensor, embedding: Tensor, action: Tensor) -> Tensor:
        """[B, A + A + 3 + H]: logits, legality, value, reward, end, and the next latent state."""
        net = self.policy.bind(theta)
        keys = embedding[:, net.hidden :].reshape(-1, net.n_actions, KEY)
        latent, reward, end = net.dynamics(embedding[:, : net.hidden], keys, action)
        found = net.predict(latent, keys)
        numbers = (x.unsqueeze(1) for x in (self._mean(found.value), reward, end))
        return found.logits.cat(found.legal, *numbers, latent, dim=1).contiguous()

    def _mean(self, value: Tensor) -> Tensor:
        """Of the distribution over bins: logits [..., bins] -> [...]."""
        c = self.config
        return (value.softmax(-1) * Tensor.arange(c.bins)).sum(-1) * ((c.high - c.low) / (c.bins - 1)) + c.low

    # *** acting ***

    def initial_hidden(self, n: int) -> np.ndarray:
        return np.zeros((n, 0), np.float32)

    def plan(self, observation: Observation, temperature: float = 1.0, explore: float = 0.0) -> SearchResult:
        """A search from each row, whose prior is (1 - explore) pi + explore / legal actions. The Gumbel noise is scaled
        by `temperature`, which at 0 leaves none."""
        c, noise = self.config, None
        if temperature:
            noise = temperature * self.rng.gumbel(size=observation.mask.shape)
        root = self.initial(observation)
        if explore:
            logits = np.where(root.mask, root.prior_logits, ILLEGAL).astype(np.float64)
            prior = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
            root = root._replace(prior_logits=np.log((1 - explore) * prior + explore / root.mask.sum(1, keepdims=True)))
        return search(root, self.recurrent, c.simulations, noise, c.considered, c.backup, c.spread)

    def act(self, observation: Observation, hidden: np.ndarray, reset: np.ndarray, temperature: float = 1.0) -> Action:
        """Acts by a search, which explores unless `temperature` is 0. The distribution of its actions is not known;
        `log_prob` is that of the improved policy, near to it."""
        c = self.config
        found = self.plan(observation, temperature, self.annealed(c.explore, c.explore_end) if temperature else 0.0)
        probability = np.take_along_axis(found.policy_target, found.action[:, None], 1)[:, 0]
        log_prob = np.log(probability.clip(np.finfo(np.float32).tiny)).astype(np.float32)
        return Action(found.action, log_prob, found.value.astype(np.float32), hidden)

    def evaluate(
        self, observation: Observation, hidden: np.ndarray, reset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Without a search: log-probabilities of the prior [B, A] (illegal: ILLEGAL), values [B]; and `hidden`."""
        root = self.initial(observation)
        logits = np.where(root.mask, root.prior_logits, ILLEGAL)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), root.value, hidden

    # *** learning ***

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Adds a rollout to the replay, searches again from all states of some sequences, and takes gradient steps on
        windows of them. Returns METRICS averaged over the steps, and of the searches `gain`, mean of the value found
        less the network's own, and `target_kl`, KL(improved policy, prior)."""
        c = self.config
        check_rollout(rollout, c)
        self.replay.add(rollout)
        sample = self._sample()
        sample, searched = self.reanalyse(sample)
        lr, batches = self.lr, (to_tensors(*self.windows(sample)) for _ in range(c.gradient_steps))
        table = self.trained.table([self.trained.step(lr, [], batch) for batch in batches])
        self.updates += 1
        own = {"lr": lr, "replay": float(len(self.replay))}
        return self.trained.means(table) | searched | own

    def _sample(self) -> dict[str, np.ndarray]:
        """Sequences of the replay by field, [T, B, ...]."""
        shapes, rows = self.replay.shapes, self.replay.sample(self.rng, self.config.batch)
        parts = np.split(rows, np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1], axis=1)
        columns = zip(shapes.items(), parts, strict=True)
        fields = {name: np.moveaxis(part.reshape(-1, *shape), 1, 0) for (name, shape), part in columns}
        kinds = {"mask": bool, "action": np.int32, "terminated": bool, "ended": bool}
        return fields | {name: fields[name].astype(kind) for name, kind in kinds.items()}

    def reanalyse(self, sample: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The sample with `policy` [T, B, A] and `value` [T, B] to learn, from a search at each of its states by the
        present network (Schrittwieser et al. 2021); and metrics of these searches."""
        c, (T, B) = self.config, sample["action"].shape
        flat = {name: x.reshape(T * B, *x.shape[2:]) for name, x in sample.items()}
        found = self.plan(Observation(flat["state"], flat["mask"], flat.get("actions")))
        value = found.value.reshape(T, B)
        target = value_targets(sample["reward"], sample["terminated"], sample["ended"], value, c.gamma, c.lam)
        policy = found.policy_target.astype(np.float32).reshape(T, B, -1)
        root = found.tree.log_prior[:, 0]
        ratio = np.log(found.policy_target.clip(1e-12)) - root
        kl = np.where(flat["mask"], found.policy_target * ratio, 0).sum(1).mean()
        metrics = {"gain": float((found.value - found.tree.raw[:, 0]).mean()), "target_kl": float(kl)}
        return sample | {"policy": policy, "value": target}, metrics

    def windows(self, sample: dict[str, np.ndarray]) -> list[np.ndarray | None]:
        """Batch's fields, of windows that begin at a random step of each sequence."""
        K, (T, B) = self.config.unroll, sample["action"].shape
        rows, at = np.arange(B), self.rng.integers(T, size=B) + np.arange(K + 1)[:, None]  # [K+1, B]
        inside, at = at < T, np.minimum(at, T - 1)
        window = {name: x[at, rows] for name, x in sample.items()}
        here = inside.copy()
        for k in range(K):
            here[k + 1] &= here[k] & ~window["ended"][k]
        going = here[:-1]  # the step out of a state is known wherever the state is
        states = [window[name] for name in ("state", "mask", "policy", "value")] + [here.astype(np.float32)]
        steps = [window["action"][:-1], window["reward"][:-1], window["terminated"][:-1].astype(np.float32)]
        features = window["actions"][0] if "actions" in window else None
        return [*states, *steps, going.astype(np.float32), features]

    def _loss(self, net: MuZeroNet, coefs: Tensor, *batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        b = Batch(*batch)
        K, B, D = b.state[1:].shape
        seen = net.represent(b.state[1:].reshape(K * B, D)).reshape(K, B, -1)
        return muzero_loss(net.unroll(b.state[0], b.action, b.actions), seen, b, self.config)

    # *** resuming ***

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As NetworkAgent's, with the replay where the configuration says so."""
        tensors, meta = super().state()
        if self.config.save_replay:
            tensors["replay"] = self.replay.deflated()
        return tensors, meta | {"replay_added": self.replay.added if self.config.save_replay else 0}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The opposite of `state`. Raises CheckpointError where a shape differs; nothing is changed then."""
        added = int(meta["replay_added"])
        replay = self.replay.inflated(tensors.get("replay", np.zeros(0, np.uint8)), added)
        super().load_state(tensors, meta)
        self.replay.load(replay, added)
