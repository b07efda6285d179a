"""What is kept of a run: its settings, searches and checkpoints can be read again, and what is damaged is found out."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import add_one

from autotune.compiler import default_device, fingerprint
from autotune.curves import Curve
from autotune.errors import UsageError
from autotune.experiments import curves, replay
from autotune.experiments.inputs import keep
from autotune.experiments.kept import pack, unpack
from autotune.records import BASELINES, Records, Trial

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_of_all_kept_runs_are_good(tmp_path: Path):
    """And what preparing each of their kernels costs is known: the tables charge it."""
    kept = sorted((ROOT / "benchmarks").glob("bench-*.tar.xz"))
    for file in kept:
        unpack(file, tmp_path / file.stem)
        name, settings, result = replay.read_run(tmp_path / file.stem)
        assert name == "curves" and curves.checked(settings).items() >= result["figures"]["settings"].items()
        costs = json.loads((ROOT / "benchmarks" / f"preparing-{result['device'].lower()}.json").read_text())
        assert costs["device"] == result["device"] and set(result["figures"]["calls"]) <= set(costs["seconds"])
        assert set(costs["again"]) == set(costs["seconds"])
    assert kept


def test_a_replay_reads_what_a_killed_run_has_left_in_a_log(tmp_path: Path):
    """Somebody who only reads keeps the log alive. It is not packed without it."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir(), out.mkdir()
    (run / "run.json").write_text('{"experiment": {"name": "curves"}}')
    (run / "config.json").write_text("{}")
    device = default_device()
    with closing(Records(run / "records.db")) as records:
        own = records.add_fingerprint(fingerprint(device))
        with closing(Records(run / "records.db", read_only=True)) as reader:
            assert reader.history("none", own).trials == []
            records.add_kernel(add_one())
            for kind in BASELINES:
                records.add_trial(own, Trial(add_one().key, (), "ok", (1.0,), kind=kind), 1)
            assert (run / "records.db-wal").stat().st_size
            with pytest.raises(UsageError, match="in use, or was killed"):
                pack(run, tmp_path / "kept.tar.xz")
            session = replay._recorded(run, out, {"fingerprint": own, "clock": {}, "device": device})
            assert [t.kind for t in session.measurer.baselines(add_one())] == [*BASELINES]


def test_a_damaged_file_is_no_run(tmp_path: Path):
    run, file = tmp_path / "run", tmp_path / "kept.tar.xz"
    run.mkdir()
    (run / "run.json").write_text('{"experiment": {"name": "curves"}}')
    (run / "config.json").write_text(json.dumps({str(i): hash(str(i)) for i in range(2000)}))
    with pytest.raises(UsageError, match="no finished run: it has no result.json"):
        pack(run, file)
    assert not file.exists()
    (run / "result.json").write_text("{}")
    pack(run, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UsageError, match="no run that was kept"):
        unpack(file, tmp_path / "again")


def test_a_kept_run_stays_whole_where_keeping_it_again_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool
):
    """And who names what is no run is told so in one line."""
    run, file = tmp_path / "run", tmp_path / "kept.tar.xz"
    run.mkdir()
    for name in ("run", "config", "result"):
        (run / f"{name}.json").write_text('{"experiment": {"name": "curves"}}')
    pack(run, file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarfile.TarFile.addfile", full)
    with pytest.raises(OSError, match="No space left"):
        pack(run, file)
    assert file.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"run", "kept.tar.xz"}
    for where, message in ((run, "No space left"), (tmp_path / "nowhere", "is no finished run: it has no run.json")):
        monkeypatch.setattr("sys.argv", ["keep_run.py", str(where), str(file)])
        with pytest.raises(SystemExit, match=message):
            tool("keep_run").main()


@pytest.mark.parametrize("text", ["", "[]", '{"strategy": "random"}', '{"strategy": "ran'])
def test_a_search_that_cannot_be_read_is_made_again(text: str, tmp_path: Path):
    out, part = tmp_path / "out", tmp_path / "part"
    out.mkdir(), part.mkdir()
    whole, broken = (curves.curve_file(part, "random", seed, 3, "a", None) for seed in (0, 1))
    whole.write_text(json.dumps(asdict(Curve("a", "random", 0, 0.0, [1.0], [1.0]))))
    broken.write_text(text)
    shared = SimpleNamespace(hand_coded=0.0)
    assert curves._made_here(whole, shared) and not curves._made_here(broken, shared)  # type: ignore[arg-type]
    curves.take_over(part, out)
    assert [path.name for path in out.iterdir()] == [whole.name]


def test_checkpoints_may_have_dots_in_their_names(tmp_path: Path):
    """Beside one whose name is all before the dot."""
    for name in ("guide-v1", "guide-v1.2"):
        for kind in ("safetensors", "json"):
            (tmp_path / f"{name}.{kind}").write_text(f"{name} {kind}")
    out = tmp_path / "out"
    out.mkdir()
    for named in ("guide-v1.2", "guide-v1.2.safetensors", "guide-v1.2.json"):
        keep(tmp_path / named, out / f"guide-{named}")
    for target in ("guide-guide-v1.2.safetensors", "guide-guide-v1.2.json"):
        assert (out / target).read_text() == f"guide-v1.2 {target.rpartition('.')[2]}"
    assert curves.guide_of(tmp_path, "v1.2") == tmp_path / "guide-v1.2.safetensors"
    assert curves.guide_of(tmp_path, "v1.3") is None
