"""The commands that move records about and check them: `merge`, `export`, `import`, `verify`."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path

from tqdm import tqdm

from autotune.compiler import default_device, fingerprint
from autotune.errors import DeviceError
from autotune.kernel import Schedule, schedule_to_json
from autotune.measuring import noise
from autotune.measuring.recheck import SLOWER, Checked, choose, recheck
from autotune.measuring.runner import NOISE_FLOOR, Refuted, Runner, commit
from autotune.records import Records, fingerprint_id, foreign
from autotune.records.exchange import describe, export, import_, merge
from autotune.script import say
from autotune.strict import one_line
from autotune.winners import Winners


def merge_command(args: argparse.Namespace) -> int:
    with contextlib.closing(Records(args.records)) as records:
        for path in args.files:
            _tell(records, f"{path}: {merge(records, path)}")
    return 0


def import_command(args: argparse.Namespace) -> int:
    with contextlib.closing(Records(args.records)) as records:
        _tell(records, f"{args.file}: {import_(records, args.file)}")
    return 0


def _tell(records: Records, line: str) -> None:
    print(line)
    try:
        own = fingerprint(default_device())
    except DeviceError as error:  # records may be moved about where nothing can be tuned
        print(f"which of them serve here is not known: {error}", flush=True)
        return
    print(foreign.summary(foreign.others(records, own)), flush=True)


def export_command(args: argparse.Namespace) -> int:
    with contextlib.closing(Records(args.records, read_only=True)) as records:
        print(f"{args.file}: wrote {describe(export(records, args.file))}")
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Exit status 1 if any schedule does not hold: that goes on record, and it is served no more. A time may move."""
    device = default_device()
    own = fingerprint_id(fingerprint(device))
    with contextlib.closing(Records(args.records, read_only=True)) as records:
        claims = choose(records, own, args.count, args.seed)
    if not claims:
        print(f"{args.records} holds nothing for {device} (fingerprint {own}); tune a script first")
        return 0
    checked: list[Checked] = []
    seen: set[tuple[str, Schedule]] = set()
    with (
        contextlib.closing(Runner(device)) as runner,
        contextlib.closing(Records(args.records)) as records,
        tqdm(total=len(claims), desc="verifying", unit="record") as bar,
    ):

        def tell(one: Checked) -> None:
            if not one.holds:
                commit(records, runner, one.claim.kernel, [one.now])
            print(_line(one), flush=True)
            checked.append(one)
            bar.update()

        winners = Winners(records, runner)
        while claims:
            before = len(checked)
            recheck(claims, runner, tell)
            checked[before:] = [_beside(c, winners) if c.claim.winner and c.slower else c for c in checked[before:]]
            seen |= {c.name for c in claims}
            kernels = {key for key, _ in seen}
            # where a winner is served no more, an earlier one is: nobody has looked at that
            claims = [c for c in choose(records, own, None, args.seed)
                      if c.winner and c.kernel.key in kernels and c.name not in seen]  # fmt: skip
            bar.total += len(claims)
    wrong, slower = sum(not c.holds for c in checked), sum(c.slower for c in checked)
    unknown = sum(not c.judged for c in checked)
    print(f"{len(checked)} checked, of them winners: {sum(c.claim.winner for c in checked)}; no longer right: {wrong}; "
          f"right, but slower than recorded by more than {SLOWER - 1:.0%}: {slower}"
          + (f"; could not be looked at: {unknown}" if unknown else ""))  # fmt: skip
    if wrong:
        say("what `export-beam` wrote is not withdrawn: run it again")
    return 1 if wrong else 0


def noise_command(device: str, path: Path) -> None:
    """Measure and keep how far apart timings of the same kernel come out; later tuning asks its winners for more than that."""
    print(
        f"{device}: {noise.REPEATS} comparisons of each kernel with itself; the floor is their {noise.QUANTILE:.0%} quantile"
    )
    print(f"{'kernel':>12} {'median':>8} {'floor':>8} {'worst':>8}")
    with contextlib.closing(Runner(device)) as runner, contextlib.closing(Records(path)) as records:
        records.add_fingerprint(runner.fields)
        lengths = noise.measure_noise(runner, tell=_tell_noise)
        records.add_noise(runner.fingerprint, noise.curve_of(lengths))
    if len(lengths) < len(noise.SIZES):
        say("longer kernels could not be measured here: the last floor stands for them too")


def _tell_noise(length: noise.Length) -> None:
    median, worst = statistics.median(length.differences), max(length.differences)
    print(f"{length.seconds * 1e3:9.3f} ms {median:8.2%} {length.floor:8.2%} {worst:8.2%}", flush=True)


def _beside(one: Checked, winners: Winners) -> Checked:
    """Hold a winner that has become slower against hand-coded and print what becomes of it; returns what is known of it then."""
    kernel = one.claim.kernel
    try:
        final = winners.again(kernel, one.claim.schedule)
    except Refuted as refuted:
        failed = Checked(one.claim, refuted.trial)
        print(_line(failed), flush=True)
        return failed
    if final is None:
        what = "could not be timed beside hand-coded"
    else:
        stays = final.accepted or final.noise > NOISE_FLOOR
        what = f"{final.ratio:.2f} of hand-coded's time now, {'stays' if stays else 'and is served no more'}"
    print(f"{kernel.name}: {what}", flush=True)
    return one


def _line(one: Checked) -> str:
    kind, was = "winner" if one.claim.winner else "trial", f"{one.claim.seconds * 1e3:8.3f} ms"
    words = json.dumps(schedule_to_json(one.claim.schedule), separators=(",", ":"))
    if one.now.seconds is None:
        return (
            f"{kind:6} {one.claim.kernel.name[:34]:34} {one.now.verdict:14} {was}  {words}  {one_line(one.now.detail)}"
        )
    now = f"{one.now.seconds * 1e3:8.3f} ms"
    return f"{kind:6} {one.claim.kernel.name[:34]:34} {'slower' if one.slower else 'ok':14} {was} -> {now} {one.ratio:5.2f}  {words}"
