"""What the examples share: their options, tuning with a control, and whole-program latency."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import autotune
from autotune import latency
from autotune.api import check_checkpoint
from autotune.budget import Budget
from autotune.capture import Program
from autotune.cli import check_output, write_json
from autotune.compiler import default_device, renderer_of
from autotune.errors import UsageError, status_of
from autotune.finetune import fine_tune
from autotune.guide import Guide, find_checkpoint
from autotune.kernel import Kernel
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.runner import Refuted, Runner, Unprepared
from autotune.records import History, Records, default_path
from autotune.report import Report
from autotune.search import DEFAULT, NEEDS_GUIDE, STRATEGIES
from autotune.strict import at_least
from autotune.tuner import Tuner

# what only one mode has a use for, and its default
OF_INFER = {"trials": 16, "seconds": None, "control": False, "beam": 0, "json": None, "pytorch": False}
OF_TRAIN = {"minutes": 5.0}


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--infer", action="store_true", help="tune this network's kernels and time the whole network")
    mode.add_argument("--train", action="store_true", help="fine-tune the policy to this network's kernels")
    parser.add_argument(
        "--trials",
        type=int,
        default=OF_INFER["trials"],
        help="trials, times the number of kernels, for all together (default 16)",
    )
    parser.add_argument("--seconds", type=float, help="stop tuning after this time")
    parser.add_argument("--records", type=Path, default=default_path(), help="records file")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="default: the newest under runs/, of `make train` or --train, else the shipped one",
    )
    parser.add_argument("--strategy", default=DEFAULT, choices=list(STRATEGIES))
    parser.add_argument("--control", action="store_true", help="also let random schedules search, with as many trials")
    parser.add_argument("--beam", type=int, default=0, help="also time tinygrad's BEAM=N (takes minutes)")
    parser.add_argument("--minutes", type=float, default=OF_TRAIN["minutes"], help="of --train")
    parser.add_argument("--seed", type=at_least(0, int), default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--serve", choices=("default", "tuned", "beam", "pytorch"), help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """What would be refused in the end is refused before the network is built. Raises UsageError."""
    check_output(args.json)
    given, of_other = vars(args), OF_INFER if args.train else OF_TRAIN
    if unused := [name for name, default in of_other.items() if given.get(name, default) != default]:
        why = "infer: --train makes a checkpoint, and ends" if args.train else "train: --infer trains nothing"
        raise UsageError(f"--{unused[0]} is of --{why}")
    if args.train and args.strategy not in NEEDS_GUIDE:
        raise UsageError(f"strategy {args.strategy!r} uses no checkpoint, so there is nothing to train")
    check_checkpoint(args.checkpoint, args.strategy)


def find_guide(args: argparse.Namespace) -> Guide | None:
    """The checkpoint to use; None for a strategy that needs none."""
    if args.strategy not in NEEDS_GUIDE:
        return None
    path = find_checkpoint(args.checkpoint, default_device())
    print(f"checkpoint {path}")
    return Guide.load(path)


def infer(args: argparse.Namespace, program: Program, label: str) -> None:
    """Tune, print the table, with --control hold the result against random schedules, and time the whole program. What is known
    is in the file of --json after each of these."""
    guide = find_guide(args)
    report = autotune.tune(program, records=args.records, trials=args.trials, seconds=args.seconds, strategy=args.strategy,
                           checkpoint=guide, seed=args.seed)  # fmt: skip
    print(report.table())
    figures = {"program": label, "trials": args.trials, "strategy": args.strategy, "tune": report.to_json()}
    write_json(args.json, figures)
    if args.control:
        figures["control"] = control(args, report)
        write_json(args.json, figures)
    figures["latency"] = whole_program(args, label)
    figures["peak_gflops"] = latency.core_peak() / 1e9
    write_json(args.json, figures)


def control(args: argparse.Namespace, report: Report) -> dict[str, float]:
    """Random schedules from empty records, as many a kernel as the tuned ones had on average; then what is served of both, and
    hand-coded, in one interleaved timing per kernel.

    Returns milliseconds summed over calls, the worst kernel's ratio to hand-coded, and trials of both.
    """
    device = default_device()
    results, runner = [r for r in report.kernels if not r.refused], Runner(device)
    with tempfile.TemporaryDirectory() as folder:
        tuned, random = Records(args.records), Records(Path(folder) / "control.db")
        spent = sum(made_of(tuned.history(r.kernel.key, runner.fingerprint)) for r in results)
        trials = max(1, math.ceil(spent / max(1, len(results))))
        tuner = Tuner(random, runner, renderer_of(device), trials=trials, strategy="random", seed=args.seed)
        made, _ = tuner.run(
            [r.kernel for r in results], {r.kernel.key: r.calls for r in results}, Budget(trials * len(results))
        )
        bar = tqdm(results, desc="tuned, random, hand-coded")
        rows = {r.kernel.key: row for r in bar if (row := three_way(r.kernel, tuned, random, runner)) is not None}
    runner.close()
    if not rows:
        raise UsageError("none of the kernels could be timed, so there is nothing to compare")
    sums = np.array([r.calls * np.array(rows[r.kernel.key]) for r in results if r.kernel.key in rows]).sum(0)
    tuned_ms, random_ms, hand_ms = (1e3 * sums).tolist()
    worst, drawn = max(row[0] / row[2] for row in rows.values()), sum(r.trials for r in made)
    print(f"one interleaved run of {len(rows)} kernels, sum over calls: hand-coded {hand_ms:.2f} ms, random {random_ms:.2f} ms "
          f"({random_ms / hand_ms:.3f} of hand-coded, {drawn} trials), {args.strategy} {tuned_ms:.2f} ms ({tuned_ms / hand_ms:.3f} of "
          f"hand-coded, {tuned_ms / random_ms:.3f} of random, {spent} trials); worst kernel {worst:.3f} of hand-coded")  # fmt: skip
    return {"hand_coded_ms": hand_ms, "random_ms": random_ms, "tuned_ms": tuned_ms, "worst": worst,
            "trials": spent, "random_trials": drawn}  # fmt: skip


def made_of(history: History) -> int:
    """All trials of a kernel that tuning has heard of: of earlier runs, fine-tuning and beam searches, too."""
    return sum(trial.kind in ("trial", "answer") for trial in history.trials)


def three_way(kernel: Kernel, tuned: Records, random: Records, runner: Runner) -> list[float] | None:
    """Seconds of (tuned, random, hand-coded), each of what is served; hand-coded's where nothing is. None, and a line, where
    they cannot be timed."""
    hand = tuned.history(kernel.key, runner.fingerprint).baselines["hand_coded"].schedule
    finals = [records.served(runner.fingerprint, PROTOCOL, kernel.key).get(kernel.key) for records in (tuned, random)]
    try:
        samples = runner.duel(kernel, [*(hand if f is None else f.schedule for f in finals), hand, hand])
    except (Refuted, Unprepared) as why:
        tqdm.write(f"{kernel.name} is left out of the comparison: {why}", file=sys.stderr)
        return None
    *medians, first, second = (statistics.median(s) for s in samples)
    floor = min(first, second)
    return [floor if f is None else m for f, m in zip(finals, medians, strict=True)] + [floor]


def train(args: argparse.Namespace, program: Program, name: str) -> None:
    """Train the checkpoint further on this network's kernels, measured here; later --infer finds the result."""
    device, guide = default_device(), find_guide(args)
    assert guide is not None  # `check` has seen to it
    best = fine_tune(program.for_device(device), device, Records(args.records), guide, args.minutes, args.seed, name)
    print(f"fine-tuned checkpoint: {best}")


