"""Which tuner works on which kernel: several may share one records file, and spend no trial twice."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from autotune.kernel import Kernel

PAUSE = 0.2  # seconds between two looks at kernels that others hold


@contextlib.contextmanager
def claim(records: Path, kernel: Kernel, fingerprint: str) -> Iterator[bool]:
    """Hold a kernel of a device against other tuners on a records file; False where another process has it.

    One byte is locked in a file beside the records (closing that file itself would drop SQLite's own locks). The system
    frees it however its holder ends. A process holds one kernel at a time.
    """
    with open(f"{records}-claims", "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(kernel.key[:15], 16) ^ int(fingerprint[:15], 16))
        except BlockingIOError:
            yield False
        else:
            yield True


def share(
    records: Path,
    fingerprint: str,
    kernels: Iterable[Kernel],
    work: Callable[[Kernel], object],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Do something with each kernel while no other tuner does: free ones first, then those that were another's.

    Nobody waits for the rest once they are not `wanted` any more.
    """
    waiting = list(kernels)
    while waiting:
        others = []
        for kernel in waiting:
            with claim(records, kernel, fingerprint) as free:
                if free:
                    work(kernel)
                else:
                    others.append(kernel)
        if len(others) == len(waiting):
            time.sleep(PAUSE)
        waiting = others if wanted() else []
