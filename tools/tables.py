"""Markdown, for tools/figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Rows are whole lines."""
    return "\n".join([line(head), "|" + "---|" * len(head), *rows])


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
