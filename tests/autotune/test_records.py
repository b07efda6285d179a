"""The file of all trials: what goes in comes out, in order, from several processes, and nothing else is accepted."""

from __future__ import annotations

import math
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rows import FIELDS, OTHER, TC, fill, final, trial
from tiny import U2, U4, add_one, kernel_of, symbolic, total
from tinygrad import Tensor

from autotune.compiler import Opt, OptOps
from autotune.errors import CodecError, RecordsError
from autotune.records import VERDICTS, History, Records, Trial, default_path, fingerprint_id
from autotune.records.rows import MAX_DETAIL, MAX_SAMPLES
from autotune.records.store import copy_records


def test_trials_come_back_whole_and_in_order(records):
    full = trial((U4, TC, Opt(OptOps.NOLOCALS)), compile_seconds=0.25, code_hash="abc", detail="é 'quoted'; DROP TABLE trials",
                 strategy="ppo", seed=7, verify_seconds=0.5, timing_seconds=1.5, input_seed=11)  # fmt: skip
    trials = [full, trial(samples=(0.1 + 0.2, 1e-300)), trial((), (), "timeout", kind="unoptimized")]
    own = fill(records, *trials)
    assert records.history(full.kernel, own).trials == trials
    assert [t for _, t in records.all_trials(own)] == trials
    stamps = [when for when, _ in records.all_trials(own)]
    assert stamps == sorted(stamps) and stamps[0] > 1.6e9


def test_devices_and_kernels_are_kept_apart(records):
    own, other = fill(records, trial()), records.add_fingerprint(OTHER)
    records.add_trial(other, trial((U2,)), 1)
    records.add_trial(own, replace(trial(), kernel="other"), 1)
    assert [t.schedule for t in records.history(add_one().key, other).trials] == [(U2,)]
    assert records.history(add_one().key, own).spent == 1 and records.history("none", own).trials == []
    assert records.fingerprints() == {own: FIELDS, other: OTHER} and own != other
    assert fingerprint_id(dict(reversed(list(FIELDS.items())))) == own == records.add_fingerprint(FIELDS)


def test_a_file_that_is_opened_again_holds_all(records):
    own = fill(records, trial())
    records.add_kernel(symbolic())
    records.add_kernel(symbolic())
    records.close()
    for read_only in (True, False):
        again = Records(records.path, read_only)
        assert again.history(add_one().key, own).trials == [trial()]
        assert [k.ast for k in again.kernels()] == [symbolic().ast]
        again.close()


@pytest.mark.parametrize("verdict", VERDICTS)
def test_each_verdict_is_stored(records, verdict):
    samples = (1e-6,) if verdict == "ok" else ()
    own = fill(records, trial(samples=samples, verdict=verdict))
    (found,) = records.history(add_one().key, own).trials
    assert found.verdict == verdict and found.seconds == (1e-6 if verdict == "ok" else None)


@pytest.mark.parametrize("typo", ["OK", "crash", "", "wrong-output"])
def test_other_verdicts_are_refused(records, typo):
    with pytest.raises(CodecError, match="verdict: .* is none of ok, illegal"):
        fill(records, trial(verdict=typo))
    assert records.all_trials(fingerprint_id(FIELDS)) == []


def test_history_by_hand():
    plain, hand = trial((), (9.0,), kind="unoptimized"), trial((U2,), (5.0, 7.0), kind="hand_coded")
    history = History([plain, hand])
    assert (history.spent, history.best) == (0, hand) and history.baselines == {
        "unoptimized": plain,
        "hand_coded": hand,
    }
    slow, failed, wrong = (
        trial((U4,), (1.0, 8.0, 9.0)),
        trial((TC,), (), "crashed"),
        trial((U2, U2), (), "wrong_output"),
    )
    history.trials += [slow, failed, wrong]
    assert (history.spent, history.best) == (3, hand)  # the median of 1, 8, 9 is 8: no luck with a minimum
    fast = trial((U4, U2), (5.9, 5.9, 100.0))
    history.trials.append(fast)
    assert (history.spent, history.best) == (4, fast)
    assert History().best is None and History([failed]).best is None


