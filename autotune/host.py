"""The machine itself: which processor it has, and which clang compiles for it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

X86 = ("model name", "cpu family", "model", "stepping")  # which processor it is, in /proc/cpuinfo
ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")


def cpu_model() -> str:
    """Vendor, family, model and stepping: the marketing name alone is shared by machines that time differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    names = X86 if "model name" in values else ARM
    return " ".join(values.get(k, "?") for k in names)


@functools.cache
def clang_version() -> str:
    """The first line of what the compiler named by CC, else clang, says of itself; "unknown" where it says nothing."""
    try:
        done = subprocess.run([os.environ.get("CC", "clang"), "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.splitlines()[0] if done.stdout else "unknown"
