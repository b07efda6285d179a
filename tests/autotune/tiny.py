"""Small real kernels for the tests of the tuner, and a few ways to bend their schedules."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tinygrad import Tensor, Variable

from autotune.compiler import Ops, Opt, OptOps, UOp, canonical, renderer_of
from autotune.kernel import Kernel, kernel_from_json, kernel_to_json

U2, U4 = Opt(OptOps.UPCAST, 0, 2), Opt(OptOps.UPCAST, 0, 4)


def raw_kernels(*tensors: Tensor) -> list[UOp]:
    """The kernels of unrealized tensors as tinygrad's scheduler leaves them; nothing is run."""
    linear, _ = tensors[0].linear_with_vars(*tensors[1:])
    return [call.src[0] for call in linear.src if call.src[0].op is Ops.SINK]


def kernels_of(*tensors: Tensor, device: str = "CPU") -> list[Kernel]:
    return [Kernel.from_ast(canonical(raw, renderer_of(device))) for raw in raw_kernels(*tensors)]


def kernel_of(tensor: Tensor, device: str = "CPU") -> Kernel:
    (kernel,) = kernels_of(tensor, device=device)
    return kernel


def add_one(size: int = 300) -> Kernel:
    return kernel_of(Tensor.empty(size) + 1)


def total(size: int) -> Kernel:
    return kernel_of(Tensor.empty(size).sum())


def symbolic() -> Kernel:
    """Sums over the first n of 64 rows; n is known only when it runs."""
    return kernel_of(Tensor.empty(64, 32)[: Variable("n", 1, 64).bind(33)].sum(0))


def in_place() -> Kernel:
    x = Tensor.empty(300).realize()
    return kernel_of(x.assign(x * 2 + 1))


def slots(kernel: Kernel, swapped: dict[int, int]) -> Kernel:
    """The same kernel with its buffers numbered otherwise."""
    data = kernel_to_json(kernel)
    nodes = []
    for node in kernel.ast.toposort():
        sources = tuple(nodes[i] for i in data["nodes"][len(nodes)][2])
        arg = node.arg
        if node.op is Ops.PARAM:
            arg = type(arg)(**{**vars_of(arg), "slot": swapped.get(arg.slot, arg.slot)})
        nodes.append(UOp(node.op, node.dtype, sources, arg))
    return Kernel.from_ast(nodes[-1])


def vars_of(arg: object) -> dict:
    return {name: getattr(arg, name) for name in arg.__dataclass_fields__}  # type: ignore[attr-defined]


def reread(kernel: Kernel) -> Kernel:
    """A kernel through its stored text."""
    return kernel_from_json(json.loads(json.dumps(kernel_to_json(kernel))))


def by_op(actions: Iterable[Opt | None], op: OptOps) -> list[Opt]:
    return [a for a in actions if a is not None and a.op is op]