def test_finals_come_back_and_the_latest_on_each_schedule_counts(records):
    own = records.add_fingerprint(FIELDS)
    assert records.final("k", own) is None and records.winners(own) == {}
    records.add_final(own, final(True))
    assert records.final("k", own) == final(True) and records.winners(own) == {"k": (U4,)}
    assert records.final("k", own).ratio == 0.5
    records.add_final(own, final(True, (U2, U2)))
    assert records.winners(own) == {"k": (U2, U2)}
    records.add_final(own, final(False, (U2,)))  # refuses this one, and no other
    assert records.winners(own) == {"k": (U2, U2)} and records.final("k", own) == final(False, (U2,))
    records.add_final(own, final(False, (U2, U2)))
    assert records.winners(own) == {"k": (U4,)} and records.final("k", own, (U4,)) == final(True)
    records.add_final(own, final(False))
    assert records.winners(own) == {} and records.final("k", own, ()) is None
    records.add_final(own, final(True, (), "other"))
    assert records.served(own, 1, "other") == {"other": final(True, (), "other")} and records.served(own, 1, "k") == {}
    records.add_final(fingerprint_id(OTHER), final(True, (U2,)))
    assert records.winners(own) == {"other": ()} and records.winners(fingerprint_id(OTHER)) == {"k": (U2,)}


def test_a_winner_that_failed_when_it_was_looked_at_again_is_served_no_more(records):
    own = records.add_fingerprint(FIELDS)
    records.add_final(own, final(True))
    records.add_trial(own, Trial("k", (U4,), "ok", (1.0,), kind="recheck"), 2)
    assert records.winners(own) == {"k": (U4,)}
    records.add_trial(own, Trial("k", (U2,), "crashed", kind="recheck"), 2)
    records.add_trial(own, Trial("k", (U4,), "crashed"), 2)  # a trial is no recheck
    assert records.winners(own) == {"k": (U4,)}
    records.add_trial(own, Trial("k", (U4,), "timeout", kind="recheck"), 2)
    assert records.winners(own) == {}


def test_a_winner_that_was_ever_wrong_is_served_no_more(records):
    """Though it be on another machine of the kind, whose records were merged."""
    own = records.add_fingerprint(FIELDS)
    records.add_final(own, final(True))
    records.add_trial(own, Trial("k", (U4,), "ok", (1.0,)), 2)
    assert records.winners(own) == {"k": (U4,)} and [t.schedule for t in records.history("k", own).good] == [(U4,)]
    records.add_trial(own, Trial("k", (U4,), "wrong_output"), 2)
    assert records.winners(own) == {} and records.history("k", own).good == []


def served(records: Records, own: str) -> set[str]:
    """Which kernels have a winner; however it is asked, and by `History.good`, it is the same."""
    found = set(records.winners(own))
    for key in ("k", "other"):
        good = {t.kernel for t in records.history(key, own).good}
        assert set(records.served(own, 1, key)) == found & {key} == good
    return found


@pytest.mark.parametrize("kind", ["trial", "recheck"])
def test_a_binary_that_was_ever_wrong_is_served_under_no_name(records, kind):
    """(U4,) was accepted, and (U2, U4) gives the same binary. What looks at it again leaves no hash."""
    own, others = records.add_fingerprint(FIELDS), records.add_fingerprint(OTHER)
    for device, key in ((own, "k"), (own, "other"), (others, "k")):
        records.add_final(device, final(True, (U4,), key))
        records.add_trial(device, Trial(key, (U4,), "ok", (1.0,), code_hash="h"), 2)
    records.add_trial(own, Trial("k", (U2, U4), "crashed" if kind == "recheck" else "wrong_output", code_hash="h"), 2)
    if kind == "recheck":
        records.add_trial(own, Trial("k", (U2, U4), "timeout", kind="recheck"), 2)
        assert served(records, own) == {"k", "other"}  # accidents of another schedule
        records.add_trial(own, Trial("k", (U2, U4), "wrong_output", kind="recheck"), 2)
    assert served(records, own) == {"other"} and set(records.winners(others)) == {"k"}


def test_what_has_no_hash_is_no_binary(records):
    own = records.add_fingerprint(FIELDS)
    records.add_final(own, final(True))
    for schedule, verdict in (((U4,), "ok"), ((U2,), "wrong_output"), ((U2, U4), "wrong_output")):
        records.add_trial(own, Trial("k", schedule, verdict, (1.0,) * (verdict == "ok")), 2)
    records.add_trial(own, Trial("k", (U2,), "crashed", code_hash="h"), 2)
    assert served(records, own) == {"k"}
    records.add_trial(own, Trial("k", (U4,), "crashed", code_hash="h"), 2)  # in a trial that did not go well
    assert served(records, own) == set()


