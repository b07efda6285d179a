"""Losses over [T, B] tensors: pure functions, each with its equation."""

from __future__ import annotations

from typing import NamedTuple

from tinygrad import Tensor

from agents.networks import entropy

METRICS = ("policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "ratio", "ratio_error")


class Batch(NamedTuple):
    """What one update step learns from: whole sequences of some environments."""

    hidden: Tensor  # [B, 2H], before the first step
    state: Tensor  # [T, B, D]
    mask: Tensor  # [T, B, A] bool
    reset: Tensor  # [T, B], 1 where an episode begins
    action: Tensor  # [T, B] int32
    log_prob: Tensor  # [T, B], of the action when it was taken
    advantage: Tensor  # [T, B]
    target: Tensor  # [T, B], for the value
    actions: Tensor | None = None  # [T, B, A, F]


def taken(x: Tensor, action: Tensor) -> Tensor:
    """x [..., A] of the action [...] that was taken."""
    return (action.unsqueeze(-1) == Tensor.arange(x.shape[-1])).where(x, 0.0).sum(-1)


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight x over sum of weight; 0 where all weights are."""
    return (weight * x).sum() / weight.sum().maximum(1e-8)


def ppo_loss(
    log_probs: Tensor, value: Tensor, batch: Batch, entropy_coef: Tensor, clip: float, value_coef: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scalar to minimise, and METRICS (Schulman et al. 2017, eqs. 7 and 9).

        r = exp(log pi(a) - log pi_old(a))
        L = -mean min(r A, clip(r, 1 - e, 1 + e) A) + c_v mean (V - G)^2 / 2 - c_e mean H
        KL(old, new) ~ mean (r - 1 - log r)       (Schulman 2020, "Approximating KL divergence", k3)

    log_probs [T, B, A] over legal actions, value [T, B], entropy_coef [1].
    """
    log_ratio = taken(log_probs, batch.action) - batch.log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clip(1 - clip, 1 + clip)
    policy_loss = -(ratio * batch.advantage).minimum(clipped * batch.advantage).mean()
    value_loss = 0.5 * (value - batch.target).square().mean()
    mean_entropy = entropy(log_probs, batch.mask).mean()
    kl, deviation = (ratio - 1 - log_ratio).mean(), (ratio - 1).abs()
    loss = policy_loss + value_coef * value_loss - entropy_coef.sum() * mean_entropy
    metrics = policy_loss, value_loss, mean_entropy, kl, (deviation > clip).mean(), ratio.mean(), deviation.max()
    return loss, metrics
