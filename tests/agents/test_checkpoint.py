import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import safe_load

from agents.checkpoint import NAMES, CheckpointError, check_shapes, digest, files_of, load, replacing, save

ARRAYS = {
    "a/weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array([2**40], np.int64),
    "flags": np.array([True, False]),
}
META = {"vocabulary": "abc", "rng": {"state": 2**120}}


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "deep" / "best", ARRAYS, META)


def test_round_trip(saved):
    for path in (saved, saved.with_suffix(""), saved.with_suffix(".json")):
        arrays, meta = load(path)
        check_shapes(arrays, {"a/weight": (2, 3)}, "here")
        assert meta == META and all(
            np.array_equal(arrays[k], v) and arrays[k].dtype == v.dtype for k, v in ARRAYS.items()
        )
    assert json.loads(saved.with_suffix(".json").read_text()) == META
    assert {file.name for file in saved.parent.iterdir()} == {"best.safetensors", "best.json"}  # nothing half-written


def test_tinygrad_reads_what_is_written(tmp_path):
    """Every dtype, an empty array and a transposed one; the arrays begin at a multiple of eight, as readers that map files want it."""
    arrays = {f"a {dtype}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in NAMES}
    arrays |= {"empty": np.zeros((0, 3), np.float32), "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    file = save(tmp_path / "all", arrays, META)
    read = safe_load(file)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        if array.size:
            np.testing.assert_array_equal(read[name].to("CPU").numpy(), array, strict=True)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_saving_again_replaces(saved):
    save(saved, {"a/weight": np.zeros(1, np.float32)}, {})
    assert load(saved)[0]["a/weight"].tolist() == [0]


@pytest.mark.parametrize("named", ["runs/guide-v1.2", "runs/guide-v1.2.json", "runs/guide-v1.2.safetensors"])
def test_a_name_keeps_the_dots_of_its_own(named):
    assert files_of(named) == (Path("runs/guide-v1.2.safetensors"), Path("runs/guide-v1.2.json"))


def test_what_is_cut_off_replaces_nothing(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as draft:
        draft.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    with replacing(file) as draft:
        draft.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "meta"])
def test_damage_is_found(saved, damage):
    data = bytearray(saved.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    damaged = {
        "flip": data,
        "cut": data[:-4],
        "empty": b"",
        "text": b"not a checkpoint at all",
        "meta": data.replace(b"abc", b"abd"),
    }[damage]
    saved.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="damaged") as error:
        load(saved)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_in_one_line(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"^here: a/weight has shape \(2, 3\), expected \(3, 2\)$"):
        check_shapes(load(saved)[0], {"a/weight": (3, 2)}, "here")
    with pytest.raises(CheckpointError, match="^here: b is missing$"):
        check_shapes(load(saved)[0], {"b": (1,)}, "here")

    def accept(meta):
        return None if meta["vocabulary"] == "xyz" else f"vocabulary {meta['vocabulary']}, expected xyz"

    with pytest.raises(CheckpointError, match="vocabulary abc, expected xyz"):
        load(saved, accept=accept)


# *** files that another hand has written, with the right checksum where that is possible ***

GOOD = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path, header, data: bytes = bytes(8), length: int | None = None):
    """A safetensors file of this header, which is text or becomes it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def signed(entries: dict, meta: str = "{}") -> dict:
    return {"__metadata__": {"meta": meta, "sha256": digest({"x": np.zeros(2, np.float32)}, meta)}, **entries}


def test_a_file_written_by_hand_is_read(tmp_path):
    arrays, meta = load(write(tmp_path / "a.safetensors", signed(GOOD, '{"a": 1}')))
    assert arrays["x"].tolist() == [0, 0] and arrays["x"].dtype == np.float32 and meta == {"a": 1}


def entry(**more) -> dict:
    return signed({"x": {**GOOD["x"], **more}})


@pytest.mark.parametrize("header", [
    entry(shape=[3]), entry(shape=[2**40]), entry(shape=[-2]), entry(shape=[2, 2.0]), entry(shape=[True, 2]), entry(shape="2"),
    entry(shape=[1] * 9 + [2]), entry(shape=[10**30]), entry(data_offsets=[0, 2**62]), entry(data_offsets=[-8, 0]), entry(data_offsets=[8, 16]),
    entry(data_offsets=[0]), entry(dtype="OBJECT"), entry(dtype=["F32"]), entry(dtype="BF16"), entry(shape=[1], data_offsets=[0, 4]),
    signed({"x": 3}), signed({"x": {}}), signed({**GOOD, "y": GOOD["x"]}), signed({}), GOOD, {"__metadata__": 3, **GOOD},
    {"__metadata__": {"meta": "{}"}, **GOOD}, {"__metadata__": {"meta": 3, "sha256": ""}, **GOOD}, signed(GOOD, "[]"), signed(GOOD, "{"),
    signed(GOOD, "[" * 100_000), "[]", "3", "", "[" * 100_000, '{"__metadata__":{},"__metadata__":{}}', "\u00e9",
])  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="damaged") as error:
        load(write(tmp_path / "a.safetensors", header))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match="damaged"):
        load(write(tmp_path / "a.safetensors", signed(GOOD), length=length))


def test_a_file_beyond_all_reason_is_not_even_read(tmp_path):
    path = write(tmp_path / "a.safetensors", signed(GOOD))
    with open(path, "r+b") as file:
        file.truncate(2**40)  # no block of it is ever written
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def test_no_pickle_is_ever_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "a")
    assert not (tmp_path / "pwned").exists()