def test_what_a_budget_counts_is_counted_without_being_read(records):
    own = records.add_fingerprint(FIELDS)
    for kind, strategy in (("trial", "auto"), ("trial", "auto/beam"), ("trial", "finetune/random"), ("hand_coded", ""),
                           ("recheck", ""), ("trial", ""), ("answer", "auto"), ("trial", "beam"), ("trial", "beams/x")):  # fmt: skip
        records.add_trial(own, Trial("k", (U4,), "ok", (1.0,), kind=kind, strategy=strategy), 2)
    assert records.spent(own) == {"k": records.history("k", own).spent} == {"k": 4}
    assert records.spent(fingerprint_id(OTHER)) == {}


def test_a_copy_holds_what_a_killed_run_left_in_its_log(records, tmp_path):
    own = records.add_fingerprint(FIELDS)
    records.add_trial(own, Trial("k", (U4,), "ok", (1.0,)), 2)  # the file is open: all of it is in the log
    with sqlite3.connect(
        f"file:{shutil.copy(records.path, tmp_path / 'alone.db')}?mode=ro&immutable=1", uri=True
    ) as alone:
        assert not alone.execute("SELECT * FROM sqlite_master").fetchall()
    copy_records(records.path, tmp_path / "copy.db")
    with closing(Records(tmp_path / "copy.db", read_only=True)) as copied:
        assert copied.everything() == records.everything() and copied.spent(own) == {"k": 1}
    (tmp_path / "none.db").write_bytes(b"nothing" * 1000)
    with pytest.raises(RecordsError, match="none.db cannot be copied: file is not a database"):
        copy_records(tmp_path / "none.db", tmp_path / "copy2.db")


def test_a_link_to_a_file_is_that_file(tmp_path):
    """What lies beside it, claims and logs, is the same for both."""
    real, link = tmp_path / "real" / "r.db", tmp_path / "l.db"
    Records(real).close()
    link.symlink_to(real)
    with closing(Records(link)) as linked:
        assert linked.absolute == real.resolve()
    with closing(Records(link, read_only=True)) as linked:
        assert linked.kernels() == []


def test_duels_come_back(records):
    own = records.add_fingerprint(FIELDS)
    pair, first, second = [(U4,), ()], [(1.0, 2.0), (3.0, 4.0)], [(5.0,), (6.0,)]
    records.add_duel("k", own, pair, first)
    records.add_duel("k", own, pair, second)
    assert records.duel("k", own, pair) == second  # the latest
    assert records.duel("k", own, pair[::-1]) is None is records.duel("k", "elsewhere", pair)
    assert [row[1:] for row in records.all_duels(own)] == [("k", tuple(pair), first), ("k", tuple(pair), second)]


def test_winners_of_an_older_protocol_do_not_count(records):
    own = records.add_fingerprint(FIELDS)
    for key, versions in {
        "old": (1,),
        "new": (2,),
        "measured again": (1, 2),
        "lately by an old program": (2, 1),
    }.items():
        for version in versions:
            records.add_final(own, replace(final(True, (U4,) * version, key), protocol=version))
    assert records.final("new", own).protocol == 2
    assert set(records.winners(own)) == {"old", "new", "measured again", "lately by an old program"}
    assert records.winners(own, 2) == dict.fromkeys(("new", "measured again", "lately by an old program"), (U4, U4))
    records.add_final(own, replace(final(False, (U4, U4), "new"), protocol=2))
    assert (
        set(records.winners(own, 2)) == {"measured again", "lately by an old program"} and records.winners(own, 3) == {}
    )


def test_the_latest_final_is_the_one_made_last_wherever_it_stands(records):
    """A merge appends what another machine made before."""
    own = records.add_fingerprint(FIELDS)
    records.add_final(own, final(True, (U4,)))
    records.add_final(own, final(True, (U2,)))
    records.db.execute("UPDATE finals SET created = 1000000 WHERE id = 2")
    assert records.winners(own) == {"k": (U4,)} == {"k": records.final("k", own).schedule}


def test_noise_comes_back_and_the_latest_counts(records):
    own = records.add_fingerprint(FIELDS)
    assert records.noise(own) is None
    records.add_noise(own, [(1e-6, 0.25), (1e-3, 0.0)])
    records.add_noise(own, ((2e-6, 0.125),))
    assert records.noise(own) == ((2e-6, 0.125),) and records.noise("elsewhere") is None


