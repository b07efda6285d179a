"""A kernel: one tinygrad AST in the form in which schedules apply to it, its key, and a JSON codec for it.

The codec is strict: a whitelist of ops, every string checked, sizes limited. A file from a stranger can be opened, and
the kernels in it compiled, without running anything but what these ops mean. Never pickle, never eval.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autotune.compiler import (
    DTYPE_NAMES,
    DTYPES,
    AddrSpace,
    AxisType,
    DType,
    Invalid,
    KernelInfo,
    Ops,
    Opt,
    OptOps,
    ParamArg,
    UOp,
    dtypes,
    uop_identity,
)
from autotune.errors import CodecError
from autotune.strict import MAX_INT, shown

Schedule = tuple[Opt, ...]
VERSION = 1
MAX_NODES = 20_000
MAX_SIZE = 2**48  # of a loop, and of a buffer in elements
MAX_ITERATIONS = 2**512  # of all loops together; what is counted of them must fit a float
MAX_BOUND = 2**4096  # of an integer expression: a chain of products would double its digits with each node
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
UNARY = "EXP2 LOG2 SIN SQRT RECIPROCAL NEG TRUNC".split()
BINARY = "ADD MUL SHL SHR CDIV MAX CMOD CMPLT CMPNE CMPEQ XOR OR AND THREEFRY SUB FDIV POW FLOORDIV FLOORMOD".split()
TERNARY = "WHERE MULACC".split()
ARITHMETIC = (*UNARY, *BINARY, *TERNARY)
STRUCTURE = "SINK PARAM RANGE CONST INDEX LOAD STORE END REDUCE CAST BITCAST STACK AFTER GROUP NOOP STAGE".split()
ALLOWED = {name: getattr(Ops, name) for name in (*ARITHMETIC, *STRUCTURE)}
SOURCES = {"CONST": 0, "PARAM": 1, "RANGE": 1, "CAST": 1, "BITCAST": 1,
           **dict.fromkeys(UNARY, 1), **dict.fromkeys(BINARY, 2), **dict.fromkeys(TERNARY, 3)}  # fmt: skip
LEAST_SOURCES = {"STORE": 2, "SINK": 1, "INDEX": 1, "END": 1, "REDUCE": 1, "AFTER": 1, "STAGE": 1}


@dataclass(frozen=True)
class Kernel:
    """One distinct kernel. Equality and hashing go by `key`, which does not depend on process or machine."""

    ast: UOp = field(compare=False, repr=False)
    key: str
    name: str = field(default="", compare=False)  # e.g. "conv 64x3x3"; only for people
    family: str = field(default="", compare=False)  # the corpus's family: split unit

    @staticmethod
    def from_ast(ast: UOp, name: str = "", family: str = "") -> Kernel:
        """Make a kernel of a canonical AST (see `compiler.canonical`)."""
        ast = ast.replace(arg=KernelInfo(), tag=None)
        return Kernel(ast, uop_identity(ast)[:32], name or describe(ast), family)

    @functools.cached_property
    def signature(self) -> str:
        """Kinds and sizes of the loops with the arithmetic, strides left out: what two splits may not share."""
        axes = sorted((u.arg[-1].name, int(u.vmax) + 1) for u in self.ast.toposort() if u.op is Ops.RANGE)
        ops = sorted(u.op.name for u in self.ast.toposort() if u.op.name in ARITHMETIC or u.op is Ops.REDUCE)
        types = sorted(DTYPE_NAMES[u.dtype] for u in self.ast.toposort() if u.op is Ops.PARAM)
        return hashlib.sha256(json.dumps([axes, ops, types]).encode()).hexdigest()[:16]

    def rng(self, seed: int) -> np.random.Generator:
        """For whatever is drawn of this kernel: another kernel draws otherwise with the same seed."""
        return np.random.default_rng([seed, int(self.key[:8], 16)])

    @functools.cached_property
    def variables(self) -> dict[str, tuple[int, int]]:
        """Symbolic sizes by name, with their smallest and largest value."""
        return {v.expr: (int(v.vmin), int(v.vmax)) for v in self.ast.variables()}

    @functools.cached_property
    def work(self) -> tuple[float, float]:
        """(arithmetic operations, bytes of all its buffers), symbolic sizes at their largest."""
        nodes = self.ast.toposort()
        size = float(sum(u.max_numel() * u.dtype.itemsize for u in nodes if u.op is Ops.PARAM and u.arg.slot >= 0))
        return _operations(self.ast), size

    @functools.cached_property
    def operations(self) -> float:
        """Arithmetic operations of a launch as it is timed: symbolic sizes at their middle value."""
        return _operations(self.ast.substitute({v: v.const_like((v.vmin + v.vmax) // 2) for v in self.ast.variables()}))

    @functools.cached_property
    def iterations(self) -> float:
        """Product of the sizes of all its loops."""
        return float(math.prod(int(u.vmax) + 1 for u in self.ast.toposort() if u.op is Ops.RANGE))

    @functools.cached_property
    def weights(self) -> tuple[float, float]:
        """About how many operations become of one element after lowering, on this release: (inside a reduce, outside).

        What stands inside is repeated by UPCAST and UNROLL, what stands outside by UPCAST alone.
        """
        inside = outside = 0.0
        for u in self.ast.toposort():
            if u.op.name in ARITHMETIC or u.op is Ops.REDUCE:
                weight = LOWERED.get(u.op.name, 0.6)
                nested = u.op is Ops.REDUCE or any(r.arg[-1] is AxisType.REDUCE for r in u.ranges)
                inside, outside = (inside + weight, outside) if nested else (inside, outside + weight)
        return inside, outside

    def lowered(self, upcast: int, unroll: int) -> float:
        """Expected number of operations after lowering, for products of UPCAST and UNROLL sizes."""
        inside, outside = self.weights
        return upcast * (unroll * inside + outside)


# operations that become polynomials or rounds of bit mixing on backends without them
LOWERED = {"EXP2": 36.0, "LOG2": 40.0, "SIN": 160.0, "POW": 80.0, "THREEFRY": 24.0}
FLOATS = {DTYPES[n] for n in ("float16", "bfloat16", "float32", "float64", "weakfloat")}


def _operations(ast: UOp) -> float:
    """Arithmetic operations of a launch, each loop as long as it can be."""
    ranges = {u: math.prod(int(r.vmax) + 1 for r in u.ranges) for u in ast.toposort()}
    flops = sum(n for u, n in ranges.items() if u.op.name in ARITHMETIC and u.dtype in FLOATS)
    return float(flops + sum(ranges[u.src[0]] for u in ranges if u.op is Ops.REDUCE))


def describe(ast: UOp) -> str:
    """A short name for people: reduce or element-wise, and the sizes of its loops."""
    ranges = sorted((u for u in ast.toposort() if u.op is Ops.RANGE), key=lambda u: u.arg[:-1])
    outer = [str(int(u.vmax) + 1) for u in ranges if u.arg[-1] is not AxisType.REDUCE]
    inner = [str(int(u.vmax) + 1) for u in ranges if u.arg[-1] is AxisType.REDUCE]
    return ("r " if inner else "e ") + "x".join(outer or ["1"]) + (" / " + "x".join(inner) if inner else "")


# **** schedules ****


def schedule_to_json(schedule: Schedule) -> list[list[Any]]:
    return [[opt.op.name, opt.axis, list(opt.arg) if isinstance(opt.arg, tuple) else opt.arg] for opt in schedule]


def schedule_from_json(data: Any) -> Schedule:
    """Strictly parse [[op, axis, arg], ...]. Raises CodecError."""
    if not isinstance(data, list) or len(data) > 64:
        raise CodecError("a schedule is a list of at most 64 [op, axis, arg]")
    return tuple(_opt_from_json(item) for item in data)


def _opt_from_json(item: Any) -> Opt:
    if (
        not isinstance(item, list)
        or len(item) != 3
        or not isinstance(item[0], str)
        or item[0] not in OptOps.__members__
    ):
        raise CodecError(f"not an [op, axis, arg]: {shown(item)}")
    op, axis, arg = item
    if op == "NOLOCALS" and axis is None and arg is None:
        return Opt(OptOps.NOLOCALS)
    if op == "NOLOCALS" or not _is_int(axis) or axis < 0:
        raise CodecError(f"the axis of {op} is not what it must be: {shown(axis)}")
    if op == "TC" and isinstance(arg, list) and len(arg) == 3 and all(_is_int(a) for a in arg):
        return Opt(OptOps.TC, axis, tuple(arg))
    if op != "TC" and _is_int(arg) and arg >= 0:
        return Opt(OptOps[op], axis, arg)
    raise CodecError(f"the argument of {op} is not what it must be: {shown(arg)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT


# **** the AST ****


def kernel_to_json(kernel: Kernel) -> dict[str, Any]:
    """A JSON object that `kernel_from_json` restores exactly. Raises CodecError for an op outside the whitelist."""
    nodes = list(kernel.ast.toposort())
    if len(nodes) > MAX_NODES:
        raise CodecError(f"kernels of more than {MAX_NODES} nodes are not supported")
    number = {node: i for i, node in enumerate(nodes)}
    rows = [[u.op.name, _dtype_name(u.dtype), [number[s] for s in u.src], _arg_to_json(u)] for u in nodes]
    return {"version": VERSION, "key": kernel.key, "name": kernel.name, "family": kernel.family, "nodes": rows}


def kernel_from_json(data: Any) -> Kernel:
    """Restore a kernel. Raises CodecError for anything that is not exactly what `kernel_to_json` writes."""
    if not isinstance(data, dict) or set(data) != {"version", "key", "name", "family", "nodes"}:
        raise CodecError("not a stored kernel: its fields are version, key, name, family, nodes")
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise CodecError(f"kernel codec version {shown(data['version'])}, this program reads {VERSION}")
    if not all(
        isinstance(data[k], str) and len(data[k]) <= 200 and data[k].isprintable() for k in ("key", "name", "family")
    ):
        raise CodecError("key, name and family are short printable strings")
    kernel = kernel_of_nodes(data["nodes"], data["name"], data["family"])
    if kernel.key != data["key"]:
        raise CodecError(f"the stored kernel {data['key'][:32]} does not give its own key")
    return kernel


def kernel_of_nodes(rows: Any, name: str = "", family: str = "") -> Kernel:
    """The kernel of its stored nodes, whatever its key. Raises CodecError."""
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_NODES:
        raise CodecError(f"a kernel has 1 to {MAX_NODES} nodes")
    nodes: list[UOp] = []
    try:
        for row in rows:
            nodes.append(_node_from_json(row, nodes))
        if nodes[-1].op is not Ops.SINK:
            raise CodecError("the last node of a kernel is its SINK")
        if math.prod(int(n.vmax) + 1 for n in nodes if n.op is Ops.RANGE) > MAX_ITERATIONS:
            raise CodecError("the loops of this kernel never end")
        return Kernel.from_ast(nodes[-1], name, family)
    except CodecError:
        raise
    except Exception as error:  # tinygrad's own checks of a node: any of its assertions means a malformed kernel
        raise CodecError(f"malformed kernel: {type(error).__name__}: {str(error)[:100]}") from None


def _dtype_name(dtype: DType) -> str:
    if dtype not in DTYPE_NAMES:
        raise CodecError(f"kernels with {dtype} are not supported")
    return DTYPE_NAMES[dtype]


def _arg_to_json(u: UOp) -> Any:
    if u.op.name not in ALLOWED:
        raise CodecError(f"kernels with {u.op} are not supported")
    if u.op is Ops.PARAM:
        arg = u.arg
        limits = None if arg.vmin_vmax is None else list(arg.vmin_vmax)
        return [arg.slot, _dtype_name(arg.dtype), limits, arg.multiple_of, arg.name, arg.addrspace.name]
    if u.op is Ops.RANGE:
        return [*u.arg[:-1], u.arg[-1].name]
    if u.op is Ops.REDUCE:
        return [u.arg[0].name, u.arg[1]]
    if u.op is Ops.CONST:
        return _const_to_json(u.arg)
    if u.op in (Ops.CAST, Ops.BITCAST):
        return _dtype_name(u.arg)
    if u.op is Ops.SINK or u.arg is None:
        return None
    raise CodecError(f"kernels with an argument on {u.op} are not supported")


def _const_to_json(value: Any) -> list[Any]:
    if value is Invalid:
        return ["invalid", 0]
    if isinstance(value, bool):
        return ["bool", value]
    return ["int", int(value)] if isinstance(value, int) else ["float", float(value).hex()]


def _const_from_json(arg: Any) -> Any:
    match arg:
        case ["invalid", 0]:
            return Invalid
        case ["bool", bool(value)]:
            return value
        case ["int", value] if _is_int(value):
            return value
        case ["float", str(text)] if len(text) <= 40:
            return dtypes.float64.const(float.fromhex(text))
    raise CodecError(f"not a constant: {shown(arg)}")


def _node_from_json(row: Any, nodes: list[UOp]) -> UOp:
    if not isinstance(row, list) or len(row) != 4 or row[0] not in ALLOWED or row[1] not in DTYPES:
        raise CodecError(f"not a node: {shown(row)}")
    op, dtype, sources = ALLOWED[row[0]], DTYPES[row[1]], row[2]
    if not isinstance(sources, list) or not all(_is_int(s) and 0 <= s < len(nodes) for s in sources):
        raise CodecError(f"node {len(nodes)} refers to a node that does not stand before it")
    if len(sources) != SOURCES.get(row[0], len(sources)) or len(sources) < LEAST_SOURCES.get(row[0], 0):
        raise CodecError(f"node {len(nodes)}: a {row[0]} has not {len(sources)} sources")
    if op is Ops.SHL and len(sources) == 2 and nodes[sources[1]].vmax > 64:
        raise CodecError(f"node {len(nodes)} shifts too far")
    if op in (Ops.RANGE, Ops.PARAM) and not _is_size(nodes[sources[0]]):
        raise CodecError(f"node {len(nodes)} has a size that is no number from 1 to 2^48")
    node = UOp(op, dtype, tuple(nodes[s] for s in sources), _arg_from_json(op, row[3]))
    if dtypes.is_int(dtype) and max(abs(node.vmin), abs(node.vmax)) >= MAX_BOUND:
        raise CodecError(f"node {len(nodes)} may grow too large")
    return node


def _is_size(node: UOp) -> bool:
    """Whether a loop or a buffer can have this size, or these; a symbolic one counts with its largest value."""
    sizes = node.src if node.op is Ops.STACK else (node,)
    good = all(dtypes.is_int(s.dtype) and type(s.vmax) is int and s.vmax > 0 for s in sizes)
    return good and math.prod(int(s.vmax) for s in sizes) <= MAX_SIZE


def _arg_from_json(op: Ops, arg: Any) -> Any:
    if op is Ops.SINK:
        return KernelInfo()
    if op is Ops.CONST:
        return _const_from_json(arg)
    if op in (Ops.CAST, Ops.BITCAST) and isinstance(arg, str) and arg in DTYPES:
        return DTYPES[arg]
    if op is Ops.PARAM and isinstance(arg, list) and len(arg) == 6:
        return _param_from_json(*arg)
    if op is Ops.RANGE and isinstance(arg, list) and len(arg) >= 2 and arg[-1] in AxisType.__members__:
        if all(_is_int(a) for a in arg[:-1]):
            return (*arg[:-1], AxisType[arg[-1]])
    if (
        op is Ops.REDUCE
        and isinstance(arg, list)
        and len(arg) == 2
        and arg[0] in ("ADD", "MUL", "MAX")
        and _is_int(arg[1])
    ):
        return (Ops[arg[0]], arg[1])
    if arg is None and op not in (Ops.CAST, Ops.BITCAST, Ops.PARAM, Ops.RANGE, Ops.REDUCE):
        return None
    raise CodecError(f"bad argument of {op.name}: {shown(arg)}")


def _param_from_json(slot: Any, dtype: Any, limits: Any, multiple: Any, name: Any, addrspace: Any) -> ParamArg:
    good = _is_int(slot) and dtype in DTYPES and addrspace in AddrSpace.__members__
    good = good and (limits is None or (isinstance(limits, list) and len(limits) == 2 and all(map(_is_int, limits))))
    good = good and (limits is None or limits[0] <= limits[1])
    good = good and (addrspace != "ALU" or (name is not None and limits is not None))  # a symbolic size
    good = good and (multiple is None or _is_int(multiple))
    if not good or not (name is None or (isinstance(name, str) and IDENTIFIER.match(name))):
        raise CodecError(f"bad parameter: {', '.join(map(shown, (slot, dtype, limits, multiple, name, addrspace)))}")
    bounds = None if limits is None else (limits[0], limits[1])
    return ParamArg(slot, DTYPES[dtype], bounds, multiple, name, AddrSpace[addrspace])
