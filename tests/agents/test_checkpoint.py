import json

import numpy as np
import pytest

from agents.checkpoint import CheckpointError, load, save

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
        arrays, meta = load(path, {"a/weight": (2, 3)})
        assert meta == META and all(
            np.array_equal(arrays[k], v) and arrays[k].dtype == v.dtype for k, v in ARRAYS.items()
        )
    assert json.loads(saved.with_suffix(".json").read_text()) == META
    assert {file.name for file in saved.parent.iterdir()} == {"best.safetensors", "best.json"}  # nothing half-written


def test_saving_again_replaces(saved):
    save(saved, {"a/weight": np.zeros(1, np.float32)}, {})
    assert load(saved)[0]["a/weight"].tolist() == [0]


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
    with pytest.raises(CheckpointError, match=r"a/weight has shape \(2, 3\), expected \(3, 2\)"):
        load(saved, {"a/weight": (3, 2)})
    with pytest.raises(CheckpointError, match="b is missing"):
        load(saved, {"b": (1,)})

    def accept(meta):
        return None if meta["vocabulary"] == "xyz" else f"vocabulary {meta['vocabulary']}, expected xyz"

    with pytest.raises(CheckpointError, match="vocabulary abc, expected xyz"):
        load(saved, accept=accept)
