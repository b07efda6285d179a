"""All parameters of a member as one row of `theta` [M, P]: Adam is then a few kernels in place of dozens."""

from __future__ import annotations

from tinygrad import Tensor

from agents.parameters import ALIGN, Shapes, slots
from sims.mlp import BETA1, BETA2, EPSILON


def bind(theta: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Name -> a view of theta [M, *shape]."""
    return {n: theta[:, a:b].reshape(theta.shape[0], *shapes[n]) for n, (a, b) in slots(shapes)[0].items()}


def gradient_of(loss: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """d loss / d theta [M, P]; each part realized by itself (see `agents.parameters.Parameters.gradient`)."""
    flat = [g.contiguous().reshape(g.shape[0], -1) for g in loss.gradient(*parameters.values())]
    return Tensor.cat(*[part.pad((None, (0, -part.shape[1] % ALIGN))) for part in flat], dim=1).contiguous()


def adam(theta: Tensor, m: Tensor, v: Tensor, gradient: Tensor, hyper: Tensor) -> list[Tensor]:
    """AdamW (Loshchilov & Hutter 2019) of all members, as assignments yet to be realized. All [M, P].

    hyper [4] = learning rate, weight decay, 1 / (1 - beta1^t), 1 / (1 - beta2^t). The norm of each member's gradient is
    clipped to 1.
    """
    g = gradient * (1.0 / (gradient.square().sum(1, keepdim=True).sqrt() + 1e-6)).minimum(1.0)
    m_new, v_new = (BETA1 * m + (1 - BETA1) * g).contiguous(), (BETA2 * v + (1 - BETA2) * g * g).contiguous()
    rate, decay, unbias1, unbias2 = (hyper[i : i + 1] for i in range(4))
    move = m_new * unbias1 / ((v_new * unbias2).sqrt() + EPSILON) + decay * theta
    return [theta.assign(theta - rate * move), m.assign(m_new), v.assign(v_new)]
