"""Shared by the tuner's tests: one child process that measures on CPU, and one on OpenCL where there is a device."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from autotune.compiler import renderer_of
from autotune.errors import DeviceError
from autotune.measuring.runner import Runner
from autotune.records import Records


@pytest.fixture(scope="session")
def runner():
    runner = Runner("CPU", workers=1)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def cl():
    """The renderer of an OpenCL device; its tests are skipped where none can be opened."""
    try:
        return renderer_of("CL")
    except DeviceError as error:
        pytest.skip(f"no OpenCL device: {error}")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    """An empty file, in a directory that is made for it."""
    records = Records(tmp_path / "deep" / "records.db")
    yield records
    records.close()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """tool(name) -> a module of tools/, which are scripts and no package; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(Path(__file__).parents[2] / "tools")):
            del sys.modules[name]
