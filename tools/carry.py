"""Carry a checkpoint to another backend: its policies and its world stay, its simulators and its memory are learned anew from all
trials that ship for DEV.

    DEV=CL python tools/carry.py autotune/data/guide-cpu autotune/data/guide-cl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agents import checkpoint
from autotune.compiler import backend_of, default_device, renderer_of
from autotune.data import shipped_trials
from autotune.errors import UsageError
from autotune.guide import Guide
from autotune.memory import Memory


def carry(source: Path, target: Path, device: str, policy_first: bool = False) -> dict[str, float]:
    """Write `target`; what `Guide.fit` tells. Raises UsageError where no trials ship for the device, or `source` cannot be read."""
    guide, data = Guide.load(source), shipped_trials(device, renderer_of(device))
    guide.policy_first = policy_first
    told = guide.fit(data.states, *data.arrays())
    guide.memory = Memory.learn(data)
    about = checkpoint.load(source)[1]
    kept = {name: about[name] for name in ("draft", "updates", "validation")}
    guide.save(target, {**kept, "backend": backend_of(device), "carried_from": about["backend"]}, moments=False)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="checkpoint, without its suffix, such as runs/1/best")
    parser.add_argument("target", type=Path)
    parser.add_argument("--policy-first", action="store_true", help="its answer is tried before that of the trees")
    args = parser.parse_args()
    try:
        told = carry(args.source, args.target, default_device(), args.policy_first)
    except UsageError as error:
        raise SystemExit(str(error)) from None
    print(
        f"{args.target}: {told['rows']:.0f} trials of {told['kernels']:.0f} kernels, out of bag {told['oob_pairwise']:.3f}"
    )


if __name__ == "__main__":
    main()
