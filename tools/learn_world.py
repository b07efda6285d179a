"""Give a checkpoint another world to plan in, learned from all trials that ship for DEV; everything else of it stays. There is
no policy of that world's view then: `sequential` needs one (`train with world=KIND sequential_updates=300`).

    DEV=CPU python tools/learn_world.py autotune/data/guide-cpu runs/guide-transformer --kind transformer
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agents import checkpoint
from autotune.compiler import default_device, renderer_of
from autotune.data import shipped_trials
from autotune.errors import UsageError
from autotune.guide import Guide
from autotune.world import ROUNDS, SIMULATORS, World
from sims.heads import HeadsConfig


def learn_world(
    source: Path, target: Path, kind: str, device: str, rounds: int = ROUNDS, steps: int | None = None,
    heads: HeadsConfig | None = None,
) -> World:  # fmt: skip
    """Write `target`. `rounds` of reanalysis; `steps` shortens the simulator's training, `heads` are how its heads learn. Raises
    UsageError where no trials ship for the device, or `source` cannot be read."""
    guide, data = Guide.load(source), shipped_trials(device, renderer_of(device))
    guide.world = World.learn(kind, data, guide.seed, rounds, steps, heads)
    about = checkpoint.load(source)[1]
    guide.save(target, {name: about[name] for name in ("backend", "draft", "updates", "validation")}, moments=False)
    return guide.world


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="checkpoint, without its suffix, such as runs/1/best")
    parser.add_argument("target", type=Path)
    parser.add_argument("--kind", choices=SIMULATORS, required=True, help="of the simulator that the world is made of")
    args = parser.parse_args()
    try:
        learn_world(args.source, args.target, args.kind, default_device())
    except UsageError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
