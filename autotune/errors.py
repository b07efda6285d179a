"""Everything that can go wrong in a way a user can mend. Each message is one line: what happened, and what to do."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable

TRAIN = "python -m autotune.experiments.train"  # what `make train` runs, and works without the Makefile, too


class AutotuneError(Exception):
    """Base of every error that the command line prints as one line. `status` is the process's exit status."""

    status = 1


class UsageError(AutotuneError):
    """The command, script, option or config key is wrong."""

    status = 2


class RecordsError(AutotuneError):
    """The records file cannot be opened, read or written."""


class CodecError(AutotuneError):
    """A stored kernel or schedule is malformed, or of another version."""


class IllegalAction(AutotuneError):
    """This action cannot be applied to this schedule state."""


class DeviceError(AutotuneError):
    """The device cannot be opened, or keeps failing."""


class ScriptError(AutotuneError):
    """The script to tune raised, or ran no kernel."""


class TrainingError(AutotuneError):
    """What was learned came to nothing: numbers left all bounds."""


class ReplayError(AutotuneError):
    """A replay was asked for a measurement that its recording does not hold."""


def status_of(program: str, body: Callable[[], int | None], interrupted: str) -> int:
    """Run what a command does, and return its exit status: its own, or after one line on stderr 1 (failure) or 2 (usage). `interrupted`
    is what to say after Ctrl-C."""
    try:
        return body() or 0
    except AutotuneError as error:
        line, status = str(error), error.status
    except KeyboardInterrupt:
        line, status = f"interrupted; {interrupted}", 1
    except (OSError, sqlite3.Error) as error:  # a full disk, a file that may not be written, ...
        line, status = f"{type(error).__name__}: {error}", 1
    print(f"{program}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return status
