"""Records of other devices in the same file: they are kept, shown, and never served here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.records.rows import fingerprint_id
from autotune.records.store import Records


@dataclass(frozen=True)
class Foreign:
    """What is on record for one other device."""

    fingerprint: str
    differs: tuple[str, ...]  # names of the fields in which it differs from this device; none where it is not described
    kernels: int
    trials: int
    winners: int


def others(records: Records, own: dict[str, str]) -> list[Foreign]:
    """Every device on record but the one with these fields, the nearest first: that with the fewest fields that differ."""
    described, counts, here = records.fingerprints(), records.counts(), fingerprint_id(own)
    found = []
    for device in sorted({*described, *counts} - {here}):
        fields = described.get(device, {})
        differs = [name for name in {**own, **fields} if fields and own.get(name) != fields.get(name)]
        kernels, trials = counts.get(device, (0, 0))
        found.append(Foreign(device, tuple(differs), kernels, trials, len(records.winners(device))))
    return sorted(found, key=lambda f: (not f.differs, len(f.differs), -f.trials))


def table(found: Sequence[Foreign]) -> str:
    """For people: one line a device."""
    head = f"{'other device':16} {'kernels':>7} {'trials':>7} {'winners':>7}  differs in"
    lines = ["on record for other devices, and not served here:", head, "-" * len(head)]
    for f in found:
        lines.append(f"{f.fingerprint[:16]:16} {f.kernels:7d} {f.trials:7d} {f.winners:7d}  {_differs(f)}")
    return "\n".join(lines)


def summary(found: Sequence[Foreign]) -> str:
    """The same in one line."""
    if not found:
        return "all records are of this device"
    trials, winners = sum(f.trials for f in found), sum(f.winners for f in found)
    return (f"other devices on record: {len(found)}, with {trials} trials and {winners} winners that are not served here; "
            f"the nearest differs in {_differs(found[0])}")  # fmt: skip


def _differs(other: Foreign) -> str:
    return ", ".join(name.removeprefix("setting.") for name in other.differs) or "all: it is not described"
