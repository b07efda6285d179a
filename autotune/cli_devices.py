"""The command that lists what tinygrad can use here: `devices`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autotune.cli_records import noise_command
from autotune.compiler import default_device
from autotune.records import fingerprint_id

DEVICES = ("CPU", "CL", "CUDA", "NV", "AMD", "METAL", "QCOM", "WEBGPU")  # what it tries to open
PROBE = "import json, sys; from autotune.compiler import fingerprint; print(json.dumps(fingerprint(sys.argv[1])))"
PROBE_SECONDS = 60.0
ROOT = Path(__file__).resolve().parent.parent  # it runs here: the user's folder may hold modules with names of ours


def devices_command(args: argparse.Namespace) -> int:
    """Each device is opened in a process of its own: a broken driver can take its process with it."""
    default = default_device()
    names, usable = list(dict.fromkeys([*DEVICES, default])), []
    with ThreadPoolExecutor(2) as pool:
        for name, (fields, problem) in zip(names, pool.map(_probe, names), strict=True):
            mark = " (default)" if name == default else ""
            if fields is None:
                print(f"{name}{mark}: not usable here: {problem}")
                continue
            known = {k.removeprefix("setting."): v if len(v) <= 60 else v[:57] + "..." for k, v in fields.items()}
            print(f"{name}{mark}: fingerprint {fingerprint_id(fields)}")
            print("    " + ", ".join(f"{k} {v}" for k, v in known.items() if f"setting.{k}" not in fields))
            print("    " + " ".join(f"{k}={v}" for k, v in known.items() if f"setting.{k}" in fields), flush=True)
            usable.append(name)
    for name in usable if args.noise else ():
        noise_command(name, args.records)
    return 0


def _probe(device: str) -> tuple[dict[str, str] | None, str]:
    """(fingerprint fields, "") or (None, why the device cannot be opened)."""
    try:
        command = [sys.executable, "-c", PROBE, device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_SECONDS:.0f} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return None, last.partition("cannot be opened ")[2].partition("; set DEV")[0].strip("()") or last
