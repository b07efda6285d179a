"""Jobs of an experiment: each is done once, kept whole or not at all, and taken over where it is the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tinygrad.helpers import BEAM

from autotune.curves import Curve
from autotune.experiments import curves
from autotune.experiments import jobs as jobs_of
from autotune.experiments.jobs import run_jobs


def test_where_a_job_fails_the_rest_is_given_up(tmp_path: Path):
    """One process: the second job fails, and of the others at most what it had begun by then is done."""
    settings = {"part": "", "processes": 1, "folder": str(tmp_path)}
    with pytest.raises(ZeroDivisionError):
        run_jobs(divide, [(1,), (0,), *((n,) for n in range(2, 12))], settings, tmp_path, "dividing")
    assert (tmp_path / "job-1.json").exists() and len(list(tmp_path.glob("done-*"))) < 6


def test_jobs_are_not_searched_by_tinygrad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker has BEAM from the environment."""
    monkeypatch.setenv("BEAM", "2")
    assert run_jobs(told_of_beam, [(1,)], {"part": "", "processes": 1}, tmp_path, "asking") == [{"beam": 0}]


JOBS = {"part": "", "processes": 1, "seeds": 1, "seed": 5, "hidden": 8}


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """Two jobs that are done, and say so by other results than those which they would have again."""
    folder = tmp_path / "part"
    folder.mkdir()
    run_jobs(told_of_beam, [(1,), (2,)], JOBS, folder, "asking")
    for path in folder.iterdir():
        path.write_text(path.read_text().replace('{"beam": 0}', '{"beam": 7}'))
    return folder


def went_on(part: Path, **changed) -> list[int]:
    out = part.parent / "out"
    out.mkdir()
    found = run_jobs(told_of_beam, [(1,), (2,)], {**JOBS, "part": str(part), **changed}, out, "asking")
    assert sorted(path.name for path in out.iterdir()) == ["job-1.json", "job-2.json"]
    return [row["beam"] for row in found]


def test_jobs_are_taken_over_from_a_run_of_the_same_settings(part: Path, capsys):
    """How many there are, by how many processes, and what sacred has drawn is nothing to a job."""
    assert went_on(part, seeds=3, processes=2, seed=6) == [7, 7] and "not of these" not in capsys.readouterr().err


def test_jobs_of_other_settings_are_done_again(part: Path, capsys):
    assert went_on(part, hidden=16) == [0, 0]
    assert f"2 jobs of {part} are not of these settings" in capsys.readouterr().err


def test_jobs_of_another_device_or_recording_are_done_again(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources, recording = [jobs_of.source_of(JOBS)], tmp_path / "recorded.jsonl.gz"
    monkeypatch.setattr(jobs_of, "recorded_path", lambda device: recording)
    for content in (b"1", b"2"):
        recording.write_bytes(content)
        sources.append(jobs_of.source_of(JOBS))
    with monkeypatch.context() as patch:
        patch.setattr(jobs_of, "default_device", lambda: "CL")
        sources.append(jobs_of.source_of(JOBS))
    assert len(set(sources)) == 4
    assert went_on(part) == [0, 0]


@pytest.mark.parametrize("text", ["", '{"beam": 7}', '{"source": "x"}', "[]", '{"source": "x", "result": {"be'])
def test_a_job_that_cannot_be_read_or_does_not_say_of_what_it_is_is_done_again(text: str, part: Path):
    (part / "job-2.json").write_text(text)
    assert went_on(part) == [7, 0]


def test_a_job_that_is_cut_off_while_it_is_kept_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, text: str) -> None:
        self.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        run_jobs(told_of_beam, [(1,)], JOBS, tmp_path, "asking")
    assert list(tmp_path.iterdir()) == []
    path = curves.curve_file(tmp_path, "random", 0, 3, "a", None)
    with pytest.raises(OSError):
        curves._keep(path, Curve("a", "random", 0, 0.0, [1.0], [1.0]))
    assert list(tmp_path.iterdir()) == []


def told_of_beam(n: int, settings: dict) -> dict:
    return {"beam": BEAM.value}


def divide(n: int, settings: dict) -> dict:
    """A job."""
    result = {"of": 1 / n}
    time.sleep(0.2)
    (Path(settings["folder"]) / f"done-{n}").touch()
    return result