def test_a_long_detail_is_cut_and_half_a_character_replaced(records):
    own = fill(records, trial(detail="x" * 5000), trial(detail="a\ud800\nb"))
    assert [t.detail for t in records.history(add_one().key, own).trials] == ["x" * MAX_DETAIL, "a?\nb"]


@pytest.mark.parametrize(("bad", "says"), [
    ({"samples": ()}, "0 samples with the verdict ok"), ({"samples": (0.0,)}, "samples: 0.0"), ({"samples": (math.nan,)}, "samples: nan"),
    ({"verdict": "crashed"}, "3 samples with the verdict crashed"), ({"samples": (1e-6,) * (MAX_SAMPLES + 1)}, "samples: .* at most 10000"),
    ({"kind": "guess"}, "kind: 'guess' is none of"), ({"seed": -1}, "seed: -1"), ({"seed": 2**63}, "seed: "),
    ({"compile_seconds": math.inf}, "compile_seconds: inf"), ({"verify_seconds": -1.0}, "verify_seconds: -1.0"),
    ({"strategy": "a\x1b[2J"}, "strategy: .* no printable text"), ({"kernel": "k" * 65}, "kernel: .* at most 64"),
])  # fmt: skip
def test_a_trial_that_is_none_is_not_written(records, bad, says):
    with pytest.raises(CodecError, match=says):
        fill(records, replace(trial(), **bad))
    assert records.everything()["trials"] == {}


def test_all_rows_or_none_are_added(records):
    own = fill(records, trial())
    (row,) = records.rows("trials").values()
    other = {**row, "created": row["created"] + 1}
    assert records.add_missing([("trials", row), ("trials", other), ("trials", other)]) == {"trials": 1}
    with pytest.raises(KeyError):
        records.add_missing([("trials", {**row, "created": 5.0}), ("trials", {})])
    assert len(records.history(add_one().key, own).trials) == 2 and not records.db.in_transaction


WRITER = """
import sys
sys.path.insert(0, "tests/autotune")
from tiny import add_one, U4
from autotune.records import Records, Trial
kernel, records = add_one(), Records(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(120):
    records.add_kernel(kernel)
    records.add_trial("f", Trial(kernel.key, (U4,), "ok", (i + 1.0,), strategy=sys.argv[2]), 1)
"""


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "shared.db"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                cwd=Path(__file__).resolve().parents[2]) for name in "ab"]  # fmt: skip
    assert [w.stdout.readline() for w in writers] == ["ready\n"] * 2  # the file itself was made by both at once
    for w in writers:
        w.stdin.write("\n")
        w.stdin.flush()
    assert [(w.communicate()[1] and w.returncode) or w.returncode for w in writers] == [0, 0]
    trials = Records(path, read_only=True).history(add_one().key, "f").trials
    for name in "ab":
        assert [t.samples for t in trials if t.strategy == name] == [(i + 1.0,) for i in range(120)]
    assert len(Records(path, read_only=True).kernels()) == 1


def test_a_killed_writer_loses_at_most_the_trial_under_way(tmp_path):
    path = tmp_path / "killed.db"
    with subprocess.Popen([sys.executable, "-c", WRITER.replace("120", "10**6"), path, "a"], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2]) as writer:  # fmt: skip
        writer.stdout.readline()
        writer.stdin.write("\n")
        writer.stdin.flush()
        reader = Records(path, read_only=True)
        while (seen := reader.history(add_one().key, "f").spent) < 20:
            pass
        writer.kill()
    found = Records(path).history(add_one().key, "f").trials
    assert len(found) >= seen and [t.samples for t in found] == [(i + 1.0,) for i in range(len(found))]


def test_default_path_follows_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_path() == Path("/some/where/tinygrad-autotune/records.db")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_path() == Path("/home/someone/.cache/tinygrad-autotune/records.db")


def test_a_kernel_that_could_not_be_read_again_is_not_written(records):
    a, b = Tensor.empty(8, dtype="int32"), Tensor.empty(8, dtype="int32")
    with pytest.raises(CodecError, match="shifts too far"):
        records.add_kernel(kernel_of(a << b))
    assert records.kernels() == []


def test_sums_are_other_kernels_than_additions(records):
    records.add_kernel(add_one())
    records.add_kernel(total(300))
    assert [k.key for k in records.kernels()] == [add_one().key, total(300).key]
