"""Running a user's unmodified script inside this process, as `python SCRIPT ARGS...` would run it."""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from autotune.capture import Program, capture
from autotune.compiler import backend_of, settings, unheard, without_beam
from autotune.errors import ScriptError, UsageError

CAPTURE_SECONDS = 60.0  # an endless script is stopped after this long, and what it ran until then counts
SOON_SECONDS = 0.005  # until another look whether a finalizer is over
AGAIN_SECONDS = 10.0  # until the next interrupt: a script may swallow the first, or write its files once it has come
COMMON_NAMES = ("agents", "sims")  # packages of ours; a program may well have modules of these names


def check_script(script: Path) -> None:
    if not script.is_file():
        raise UsageError(f"no script {script}; name a Python file")


def say(line: str) -> None:
    """One line to the user about what is going on, apart from the results on stdout."""
    print("autotune: " + " ".join(line.split()), file=sys.stderr, flush=True)


def capture_script(script: Path, arguments: list[str], seconds: float) -> Program:
    """The kernels of a script, or of as much of it as ran until its time was over or the user pressed Ctrl-C."""
    started = time.monotonic()
    with capture() as program, _bounded(seconds) as stopped:
        try:
            run_script(script, arguments)
        except (KeyboardInterrupt, ScriptError):
            if not stopped:
                raise
        except SystemExit as end:
            if not stopped and end.code not in (None, 0):
                raise ScriptError(f"{script} ended with status {end.code}; see that it runs by itself") from None
    if stopped:
        seconds = time.monotonic() - started
        say(f"{script} stopped by {stopped[0]} after {seconds:.0f} s, going on with what it ran so far")
    return program


def kernels_of_script(script: Path, device: str) -> Program:
    """What a script runs in CAPTURE_SECONDS. Raises UsageError where there is no such script, ScriptError where it fails or
    runs nothing that can be tuned on this device."""
    check_script(script)
    with without_beam():  # an environment may ask for it
        program = capture_script(script, [], CAPTURE_SECONDS)
    check_captured(program, device, script)
    return program


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[list[str]]:
    """Interrupt the block as Ctrl-C does when `seconds` are over; yields a list that will hold the reason."""
    stopped: list[str] = []
    why = ""

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal why
        why = why or ("Ctrl-C" if number == signal.SIGINT else "--capture-seconds")
        if _finalizes(frame):  # where an exception would be printed and forgotten
            signal.setitimer(signal.ITIMER_REAL, SOON_SECONDS, AGAIN_SECONDS)
            return
        stopped.append(why)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
        yield stopped
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _finalizes(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def run_script(script: Path, arguments: list[str]) -> None:
    """Run a script as `python SCRIPT ARGS...` would. Raises ScriptError where it raises; SystemExit passes.

    It sees none of our packages that others may call alike, and is free to import its own of these names.
    """
    argv, path, folder, process = sys.argv, list(sys.path), os.getcwd(), os.getpid()
    before, threads = dict(os.environ), set(threading.enumerate())
    sys.argv = [str(script), *arguments]
    own, absolute = str(script.resolve().parent), str(script.absolute())
    sys.path[:] = [own, *(path[1:] if path and path[0] in ("", os.getcwd()) else path)]
    ours = _taken()
    try:
        ended = _run(absolute)
        _wait(threads, forked=os.getpid() != process)
        if ended is not None:
            if os.getpid() != process:  # a fork of the script, which ends here as it would by itself
                _end(ended.code)
            raise ended
    except Exception as error:
        raise ScriptError(
            f"{_place(error, absolute, script)}: {_in_one_line(error)}; run it by itself to see more"
        ) from None
    finally:
        if os.getpid() != process:
            _end(_told_of_error())
        if names := unheard(before):
            say(
                f"{script} has set {', '.join(names)}, which tinygrad had read before, so that it had no effect: set it on the command line"
            )
        sys.argv, sys.path[:] = argv, path
        _taken()
        sys.modules.update(ours)
        with contextlib.suppress(OSError):  # it may have removed the folder
            os.chdir(folder)


def _run(script: str) -> SystemExit | None:
    """How it has ended, where that was its own wish."""
    try:
        # by its whole name, as Python does: it may go elsewhere and look for itself
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        return ended
    return None


def _wait(threads: set[threading.Thread], forked: bool) -> None:
    """Wait for all threads but these, as Python does before it ends: executors, whose threads wait for work, are told first that
    none will come."""
    own = {*threads, threading.current_thread()}
    left = [thread for thread in threading.enumerate() if thread not in own and not thread.daemon]
    if left and not forked:  # those of a fork are copies: its parent's threads do their work
        # to look at all objects takes a while, so not where no thread is left; the only executors are the script's
        for executor in [thing for thing in gc.get_objects() if issubclass(type(thing), Executor)]:
            executor.shutdown()
    for thread in left:
        thread.join()


def _told_of_error() -> int:
    """The exit status of a fork that is under way to its end, with its traceback where it fails."""
    if sys.exc_info()[0] is None:
        return 0
    traceback.print_exc()
    return 1


def _end(code: object) -> NoReturn:
    """End this process at once, and nothing of ours with it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _taken() -> dict[str, ModuleType]:
    """Take all modules of COMMON_NAMES out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in COMMON_NAMES]
    return {name: sys.modules.pop(name) for name in names}


def _place(error: BaseException, absolute: str, script: Path) -> str:
    """FILE:LINE of the last line of the script that was under way; `script` as the user calls it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{script if error.filename == absolute else error.filename}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == absolute]
    return f"{script}:{lines[-1]}" if lines else str(script)


def _in_one_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def check_captured(program: Program, device: str, script: Path) -> None:
    """Raises ScriptError where the script ran nothing that can be tuned on this device."""
    if program.for_device(device):
        return
    if elsewhere := sorted(set().union(*program.devices.values())):
        places = ", ".join(elsewhere)
        raise ScriptError(f"{script} ran its kernels on {places}, not on {device}; set DEV={backend_of(elsewhere[0])}")
    if program.skipped:
        raise ScriptError(
            f"none of the {program.skipped} kernels that {script} launched can be tuned: their schedule is fixed "
            "by the program, or they use an operation that is not supported"
        )
    raise ScriptError(
        f"{script} ran no tinygrad kernel, so there is nothing to tune; let it realize() a Tensor, or give it longer "
        "with --capture-seconds"
    )


def left_out(program: Program, device: str) -> str:
    """What of a program is not tuned on this device; empty where nothing is left out."""
    here = {kernel.key for kernel in program.for_device(device)}
    elsewhere = [places for key, places in program.devices.items() if key not in here]
    told = f", launches of kernels that cannot be tuned: {program.skipped}" if program.skipped else ""
    if elsewhere:
        told += f", kernels on other devices ({', '.join(sorted(set().union(*elsewhere)))}): {len(elsewhere)}"
    now = settings()
    if others := [own for key, own in program.settings.items() if key in here and own != now]:
        differ = sorted({f"{name}={value}" for own in others for name, value in own.items() if now.get(name) != value})
        told += (f", kernels that ran under settings of the script's own ({', '.join(differ)}), for which nothing is tuned: {len(others)}; "
                 "set them on the command line")  # fmt: skip
    return told
