"""Returns and advantages, in numpy. Arrays are [T, B] (or [T]); t runs forward in time.

Two flags, never one: `terminated` (the task is over: nothing follows, do not bootstrap) and `ended` =
terminated | truncated (another episode follows: let no credit flow back over it)."""

from __future__ import annotations

import numpy as np


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    last_value: np.ndarray,
    gamma: float,
    lam: float,
    bootstrap: np.ndarray | None = None,
) -> np.ndarray:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), [T, B] float32; the value target is A
    + values.

        A_t = d_t + gamma lam (1 - ended_t) A_{t+1},   d_t = r_t + gamma V'_t - V_t
        V'_t = 0 if terminated_t;  bootstrap_t if truncated_t;  else V_{t+1}, with V_T = last_value [B]

    bootstrap_t [T, B] is the value of the observation in which an episode was cut; needed only where one was.
    """
    truncated = ended & ~terminated
    following = np.concatenate([values[1:], last_value[None]]).astype(np.float64)
    if bootstrap is not None:
        following = np.where(truncated, bootstrap, following)
    elif truncated.any():
        raise ValueError("a truncated episode needs the value of its final observation: pass bootstrap")
    delta = rewards + gamma * np.where(terminated, 0.0, following) - values
    advantages, trace = np.zeros_like(delta), np.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        trace = delta[t] + gamma * lam * ~ended[t] * trace
        advantages[t] = trace
    return advantages.astype(np.float32)


def lambda_returns(rewards: np.ndarray, discounts: np.ndarray, next_values: np.ndarray, lam: float) -> np.ndarray:
    """G_t = r_t + d_t ((1 - lam) v_{t+1} + lam G_{t+1}), with G_T = v_T (Sutton and Barto 2018, eq. 12.18
    made recursive).

    All [T] or [T, B]; next_values[t] is v_{t+1}; discounts[t] is 0 after a termination.
    """
    returns = np.zeros_like(np.asarray(rewards), dtype=np.float64)
    following = np.asarray(next_values[-1], dtype=np.float64)
    for t in reversed(range(len(returns))):
        following = rewards[t] + discounts[t] * ((1 - lam) * next_values[t] + lam * following)
        returns[t] = following
    return returns.astype(np.float32)


def explained_variance(predictions: np.ndarray, targets: np.ndarray) -> float:
    """1 - Var(target - prediction) / Var(target): 1 is perfect, 0 is no better than a constant; 0 also for
    constant targets."""
    variance = float(np.var(targets))
    return 0.0 if variance < 1e-12 else 1.0 - float(np.var(targets - predictions)) / variance


def known_steps(terminated: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """1 for the steps [T, B] whose target is known from the sequence: those that terminated, and those followed by a
    step of the same episode. A truncated step and the sequence's last have a successor that was not stored: 0."""
    known = ~ended
    known[-1] = False
    return (known | terminated).astype(np.float32)
