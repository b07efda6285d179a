"""The command line: `python -m autotune tune|run|report|collect|export-beam|merge|export|import|verify|replay|devices`.

Whatever goes wrong in a way a user can mend is one line on stderr: exit status 2 for a wrong command, 1 for a failure.
Results go to stdout, everything about the way there to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from autotune import corpus
from autotune.api import check_checkpoint, guide_for, tune
from autotune.cli_collect import SPLIT, collect_command
from autotune.cli_devices import devices_command
from autotune.cli_records import export_command, import_command, merge_command, verify_command
from autotune.collect import DEFAULT as COLLECTING
from autotune.collect import STRATEGIES as COLLECTORS
from autotune.compiler import default_device, fingerprint, renderer_of, without_beam
from autotune.errors import UsageError, status_of
from autotune.finetune import fine_tune
from autotune.guide import Guide
from autotune.install import apply, export_beam
from autotune.measuring.bench import PROTOCOL
from autotune.measuring.recheck import ENOUGH
from autotune.programs import PROGRAMS
from autotune.records import Records, default_path, fingerprint_id, foreign
from autotune.report import result_of, table_of
from autotune.script import (
    CAPTURE_SECONDS,
    capture_script,
    check_captured,
    check_script,
    left_out,
    run_script,
    say,
)
from autotune.search import DEFAULT, NEEDS_GUIDE, STRATEGIES
from autotune.strict import at_least

CAPTURE_HELP = "stop the script after this long and tune what it ran so far (default: %(default)g)"
CHECKPOINT_HELP = (
    "what was learned (default: the newest under runs/, of `make train` or --finetune, else the shipped one)"
)
INTERRUPTED = 130  # status of a script that Ctrl-C has ended, as a shell has it
VERIFY_HELP = f"how many (default: all that are served, and {ENOUGH} at least)"
STRATEGY_HELP = f"one of {', '.join(STRATEGIES)} (default: %(default)s)"
COLLECTORS_HELP = f"they take turns at each kernel: {', '.join(COLLECTORS)} (default: {', '.join(COLLECTING)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = make_parser().parse_args(argv)
    told = "every finished trial is on record, the same command goes on from there"
    return status_of("autotune", lambda: args.command(args), told)


# **** the options ****


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m autotune", description="Faster tinygrad programs. DEV picks the device.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, records: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=function)
        if records:
            sub.add_argument(
                "--records", type=Path, default=default_path(), metavar="FILE", help="default: %(default)s"
            )
        return sub

    tuning = command("tune", tune_command, "run a script, then search for faster schedules of the kernels it ran")
    _add_tuning_options(tuning)
    running = command("run", run_command, "run a script with its tuned schedules; unknown kernels run as ever")
    for sub in (tuning, running):
        sub.add_argument("script", type=Path, metavar="SCRIPT")
        sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="handed to the script")
    reporting = command("report", report_command, "show what is on record for this device")
    reporting.add_argument("--json", type=Path, metavar="OUT", help="also write it there")
    exporting = command("export-beam", export_beam_command, "put the tuned schedules into tinygrad's own BEAM cache")
    exporting.add_argument(
        "--beam", type=at_least(1, int), required=True, metavar="N", help="for programs under BEAM=N"
    )
    _add_collecting_options(command("collect", collect_command, "measure schedules of many kernels, to learn from"))
    _add_records_commands(command)
    replaying = command("replay", replay_command, "run a recorded experiment again", records=False)
    replaying.add_argument(
        "run", type=Path, metavar="RUN", help="its directory, such as runs/3, or a file in which one was kept"
    )
    replaying.add_argument("--live", action="store_true", help="measure again, and report each difference")
    listing = command("devices", devices_command, "list the devices that tinygrad can use here")
    listing.add_argument(
        "--noise", action="store_true", help="also compare kernels with themselves, and keep the result"
    )
    return parser


def _add_records_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    merging = command("merge", merge_command, "take over what other records files hold; nothing is added twice")
    merging.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a records file of another machine or run")
    exporting = command("export", export_command, "write all records as JSON lines, to hand them on")
    exporting.add_argument("file", type=Path, metavar="OUT")
    importing = command("import", import_command, "take over such an export, all of it or nothing")
    importing.add_argument("file", type=Path, metavar="IN")
    verifying = command("verify", verify_command, "compile, verify and time recorded schedules again, winners first")
    verifying.add_argument("-n", dest="count", type=at_least(1, int), metavar="N", help=VERIFY_HELP)
    verifying.add_argument("--seed", type=at_least(0, int), default=0, metavar="S", help="of the choice (default: 0)")


def _add_collecting_options(collecting: argparse.ArgumentParser) -> None:
    count, minutes = at_least(1, int), at_least(0.0, float)

    def option(name: str, **settings: Any) -> None:
        collecting.add_argument(name, **settings)

    option("--script", type=Path, metavar="FILE", help="collect the kernels that this script runs, not the corpus's")
    option(
        "--program", choices=sorted(PROGRAMS), metavar="NAME", help=f"or those of one of {', '.join(sorted(PROGRAMS))}"
    )
    option("--split", choices=corpus.SPLITS, help=f"of the corpus (default: {SPLIT})")
    option("--unseen", action="store_true", help="leave out kernels of the corpus of which trials ship for this device")
    option("--kernels", type=count, metavar="N", help="only so many of them, as the seed draws them (default: all)")
    option("--per-kernel", type=count, default=24, metavar="N", help="trials of each, in all (default: %(default)s)")
    option("--minutes", type=minutes, default=60.0, metavar="M", help="stop after this long (default: %(default)g)")
    option("--strategies", nargs="+", choices=COLLECTORS, default=COLLECTING, metavar="NAME", help=COLLECTORS_HELP)
    option("--checkpoint", type=Path, metavar="FILE", help=CHECKPOINT_HELP)
    option("--seed", type=at_least(0, int), default=0, metavar="S", help="of order and schedules (default: 0)")


def _add_tuning_options(tuning: argparse.ArgumentParser) -> None:
    count, seconds, minutes = at_least(0, int), at_least(0.001, float), at_least(0.0, float)

    def option(name: str, **settings: Any) -> None:
        tuning.add_argument(name, **settings)

    option(
        "--trials",
        type=count,
        default=16,
        metavar="N",
        help="trials, times the number of kernels (default: %(default)s)",
    )
    option("--seconds", type=seconds, metavar="S", help="stop searching after this long (default: no limit)")
    option(
        "--beam",
        type=count,
        default=0,
        metavar="N",
        help="then go on by beam search of width N, beyond --trials, to its end or that of --seconds",
    )
    option(
        "--finetune",
        type=minutes,
        default=0.0,
        metavar="M",
        help="first train the guide's policy on the script's kernels for M minutes (default: not)",
    )
    option("--capture-seconds", type=seconds, default=CAPTURE_SECONDS, metavar="S", help=CAPTURE_HELP)
    option("--strategy", choices=list(STRATEGIES), default=DEFAULT, metavar="NAME", help=STRATEGY_HELP)
    option("--checkpoint", type=Path, metavar="FILE", help=CHECKPOINT_HELP)
    option("--seed", type=count, default=0, metavar="N", help="of all sampling (default: %(default)s)")
    option("--json", type=Path, metavar="OUT", help="also write the result there")


# **** the commands ****


def tune_command(args: argparse.Namespace) -> int:
    """Everything that may be wrong with the command itself is found before the script is run."""
    check_script(args.script)
    if args.finetune and args.strategy not in NEEDS_GUIDE:
        raise UsageError(f"strategy {args.strategy!r} uses no checkpoint, so there is nothing to fine-tune")
    check_checkpoint(args.checkpoint, args.strategy)
    check_output(args.json)
    device = default_device()
    description = fingerprint(device)
    records = Records(args.records)
    with contextlib.closing(records), without_beam():  # neither the script nor our own nets shall be searched by BEAM
        records.add_fingerprint(description)  # a read-only file or a full disk is noticed now
        guide = guide_for(args.strategy, args.checkpoint, device)
        program = capture_script(args.script, args.arguments, args.capture_seconds)
        kernels = program.for_device(device)
        check_captured(program, device, args.script)
        calls = sum(program.calls[k.key] for k in kernels)
        seen = f"{device}, distinct kernels: {len(kernels)}, calls: {calls}{left_out(program, device)}"
        say(f"{seen}; trials are kept in {args.records}")
        if args.finetune and guide is not None:
            guide = Guide.load(fine_tune(kernels, device, records, guide, args.finetune, args.seed, args.script.stem))
        report = tune(program, records=records, trials=args.trials, seconds=args.seconds, strategy=args.strategy,
                      checkpoint=guide, seed=args.seed, beam=args.beam)  # fmt: skip
    print(report.table(), flush=True)
    if report.stopped:
        rest = "the beam had ended" if args.beam else "every kernel had its answer"
        what = f"with {report.left} trials left" if report.left else f"before {rest}"
        say(f"stopped by --seconds {what}; the same command goes on from there")
    write_json(args.json, report.to_json())
    return 0


def run_command(args: argparse.Namespace) -> int:
    """The script's own exit status is passed on."""
    check_script(args.script)
    device = default_device()
    renderer_of(device)
    with contextlib.closing(Records(args.records, read_only=True)) as records, apply(records) as applied:
        end: SystemExit | None = None
        try:
            run_script(args.script, args.arguments)
        except SystemExit as raised:
            end = raised
        except KeyboardInterrupt:
            say(f"{args.script} was interrupted")
            end = SystemExit(INTERRUPTED)
    nothing = f"; {args.records} holds nothing for them on {device}" if applied.plain and not applied.tuned else ""
    say(f"{applied.tuned} kernels ran tuned, {applied.plain} as tinygrad would run them{nothing}")
    if end is not None:
        raise end
    return 0


