import itertools
import math

import numpy as np
import pytest
from tinygrad import Tensor

from agents import networks
from agents.networks import LSTMPolicy, entropy, log_softmax, orthogonal
from agents.parameters import ALIGN

T, B, D, A, F, H = 4, 2, 3, 4, 2, 8


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((T, B, A)) < 0.6
    mask[..., 1] = True
    reset = np.zeros((T, B), np.float32)
    reset[0], reset[2, 0] = 1, 1
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(T, B, D), mask, draw(T, B, A, F), draw(B, 2 * H), reset


def run(function, *arrays):
    """Logits, values and hidden state in numpy, realized together: one by one they would be computed three times."""
    out = function(*(Tensor(x) for x in arrays))
    Tensor.realize(*out)
    return [x.numpy() for x in out]


@pytest.fixture(scope="module")
def policy():
    return LSTMPolicy(D, A, F, H)


@pytest.fixture(scope="module")
def unrolled(policy):
    return run(policy.unroll, *inputs())


def test_the_whole_network_equals_a_second_implementation(policy, unrolled, reference):
    (logits, values, hidden), mask = unrolled, inputs()[1]
    expected, expected_values, expected_hidden = reference.forward(policy.unflatten(policy.theta.numpy()), *inputs())
    got = log_softmax(Tensor(logits)).numpy()
    assert np.abs(got - expected)[mask].max() < 1e-5 and got[~mask].max() < -1e8
    assert np.abs(values - expected_values).max() < 1e-5 and np.abs(hidden - expected_hidden).max() < 1e-5


def test_unrolling_with_resets_equals_the_pieces_run_apart(policy, unrolled):
    state, mask, actions, hidden, reset = inputs()
    for t in range(T):
        hidden = np.where(reset[t][:, None] == 1, 0, hidden).astype(np.float32)  # wiped here, never by the network
        logits, value, hidden = run(policy.step, state[t], mask[t], actions[t], hidden, np.zeros(B, np.float32))
        assert np.abs(logits - unrolled[0][t]).max() < 1e-6 and np.abs(value - unrolled[1][t]).max() < 1e-6
    assert np.abs(hidden - unrolled[2]).max() < 1e-6


def test_without_memory_the_past_changes_nothing():
    control, (state, mask, actions, hidden, reset) = LSTMPolicy(D, A, F, H, memory=False), inputs()
    logits, _, after = run(control.unroll, state, mask, actions, hidden, reset)
    alone = run(control.unroll, state[3:], mask[3:], actions[3:], hidden * 0, reset[3:])
    assert np.abs(logits[3] - alone[0][0]).max() < 1e-6 and np.array_equal(after, hidden)
    assert not any("lstm" in name for name in control.shapes)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_k_legal_actions_with_equal_logits_have_entropy_log_k_and_the_others_no_gradient(k):
    mask = Tensor(np.arange(7) < k)
    logits = Tensor(np.full(7, 0.3, np.float32))
    log_probs = log_softmax(mask.where(logits, -1e9))
    assert math.exp(entropy(log_probs, mask).item()) == pytest.approx(k, rel=1e-5)
    uneven = log_softmax(mask.where(logits + Tensor.arange(7) * 0.1, -1e9))
    gradient = (entropy(uneven, mask) + uneven[0]).gradient(logits)[0].numpy()
    assert (gradient[k:] == 0).all() and (k == 1 or (gradient[:k] != 0).all())


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_squashing_is_exact_and_keeps_a_gradient_at_any_number(name):
    x = np.array([-200.0, -60.0, -9.0, -1.0, 0.0, 0.5, 9.0, 60.0, 200.0], np.float32)
    numbers = Tensor(x)
    y = getattr(networks, name)(numbers)
    with np.errstate(over="ignore"):
        exact = np.tanh(x) if name == "tanh" else 1 / (1 + np.exp(-x))
    slope = 1 - exact**2 if name == "tanh" else exact * (1 - exact)
    assert np.allclose(y.numpy(), exact, atol=2e-7)
    assert np.allclose(y.sum().gradient(numbers)[0].numpy(), slope, atol=1e-6)


@pytest.mark.parametrize("cell", [-60.0, 60.0])
def test_a_cell_state_of_a_long_episode_leaves_the_gradient_finite(cell):
    """Cells count up by at most 1 a step, so long episodes reach 60: there tinygrad's tanh gives a NaN for a gradient in here."""
    policy = LSTMPolicy(D, A, 0, H)
    state, mask, _, hidden, reset = inputs()
    hidden[:, H:], reset[:] = cell, 0
    out = policy.unroll(Tensor(state), Tensor(mask), None, Tensor(hidden), Tensor(reset))
    gradient = policy.gradient(out.value.square().mean()).numpy()
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_orthogonal_initialisation():
    rng = np.random.default_rng(0)
    tall, wide = orthogonal(rng, 6, 3, 2.0), orthogonal(rng, 3, 6, 1.0)
    assert np.allclose(tall.T @ tall, 4 * np.eye(3), atol=1e-5) and np.allclose(wide @ wide.T, np.eye(3), atol=1e-5)
    policy = LSTMPolicy(D, A, F, H)
    p = policy.unflatten(policy.theta.numpy())
    assert np.allclose(p["encoder2.weight"] @ p["encoder2.weight"].T, 2 * np.eye(H), atol=1e-5)
    assert np.abs(p["policy.weight"]).max() <= 0.01 and np.linalg.norm(p["value.weight"]) == pytest.approx(1, abs=1e-5)


def test_every_parameter_has_its_own_place():
    policy = LSTMPolicy(D, A, F, H)
    spans = sorted(policy.slots.values())
    assert all(start % ALIGN == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[0][0] == 0 and spans[-1][1] <= policy.theta.shape[0]
    arrays = {name: np.random.default_rng(1).standard_normal(shape) for name, shape in policy.shapes.items()}
    back = policy.unflatten(policy.flatten(arrays))
    assert all(np.array_equal(back[name], arrays[name].astype(np.float32)) for name in arrays)
    assert set(policy.parameters) == set(policy.shapes) and {"value.weight", "policy.weight"} <= set(policy.shapes)
