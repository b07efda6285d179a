"""`python -m autotune.experiments.curves`: how many trials each strategy needs, on kernels that were never trained on.

Each search starts from empty records and ends after `trials`; see `autotune/curves.py` for what they share. `with
part=runs/3` (or a run that was kept as a file) goes on from what an earlier run has measured and finished; what another
checkpoint has led is searched anew. A replay makes all searches again from the recorded trials, without a device; their
wall-clock seconds are its own, and not compared. `docs/benchmarks.md` holds the tables of programs, `docs/simulators.md` that
of the split.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from sacred.run import Run
from tqdm import tqdm

from agents.checkpoint import files_of, replacing
from autotune import corpus
from autotune.compiler import Renderer
from autotune.curves import Curve, Shared, pooled, search, summarise, table
from autotune.errors import UsageError
from autotune.experiments import (
    Session,
    check_counts,
    check_names,
    check_types,
    command_line,
    finished,
    make_experiment,
    without,
)
from autotune.experiments.ablations import ABLATIONS
from autotune.experiments.controls import LEARNED, SIMULATED, Controls
from autotune.experiments.inputs import keep, keep_guide, program_of, sample
from autotune.experiments.kept import unpack
from autotune.guide import Guide
from autotune.kernel import Kernel
from autotune.records.store import copy_records
from autotune.search import DEFAULT, NEEDS_GUIDE, POOLED, STRATEGIES, Strategy, make_strategy

# strategies whose kernels share their trials, and what searches each of these kernels: `auto-no-memory`, say
POOLS = {POOLED: POOLED, **{f"{POOLED}-{name}": name for name in (*ABLATIONS, *SIMULATED)}}
GUIDED = NEEDS_GUIDE | set(ABLATIONS) | set(SIMULATED) | set(POOLS)
PAIRS = {"more": int, "fewer": int, "guides": str}  # settings that are lists of pairs: what each tells of a strategy
experiment = make_experiment("curves")
DEFAULTS: dict[str, Any] = {
    "checkpoint": "",  # empty: the newest of `make train`, else the one that ships; "shipped": that one in any case
    "split": "held_out",  # or validation
    "kernels": 8,  # drawn from the split
    "program": "",  # one of programs.PROGRAMS, or a script, whose kernels are taken in place of the split's ...
    "least": 0.01,  # ... but those that take less than this share of its time
    "trials": 64,  # of each search ...
    "more": [],  # ... but of these: [strategy, trials]
    "strategies": ["mixed", "planner", "muzero", "sequential", "policy", "evolution", "random"],
    "seeds": 5,
    "fewer": [],  # seeds of these: [strategy, seeds]
    # checkpoints to compare, each as a strategy of its own: [name, checkpoint], and `name` among the strategies; `policy-mine`
    # searches as `policy` does, `auto-mine` as `auto`, whose kernels share their trials, and `mine` as one kernel of `auto`
    "guides": [],
    "part": "",  # an earlier run, or the file in which it was kept, whose trials and finished searches are taken over
}  # fmt: skip
experiment.add_config(DEFAULTS)
experiment.add_named_config("fast", {"kernels": 2, "trials": 3, "strategies": ["mixed", "random"], "seeds": 2})
# the comparison that `make bench` repeats: beam to its end, which is the same for every seed, and the random control to 256
experiment.add_named_config("bench", {
    "strategies": ["beam", "auto", "mixed", "policy", "ranker", "evolution", "random", "recipe"],
    "seeds": 3, "fewer": [["beam", 1], ["recipe", 1]],
    "more": [["beam", 1000], ["random", 256], ["recipe", 1]],
    "checkpoint": "shipped",
})  # fmt: skip
experiment.add_named_config("ablations", {  # each kernel by itself, so it has no relatives
    "strategies": ["mixed", *(name for name in ABLATIONS if name != "no-relatives"), "random"], "trials": 32, "seeds": 3, "checkpoint": "shipped",
})  # fmt: skip
experiment.add_named_config("simulators", {
    "strategies": ["auto", *(f"{POOLED}-{name}" for name in SIMULATED), "random"], "trials": 16, "seeds": 3, "checkpoint": "shipped",
})  # fmt: skip


def compare(session: Session, settings: dict[str, Any]) -> dict[str, Any]:
    """All searches; each is kept in a file of its own as soon as it is done."""
    settings = checked(settings)
    guide = Guide.load(keep_guide(session, settings["checkpoint"])) if GUIDED & set(settings["strategies"]) else None
    for name, path in settings["guides"].items():
        keep(Path(path), session.out / f"guide-{name}")
    if settings["part"]:
        take_over(Path(settings["part"]), session.out)
    kernels, calls = kernels_of(session, settings)
    searches = Searches(session, settings, kernels, calls, guide)
    curves = list(tqdm(searches.all(), desc="searches", total=searches.count))
    summary = summarise(curves, calls=calls)
    print(table(summary))
    return {"summary": summary, "calls": calls, "settings": without(settings, "part"),
            "curves": [asdict(c) for c in curves]}  # fmt: skip


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, pairs as dictionaries. Raises UsageError for what would fail only after the first searches."""
    settings = {**DEFAULTS, **settings}  # a run of an earlier version lacks what came later
    check_types(DEFAULTS, settings)
    settings = {**settings, **{key: _pairs(key, settings[key], kind) for key, kind in PAIRS.items()}}
    check_names("strategy", settings["strategies"], [*STRATEGIES, *POOLS, *ABLATIONS, *LEARNED, *settings["guides"]])
    if unknown := {*settings["more"], *settings["fewer"], *settings["guides"]} - set(settings["strategies"]):
        raise UsageError(f"settings for {', '.join(sorted(unknown))}, which is not among the strategies")
    if taken := {*settings["guides"]} & {*POOLS, *STRATEGIES, *ABLATIONS, *LEARNED}:
        raise UsageError(f"a checkpoint cannot be called {min(taken)}: that is a strategy; say {min(taken)}-mine")
    check_counts(settings, "trials", "seeds")
    for key in ("more", "fewer"):
        check_counts(settings[key], *settings[key])
    return settings


