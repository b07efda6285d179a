"""Give a checkpoint the memory of all trials that ship for DEV, as `make train` does at its end.

DEV=CPU python tools/remember.py autotune/data/guide-cpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from autotune import corpus
from autotune.compiler import default_device, renderer_of
from autotune.data import Dataset, add_shipped
from autotune.guide import Guide
from autotune.memory import Memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="without its suffix, such as runs/1/best")
    path = parser.parse_args().checkpoint
    device, about = default_device(), json.loads(path.with_suffix(".json").read_text())
    if about["backend"].split(":")[0] != device.split(":")[0]:  # another backend's trials would mean nothing to it
        raise SystemExit(f"{path} was trained for {about['backend']}, this is {device}: set DEV")
    guide, data = Guide.load(path), Dataset(renderer_of(device))
    add_shipped(data, device, corpus.load("train"), guided=True)
    guide.memory = Memory.learn(data)
    guide.save(path, {name: about[name] for name in ("backend", "draft", "updates", "validation")})
    print(f"{path}: remembers {len(guide.memory.schedules) if guide.memory else 0} kernels")


if __name__ == "__main__":
    main()
