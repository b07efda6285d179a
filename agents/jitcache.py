"""Captured JITs on disk: capturing a PPO update takes many seconds, loading it takes a fraction of one.

A captured TinyJit holds compiled kernels and no Python function, so it can be pickled. Unpickling runs code:
files are read only from a directory that belongs to the user and that nobody else can write to. All state
must come in as arguments: what the function reads from its closure would be frozen into the file."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit, dtypes, helpers

log = logging.getLogger(__name__)
# settings that change no kernel, or that `__call__` sets itself; every other one is part of the key
INERT = {
    "BEAM",
    "DEV",
    "DEBUG",
    "TRAINING",
    "VIZ",
    "PROFILE",
    "PARALLEL",
    "NO_COLOR",
    "TRACEMETA",
    "CACHELEVEL",
    "CCACHE",
    "SCACHE",
    "LRU",
    "IGNORE_BEAM_CACHE",
    "CAPTURING",
    "CAPTURE_PROCESS_REPLAY",
    "ALLOW_DEVICE_USAGE",
    "DEBUG_RANGEIFY",
}
# what tinygrad reads of the environment when it makes code, and no setting of `helpers` holds
SWITCHES = ("THREADS", "EXPAND_SSA", "ALIGNED", "ALLOW_HALF8", "OCCUPANCY_FLOOR", "MV", "MV_BLOCKSIZE", "MV_THREADS_PER_ROW",
            "MV_ROWS_PER_THREAD", "DMC", "LLVMOPT", "JITBEAM", "REDUCEOP_SPLIT_THRESHOLD", "REDUCEOP_SPLIT_SIZE")  # fmt: skip
_loaded: dict[
    tuple[Path | None, str], Any
] = {}  # captured JITs. Agents of one shape share them: they hold nothing of theirs


def default_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygrad-autotune" / "jit"


@functools.cache
def machine(device: str) -> tuple[str, ...]:
    """What a compiled kernel depends on besides its source; a home directory may be shared by many
    machines."""
    renderer = Device[device].renderer
    facts = (version("tinygrad"), device, type(renderer).__name__, repr(renderer.target))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return facts + tuple(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))


def settings() -> list[str]:
    """tinygrad's settings that may change a kernel. Those of `helpers`, and what the environment says of SWITCHES: other modules
    add theirs when imported, which would make the key depend on what a process has done before."""
    variables = {v.key: v.value for v in vars(helpers).values() if isinstance(v, helpers.ContextVar)}
    said = [f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ]
    return [*(f"{key}={variables[key]}" for key in sorted(variables.keys() - INERT)), *said]


def private(path: Path) -> bool:
    """Whether the file or directory is the user's own and nobody else can write to it."""
    info = path.lstat()
    return info.st_uid == os.getuid() and not info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode)


class CachedJit:
    """fn(*tensors) -> Tensors, jitted; one capture for each signature of inputs, kept in memory and on disk.

    What fn returns is overwritten by the next call of any agent: copy it out at once. Tensors that fn assigns
    to are updated in place."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        key_parts: Sequence[object] = (),
        sources: Sequence[ModuleType] = (),
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        self.fn, self.name, self.captures = fn, name, 0
        self.directory = self._open(Path(cache_dir) if cache_dir is not None else default_dir())
        code = [inspect.getsource(module) for module in sources] + [inspect.getsource(fn)]
        self.parts = [name, *code, *(repr(part) for part in key_parts)]

    @staticmethod
    def _open(directory: Path) -> Path | None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if private(directory):
                return directory
            log.warning("JIT cache %s can be written by others (or is not yours): not used", directory)
        except OSError as error:
            log.warning("JIT cache %s cannot be used: %s", directory, error)
        return None

    def key(self, tensors: Sequence[Tensor]) -> str:
        signature = [f"{t.shape} {t.dtype} {t.device}" for t in tensors]
        return hashlib.sha256(
            "\0".join([*self.parts, *machine(Device.DEFAULT), *settings(), *signature]).encode()
        ).hexdigest()

    def __call__(self, *tensors: Tensor) -> Any:
        with Context(BEAM=0):  # a user's BEAM is meant for his kernels, not for a search over our own
            if not helpers.JIT:
                return self.fn(*tensors)
            key = self.key(tensors)
            if (self.directory, key) not in _loaded:
                jit = self._load(key)
                if jit is None:
                    return self._capture(key, tensors)
                _loaded[self.directory, key] = jit
            return _loaded[self.directory, key](*tensors)

    def _capture(self, key: str, tensors: Sequence[Tensor]) -> Any:
        jit: Any = TinyJit(self.fn)
        jit.cnt = 1  # capture at the first call: the eager one before it only serves lazily created inputs
        result = jit(*tensors)
        self.captures += 1
        jit.fxn = None  # as in one that was loaded; a method would keep its agent alive for as long as this process
        _loaded[self.directory, key] = jit
        self._save(key, jit)
        return result

    def _file(self, key: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{self.name}-{key[:32]}.pkl"

    def _load(self, key: str) -> Any | None:
        file = self._file(key)
        if file is None or not file.exists():
            return None
        try:
            if not private(file):
                raise PermissionError("can be written by others")
            return pickle.loads(file.read_bytes())
        except Exception as error:  # a pickle may fail in any way; capturing again mends all of them
            log.warning("JIT cache: discarded %s (%s: %s)", file, type(error).__name__, error)
            file.unlink(missing_ok=True)
            return None

    def _save(self, key: str, jit: Any) -> None:
        file = self._file(key)
        if file is None:
            return
        try:
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")  # mode 0600
            try:
                with os.fdopen(handle, "wb") as stream:
                    pickle.dump(jit, stream)
                os.replace(temporary, file)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except Exception as error:
            log.warning("JIT cache: could not write %s (%s: %s)", file, type(error).__name__, error)


DTYPES = {np.dtype(np.float32): dtypes.float32, np.dtype(np.int32): dtypes.int32, np.dtype(np.bool_): dtypes.bool}


def upload(array: np.ndarray) -> Tensor:
    """A realized tensor that holds a copy of an array of float32, int32 or bool: an input of a jitted function.

    As `Tensor(array).realize()`, which schedules and runs a program for it; that took longer than the small networks here.
    """
    tensor = Tensor.empty(*array.shape, dtype=DTYPES[array.dtype])
    refill(tensor, array)
    return tensor


def refill(tensor: Tensor, array: np.ndarray) -> None:
    """Another array of the same shape and type into a tensor that `upload` made. What was computed from it must be read by now."""
    if array.size:
        buffer: Any = tensor.uop.buffer
        own = np.array(array, order="C", ndmin=1)  # a device may copy later, from memory that nobody changes
        buffer.ensure_allocated().allocator._copyin(buffer._buf, own.data.cast("B"))
