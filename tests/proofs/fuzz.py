"""Random schedules over the whole corpus, each compiled, verified and run: what does tinygrad make of them?

    DEV=CL python tests/proofs/fuzz.py --records fuzz-cl.db --count 10000 --json benchmarks/measuring-fuzz-cl.json

Three of four schedules are drawn from what the mask offers, the fourth from all that tinygrad takes (PADTO on a reduce
among them), to find its own wrong answers. An interrupted run goes on where it was, as long as what measures is the same: with
other sources another records file is begun. The table is made from that file.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autotune import compiler, corpus, measuring, space
from autotune.compiler import Renderer, default_device, renderer_of
from autotune.errors import IllegalAction
from autotune.kernel import Kernel, Schedule, schedule_to_json
from autotune.measuring.runner import Runner, commit
from autotune.records import Records, Trial
from autotune.space import ACTIONS, State, apply_to_state, legal_mask, root_state

MAX_ACTIONS = 6
KINDS = {"wrong_output": "wrong", "crashed": "refused", "timeout": "endless"}  # by the device; compiled for over 30 s
KNOWN_WRONG = "PADTO"  # on a reduce axis, which the mask never offers: see tests/autotune/test_known_bugs.py
SOURCES = (*sorted(Path(measuring.__file__).parent.glob("*.py")), Path(compiler.__file__), Path(space.__file__))


def records_path(path: Path) -> Path:
    """The path with a digest of what measures and of what offers in its name: a verdict of other sources tells nothing of these."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(source.read_bytes())
    return path.with_stem(f"{path.stem}-{digest.hexdigest()[:8]}")


def draw(kernel: Kernel, renderer: Renderer, count: int, seed: int) -> list[tuple[str, Schedule]]:
    """(how it was drawn, schedule), each schedule once; fewer where the space is small. One drawn both ways is an offered one."""
    rng = np.random.default_rng([seed, int(kernel.key[:8], 16)])
    found: dict[Schedule, str] = {}
    for i in range(4 * count):
        how = "any" if i % 4 == 3 else "offered"
        state = root_state(kernel, renderer)
        for _ in range(int(rng.integers(1, MAX_ACTIONS + 1))):
            state = _step(state, rng, how) or state
        if how == "offered" or state.schedule not in found:
            found[state.schedule] = how
        if len(found) == count:
            break
    return [(how, schedule) for schedule, how in found.items()]


def _step(state: State, rng: np.random.Generator, how: str) -> State | None:
    """One random action further; None where there is none."""
    legal = np.flatnonzero(legal_mask(state)[:-1]) if how == "offered" else np.arange(len(ACTIONS) - 1)
    for action in rng.permutation(legal):
        opt = ACTIONS[action]
        assert opt is not None  # STOP is left out above
        try:
            return apply_to_state(state, opt)
        except IllegalAction:  # only where all actions are tried
            continue
    return None


def fuzz(kernels: list[Kernel], records: Records, runner: Runner, count: int, seed: int, deadline: float) -> None:
    """Measure `count` schedules, the same number of each kernel; what is on record is not done again."""
    share = -(-count // len(kernels))
    for kernel in tqdm(kernels, desc=f"fuzz {runner.device}"):
        if time.monotonic() > deadline:
            return
        history = records.history(kernel.key, runner.fingerprint)
        if "hand_coded" not in history.baselines:
            commit(records, runner, kernel, runner.baselines(kernel))
        done = {t.schedule for t in history.trials if t.kind == "trial"}
        drawn = [(how, s) for how, s in draw(kernel, renderer_of(runner.device), share, seed) if s not in done]
        names = {schedule: how for how, schedule in drawn}
        keep = functools.partial(_commit, records, runner, kernel, names)
        runner.measure(kernel, [s for _, s in drawn], 0.0, keep)  # with a cutoff of 0 two samples are enough


def _commit(records: Records, runner: Runner, kernel: Kernel, names: dict[Schedule, str], trial: Trial) -> None:
    commit(records, runner, kernel, [Trial(**{**trial.__dict__, "strategy": names[trial.schedule]})])


def summary(records: Records, fingerprint: str, device: str) -> dict[str, Any]:
    """Counts per verdict, by how a schedule was drawn and by kind of Opt, every answer that was wrong, what the device refused to
    launch, and what never came to an end."""
    names = {k.key: k.name for k in records.kernels()}
    trials = [t for _, t in records.all_trials(fingerprint)]
    verdicts = {how: dict(Counter(t.verdict for t in trials if (t.strategy or t.kind) == how))
                for how in ("offered", "any", "unoptimized", "hand_coded")}  # fmt: skip
    opts = Counter(name for t in trials for name in {opt.op.name for opt in t.schedule})
    found: dict[str, list[dict[str, Any]]] = {"wrong": [], "refused": [], "endless": []}
    for t in trials:
        if (kind := KINDS.get(t.verdict)) is not None:
            found[kind].append({"kernel": t.kernel, "name": names[t.kernel], "drawn": t.strategy or t.kind,
                                "verdict": t.verdict, "schedule": schedule_to_json(t.schedule), "detail": t.detail,
                                "input_seed": t.input_seed})  # fmt: skip
    drawn = [t.kernel for t in trials if t.kind == "trial"]
    return {"device": device, "schedules": len(drawn), "kernels": len(set(drawn)), "verdicts": verdicts,
            "schedules_with": dict(sorted(opts.items())), **found}  # fmt: skip


def unknown(wrong: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a summary's wrong answers that no known bug explains: known are only schedules that the mask did not offer."""
    return [r for r in wrong if r["drawn"] != "any" or all(opt[0] != KNOWN_WRONG for opt in r["schedule"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--records", type=Path, help="default: runs/fuzz-DEV.db; a digest of the sources is added to the name"
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th kernel: N processes may share a file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, deadline = default_device(), time.monotonic() + 60 * args.minutes
    kernels = [k for split in corpus.SPLITS for k in corpus.load(split)]
    order = np.random.default_rng(args.seed).permutation(len(kernels))
    part, parts = map(int, args.part.split("/"))
    share = args.count // parts
    path = records_path(args.records or Path("runs") / f"fuzz-{device.lower()}.db")
    records, runner = Records(path), Runner(device, args.workers)
    records.add_fingerprint(runner.fields)
    try:
        fuzz([kernels[i] for i in order[part::parts]], records, runner, share, args.seed, deadline)
    finally:
        runner.close()
    found = summary(records, runner.fingerprint, device)
    print(json.dumps({**found, **{kind: len(found[kind]) for kind in ("wrong", "refused", "endless")}}, indent=1))
    for row in found["wrong"] + found["refused"] + found["endless"]:
        print(row["drawn"], row["name"], row["verdict"], row["schedule"], row["detail"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(1 if unknown(found["wrong"]) else 0)


if __name__ == "__main__":
    main()
