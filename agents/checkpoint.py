"""Checkpoints: NAME.safetensors holds arrays and meta data, NAME.json repeats the meta data for people. Never
a pickle.

The meta data travels inside the safetensors file, so that one rename replaces both at once; what is loaded comes from there. By the
JSON beside it, which follows, a checkpoint is looked for alone. A file may come from a stranger: it is read as plain bytes, every number of its header is held
against the size of the file before anything is made of it, and all that is wrong is a CheckpointError."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
          "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # fmt: skip  # of safetensors, as numpy spells them
NAMES = {np.dtype(spelled): name for name, spelled in DTYPES.items()}
MAX_BYTES = 2**30  # of a file; ours have a few million
MAX_HEADER = 10_000_000  # bytes
MAX_DIMENSIONS = 8


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why, in one line."""


def files_of(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """NAME.safetensors and NAME.json of a checkpoint that is named by either of them or by NAME, which may have dots of its own."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.parent / f"{stem.name}.safetensors", stem.parent / f"{stem.name}.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another file to write into, which takes the place of `path` once it is whole; where that fails `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(tensors: Mapping[str, np.ndarray], meta: str) -> str:
    """sha256 over the meta data, and over names, dtypes, shapes and bytes of the arrays."""
    total = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Writes both files, each by renaming a finished one, and returns the safetensors' path. `meta` must be
    JSON."""
    binary, readable = files_of(path)
    binary.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(meta)
    header = {"meta": text, "sha256": digest(tensors, text)}
    with replacing(binary) as draft:
        _write(draft, tensors, header)
    with replacing(readable) as draft:
        draft.write_text(json.dumps(meta, indent=1) + "\n")
    return binary


def _write(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """The counterpart of `_read`. (`safe_save` of tinygrad schedules a kernel for each array: a second and more a checkpoint, which
    a training writes every few updates.)"""
    entries: dict[str, Any] = {"__metadata__": dict(header)}
    end = 0
    for name, array in tensors.items():
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def load(
    path: str | os.PathLike[str], accept: Callable[[dict[str, Any]], str | None] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and meta data. `accept(meta)` returns a complaint, or None where all is well. Raises CheckpointError."""
    binary, _ = files_of(path)
    if not binary.is_file():
        raise CheckpointError(f"no checkpoint at {binary}")
    try:
        tensors, header = _read(binary)
        text = header["meta"]
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise ValueError("the meta data is no object")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{binary} is damaged or no checkpoint of ours ({type(error).__name__})") from error
    if digest(tensors, text) != header.get("sha256"):
        raise CheckpointError(f"{binary} is damaged: its checksum differs")
    if accept is not None and (complaint := accept(meta)):
        raise CheckpointError(f"{binary}: {complaint}")
    return tensors, meta


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a safetensors file: 8 bytes with the length of the header, a JSON header, then the arrays
    one behind the other. Raises ValueError, KeyError, TypeError or RecursionError for anything else."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("the file is too large")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 <= start <= min(len(data), MAX_HEADER):
        raise ValueError("the header is longer than the file")
    entries = json.loads(data[8:start], object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("the header is no object")
    header, tensors, end = entries.pop("__metadata__"), {}, start
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        array = _array(entry, data, end)
        if entry["data_offsets"] != [end - start, end - start + array.nbytes]:
            raise ValueError(f"{name} does not begin where the one before ends")
        tensors[name], end = array, end + array.nbytes
    if end != len(data) or not isinstance(header, dict):
        raise ValueError("there is more than the header says")
    return tensors, header


def _array(entry: dict[str, Any], data: bytes, at: int) -> np.ndarray:
    """A copy of the array that begins at byte `at`."""
    shape, dtype = entry["shape"], np.dtype(DTYPES[entry["dtype"]])
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in shape):
        raise ValueError("not a shape")
    count = math.prod(shape)
    if count * dtype.itemsize > len(data) - at:
        raise ValueError("an array ends behind the file")
    return np.frombuffer(data, dtype, count, at).reshape(shape).copy() if count else np.zeros(shape, dtype)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def check_shapes(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError, which says `where`, for the first array that is missing or has another shape; others may be there."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: {name} is missing")
        if tensors[name].shape != tuple(shape):
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, expected {tuple(shape)}")
