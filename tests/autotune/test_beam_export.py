"""Tuned schedules in tinygrad's own BEAM cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from running import DEVICE, array, records_with
from tinygrad import Context, Variable

import autotune
from autotune.compiler import Opt, OptOps, fingerprint, hand_coded, renderer_of
from autotune.errors import UsageError
from autotune.install import _beam_keys, export_beam, read_beam_cache, write_beam_cache
from autotune.measuring.bench import PROTOCOL
from autotune.records import Final, Trial, fingerprint_id

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, numpy as np
from tinygrad import Tensor
from tinygrad.codegen.opt import search
from running import launched
searches = []
original = search._try_compile
search._try_compile = lambda x: searches.append(x[0]) or original(x)
x = Tensor(np.arange(600, dtype=np.float32).reshape(30, 20)).realize()
with launched() as found:
    total = float((x * 3 - 1).numpy().sum())
print(json.dumps([len(searches), [[[o.op.name, o.axis, o.arg] for o in s] for s in found], total]))
"""


def test_beam_serves_an_exported_schedule_and_searches_nothing(tmp_path, monkeypatch):
    if DEVICE != "CPU":
        pytest.skip("the script below runs on CPU")
    env = {**os.environ, "CACHEDB": str(tmp_path / "cache.db"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'autotune'}", "DEV": "CPU",
           "PARALLEL": "0", "NUM_CPU_THREADS": "1"}  # fmt: skip

    def python(code: str, **more: str) -> list:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**env, **more}, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    x = array(30, 20)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    records_with(tmp_path / "r.db", program).close()
    export = ("from autotune.records import Records\nfrom autotune.install import export_beam\nimport sqlite3\n"
              f"records = Records({str(tmp_path / 'r.db')!r})\n"
              "from autotune.records import fingerprint_id\nfrom autotune.compiler import fingerprint\n"
              "own = fingerprint_id(fingerprint('CPU'))\n"
              "for table in ('trials', 'finals'): records.db.execute(f'UPDATE {table} SET fingerprint = ?', (own,))\n"
              "print(export_beam(records, 3))")  # fmt: skip
    assert python(export) == 1
    tuned = [["UPCAST", 0, 2], ["UPCAST", 0, 3]]
    assert python(SCRIPT, BEAM="3") == [0, [tuned], float((np.arange(600) * 3 - 1).sum())]
    assert python(SCRIPT, BEAM="0")[1] != [tuned]
    assert python(SCRIPT, BEAM="1")[0] > 0  # another width: it searches, so the script would have shown it


@pytest.mark.parametrize("rows", [40, Variable("rows", 2, 40).bind(17)])
def test_what_is_exported_has_the_key_that_beam_asks_for(monkeypatch, rows):
    """Of symbolic kernels, too, whose variables are on no device."""
    asked = []
    monkeypatch.setattr("tinygrad.codegen.opt.search.beam_search", lambda s, *_, **__: asked.append(s.ast.key) or s)
    x = array(40, 7)
    with autotune.capture() as program, Context(BEAM=2):
        (x[:rows] * 3).sum(0).realize()
    (kernel,) = program.kernels.values()
    assert {key["ast"] for key in _beam_keys(kernel.ast, 2, renderer_of(DEVICE))} == set(asked)


def test_an_export_that_tinygrad_would_not_keep_is_refused(tmp_path):
    x = array(31, 21)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    with Context(CACHELEVEL=0), pytest.raises(UsageError, match="CACHELEVEL"):
        export_beam(records_with(tmp_path / "r.db", program), 2)


def test_a_kernel_without_a_winner_is_exported_hand_coded(tmp_path, monkeypatch):
    x = array(31, 20)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    written = Counter()
    monkeypatch.setattr(
        "autotune.install.write_beam_cache", lambda ast, schedule, width, ren: written.update([(schedule, width)])
    )
    records = records_with(tmp_path / "r.db", program, accepted=False)
    (kernel,) = program.kernels.values()
    assert export_beam(records, 2) == 1 and written == {(hand_coded(kernel.ast, renderer_of(DEVICE)), 2): 1}
    own = fingerprint_id(fingerprint(DEVICE))
    assert own in records.fingerprints()
    records.db.execute("DELETE FROM trials")  # nothing is left but a hand-coded form that could not be prepared
    records.add_trial(own, Trial(kernel.key, (), "crashed", kind="hand_coded"), PROTOCOL)
    assert export_beam(records, 2) == 0 and written.total() == 1


def test_what_beam_has_found_itself_is_not_replaced_by_hand_coded(tmp_path, monkeypatch):
    """But by a winner. What was accepted here once and is served no more was put there by an earlier export."""
    monkeypatch.setattr("tinygrad.helpers.CACHEDB", str(tmp_path / "cache.db"))
    monkeypatch.setattr("tinygrad.helpers._db_connection", None)
    monkeypatch.setattr("tinygrad.helpers._db_tables", set())
    x = array(31, 24)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    (kernel,) = program.kernels.values()
    renderer, own = renderer_of(DEVICE), fingerprint_id(fingerprint(DEVICE))
    hand, found = hand_coded(kernel.ast, renderer), (Opt(OptOps.UPCAST, 0, 31),)
    assert hand != found and read_beam_cache(kernel.ast, 2, renderer) == set()
    write_beam_cache(kernel.ast, found, 2, renderer)
    records = records_with(tmp_path / "r.db", program, accepted=False)
    assert export_beam(records, 2) == 0 and read_beam_cache(kernel.ast, 2, renderer) == {found}
    assert export_beam(records, 3) == 1 and read_beam_cache(kernel.ast, 3, renderer) == {hand}
    records.add_trial(own, Trial(kernel.key, found, "ok", (1e-6,)), PROTOCOL)  # tried here, and not yet settled
    assert export_beam(records, 2) == 0 and read_beam_cache(kernel.ast, 2, renderer) == {found}
    for still in (True, False):
        records.add_final(own, Final(kernel.key, found, (1.0,), (2.0,), (2.0,), still, PROTOCOL))
    assert export_beam(records, 2) == 1 and read_beam_cache(kernel.ast, 2, renderer) == {hand}
    write_beam_cache(kernel.ast, (Opt(OptOps.UPCAST, 0, 12),), 2, renderer)
    accepted = records_with(tmp_path / "accepted.db", program)
    (winner,) = accepted.winners(own, PROTOCOL).values()
    assert export_beam(accepted, 2) == 1 and read_beam_cache(kernel.ast, 2, renderer) == {winner}


@pytest.mark.parametrize("hand_coded_runs", [True, False])
def test_a_winner_that_tinygrad_refuses_is_not_exported(tmp_path, monkeypatch, hand_coded_runs):
    """A program under BEAM would end in an error. Where hand-coded could not be measured either, nothing is known."""
    x = array(31, 22)
    with autotune.capture() as program:
        (x * 3 - 1).realize()
    written = []
    monkeypatch.setattr("autotune.install.write_beam_cache", lambda ast, schedule, *_: written.append(schedule))
    # 682 elements are no multiple of 7
    records = records_with(tmp_path / "r.db", program, winner=(Opt(OptOps.UPCAST, 0, 7),))
    (kernel,) = program.kernels.values()
    hand = hand_coded(kernel.ast, renderer_of(DEVICE))
    if not hand_coded_runs:
        own = fingerprint_id(fingerprint(DEVICE))
        records.add_trial(own, Trial(kernel.key, hand, "crashed", kind="hand_coded"), PROTOCOL)
    assert export_beam(records, 2) == len(written) == hand_coded_runs and written == [hand] * hand_coded_runs
