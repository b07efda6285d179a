import numpy as np
import pytest

from agents.returns import explained_variance, gae, lambda_returns

T, B, GAMMA = 12, 3, 0.97


def experience(seed=0):
    rng = np.random.default_rng(seed)
    terminated, truncated = rng.random((T, B)) < 0.2, rng.random((T, B)) < 0.2
    truncated &= ~terminated
    draw = rng.standard_normal
    return draw((T, B)), draw((T, B)), terminated, terminated | truncated, draw(B), draw((T, B))


def naive(rewards, values, terminated, ended, last, gamma, lam, bootstrap):
    """The definition: sum over k of (gamma lam)^k times the k-th next TD error, up to the episode's end."""
    result = np.zeros((T, B))
    for b in range(B):
        for t in range(T):
            for k in range(t, T):
                follows = last[b] if k == T - 1 else values[k + 1, b]
                if terminated[k, b]:
                    follows = 0.0
                elif ended[k, b]:
                    follows = bootstrap[k, b]
                result[t, b] += (gamma * lam) ** (k - t) * (rewards[k, b] + gamma * follows - values[k, b])
                if ended[k, b]:
                    break
    return result


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae_equals_its_definition(lam):
    r, v, terminated, ended, last, bootstrap = experience()
    assert ended.sum() > 2 * B and terminated.any() and (ended & ~terminated).any()
    got = gae(r, v, terminated, ended, last, GAMMA, lam, bootstrap)
    assert np.abs(got - naive(r, v, terminated, ended, last, GAMMA, lam, bootstrap)).max() < 1e-5


def test_gae_at_lambda_1_is_lambda_return_minus_value():
    r, v, terminated, _, last, _ = experience(1)
    returns = lambda_returns(r, GAMMA * ~terminated, np.concatenate([v[1:], last[None]]), 1.0)
    assert np.abs(gae(r, v, terminated, terminated, last, GAMMA, 1.0) - (returns - v)).max() < 1e-5


def test_a_truncation_without_its_final_value_is_refused():
    r, v, terminated, ended, last, _ = experience()
    with pytest.raises(ValueError, match="bootstrap"):
        gae(r, v, terminated, ended, last, GAMMA, 0.9)


def test_lambda_returns_literal():
    got = lambda_returns(
        np.array([1.0, 0, -1, 0, 1]), np.array([0.5, 0.9, 1, 0.5, 0.8]), np.array([3.0, 1, 5, -5, 3]), 0.75
    )
    assert np.allclose(got, [1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], atol=1e-6)


def test_explained_variance():
    target = np.array([1.0, 2, 3, 4])
    assert explained_variance(target, target) == 1.0
    assert abs(explained_variance(np.full(4, 7.0), target)) < 1e-12
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert explained_variance(target, np.ones(4)) == 0.0