def report_command(args: argparse.Namespace) -> int:
    check_output(args.json)
    device = default_device()
    description = fingerprint(device)
    own = fingerprint_id(description)
    with contextlib.closing(Records(args.records, read_only=True)) as records:
        served = records.served(own, PROTOCOL)
        known = [k for k in records.kernels() if k.key in served or records.history(k.key, own).trials]
        results = [result_of(records, own, k) for k in known]
        others = foreign.others(records, description)
    if results:
        print(table_of(results, calls=False), flush=True)
    else:
        print(f"{args.records} holds nothing for {device} (fingerprint {own}); tune a script first")
    if others:
        print("\n" + foreign.table(others), flush=True)
    rows = [{**r.to_json(), "ratio": r.ratio} for r in results]
    found = {"device": device, "fingerprint": own, "kernels": rows, "foreign": [asdict(f) for f in others]}
    write_json(args.json, found)
    return 0


def export_beam_command(args: argparse.Namespace) -> int:
    with contextlib.closing(Records(args.records, read_only=True)) as records:
        count = export_beam(records, args.beam)
    device = default_device()
    if count:
        print(
            f"{count} schedules exported: a program under BEAM={args.beam} on {device} uses them, and searches only other kernels"
        )
    else:
        print(f"{args.records} holds nothing for {device}, nothing was exported; tune a script first")
    return 0


def replay_command(args: argparse.Namespace) -> int:
    if not args.run.exists():
        raise UsageError(f"{args.run} is no directory of a recorded run; they are under runs/")
    from autotune.experiments import replay  # here, because it imports sacred

    return replay.main(args.run, args.live)


# **** what can be wrong with a command ****


def check_output(path: Path | None) -> None:
    """Raises UsageError where the file that --json names could not be written in the end."""
    if path is None:
        return
    if path.exists():
        writable = not path.is_dir() and os.access(path, os.W_OK)
    else:
        writable = os.access(path.resolve().parent, os.W_OK | os.X_OK)  # to make a file takes both
    if not writable:
        raise UsageError(f"--json {path} cannot be written; name a file that may be, in a directory that exists")


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Into the file that --json names, if it names one."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1) + "\n")
