"""The codec: what it writes it reads back exactly; everything else is a CodecError, never another exception."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import replace

import pytest
from tiny import U4, add_one, kernel_of, reread, symbolic
from tinygrad import Tensor

from autotune import corpus
from autotune.compiler import Ops, Opt, OptOps, UOp
from autotune.errors import CodecError
from autotune.kernel import (
    MAX_NODES,
    Kernel,
    kernel_from_json,
    kernel_of_nodes,
    kernel_to_json,
    schedule_from_json,
    schedule_to_json,
)
from autotune.space import ACTIONS
from autotune.strict import MAX_TEXT, parse, shown


def test_the_whole_corpus_comes_back():
    kernels = corpus.load()
    assert len(kernels) > 500
    for kernel in kernels:
        again = reread(kernel)
        assert again.ast is kernel.ast and again.key == kernel.key
        assert (again.name, again.family, again.signature) == (kernel.name, kernel.family, kernel.signature)


def test_symbolic_sizes_come_back():
    kernel = symbolic()
    assert reread(kernel).ast is kernel.ast and reread(kernel).variables == {"n": (1, 64)}


def test_work_by_hand():
    matmul = kernel_of(Tensor.empty(8, 16) @ Tensor.empty(16, 4))
    assert matmul.work == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))
    assert add_one(300).work == (300, 2 * 4 * 300)
    assert kernel_of(Tensor.empty(50, dtype="half").sum()).work[1] == 2 * 51
    assert matmul.operations == 2 * 8 * 16 * 4


def test_operations_are_of_the_sizes_that_are_timed():
    """The first n of 64 rows of 32; the middle of 1 to 64 is 32."""
    assert symbolic().operations == 32 * 32 and symbolic().work[0] == 64 * 32


def test_signature_leaves_strides_out_and_sizes_in():
    x = Tensor.empty(24, 24)
    straight, transposed = kernel_of(x.sum(1)), kernel_of(x.sum(0))
    assert straight.key != transposed.key and straight.signature == transposed.signature
    others = [
        kernel_of(Tensor.empty(24, 25).sum(1)),
        kernel_of(x.exp().sum(1)),
        kernel_of(Tensor.empty(24, 24, dtype="half").sum(1)),
    ]
    assert len({straight.signature, *(k.signature for k in others)}) == 4


def row_of(data: dict, op: str) -> list:
    return next(row for row in data["nodes"] if row[0] == op)


def edit_const(value):
    return lambda d: row_of(d, "CONST").__setitem__(3, value)


def edit_param(place: int, value):
    """Change a field of the symbolic size's PARAM: [slot, dtype, limits, multiple, name, address space]."""
    return lambda d: next(r for r in d["nodes"] if r[0] == "PARAM" and r[3][4])[3].__setitem__(place, value)


