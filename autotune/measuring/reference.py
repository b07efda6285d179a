"""What a kernel should compute, and how far from it rounding may lead: a second kernel, in float64, beside the first.

Running error analysis (Wilkinson; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3), written
as tinygrad code: each float value `v` of the kernel gets a companion `error`, a bound on |computed - v| whatever the order
of its sums. Value and bound are computed in float64 by one un-optimized kernel. A schedule may only reorder sums, so a
correct candidate stays within the bound, element by element, and a bound of zero (small integers, copies, maxima) asks for
equality.

Rules, with eps of the value's own dtype, r = eps |v| (or the exact rounding error of v, where the operands are exact):
    a + b          error a + error b + r
    a * b          |a| error b + |b| error a + r
    sum of n       sum of errors + eps (8 + 2 sqrt n) sum |x|, or 0 where all x are integers whose sums are exact;
                   eps (8 + n / 2) sum |x| where nearly all x have one sign
    f(a)           |f'| error a + 4 r
    a < b, a != b  unsure where |a - b| <= error a + error b; a choice by an unsure condition may go either way
A sum of n terms in any order errs by at most n eps/2 sum |x|; errors of random sign grow like sqrt n (Higham & Mary, A new
approach to probabilistic rounding error analysis, 2019), of which 2 sqrt n is more than four standard deviations. Terms
of one sign and nearly one size are all rounded the same way: then the worst case is what happens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotune.compiler import DType, Ops, ParamArg, UOp, dtypes
from autotune.kernel import FLOATS

EPSILON = {dtypes.float16: 2.0**-10, dtypes.bfloat16: 2.0**-7, dtypes.float32: 2.0**-23, dtypes.float64: 2.0**-52}
TINY = 1e-300  # keeps 0 / 0 out
COMPARISONS = (Ops.CMPLT, Ops.CMPNE, Ops.CMPEQ)


class NoReference(Exception):
    """This kernel holds an operation whose error is not known: the un-optimized kernel itself is then the reference."""


@dataclass(frozen=True)
class Reference:
    """A float64 twin of a kernel. `bounds` maps an output's slot to the slot of its error bound; others are exact."""

    ast: UOp
    bounds: dict[int, int]


@dataclass(frozen=True)
class Value:
    """A float64 value (or a boolean, an integer) and its error bound; for a boolean, where it is unsure. None: exact."""

    v: UOp
    error: UOp | None = None


def reference(ast: UOp) -> Reference:
    """The float64 twin of a canonical AST. Raises NoReference."""
    return _Builder(ast).build()


def _double(value: float) -> UOp:
    return UOp.const(value, dtypes.float64)


def _abs(x: UOp) -> UOp:
    return (x < 0.0).where(x * -1.0, x)


def _larger(a: UOp, b: UOp) -> UOp:
    return (a < b).where(b, a)


def _plus(a: UOp | None, b: UOp | None) -> UOp | None:
    return a if b is None else b if a is None else a + b


