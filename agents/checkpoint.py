"""Checkpoints: NAME.safetensors holds arrays and meta data, NAME.json repeats the meta data for people. Never
a pickle.

The meta data travels inside the safetensors file, so that one rename replaces both at once; the JSON beside
it is never read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import safe_load, safe_load_metadata, safe_save


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why, in one line."""


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.parent / f"{stem.name}.safetensors", stem.parent / f"{stem.name}.json"


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
    binary, readable = _files(path)
    binary.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(meta)
    header = {"meta": text, "sha256": digest(tensors, text)}
    temporary = binary.with_name(f".{binary.name}.{os.getpid()}.tmp")
    arrays = {name: Tensor(np.ascontiguousarray(array), device="CPU") for name, array in tensors.items()}
    safe_save(arrays, str(temporary), header)
    os.replace(temporary, binary)
    temporary = readable.with_name(f".{readable.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(temporary, readable)
    return binary


def load(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    accept: Callable[[dict[str, Any]], str | None] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and meta data. `shapes` must be there as named; `accept(meta)` returns a complaint, or None
    where all is well."""
    binary, _ = _files(path)
    if not binary.is_file():
        raise CheckpointError(f"no checkpoint at {binary}")
    try:
        header = safe_load_metadata(binary)[2]["__metadata__"]
        meta = json.loads(header["meta"])
        tensors = {name: tensor.numpy().copy() for name, tensor in safe_load(binary).items()}
    except Exception as error:  # any damage to the file ends here, whatever the parser made of it
        raise CheckpointError(f"{binary} is damaged or no checkpoint of ours ({type(error).__name__})") from error
    if digest(tensors, header["meta"]) != header.get("sha256"):
        raise CheckpointError(f"{binary} is damaged: its checksum differs")
    if accept is not None and (complaint := accept(meta)):
        raise CheckpointError(f"{binary}: {complaint}")
    if shapes is not None:
        check_shapes(tensors, shapes, str(binary))
    return tensors, meta


def check_shapes(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: {name} is missing")
        if tensors[name].shape != tuple(shape):
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, expected {tuple(shape)}")
