"""Ways to spoil a valid input, and values that a hostile hand would put into it."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

CODE = ['n); system("touch pwned"); //', "n\n#include <stdlib.h>\n", "__import__('os').system('touch pwned')",
        "$(touch pwned)", "'; DROP TABLE trials; --", "../../pwned", "a\x00b", "\x1b]0;pwned\x07", "\ud800", "n" * 5000]  # fmt: skip
# what JSON text may hold, and json.dumps would not write: each stands as a string in a value, and is put in afterwards
RAW = {"@deep": "[" * 100_000 + "]" * 100_000, "@deeper": '{"a":' * 20_000 + "1" + "}" * 20_000, "@open": "[" * 50_000,
       "@digits": "9" * 10**6, "@minus": "-" + "1" * 5000, "@nan": "NaN", "@inf": "-Infinity", "@big": "1e999", "@tiny": "1e-999",
       "@long": '"' + "x" * 5_000_000 + '"', "@many": "[" + "0," * 30_000 + "0]", "@twice": '{"a":1,"a":2}', "@torn": '"\\ud800"',
       "@hex": "0x10", "@comment": "/* */ 1"}  # fmt: skip
POOL: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 31, 300, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 2**200, 0.5, -0.0, 1e300, 1e-320,
    "", "ADD", "CUSTOM", "CUSTOMI", "SINK", "STACK", "int32", "ok", "trial", "0x1p-3", "nan", "0x1p+99999", "k", "0" * 32,
    [], [0], [0, 1], [[0]], {}, {"a": 1}, ["int", 7], ["float", "inf"], ["invalid", 0], ["UPCAST", 0, 4], [["UPCAST", 0, 4]],
    *CODE, *RAW,
]  # fmt: skip


class Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch pwned",)


PICKLES = [pickle.dumps(Bomb(), protocol) for protocol in (0, 2, 4)]


def mutate(data: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON value: replaced, removed, doubled, swapped with a neighbour, or a number moved."""
    if isinstance(data, dict) and data and rng.random() < 0.97:
        key = rng.choice(sorted(data, key=str))
        way = rng.random()
        if way < 0.03:
            return {name: value for name, value in data.items() if name != key}
        if way < 0.06:
            return {**data, str(rng.choice(CODE)): rng.choice(POOL)}
        return {**data, key: mutate(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.9:
        return _in_list(list(data), rng)
    if isinstance(data, int | float) and not isinstance(data, bool) and rng.random() < 0.5:
        return rng.choice([data + 1, data - 1, -data, data * 2, f"{data}", [data]])
    return copy.deepcopy(rng.choice(POOL))


def _in_list(items: list[Any], rng: random.Random) -> list[Any]:
    i, way = rng.randrange(len(items)), rng.random()
    if way < 0.7:
        items[i] = mutate(items[i], rng)
    elif way < 0.8:
        del items[i]
    elif way < 0.9:
        items.insert(i, items[i])
    else:
        items[i], items[i - 1] = items[i - 1], items[i]
    return items


def mutated(data: Any, rng: random.Random) -> Any:
    """One to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = mutate(data, rng)
    return data


def mutated_text(text: str, rng: random.Random) -> str:
    """JSON text after some changes; one that was spoiled before gets an end that fits nothing."""
    try:
        return to_text(mutated(json.loads(text), rng))
    except (ValueError, RecursionError):
        return text + "["


def to_text(data: Any) -> str:
    """JSON text, with what stands in RAW put in for its name."""
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four of: bits flipped, bytes overwritten, a piece cut, doubled, moved or replaced, the end cut."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(found) + 1), rng.choice((1, 2, 4, 8, 100, 4096))
        way = rng.randrange(7)
        if way == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            found[at : at + length] = bytes(
                rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256))) for _ in found[at : at + length]
            )
        elif way == 2:
            del found[at : at + length]
        elif way == 3:
            found[at:at] = found[at : at + length]
        elif way == 4:
            found[at : at + length] = rng.randbytes(length)
        elif way == 5:
            found[at:at] = rng.choice([*PICKLES, *(text.encode(errors="replace") for text in CODE)])
        else:
            del found[at:]
    return bytes(found)