class _Builder:
    def __init__(self, ast: UOp):
        self.ast = ast
        self.done: dict[UOp, Value] = {}
        self.bounds: dict[int, int] = {}
        self.slots = [u.arg.slot for u in ast.toposort() if u.op is Ops.PARAM]

    def build(self) -> Reference:
        for u in self.ast.toposort():
            self.done[u] = self._visit(u)
        return Reference(self.done[self.ast].v, self.bounds)

    def _visit(self, u: UOp) -> Value:
        sources = [self.done[s] for s in u.src]
        if u.op is Ops.PARAM:
            return Value(_param(u, u.arg.slot) if u.dtype in EPSILON else u)
        if u.op is Ops.STORE:
            return self._store(u, *sources)
        if u.dtype in EPSILON:
            return self._float(u, sources)
        if u.dtype is dtypes.bool and u.op is not Ops.INDEX:
            return self._boolean(u, sources)
        if any(s.error is not None for s in sources) or u.op is Ops.BITCAST:
            raise NoReference(f"{u.op.name} of an inexact value")
        return Value(u.replace(src=tuple(s.v for s in sources)))

    def _store(self, u: UOp, target: Value, value: Value) -> Value:
        """Two stores where the bound is not zero everywhere."""
        store = u.replace(src=(target.v, value.v))
        if value.error is None:
            return Value(store)
        buffer = target.v.src[0]
        if buffer.op is not Ops.PARAM or buffer.arg.slot in self.bounds:
            raise NoReference("a buffer that is stored to more than once")
        self.bounds[buffer.arg.slot] = slot = max(self.slots) + 1 + len(self.bounds)
        error = value.error
        if error.dtype is dtypes.bool:  # an unsure boolean or integer may hold anything
            error = error.where(_double(math.inf), _double(0.0))
        bound = _param(buffer, slot).index(*target.v.src[1:])
        return Value(UOp.group(store, bound.store(error)))

    def _float(self, u: UOp, sources: list[Value]) -> Value:
        sources = [_as_double(s, source, u.dtype) for s, source in zip(sources, u.src, strict=True)]
        values = tuple(s.v for s in sources)
        if u.op in (Ops.INDEX, Ops.LOAD, Ops.CONST, Ops.NOOP):
            node = u.replace(src=values, dtype=dtypes.float64)
            return Value(node, sources[0].error if u.op is Ops.NOOP else None)
        if u.op is Ops.CAST:
            return _cast(u, sources[0])
        if u.op is Ops.REDUCE:
            return _reduced(u, values, sources[0].error)
        if u.op is Ops.WHERE:
            return _chosen(u, sources)
        rule = RULES.get(u.op)
        if rule is None:
            raise NoReference(f"{u.op.name} on floats")
        node = u.replace(src=values, dtype=dtypes.float64)
        return rule(node, sources, u.dtype)

    def _boolean(self, u: UOp, sources: list[Value]) -> Value:
        """Comparisons of inexact floats are unsure near equality; logic with an unsure part is unsure."""
        floats = [s.dtype in FLOATS for s in u.src]
        if u.op in COMPARISONS and any(floats):
            kind = next((s.dtype for s in u.src if s.dtype in EPSILON), None)  # of `6.0 < x` that of x
            if kind is None:
                raise NoReference("a comparison of constants")
            a, b = (_as_double(s, source, kind) for s, source in zip(sources, u.src, strict=True))
            node, error = u.replace(src=(a.v, b.v)), _plus(a.error, b.error)
            return Value(node, None if error is None else (error < _abs(a.v - b.v)).logical_not() & (error > 0.0))
        node = u.replace(src=tuple(s.v for s in sources))
        unsure = None
        for source, is_float in zip(sources, floats, strict=True):
            if source.error is not None:
                part = (source.error < _abs(source.v)).logical_not() if is_float else source.error
                unsure = part if unsure is None else unsure | part
        if u.op is Ops.REDUCE and unsure is not None:
            raise NoReference("a reduction of unsure conditions")
        return Value(node, unsure)


def _param(u: UOp, slot: int) -> UOp:
    arg: ParamArg = u.arg
    return u.replace(
        dtype=dtypes.float64,
        arg=ParamArg(slot, dtypes.float64, arg.vmin_vmax, arg.multiple_of, arg.name, arg.addrspace),
    )


def _as_double(s: Value, source: UOp, kind: DType) -> Value:
    """An operand of a float operation of dtype `kind`: constants and whole numbers become float64."""
    if source.dtype is dtypes.weakfloat:
        if source.op is not Ops.CONST:
            raise NoReference("arithmetic on constants")
        value = float(source.val)
        error = None if _fits(value, kind) else _double(abs(value) * EPSILON[kind])
        return Value(_double(value), error)
    return s


def _fits(value: float, kind: DType) -> bool:
    """Whether a constant is exact in a dtype; only few bits of mantissa count as exact, which is all that matters."""
    if value == 0.0 or not math.isfinite(value) or kind is dtypes.float64:
        return True
    scaled = math.frexp(value)[0] / EPSILON[kind]
    return scaled == int(scaled) and 2.0**-14 <= abs(value) <= 2.0**15


def _rounded(v: UOp, error: UOp | None, kind: DType, ulps: float = 1.0) -> Value:
    """Add the rounding of a result to its error: exactly known where the operands are exact."""
    general = _plus(error, _abs(v) * (EPSILON[kind] * ulps))
    if ulps > 1.0 or kind is dtypes.float64 or general is None:
        return Value(v, general)
    exact = _abs(v - v.cast(kind).cast(dtypes.float64))
    return Value(v, exact if error is None else (error > 0.0).where(general, exact))


def _cast(u: UOp, source: Value) -> Value:
    """From any dtype to a float one; an unsure boolean may be 0 or 1."""
    kind = u.src[0].dtype
    if kind in EPSILON:
        return _rounded(source.v, source.error, u.dtype)
    if kind is dtypes.weakfloat:
        return source
    error = None if source.error is None else source.error.where(_double(1.0), _double(0.0))
    return _rounded(source.v.cast(dtypes.float64), error, u.dtype)


def _chosen(u: UOp, sources: list[Value]) -> Value:
    condition, a, b = sources
    node = u.replace(src=(condition.v, a.v, b.v), dtype=dtypes.float64)
    if condition.error is None and a.error is None and b.error is None:
        return Value(node)
    zero = _double(0.0)
    ea, eb = a.error if a.error is not None else zero, b.error if b.error is not None else zero
    error = condition.v.where(ea, eb)
    if condition.error is not None:
        error = condition.error.where(_larger(ea, eb) + _abs(a.v - b.v), error)
    return Value(node, error)


