"""The values and the loss of DQN a second time, in float64 numpy, one step of one sequence after another."""

import numpy as np


def reference_q(scores, value, mask):
    q = np.full(scores.shape, np.nan)
    for where in np.ndindex(value.shape):
        legal = np.flatnonzero(mask[where])
        for a in legal:
            q[where][a] = value[where] + scores[where][a] - np.mean([scores[where][b] for b in legal])
    return q


def reference_loss(q, target_q, mask, action, reward, terminated, ended, gamma, double=True):
    """The loss, and for each step its error y - Q(s, a), NaN where the target cannot be known."""
    T, B = action.shape
    errors, losses = np.full((T, B), np.nan), []
    for t in range(T):
        for b in range(B):
            if terminated[t, b]:
                y = reward[t, b]
            elif ended[t, b] or t + 1 == T:
                continue
            else:
                legal = np.flatnonzero(mask[t + 1, b])
                judge = q if double else target_q
                best = legal[np.argmax([judge[t + 1, b, a] for a in legal])]
                y = reward[t, b] + gamma * target_q[t + 1, b, best]
            d = errors[t, b] = y - q[t, b, action[t, b]]
            losses.append(d * d / 2 if abs(d) <= 1 else abs(d) - 0.5)
    return np.mean(losses), errors
