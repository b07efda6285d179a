"""What trials teach about schedules that were not measured, of the same kernel and of those like it.

    DEV=CPU python tools/bench_correction.py benchmarks/records-{mobilenet-v1,validation}-cpu.jsonl.gz \\
        --checkpoint autotune/data/guide-cpu --json benchmarks/correction-cpu.json

Of each kernel on record some trials are drawn and told to a search, with both baselines; with `relatives` all trials of the other
kernels, too. Then the search orders the kernel's other schedules. Nothing is measured. Kernels of few trials, those
without a sum, and the corpus's training kernels are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from autotune import corpus
from autotune.compiler import Renderer, default_device, renderer_of
from autotune.errors import IllegalAction
from autotune.experiments.ablations import ABLATIONS
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel
from autotune.records import BASELINES, Records, Trial
from autotune.records.exchange import import_
from autotune.search.mixed import MixedSearch
from autotune.space import root_state, state_after
from sims.metrics import pairwise_accuracy, top_k

TOLD = (0, 4, 8)  # trials of the kernel itself
REDUCES = " / "  # in the name of a kernel that sums
LEAST = 12  # trials of a kernel that is judged
SEARCHES = {"nothing": ABLATIONS["no-correction"], "own": ABLATIONS["no-relatives"], "relatives": MixedSearch}
Histories = dict[str, tuple[Kernel, list[Trial]]]


def histories_of(path: Path, renderer: Renderer) -> Histories:
    """The timed trials of each kernel of an exported records file that is no training kernel; each binary once."""
    training = {k.key for k in corpus.load("train")}
    with tempfile.TemporaryDirectory(prefix="tinygrad-autotune-correction-") as folder:
        text = Path(folder) / "records.jsonl"
        text.write_bytes(gzip.decompress(path.read_bytes()))
        with closing(Records(Path(folder) / "records.db")) as records:
            import_(records, text)
            (fingerprint,) = records.fingerprints()
            return {
                kernel.key: (kernel, list(_distinct(kernel, records.history(kernel.key, fingerprint).trials, renderer)))
                for kernel in records.kernels()
                if kernel.key not in training and REDUCES in kernel.name
            }


def _distinct(kernel: Kernel, trials: list[Trial], renderer: Renderer) -> Iterator[Trial]:
    seen: set[str] = set()
    for trial in trials:
        if trial.seconds is None or trial.code_hash in seen:
            continue
        try:
            state_after(kernel, trial.schedule, renderer)
        except IllegalAction:
            continue
        seen.add(trial.code_hash)
        yield trial


def judge(
    name: str, kernel: Kernel, trials: list[Trial], told: int, guide: Guide, renderer: Renderer, seed: int
) -> dict[str, float]:
    """How the search orders what it was not told of."""
    search = SEARCHES[name](kernel, renderer, seed, guide)
    own = [t for t in trials if t.kind == "trial"]
    order = kernel.rng(seed).permutation(len(own))
    search.tell([t for t in trials if t.kind in BASELINES] + [own[i] for i in order[:told]])
    rest = [own[i] for i in order[told:]]
    said = search._corrected([state_after(kernel, t.schedule, renderer) for t in rest]).mean(0)
    times, group = np.log2([t.seconds for t in rest]), np.zeros(len(rest), int)
    return {"pairwise": pairwise_accuracy(said, times, group), "top-1": top_k(said, times, group, 1),
            "top-3": top_k(said, times, group, 3)}  # fmt: skip


def bench(histories: Histories, guide: Guide, renderer: Renderer, seeds: int) -> dict[str, Any]:
    """Means over kernels and seeds, by what was told."""
    assert guide.memory is not None
    own = guide.memory.copy()
    for kernel, trials in histories.values():
        own.add(
            root_state(kernel, renderer),
            [(t.schedule, t.seconds) for t in trials if t.kind == "trial" and t.seconds is not None],
        )
    guide.memory = own
    judged = [(k, ts) for k, ts in histories.values() if sum(t.kind == "trial" for t in ts) >= LEAST]
    scores = []
    for name in SEARCHES:
        for told in TOLD:
            rows = [judge(name, k, ts, told, guide, renderer, s) for s in range(seeds) for k, ts in judged]
            means = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
            scores.append({"corrected by": name, "own trials": told, **means})
    return {"kernels": len(judged), "seeds": seeds, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="exported (`python -m autotune export`) and gzipped")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = default_device()
    renderer = renderer_of(device)
    result: dict[str, Any] = {"device": device, "records": {}}
    for path in args.records:
        guide = Guide.load(find_checkpoint(args.checkpoint, device, None))
        result["records"][path.name] = bench(histories_of(path, renderer), guide, renderer, args.seeds)
        print(path.name, json.dumps(result["records"][path.name], indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
