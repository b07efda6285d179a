"""Markdown, for tools/figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autotune.statistics import Estimate


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Rows are whole lines."""
    return "\n".join([line(head), "|" + "---|" * len(head), *rows])


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def interval(value: Mapping[str, float]) -> str:
    return str(Estimate(**value))
