"""The corpus: splits that share nothing, and nothing of what the examples run."""

from __future__ import annotations

import gzip
import json
import sqlite3
from itertools import combinations

import numpy as np
import pytest
from tiny import U2, U4, add_one, kernel_of
from tinygrad import Tensor, Variable
from tinygrad.nn.state import get_parameters

from autotune import corpus, data, files, recorded
from autotune.compiler import renderer_of
from autotune.errors import AutotuneError, DeviceError, RecordsError, UsageError
from autotune.models import GPT, ResNet
from autotune.records import Records, Trial
from autotune.space import state_after


@pytest.fixture(scope="module")
def kernels():
    return corpus.load()


def test_splits_share_no_key_and_no_signature(kernels):
    splits = {name: corpus.load(name) for name in corpus.SPLITS}
    assert sum(map(len, splits.values())) == len(kernels) == len({k.key for k in kernels})
    for one, two in combinations(splits.values(), 2):
        assert not {k.key for k in one} & {k.key for k in two}
        assert not {k.signature for k in one} & {k.signature for k in two}
    shares = {name: len(found) / len(kernels) for name, found in splits.items()}
    assert 0.7 < shares["train"] < 0.9 and min(shares.values()) > 0.05


def test_every_family_is_there_and_in_training(kernels):
    assert {k.family for k in kernels} == set(corpus.FAMILIES) == {k.family for k in corpus.load("train")}


def test_the_split_is_decided_by_the_signature_alone():
    x = Tensor.empty(24, 24)
    assert corpus.split_of(kernel_of(x.sum(1))) == corpus.split_of(kernel_of(x.sum(0)))
    assert {corpus.split_of(add_one(n)) for n in range(100, 140)} == set(corpus.SPLITS)


def empty_weights(net):
    for weight in get_parameters(net):
        weight.replace(Tensor.empty(*weight.shape, dtype=weight.dtype))
    return net


def example_outputs(monkeypatch) -> list[list[Tensor]]:
    """The example networks' outputs, nothing computed: their weights are empty buffers, and realize() waits."""
    monkeypatch.setattr(Tensor, "realize", lambda self, *others, **options: self)
    gpt = empty_weights(GPT())
    for block in gpt.blocks:
        block.cache = Tensor.empty(*block.cache.shape)
    nets = [empty_weights(ResNet(depth)) for depth in (18, 50)]
    return [[net(Tensor.empty(1, 3, 224, 224))] for net in nets] + [[gpt(Tensor.empty(1, 64, dtype="int32"), 0)]]


def test_several_tokens_at_a_position_that_is_not_known_are_refused():
    """Which of them may see which could not be told, and each would see all."""
    with pytest.raises(ValueError, match="several tokens need a position that is a number"):
        GPT()(Tensor.empty(1, 4, dtype="int32"), Variable("start", 1, 100).bind(8))


def test_nothing_of_the_examples_is_in_the_corpus(kernels, monkeypatch):
    known = {k.key for k in kernels} | {k.signature for k in kernels}
    for outputs in example_outputs(monkeypatch):
        own = list(corpus.kernels_of(outputs, "example"))
        assert len({k.key for k in own}) >= 15
        assert [k.name for k in own if {k.key, k.signature} & known] == []


@pytest.mark.slow
def test_nothing_that_the_examples_really_run_is_in_the_corpus(kernels):
    known = {k.key for k in kernels} | {k.signature for k in kernels}
    own = corpus.example_kernels()
    assert len(own) > 50 and [k.name for k in own if {k.key, k.signature} & known] == []