def _pairs(key: str, pairs: Sequence[Any], kind: type) -> dict[str, Any]:
    if all(isinstance(pair, list | tuple) and list(map(type, pair)) == [str, kind] for pair in pairs):
        return dict(pairs)
    raise UsageError(f"bad setting {key}: it is a list of pairs, each of a strategy and {kind.__name__}")


def take_over(part: Path, out: Path) -> None:
    """What an earlier run has measured and finished, its directory or the file in which it was kept; but for searches that were led
    by another checkpoint than this run's. Raises UsageError."""
    if not part.exists():
        raise UsageError(f"no run {part} to go on from; `part` names one of `runs/`, or a file of tools/keep_run.py")
    with tempfile.TemporaryDirectory(prefix="tinygrad-autotune-part-") as folder:
        if part.is_file():
            unpack(part, Path(folder))
            part = Path(folder)
            _unfold(part)
        alike = cache(partial(_led_alike, part, out))
        for path in part.glob("curve-*.json"):
            kept = _read(path)
            if kept is not None and not (out / path.name).exists() and alike(kept.strategy):
                shutil.copy(path, out / path.name)
        if (part / "records.db").exists() and not (out / "records.db").exists():
            copy_records(part / "records.db", out / "records.db")


def _led_alike(part: Path, out: Path, name: str) -> bool:
    """Whether both runs keep the same checkpoint for a strategy; so it is taken where the earlier one keeps none. What learns from the
    trials that ship may have learned from others."""
    if POOLS.get(name, name) in LEARNED:
        return False
    theirs, ours = guide_of(part, name), guide_of(out, name)
    return theirs is None or (ours is not None and theirs.read_bytes() == ours.read_bytes())


def guide_of(run: Path, name: str) -> Path | None:
    """What a run's directory keeps to lead a strategy: its own checkpoint, else, where it needs one, that of all; or nothing."""
    labels = [f"guide-{name}", *(["guide"] if name in GUIDED else [])]
    found = [path for label in labels if (path := files_of(run / label)[0]).exists()]
    return found[0] if found else None


