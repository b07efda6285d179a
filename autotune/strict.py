"""What strangers and users write: standard JSON only, bounded, each name once; numbers of a command line; and how to show any value
in a message."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from autotune.errors import CodecError

MAX_TEXT = 4_000_000  # characters of one JSON text: a kernel of 20,000 nodes has about half as many
MAX_INT = 2**63  # what SQLite and the tuner's arrays can hold
MAX_SHOWN = 60
LARGEST = 1e9  # of any number on a command line: timers take no more seconds


def parse(text: str) -> Any:
    """The value of a JSON text. Raises CodecError for NaN, Infinity, a name that stands twice, deep nesting, or a huge text."""
    if len(text) > MAX_TEXT:
        raise CodecError(f"{len(text)} characters of JSON, at most {MAX_TEXT} are read")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"not the JSON of this program: {str(error)[:MAX_SHOWN]}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def shown(value: Any) -> str:
    """Any value in a few printable characters; neither depth nor size matters."""
    if isinstance(value, list | dict | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "a huge number"
    return repr(value[:MAX_SHOWN] if isinstance(value, str | bytes) else value)[:MAX_SHOWN]


def one_line(text: str) -> str:
    """A text for a message: whatever could end a line, or steer a terminal, becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def at_least(low: float, kind: type[int] | type[float]) -> Callable[[str], Any]:
    """The `type` of an argparse option: a number of that kind from `low` to LARGEST, else one line and exit status 2."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value < LARGEST:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no {'whole ' * (kind is int)}number from {low:g} to {LARGEST:g}"
            )
        return value

    return parse