SHIPPED = [path for kind in ("trials", "guided") for path in sorted(files.DATA.glob(f"{kind}-*.jsonl.gz"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_trial_is_of_a_training_kernel(path):
    training, count = {k.key for k in corpus.load("train")}, 0
    with gzip.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            assert row["kernel"] in training
            assert all(
                micros > 0 and kind in ("trial", "unoptimized", "hand_coded") for _, micros, _, kind in row["trials"]
            )
            count += len(row["trials"])
    assert count > 100


def test_generation_is_the_same_for_a_seed(kernels):
    one, again, other = corpus.generate(6, 3), corpus.generate(6, 3), corpus.generate(6, 4)
    assert [k.key for k in one] == [k.key for k in again] != [k.key for k in other]
    assert len({k.signature for k in one}) == 6


def test_generation_refuses_keys_and_signatures():
    one = corpus.generate(6, 3)
    other = corpus.generate(6, 3, refused=one[:3])
    assert not {k.signature for k in other} & {k.signature for k in one[:3]}
    assert [k.key for k in other[:3]] == [k.key for k in one[3:]]


def test_a_corpus_comes_back_from_its_file(tmp_path):
    written = corpus.generate(4, 9)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        corpus.write(written, folder / "corpus.gz")
        assert [k.ast for k in corpus.load(path=folder / "corpus.gz")] == [k.ast for k in written]
    assert (tmp_path / "one" / "corpus.gz").read_bytes() == (
        tmp_path / "two" / "corpus.gz"
    ).read_bytes()  # no date inside


@pytest.mark.parametrize(("error", "status", "told"), [
    (UsageError("no such thing"), 2, "no such thing"), (AutotuneError("it failed"), 1, "it failed"),
    (DeviceError("no device"), 1, "no device"), (RecordsError("no file"), 1, "no file"),
    (PermissionError(13, "Permission denied"), 1, "PermissionError: [Errno 13] Permission denied"),
    (sqlite3.OperationalError("disk I/O error"), 1, "OperationalError: disk I/O error"),
    (KeyboardInterrupt(), 1, "interrupted; "),
])  # fmt: skip
@pytest.mark.parametrize("module", [corpus, data, recorded])
def test_what_goes_wrong_in_a_command_is_one_line(module, error, status, told, monkeypatch, capsys):
    def fail(*_) -> None:
        raise error

    arguments = {"autotune.corpus": [], "autotune.data": ["x.db"], "autotune.recorded": ["collect"]}[module.__name__]
    monkeypatch.setattr(module, "example_kernels" if module is corpus else "default_device", fail)
    assert module.main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m {module.__name__}: {told}")


def test_a_file_that_is_cut_off_leaves_the_former(tmp_path):
    """And bytes are those of a file that is written at its own place: a header holds its name, and no other."""
    path = tmp_path / "rows.jsonl.gz"
    files.write_lines([{"a": 1}, [2]], path)
    before = path.read_bytes()
    assert b"rows.jsonl\0" in before and gzip.decompress(before) == b'{"a":1}\n[2]\n'
    with pytest.raises(TypeError):
        files.write_lines([{"a": 2}, object()], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_kernels_are_neither_trivial_nor_endless(kernels):
    for kernel in kernels:
        operations, size = kernel.work
        assert corpus.MIN_WORK <= max(operations, size / 4) <= corpus.MAX_WORK and size <= corpus.MAX_BYTES


# **** trials as training data ****


def measured(tmp_path, kernel, *trials) -> Records:
    records = Records(tmp_path / "records.db")
    records.add_kernel(kernel)
    own = records.add_fingerprint({"backend": "CPU", "model": "x"})
    for schedule, verdict, seconds, code in trials:
        records.add_trial(
            own, Trial(kernel.key, schedule, verdict, (seconds,) if verdict == "ok" else (), code_hash=code), 1
        )
    return records


def test_export_refuses_what_is_held_out(tmp_path):
    (kernel, *_) = corpus.load("held_out")
    with pytest.raises(UsageError, match="no training kernel"):
        data.export_trials([measured(tmp_path, kernel, ((), "ok", 1e-6, "a"))], tmp_path / "out.gz", "CPU")


def test_exported_trials_come_back(tmp_path, monkeypatch):
    kernel = corpus.load("train")[0]
    records = measured(tmp_path, kernel, ((), "ok", 8e-6, "a"), ((), "timeout", 0.0, ""), ((), "ok", 4e-6, "b"))
    monkeypatch.setattr(files, "DATA", tmp_path)
    assert data.export_trials([records], data.shipped_path("CPU"), "CPU") == 2
    dataset = data.Dataset(renderer_of("CPU"))
    assert data.add_shipped(dataset, "CPU", [kernel]) == 2 and data.add_shipped(dataset, "CL", [kernel]) == 0
    assert np.allclose(2.0 ** dataset.arrays()[0], [8e-6, 4e-6])
    assert data.add_shipped(dataset, "CPU", [add_one()]) == 0


def test_trials_of_another_backend_are_not_exported(tmp_path):
    """A file may hold those of several, and of other machines."""
    kernel = corpus.load("train")[0]
    records, path = measured(tmp_path, kernel, ((), "ok", 8e-6, "a")), tmp_path / "out.gz"
    other = records.add_fingerprint({"backend": "CL"})
    records.add_trial(other, Trial(kernel.key, (), "ok", (1e-6,)), 1)
    for backend, micros in (("CPU", 8.0), ("CL", 1.0)):
        assert data.export_trials([records], path, backend) == 1
        (line,) = files.read_lines(path)
        assert [row[1] for row in line["trials"]] == [micros]


@pytest.mark.parametrize("program", [corpus, recorded])
def test_a_negative_seed_is_a_wrong_command(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main([*(["collect"] if program is recorded else []), "--seed", "-1"])
    assert end.value.code == 2 and "'-1' is no whole number from 0" in capsys.readouterr().err


def test_what_was_refuted_later_is_not_exported(tmp_path, monkeypatch):
    kernel = corpus.load("train")[0]
    records = measured(tmp_path, kernel, ((), "ok", 8e-6, "a"), ((U2,), "ok", 1e-6, "b"), ((U4,), "ok", 4e-6, "c"))
    (own,) = records.fingerprints()
    records.add_trial(own, Trial(kernel.key, (U2,), "wrong_output", kind="recheck"), 1)
    monkeypatch.setattr(files, "DATA", tmp_path)
    path = data.shipped_path("CPU")
    assert data.export_trials([records], path, "CPU") == 2
    with gzip.open(path, "rt") as file:
        assert [micros for _, micros, *_ in json.loads(file.read())["trials"]] == [8.0, 4.0]


def test_what_shipped_before_can_be_kept_as_a_source_of_its_own(tmp_path, monkeypatch):
    kernel, other = corpus.load("train")[0], corpus.load("held_out")[0]
    monkeypatch.setattr(files, "DATA", tmp_path)
    path = data.shipped_path("CPU")
    (tmp_path / "old").mkdir()
    data.export_trials([measured(tmp_path / "old", kernel, ((), "ok", 8e-6, "a"))], path, "CPU")
    new = measured(tmp_path, kernel, ((), "ok", 2e-6, "a"))
    new.add_kernel(other)
    assert data.export_trials([new], path, "CPU", keep=True, skip=True) == 2
    dataset = data.Dataset(renderer_of("CPU"))
    assert data.add_shipped(dataset, "CPU", [kernel, other]) == 2 and dataset.groups == [0, 1]
    assert data.export_trials([new], path, "CPU", skip=True) == 1


def test_trials_that_a_guide_asked_for_are_added_on_request_and_stay_apart(tmp_path, monkeypatch):
    kernel = corpus.load("train")[0]
    monkeypatch.setattr(files, "DATA", tmp_path)
    for guided in (False, True):
        folder = tmp_path / str(guided)
        folder.mkdir()
        data.export_trials([measured(folder, kernel, ((), "ok", 8e-6, "a"))], data.shipped_path("CPU", guided), "CPU")
    for guided, groups in ((False, [0]), (True, [0, 1])):
        dataset = data.Dataset(renderer_of("CPU"))
        assert data.add_shipped(dataset, "CPU", [kernel], guided) == len(groups) and dataset.groups == groups


def test_a_binary_counts_once_and_sources_stay_apart(kernels):
    kernel = kernels[0]
    trial = Trial(kernel.key, (), "ok", (1e-6,), code_hash="same")
    dataset = data.Dataset(renderer_of("CPU"))
    dataset.add(kernel, [trial, trial], "here")
    dataset.add(kernel, [trial], "there")
    assert dataset.groups == [0, 1] and dataset.states[0] == state_after(kernel, (), renderer_of("CPU"))
