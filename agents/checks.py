"""Ranges of settings: each check raises ValueError, or `error`, for the first of the named ones that is out of its range (NaN
is out of every range)."""

from __future__ import annotations


def check_least(config: object, **least: int) -> None:
    """name=n: this setting must be at least n."""
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise ValueError(f"{name} must be at least {bound}, not {getattr(config, name)}")


def check_positive(config: object, *names: str, error: type[ValueError] = ValueError) -> None:
    """Each must be above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise error(f"{name} must be above 0, not {getattr(config, name)}")


def check_fraction(config: object, *names: str) -> None:
    """Each must be from 0 to 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {getattr(config, name)}")


def check_inside(config: object, *names: str, error: type[ValueError] = ValueError) -> None:
    """Each must lie between 0 and 1, and be neither."""
    for name in names:
        if not 0 < getattr(config, name) < 1:
            raise error(f"{name} must be between 0 and 1, not {getattr(config, name)}")


def check_below_one(config: object, *names: str) -> None:
    """Each must be from 0 to below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be from 0 to below 1, not {getattr(config, name)}")


def check_share(config: object, *names: str) -> None:
    """Each must be above 0 and at most 1: a share of something that is not nothing."""
    for name in names:
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(config, name)}")