def _unfold(part: Path) -> None:
    """The searches of a kept run, each into the file that the run itself had; but for those led by a checkpoint or by the trials that
    shipped then, neither of which is kept. Raises UsageError where there are none."""
    try:
        figures = json.loads((part / "result.json").read_text())["figures"]
        settings, curves = figures["settings"], figures["curves"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError("`part` holds no finished comparison: name a run of `curves`") from None
    led = {*GUIDED, *LEARNED, *dict(settings.get("guides", {}))}
    for curve in curves:
        if (name := curve["strategy"]) not in led:
            budget = dict(settings["more"]).get(name, settings["trials"])
            curve_file(part, name, curve["seed"], budget, curve["kernel"], None).write_text(json.dumps(curve))


def pools_of(guides: Mapping[str, str]) -> set[str]:
    """Strategies whose kernels share their trials, those of `guides` among them."""
    return {*POOLS, *(name for name in guides if name.startswith(f"{POOLED}-"))}


def curve_file(folder: Path, name: str, seed: int, budget: int, key: str, together: Mapping[str, int] | None) -> Path:
    """Where one search is kept: another budget is another search. So are other kernels or calls of these, where kernels share their
    trials: `together` is how often each of them is called."""
    label = f"curve-{name}-{seed}-{budget}-{key[:16]}"
    if together is not None:
        label += f"-{hashlib.sha256(json.dumps(sorted(together.items())).encode()).hexdigest()[:8]}"
    return folder / f"{label}.json"


def _made_here(path: Path, shared: Shared) -> bool:
    """Whether a search is kept, and beside the same baselines: times of another device are no match for ours."""
    kept = _read(path)
    return kept is not None and kept.hand_coded == shared.hand_coded


def _read(path: Path) -> Curve | None:
    """The search that a file holds; None where there is none that can be read."""
    try:
        return Curve(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _keep(path: Path, found: Curve) -> None:
    """Write one search: whole, or not at all."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(asdict(found)))


class Searches:
    """The searches of some kernels, each made once and kept in a file."""

    def __init__(self, session: Session, settings: dict[str, Any], kernels: Sequence[Kernel], calls: dict[str, int],
                 guide: Guide | None):  # fmt: skip
        self.session, self.settings, self.kernels, self.calls, self.guide = session, settings, kernels, calls, guide
        self.controls = Controls(session.device, session.renderer)
        self.controls.learn([POOLS.get(name, name) for name in settings["strategies"]])
        self.guides = {name: Guide.load(keep(Path(path), session.out / f"guide-{name}"))
                       for name, path in settings["guides"].items()}  # fmt: skip
        self.pools = pools_of(settings["guides"])
        self.seeds = {name: settings["fewer"].get(name, settings["seeds"]) for name in settings["strategies"]}
        self.count = sum(self.seeds.values()) * len(kernels)

    def all(self) -> Iterator[Curve]:
        """Kernel by kernel, since preparing one takes as long as some trials; those that share their trials last."""
        for seed in range(max(self.seeds.values())):
            names = [name for name in self.seeds if seed < self.seeds[name]]
            for kernel in self.kernels:
                yield from (self._alone(name, seed, kernel) for name in names if name not in self.pools)
            for name in names:
                if name in self.pools:
                    yield from self._together(name, seed)

    def _alone(self, name: str, seed: int, kernel: Kernel) -> Curve:
        path, budget = self._file(name, seed, kernel.key)
        shared = self._shared(kernel)
        if not _made_here(path, shared):
            self._forget()
            found = search(shared, name, self.session.renderer, seed, self._guide(name), budget, self._make)
            _keep(path, found)
        return Curve(**json.loads(path.read_text()))

    def _guide(self, name: str) -> Guide | None:
        return self.guides.get(name, self.guide)

    def _make(self, name: str, kernel: Kernel, renderer: Renderer, seed: int, guide: Guide | None) -> Strategy:
        if name in self.guides:
            own = name.partition("-")[0]
            return make_strategy(own if own in NEEDS_GUIDE else DEFAULT, kernel, renderer, seed, guide)
        return self.controls.make(POOLS.get(name, name), kernel, renderer, seed, guide)

    def _together(self, name: str, seed: int) -> list[Curve]:
        budget, paths = 0, []
        shared = [self._shared(k) for k in self.kernels]
        for kernel in self.kernels:
            path, budget = self._file(name, seed, kernel.key)
            paths.append(path)
        if not all(_made_here(path, own) for path, own in zip(paths, shared, strict=True)):
            self._forget()
            renderer, guide = self.session.renderer, self._guide(name)
            for curve in pooled(shared, self.calls, name, renderer, seed, guide, budget, self._make):
                _keep(self._file(name, seed, curve.kernel)[0], curve)
        return [Curve(**json.loads(path.read_text())) for path in paths]

    def _forget(self) -> None:
        """Each search pays for its own thinking: nothing is left of what earlier ones had predicted."""
        for guide in (self.guide, *self.guides.values()):
            if guide is not None:
                guide.forget()

    def _file(self, name: str, seed: int, key: str) -> tuple[Path, int]:
        budget = self.settings["more"].get(name, self.settings["trials"])
        together = self.calls if name in self.pools else None
        return curve_file(self.session.out, name, seed, budget, key, together), budget

    def _shared(self, kernel: Kernel) -> Shared:
        return Shared(kernel, self.session.records(), self.session.measurer)


def kernels_of(session: Session, settings: dict[str, Any]) -> tuple[list[Kernel], dict[str, int]]:
    """What is searched, most total time first, and how often each kernel is called. Of a program those that matter."""
    if settings["program"]:
        program = program_of(session, settings["program"])
        found, calls, least = list(program.kernels.values()), program.calls, settings["least"]
    else:
        found, least = sample(corpus.load(settings["split"]), settings["kernels"], 0), 0.0
        calls = {k.key: 1 for k in found}
    hand = {k: Shared(k, session.records(), session.measurer).hand_coded for k in tqdm(found, "baselines")}
    seconds = {k: calls[k.key] * 2.0**t for k, t in hand.items() if math.isfinite(t)}
    if refused := [k.name for k in found if k not in seconds]:
        print(f"left out, since they could not be measured: {', '.join(refused)}", file=sys.stderr)
    kernels = sorted((k for k, t in seconds.items() if t >= least * sum(seconds.values())), key=lambda k: -seconds[k])
    if not kernels:
        raise UsageError("no kernel is left to search: lower `least`, or name another program or more `kernels`")
    return kernels, {k.key: calls[k.key] for k in kernels}


@experiment.main
def run(_run: Run, _config: dict[str, Any]) -> dict[str, Any]:
    return finished(_run, _config, compare)["summary"]


if __name__ == "__main__":
    sys.exit(command_line(experiment, sys.argv[1:]))