def _reduced(u: UOp, values: tuple[UOp, ...], error: UOp | None) -> Value:
    kind, ranges = u.arg[0], values[1:]
    node = u.replace(src=values, dtype=dtypes.float64)
    x = values[0]

    def reduce(op: Ops, y: UOp) -> UOp:
        return UOp(Ops.REDUCE, dtypes.float64, (y, *ranges), (op, u.arg[1]))

    if kind is Ops.MAX:
        return Value(node, None if error is None else reduce(Ops.MAX, error))
    if kind is not Ops.ADD:
        raise NoReference(f"a {kind.name} reduction of floats")
    terms = math.prod(int(r.vmax) + 1 for r in u.src[1:])
    eps, size = EPSILON[u.dtype], reduce(Ops.ADD, _abs(x))
    total_of_one_sign = size - _abs(reduce(Ops.ADD, x)) <= size * 1e-3
    general = size * (eps * (8.0 + 2.0 * math.sqrt(terms)))
    if terms > 16:
        general = total_of_one_sign.where(size * (eps * (8.0 + terms / 2)), general)
    rest = _abs(x - x.trunc()) if error is None else _abs(x - x.trunc()) + error
    rounding = reduce(Ops.ADD, rest) + (size < 1.0 / eps).where(_double(0.0), _double(1.0))
    is_inexact = (rounding > 0.0) | rounding.ne(rounding)  # NaN: of an infinity it is not known
    total = general if error is None else general + reduce(Ops.ADD, error)
    return Value(node, is_inexact.where(total, _double(0.0)))


# **** the error of each operation: (float64 node, operands, dtype of the original) -> Value ****


def _error(s: Value) -> UOp:
    return s.error if s.error is not None else _double(0.0)


def _sum(node: UOp, s: list[Value], kind: DType) -> Value:
    return _rounded(node, _plus(s[0].error, s[1].error), kind)


def _product(node: UOp, s: list[Value], kind: DType) -> Value:
    left = None if s[0].error is None else _abs(s[1].v) * s[0].error
    right = None if s[1].error is None else _abs(s[0].v) * s[1].error
    return _rounded(node, _plus(left, right), kind)


def _negative(node: UOp, s: list[Value], kind: DType) -> Value:
    return Value(node, s[0].error)


def _maximum(node: UOp, s: list[Value], kind: DType) -> Value:
    if s[0].error is None and s[1].error is None:
        return Value(node)
    return Value(node, _larger(_error(s[0]), _error(s[1])))


def _reciprocal(node: UOp, s: list[Value], kind: DType) -> Value:
    room = _larger(_abs(s[0].v) - _error(s[0]), _double(0.0))  # 0: the divisor may be zero, the bound is infinite
    return _rounded(node, None if s[0].error is None else _abs(node) * s[0].error / room, kind, 4.0)


def _quotient(node: UOp, s: list[Value], kind: DType) -> Value:
    room = _larger(_abs(s[1].v) - _error(s[1]), _double(0.0))
    return _rounded(node, (_error(s[0]) + _abs(node) * _error(s[1])) / room, kind, 4.0)


def _root(node: UOp, s: list[Value], kind: DType) -> Value:
    error = None if s[0].error is None else s[0].error / (_larger(node, s[0].error.sqrt()) + TINY)
    return _rounded(node, error, kind, 4.0)


def _power_of_two(node: UOp, s: list[Value], kind: DType) -> Value:
    return _rounded(node, None if s[0].error is None else node * (s[0].error.exp2() - 1.0), kind, 4.0)


def _logarithm(node: UOp, s: list[Value], kind: DType) -> Value:
    room = _larger(_abs(s[0].v) - _error(s[0]), _double(0.0))
    error = _double(4 * EPSILON[kind])  # near 1 the logarithm is small, its approximation's error is not
    return _rounded(node, error if s[0].error is None else error + s[0].error / (room * math.log(2)), kind, 4.0)


def _sine(node: UOp, s: list[Value], kind: DType) -> Value:
    far = _abs(s[0].v) * 2.0**-12  # bringing a large angle into the first circle costs some bits
    return Value(node, _error(s[0]) + (far + 8.0) * EPSILON[kind])


def _truncated(node: UOp, s: list[Value], kind: DType) -> Value:
    e = s[0].error
    return Value(node, None if e is None else (s[0].v + e).trunc() - (s[0].v - e).trunc())


RULES = {Ops.ADD: _sum, Ops.SUB: _sum, Ops.MUL: _product, Ops.NEG: _negative, Ops.MAX: _maximum,
         Ops.RECIPROCAL: _reciprocal, Ops.FDIV: _quotient, Ops.SQRT: _root, Ops.EXP2: _power_of_two,
         Ops.LOG2: _logarithm, Ops.SIN: _sine, Ops.TRUNC: _truncated}  # fmt: skip
