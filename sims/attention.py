"""The transformer's network and its training step, as functions of tensors that keep nothing between calls (so their
captured JITs can be pickled). The members of the ensemble are the leading axis of every array.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor

from agents.parameters import slots
from sims.mlp import LossShape, loss_terms

NEVER = -1e9  # finite: an infinity would turn 0 * inf into NaN
OUTPUTS = 16  # width of the head; two are used, the rest keeps the matmul's axes divisible


class NetShape(NamedTuple):
    """The constants of the network; they are frozen into a captured JIT."""

    members: int  # M
    width: int  # D
    layers: int
    heads: int  # H
    tokens: int  # C
    token: int  # W
    steps: int  # L; T = L + 1 prefixes
    action: int  # F
    state: int  # S


class Batch(NamedTuple):
    """R paths of each of G kernels. A leading axis 1 in place of M: the same for all members."""

    context: Tensor  # [M, G, C, W]
    present: Tensor  # [M, G, C] float, 1 where there is a token
    actions: Tensor  # [M, G * R, L, F]
    states: Tensor  # [M, G * R, T, S]
    known: Tensor  # [M, G * R] int: summaries of prefixes beyond this one are withheld


def parameter_shapes(net: NetShape) -> dict[str, tuple[int, ...]]:
    D = net.width
    shapes: dict[str, tuple[int, ...]] = {
        "token": (net.token, D), "token.place": (net.tokens, D), "action": (net.action, D), "state": (net.state, D),
        "path.place": (net.steps + 1, D), "withheld": (1, D), "head": (D, OUTPUTS), "head.bias": (1, OUTPUTS),
    }  # fmt: skip
    for layer in range(net.layers):
        for name, shape in {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 2 * D), "down": (2 * D, D)}.items():
            shapes[f"{name}{layer}"] = shape
    return shapes


def initial(net: NetShape, rng: np.random.Generator) -> np.ndarray:
    """theta [M, P] float32: variance 1 / fan_in; what writes to the residual stream is scaled by 1 / sqrt(2 layers)
    (GPT-2; Radford et al. 2019), the head by 0.1, places by 0.1."""
    shapes = parameter_shapes(net)
    places, P = slots(shapes)
    theta = np.zeros((net.members, P), np.float32)
    for name, shape in shapes.items():
        scale = 1.0 / math.sqrt(shape[0])
        if name.startswith(("out", "down")):
            scale /= math.sqrt(2 * net.layers)
        if name.endswith(("place", "withheld", "head")):
            scale = 0.1 / (math.sqrt(shape[0]) if name == "head" else 1.0)
        if name != "head.bias":
            start, end = places[name]
            theta[:, start:end] = scale * rng.standard_normal((net.members, end - start))
    return theta


def forward(p: dict[str, Tensor], batch: Batch, net: NetShape) -> Tensor:
    """[M, G * R, T, 2]: log2 time of every prefix relative to its kernel, and the best within its reach.

    Context tokens see each other; a path's tokens see the context and what came before them in the path (a prefix
    language model). Pre-norm, RMSNorm without gains (Zhang & Sennrich 2019), ReLU. Token t holds the action that led to
    prefix t, and the prefix's summary unless it is withheld.
    """
    G, B = int(batch.context.shape[1]), int(batch.actions.shape[1])
    M, D, C, T = net.members, net.width, net.tokens, net.steps + 1
    context = _matmul(batch.context.reshape(-1, G * C, net.token), p["token"]).reshape(M, G, C, D)
    context = (context + p["token.place"].reshape(M, 1, C, D)).contiguous()
    before = batch.actions.pad((None, None, (1, 0), None)).contiguous()  # the root's token has no action
    shown = (Tensor.arange(T).reshape(1, 1, T, 1) <= batch.known.reshape(-1, B, 1, 1)).float()
    seen = (batch.states * shown).contiguous().reshape(-1, B * T, net.state)
    path = _matmul(before.reshape(-1, B * T, net.action), p["action"]) + _matmul(seen, p["state"])
    path = path.reshape(M, B, T, D) + p["path.place"].reshape(M, 1, T, D)
    path = (path + (1 - shown) * p["withheld"].reshape(M, 1, 1, D)).contiguous().contiguous_backward()
    absent = ((1 - batch.present) * NEVER).reshape(-1, G, 1, 1, C)
    for layer in range(net.layers):
        weights = [p[f"{name}{layer}"] for name in ("qkv", "out", "up", "down")]
        context, path = _block(context, path, absent, weights, net, last=layer == net.layers - 1)
    out = _matmul(_norm(path).reshape(M, B * T, D), p["head"]) + p["head.bias"]
    relative, gain = out[..., 0], out[..., 1]
    return relative.stack(relative.detach() - gain.softplus(), dim=-1).reshape(M, B, T, 2).contiguous()


def _block(
    context: Tensor, path: Tensor, absent: Tensor, weights: list[Tensor], net: NetShape, last: bool
) -> tuple[Tensor, Tensor]:
    """One layer: attention, then a two-layer net, each added to the stream. context [M, G, C, D], path [M, B, T, D]."""
    M, D, C, T, H = net.members, net.width, net.tokens, net.steps + 1, net.heads
    G, B = int(context.shape[1]), int(path.shape[1])
    R, dh = B // G, D // H
    qkv, out, up, down = weights

    def heads(x: Tensor, n: int) -> list[Tensor]:
        """Queries, keys and values, each [M, G, H, n, dh]."""
        joined = _matmul(_norm(x).reshape(M, G * n, D), qkv).reshape(M, G, n, 3, H, dh)
        joined = joined.permute(3, 0, 1, 4, 2, 5).contiguous()
        return [joined[i] for i in range(3)]

    def feed(x: Tensor, attended: Tensor, n: int) -> Tensor:
        """attended [M, G, H, n, dh]."""
        joined = attended.permute(0, 1, 3, 2, 4).contiguous().reshape(M, G * n, D)
        x = (x.reshape(M, G * n, D) + _matmul(joined, out)).contiguous().contiguous_backward()
        inner = _matmul(_norm(x), up).relu().contiguous().contiguous_backward()
        return (x + _matmul(inner, down)).contiguous().contiguous_backward()

    qc, kc, vc = heads(context, C)
    q, k, v = heads(path, R * T)
    scale = 1.0 / math.sqrt(dh)
    if not last:
        attention = (qc @ kc.transpose(3, 4) * scale + absent).softmax(-1).contiguous()
        context = feed(context, attention @ vc, C).reshape(M, G, C, D)
    qs, ks, vs = (x.reshape(M, G, H, R, T, dh) for x in (q, k, v))
    later = Tensor.ones(T, T).triu(1) * NEVER
    to_context = (q @ kc.transpose(3, 4)).contiguous() * scale + absent  # [M, G, H, R * T, C]
    to_path = (qs @ ks.transpose(4, 5)).contiguous() * scale + later  # [M, G, H, R, T, T]
    scores = to_context.reshape(M, G, H, R, T, C).cat(to_path, dim=-1).contiguous()
    attention = scores.softmax(-1).contiguous().contiguous_backward()
    from_context = attention[..., :C].reshape(M, G, H, R * T, C).contiguous() @ vc
    from_path = attention[..., C:].contiguous() @ vs
    attended = from_context + from_path.reshape(M, G, H, R * T, dh)
    return context, feed(path, attended, R * T).reshape(M, B, T, D)


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    """[M or 1, N, I] @ [M, I, O]; realized by itself, and so is its gradient (see `mlp.forward`)."""
    return (x @ w).contiguous().contiguous_backward()


def _norm(x: Tensor) -> Tensor:
    return (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).contiguous().contiguous_backward()


def losses(out: Tensor, labels: Tensor, shape: LossShape) -> tuple[Tensor, Tensor, Tensor]:
    """Value, rank and reach loss of each member, each [M].

    out [M, B, T, 2]; labels [M, B, 2 + 2 T]: the prefix whose time is known, that time, what is within reach of every
    prefix, and 1 where that is known.
    Value and rank as in `mlp.loss_terms`. Reach: mean Huber of its error, less the part 1 - anchor of the kernel's level
    (the mean error of its times): it stands on the scale of the times.
    """
    M, B, T, _ = out.shape
    end, target, reach, has = labels[..., 0].int(), labels[..., 1], labels[..., 2 : 2 + T], labels[..., 2 + T :]
    here = (Tensor.arange(T).reshape(1, 1, T) == end.unsqueeze(2)).float()
    predicted = (out[..., 0] * here).sum(2).contiguous().contiguous_backward()
    value, rank = loss_terms(predicted, target, shape)
    error = (predicted - target).reshape(M, shape.kernels, shape.rows)
    level = ((1.0 - shape.anchor) * error.mean(2, keepdim=True)).expand(*error.shape).reshape(M, B, 1).detach()
    off = (out[..., 1] - reach - level) * has
    small = off.abs().minimum(shape.huber)
    return value, rank, (small * (off.abs() - 0.5 * small)).sum((1, 2)) / has.sum((1, 2)).maximum(1.0)