def nested(depth: int) -> list:
    """A list in a list in a list ..."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


BAD = {
    "unknown op": lambda d: row_of(d, "ADD").__setitem__(0, "EVIL"),
    "custom code": lambda d: row_of(d, "ADD").__setitem__(0, "CUSTOM"),
    "inline custom code": lambda d: row_of(d, "ADD").__setitem__(0, "CUSTOMI"),
    "op is a list": lambda d: row_of(d, "ADD").__setitem__(0, ["ADD"]),
    "unknown dtype": lambda d: row_of(d, "ADD").__setitem__(1, "int1024"),
    "forward reference": lambda d: row_of(d, "ADD")[2].__setitem__(0, len(d["nodes"]) - 1),
    "refers to itself": lambda d: row_of(d, "ADD")[2].__setitem__(0, d["nodes"].index(row_of(d, "ADD"))),
    "negative reference": lambda d: row_of(d, "ADD")[2].__setitem__(0, -1),
    "bool reference": lambda d: row_of(d, "ADD")[2].__setitem__(0, True),
    "code in a name": edit_param(4, "n); system(\"id\"); int(n"),
    "newline in a name": edit_param(4, "n\n"),
    "comment in a name": edit_param(4, "n/*"),
    "long name": edit_param(4, "n" * 65),
    "name is a number": edit_param(4, 5),
    "other name": edit_param(4, "m"),
    "bool slot": edit_param(0, True),
    "huge limit": edit_param(2, [1, 2**70]),
    "float limit": edit_param(2, [1, 64.0]),
    "other limit": edit_param(2, [1, 65]),
    "address space": edit_param(5, "KERNEL"),
    "nan in an int": edit_const(["int", math.nan]),
    "infinite int": edit_const(["int", math.inf]),
    "huge int": edit_const(["int", 2**70]),
    "bool in an int": edit_const(["int", True]),
    "huge float": edit_const(["float", "0x1p+99999"]),
    "float as a number": edit_const(["float", 1.5]),
    "float as code": edit_const(["float", "__import__('os')"]),
    "unknown constant": edit_const(["pickle", "gASV"]),
    "wrong key": lambda d: d.__setitem__("key", "0" * 32),
    "no key": lambda d: d.pop("key"),
    "one field more": lambda d: d.__setitem__("code", "x"),
    "newer version": lambda d: d.__setitem__("version", 2),
    "version as text": lambda d: d.__setitem__("version", "1"),
    "bool version": lambda d: d.__setitem__("version", True),
    "no nodes": lambda d: d.__setitem__("nodes", []),
    "nodes are no list": lambda d: d.__setitem__("nodes", {"0": d["nodes"][0]}),
    "one source of two": lambda d: row_of(d, "ADD")[2].pop(),
    "no source of a store": lambda d: row_of(d, "STORE").__setitem__(2, []),
    "a loop without an end": lambda d: row_of(d, "CONST").__setitem__(3, ["int", 2**50]),
    "a loop of no size": lambda d: row_of(d, "CONST").__setitem__(3, ["int", 0]),
    "a size that is no number": lambda d: row_of(d, "CONST").__setitem__(3, ["invalid", 0]),
    "a size without a name": edit_param(4, None),
    "a size without limits": edit_param(2, None),
    "limits the wrong way round": edit_param(2, [64, 1]),
    "deep op": lambda d: row_of(d, "ADD").__setitem__(0, nested(10_000)),
    "deep version": lambda d: d.__setitem__("version", nested(10_000)),
    "version of many digits": lambda d: d.__setitem__("version", 10**6000),
    "slot of many digits": edit_param(0, 10**6000),
    "huge node list": lambda d: d.__setitem__("nodes", d["nodes"][:1] * (MAX_NODES + 1)),
    "last node cut": lambda d: d["nodes"].pop(),
    "control characters in the name": lambda d: d.__setitem__("name", "a\x1b[2J"),
    "family is a number": lambda d: d.__setitem__("family", 3),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_kernels_are_refused(case):
    data = json.loads(json.dumps(kernel_to_json(symbolic())))
    assert kernel_from_json(copy.deepcopy(data)).key == data["key"]
    BAD[case](data)
    with pytest.raises(CodecError):
        kernel_from_json(data)


@pytest.mark.parametrize("name", ["n); system(0); int(n", "n\n", "n/*", "n" * 65, "", "1n", "é"])
def test_names_that_are_no_identifiers_are_refused_though_the_key_fits(name):
    """Whoever writes the file can also compute the key of what is in it."""
    nodes: list[UOp] = []
    rows = kernel_to_json(symbolic())["nodes"]
    for node, (_, _, sources, _) in zip(symbolic().ast.toposort(), rows, strict=True):
        arg = replace(node.arg, name=name) if node.op is Ops.PARAM and node.arg.name else node.arg
        nodes.append(UOp(node.op, node.dtype, tuple(nodes[s] for s in sources), arg))
    with pytest.raises(CodecError, match="bad parameter"):
        reread(Kernel.from_ast(nodes[-1]))


def test_a_key_that_fits_does_not_make_a_kernel_without_end():
    """Loops of 2^48 each, and as many as they like: what is counted of them must stay a number."""
    size, loops = ["CONST", "weakint", [], ["int", 2**48]], 30
    rows = [size, *(["RANGE", "weakint", [0], [i, "WEAK"]] for i in range(loops))]
    assert kernel_of_nodes([*rows[:4], ["SINK", "void", [1, 2, 3], None]]).iterations == 2.0 ** (3 * 48)
    with pytest.raises(CodecError, match="never end"):
        kernel_of_nodes([*rows, ["SINK", "void", list(range(1, loops + 1)), None]])


def test_a_kernel_of_too_many_nodes_is_not_stored_either(monkeypatch):
    monkeypatch.setattr("autotune.kernel.MAX_NODES", 3)
    with pytest.raises(CodecError, match="more than 3 nodes"):
        kernel_to_json(add_one())


@pytest.mark.parametrize("text", [
    "NaN", "[-Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000, "9" * 10**6, '"' + "x" * MAX_TEXT + '"', "", "[1,]", "'a'", "0x10",
])  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(text):
    with pytest.raises(CodecError) as caught:
        parse(text)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_any_value_is_shown_in_a_few_characters():
    assert shown("a\nb") == r"'a\nb'" and shown([1, [2]]) == "a list of 2" and shown(None) == "None"
    assert (
        shown(10**6000) == "a huge number" and shown(nested(10_000)) == "a list of 1" and len(shown("x" * 10**6)) <= 62
    )


@pytest.mark.parametrize("data", [None, 3, [], "x", {}, {"nodes": 1}])
def test_other_json_is_refused(data):
    with pytest.raises(CodecError):
        kernel_from_json(data)


def test_a_very_deep_kernel_is_an_error_and_no_crash():
    data = kernel_to_json(add_one())
    at = data["nodes"].index(row_of(data, "ADD"))
    chain = [["NEG", "float32", [at + i], None] for i in range(15_000)]
    store = len(data["nodes"]) - 3
    data["nodes"] = data["nodes"][: at + 1] + chain + [["STORE", "void", [3, at + 15_000], None]]
    data["nodes"] += [["END", "void", [store + 15_000, 2], None], ["SINK", "void", [store + 15_001], None]]
    with pytest.raises(CodecError):
        kernel_from_json(data)


@pytest.mark.parametrize("op", ["MUL", "SHL"])
def test_numbers_that_would_fill_the_memory_are_refused(op):
    rows = [["CONST", "weakint", [], ["int", 2**40]]] + [[op, "weakint", [i, i], None] for i in range(60)]
    rows += [["RANGE", "weakint", [60], [0, "WEAK"]], ["SINK", "void", [61], None]]
    with pytest.raises(CodecError, match="large|far"):
        kernel_from_json({**kernel_to_json(add_one()), "name": "", "nodes": rows})


POOL = [None, True, False, -1, 0, 1, 2, 31, 2**31, 2**64, -(2**63), 0.5, math.nan, math.inf, "", "ADD", "CUSTOM", "SINK", "int32", "n;",
        "0x1p-3", "nan", [], [0], [0, 1], [[0]], {}, ["int", 7], ["bool", True], ["float", "inf"], ["invalid", 0]]  # fmt: skip


def mutate(data, rng: random.Random):
    """One random change somewhere in a JSON value: replaced, removed, doubled, or swapped with a neighbour."""
    if isinstance(data, dict) and data and rng.random() < 0.98:
        key = rng.choice(sorted(data) + ["nodes"] * 12)
        return {**data, key: mutate(data[key], rng)} if key in data else {**data, key: rng.choice(POOL)}
    if isinstance(data, list) and data and rng.random() < 0.85:
        items, i, way = list(data), rng.randrange(len(data)), rng.random()
        if way < 0.7:
            items[i] = mutate(items[i], rng)
        elif way < 0.8:
            del items[i]
        elif way < 0.9:
            items.insert(i, items[i])
        else:
            items[i], items[i - 1] = items[i - 1], items[i]
        return items
    return copy.deepcopy(rng.choice(POOL))


@pytest.mark.parametrize("make", [symbolic, add_one])
def test_mutated_kernels_are_refused_or_the_same(make):
    kernel, rng = make(), random.Random(0)
    data, refused = kernel_to_json(kernel), 0
    for _ in range(2000):
        changed = mutate(data, rng)
        for _ in range(rng.randrange(2)):
            changed = mutate(changed, rng)
        try:
            assert kernel_from_json(changed).ast is kernel.ast
        except CodecError:
            refused += 1
    assert refused > 1500


def test_every_action_comes_back():
    for start in range(0, len(ACTIONS) - 1, 8):
        schedule = tuple(ACTIONS[start : min(start + 8, len(ACTIONS) - 1)])
        assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule
    assert schedule_to_json((U4, Opt(OptOps.NOLOCALS))) == [["UPCAST", 0, 4], ["NOLOCALS", None, None]]
    assert schedule_from_json([["TC", 0, [-1, 2, 1]]]) == (Opt(OptOps.TC, 0, (-1, 2, 1)),)


@pytest.mark.parametrize("data", [
    None, {}, "UPCAST", [None], [[]], [["UPCAST", 0]], [["UPCAST", 0, 4, 4]], [["EXEC", 0, 4]], [[["UPCAST"], 0, 4]], [[{}, 0, 4]],
    [["UPCAST", "0", 4]], [["UPCAST", True, 4]], [["UPCAST", 0, True]], [["UPCAST", 0, 4.0]], [["UPCAST", 0, math.nan]], [["UPCAST", 0, 2**70]],
    [["UPCAST", 2**70, 4]], [["UPCAST", -1, 4]], [["UPCAST", 0, -4]], [["UPCAST", None, 4]], [["UPCAST", 0, None]], [["UPCAST", 0, [4]]],
    [["SWAP", 0, None]], [["TC", 0, [1, 2, 3, 4, 5]]], [["TC", 0, [1, True, 3]]], [["TC", 0, "x"]], [["NOLOCALS", 0, 1]],
    [["UPCAST", 0, 4]] * 65, [nested(10_000)], [["UPCAST", nested(10_000), 4]], [["UPCAST", 0, nested(10_000)]], [["UPCAST", 10**6000, 4]],
])  # fmt: skip
def test_malformed_schedules_are_refused(data):
    with pytest.raises(CodecError):
        schedule_from_json(data)


def test_mutated_schedules_are_refused_or_well_formed():
    rng, good = random.Random(1), [["UPCAST", 0, 4], ["TC", 0, [-1, 2, 1]], ["SWAP", 0, 1], ["NOLOCALS", None, None]]
    refused = 0
    for _ in range(2000):
        changed = mutate(good, rng)
        try:
            assert schedule_to_json(schedule_from_json(changed)) == changed
        except CodecError:
            refused += 1
    assert 200 < refused < 1990


def test_what_stands_outside_a_reduce_is_not_repeated_by_unrolling_it():
    outside = kernel_of((Tensor.empty(64, 96) @ Tensor.empty(96, 32)).exp())
    inside = kernel_of(Tensor.empty(64, 96).exp().sum(1))
    assert outside.weights[1] > 36 > 4 > outside.weights[0] and inside.weights[0] > 36 > 4 > inside.weights[1]
    for kernel in (outside, inside):
        a, b = kernel.weights
        assert kernel.lowered(8, 4) == pytest.approx(8 * (4 * a + b))  # by hand
        assert kernel.lowered(16, 4) == pytest.approx(2 * kernel.lowered(8, 4))
    assert outside.lowered(8, 8) < 2 * outside.lowered(8, 1) and inside.lowered(8, 8) > 7 * inside.lowered(8, 1)
