"""Shared by the tuner's tests: one child process that measures on CPU, and one on OpenCL where there is a device."""

import pytest

from autotune.compiler import renderer_of
from autotune.errors import DeviceError
from autotune.measuring.runner import Runner


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