def whole_program(args: argparse.Namespace, label: str) -> dict[str, dict[str, float | None]]:
    """Latency under TinyJit by default, tuned, and under BEAM or in PyTorch if asked, in fresh processes, interleaved."""
    command = [sys.executable, *sys.argv]
    settings = {"default": quiet(), "tuned": quiet()}
    if args.beam:
        settings["beam"] = {**quiet(args.beam), "IGNORE_BEAM_CACHE": "1"}
    if "pytorch" in args and args.pytorch:  # not every example has a counterpart there
        settings["pytorch"] = quiet()
    variants = {name: latency.Variant([*command, "--serve", name], env) for name, env in settings.items()}
    found = latency.compare(variants)
    base, figures = found["default"], {}
    for name, result in found.items():
        # PyTorch's net has weights of its own
        difference = None if name == "pytorch" else float(np.abs(result.output - base.output).max())
        figures[name] = {"ms": result.seconds * 1e3, "largest_difference": difference, "start_seconds": result.started}
        off = "" if difference is None else (f", largest difference of outputs {difference:.2e} "
                                             f"(outputs up to {np.abs(base.output).max():.2e})")  # fmt: skip
        print(f"{label}, {name:8} {result.seconds * 1e3:9.2f} ms  {result.seconds / base.seconds:6.3f} of default, ready in "
              f"{result.started:.0f} s{off}")  # fmt: skip
    return figures


def quiet(beam: int = 0) -> dict[str, str]:
    """An environment in which tinygrad prints nothing, and searches as asked here, whatever the user's own says: inside of a
    TinyJit, JITBEAM goes before BEAM."""
    return {"DEBUG": "0", "BEAM": str(beam), "JITBEAM": str(beam)}


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[None]:
    """The schedules of the variant that this child serves."""
    with autotune.apply(args.records) if args.serve == "tuned" else contextlib.nullcontext():
        yield


def main(body: Callable[[], None]) -> int:
    """Run an example; errors that a user can mend are one line."""
    told = "every finished trial is in the records, run the same command to go on"
    return status_of(Path(sys.argv[0]).name, body, told)
