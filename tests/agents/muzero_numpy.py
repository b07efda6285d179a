"""MuZero's loss and model a second time, in float64 numpy, one row after another."""

import numpy as np

from agents.muzero import METRICS


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def keys_of(p, features):
    return np.tanh(p["action.table"] + features @ p["action.row"])


def represent(p, state):
    return np.tanh(
        np.tanh(state @ p["encoder1.weight"] + p["encoder1.bias"]) @ p["encoder2.weight"] + p["encoder2.bias"]
    )


def dynamics(p, latent, keys, a):
    h = np.tanh(np.concatenate([latent, keys[a]]) @ p["dynamics1.weight"] + p["dynamics1.bias"])
    reward, end = h @ p["outcome.weight"] + p["outcome.bias"]
    following = np.tanh(latent + h @ p["dynamics2.weight"] + p["dynamics2.bias"])
    worth = latent @ p["reward.weight"][:, a] + p["reward.bias"][a] + latent @ p["reward.query"] @ keys[a]
    return following, (reward + worth, end)


def predict(p, latent, keys):
    logits = latent @ p["policy.weight"] + p["policy.bias"] + keys @ (latent @ p["policy.query"])
    return logits, latent @ p["value.weight"] + p["value.bias"], latent @ p["legal.weight"] + p["legal.bias"]


def reference_loss(p, b, c):
    """METRICS by name; b: Batch of numpy arrays."""
    sums, counts = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0)
    support, guesses, seen = np.linspace(c.low, c.high, c.bins), [], []

    def note(name, loss):
        sums[f"{name}_loss"] += loss
        counts[f"{name}_loss"] += 1

    bce = lambda x, y: -(y * np.log(1 / (1 + np.exp(-x))) + (1 - y) * np.log(1 - 1 / (1 + np.exp(-x))))  # noqa: E731
    for row in range(b.state.shape[1]):
        latent, keys = represent(p, b.state[0, row]), keys_of(p, b.actions[row])
        for k in range(len(b.state)):
            if not b.here[k, row]:
                break
            mask = b.mask[k, row]
            logits, value, legal = predict(p, latent, keys)
            note("policy", -(b.policy[k, row][mask] * np.log(softmax(logits[mask]))).sum())
            x = np.clip(b.value[k, row], c.low, c.high)
            above = min(int(np.searchsorted(support, x, "right")), c.bins - 1)
            share = (x - support[above - 1]) / (support[above] - support[above - 1])
            log_values = np.log(softmax(value))
            note("value", -((1 - share) * log_values[above - 1] + share * log_values[above]))
            note("legal", np.mean([bce(legal[a], float(mask[a])) for a in range(len(mask))]))
            if k:
                guesses.append(latent @ p["consistency.weight"] + p["consistency.bias"])
                seen.append(represent(p, b.state[k, row]))
            if k < len(b.action):
                latent, outcome = dynamics(p, latent, keys, b.action[k, row])
                note("reward", (outcome[0] - b.reward[k, row]) ** 2)
                note("end", bce(outcome[1], b.terminated[k, row]))
    for guess, real in zip(guesses - np.mean(guesses, 0), seen - np.mean(seen, 0), strict=True):
        note("consistency", -guess @ real / np.sqrt(guess @ guess * (real @ real)))
    return {name: sums[name] / counts[name] for name in METRICS}


def total(parts, c):
    coefs = {"value": c.value_coef, "reward": c.reward_coef, "end": c.reward_coef, "legal": c.legal_coef,
             "consistency": c.consistency_coef, "policy": 1.0}  # fmt: skip
    return sum(coef * parts[f"{name}_loss"] for name, coef in coefs.items())
