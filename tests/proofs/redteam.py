"""Cheating and hostile programs, compiled and put in place of a candidate beneath the runner: none may pass.

    DEV=CPU python tests/proofs/redteam.py --json benchmarks/measuring-redteam-cpu.json

Each runs through the whole way of a trial, and an honest candidate of the same kernel is measured after each, to show that
the tuner lives on. The table says what each was caught by.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad import Device, Tensor

from autotune.compiler import Ops, Opt, OptOps, canonical, compile_schedule, default_device, renderer_of
from autotune.kernel import Kernel, Schedule
from autotune.measuring import child
from autotune.measuring.child import Child
from autotune.measuring.inputs import CASES, sizes_of
from autotune.measuring.runner import Refuted, Runner
from autotune.measuring.worker import binary_to_json
from autotune.records import Trial

N = 300  # elements of the victim: y = x + 1
TRICK: Schedule = (Opt(OptOps.UPCAST, 0, 2),)  # the schedule under whose name the programs are put in
HONEST: Schedule = (Opt(OptOps.UPCAST, 0, 4),)
MEMORY_LIMIT = 1 << 30  # for this suite alone: the program that takes memory without limit is stopped sooner
SYSCALL = """
static long call(long n, long a, long b, long c) {
  long r; register long r10 __asm__("r10") = 0x22, r8 __asm__("r8") = -1, r9 __asm__("r9") = 0;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
"""  # of x86-64 Linux; the programs that use it are left out elsewhere
RIGHT = "for (int i = 0; i < N; i++) y[i] = x[i] + 1;"


@dataclass(frozen=True)
class Attack:
    """A program that is put in, the verdict that it must get, and a word of the detail that must say why."""

    name: str
    body: str
    verdict: str
    says: str = ""
    state: str = (
        ""  # declarations outside the function, which OpenCL does not have; counters from 1, since .bss is not loaded
    )
    linux: bool = False  # needs system calls
    fenced: bool = False  # needs guards in front, or pages that trap


ATTACKS = (
    Attack("writes nothing", ";", "wrong_output", "300 of 300"),
    Attack("skips the tail", "for (int i = 0; i < N - 1; i++) y[i] = x[i] + 1;", "wrong_output", "element 299"),
    Attack("skips one in the middle", RIGHT.replace("y[i] =", "if (i != 137) y[i] ="), "wrong_output", "element 137"),
    Attack("writes NaN everywhere", "for (int i = 0; i < N; i++) y[i] = 0.0f / 0.0f;", "wrong_output", "is nan"),
    Attack("adds a little too much", "for (int i = 0; i < N; i++) y[i] = x[i] + 1.00001f;", "wrong_output"),
    Attack("wrong for zeros", "for (int i = 0; i < N; i++) y[i] = x[i] == 0 ? 0 : x[i] + 1;", "wrong_output"),
    Attack("wrong for negatives", "for (int i = 0; i < N; i++) y[i] = x[i] < 0 ? 1 - x[i] : x[i] + 1;", "wrong_output"),
    Attack("wrong for large values", "for (int i = 0; i < N; i++) y[i] = x[i] > 500 ? x[i] : x[i] + 1;", "wrong_output", "edges"),
    Attack("wrong for NaN", "for (int i = 0; i < N; i++) y[i] = x[i] == x[i] ? x[i] + 1 : 0;", "wrong_output", "nonfinite"),
    Attack("wrong for infinity", "for (int i = 0; i < N; i++) y[i] = x[i] > 3e38f ? 3e38f : x[i] + 1;", "wrong_output", "nonfinite"),
    Attack("reads one behind", "for (int i = 0; i < N; i++) y[i] = x[i + 1] + 1;", "wrong_output"),
    Attack("adds what lies behind", RIGHT + " y[0] += x[N] - 1;", "wrong_output", "element 0"),
    Attack("adds what lies in front", RIGHT + " y[0] += x[-1];", "wrong_output", "element 0", fenced=True),
    Attack("reads far behind", RIGHT + " volatile float z = x[N + 100000]; (void)z;", "crashed", fenced=True),
    Attack("writes one behind", RIGHT + " y[N] = 0;", "wrong_output", "behind the end of buffer 0"),
    Attack("writes a page's end behind", RIGHT + " y[N + 1000] = 0;", "wrong_output", "behind the end of buffer 0"),
    Attack("writes in front", RIGHT + " y[-1] = 0;", "wrong_output", "in front of the start of buffer 0", fenced=True),
    Attack("writes far behind", RIGHT + " y[N + 100000] = 0;", "crashed", fenced=True),
    Attack("writes far in front", RIGHT + " y[-100000] = 0;", "crashed", fenced=True),
    Attack("writes behind its input", RIGHT + " x[N] = 0;", "wrong_output", "buffer 1"),
    Attack("changes its input", RIGHT + " x[7] += 1;", "wrong_output", "changed its input buffer 1"),
    Attack("writes for the first input only", "if (s[0]++ == 1) { s[1] = ((int*)x)[0]; } if (((int*)x)[0] == s[1]) " + RIGHT,
           "wrong_output", state="static int s[2] = {1, 1};"),
    Attack("returns its first output again", "if (seen++ == 1) " + RIGHT.replace("y[i]", "old[i]") +
           " for (int i = 0; i < N; i++) y[i] = old[i];", "wrong_output", state="static int seen = 1; static float old[N] = {1};"),
    Attack("remembers outputs by the first element",
           "int j = 1; while (j < used && key[j] != x[0]) j++;"
           " if (j == used && used < 9) { key[used++] = x[0]; for (int i = 0; i < N; i++) old[j][i] = x[i] + 1; }"
           " for (int i = 0; i < N; i++) y[i] = old[j][i];", "wrong_output",
           state="static int used = 1; static float key[10] = {1}; static float old[10][N] = {{1}};"),
    Attack("remembers outputs by an element of the middle",
           "int j = 1; while (j < used && key[j] != x[137]) j++;"
           " if (j == used && used < 9) { key[used++] = x[137]; for (int i = 0; i < N; i++) old[j][i] = x[i] + 1; }"
           " for (int i = 0; i < N; i++) y[i] = old[j][i];", "wrong_output",
           state="static int used = 1; static float key[10] = {1}; static float old[10][N] = {{1}};"),
    Attack("right once, wrong later", "if (calls++ == 1) " + RIGHT, "wrong_output", state="static int calls = 1;"),
    Attack("right while verified, wrong when timed", f"if (calls++ <= {len(CASES)}) " + RIGHT, "wrong_output", "after timing",
           state="static int calls = 1;"),
    Attack("right until long after", "if (calls++ <= 40) " + RIGHT, "wrong_output", "after timing", state="static int calls = 1;"),
    Attack("never ends", "volatile int go = 1; while (go) ;", "timeout"),
    Attack("ends for all cases but the timed one", f"volatile int go = 1; if (calls++ == {len(CASES) + 1}) while (go) ; " + RIGHT, "timeout",
           state="static int calls = 1;"),
    Attack("follows a null pointer", "*(volatile int*)8 = 1;", "crashed", fenced=True),
    Attack("executes an illegal instruction", "__builtin_trap();", "crashed", "status -", fenced=True),
    Attack("overflows the stack", "volatile char big[1 << 26]; for (int i = 0; i < 1 << 26; i += 4096) big[i] = 1;", "crashed",
           fenced=True),
    Attack("exits", "call(231, 0, 0, 0);", "crashed", "status 0", linux=True),
    Attack("kills its process", "call(62, call(39, 0, 0, 0), 9, 0);", "crashed", "status -9", linux=True),
    Attack("stops its process", "call(62, call(39, 0, 0, 0), 19, 0);", "timeout", linux=True),
    Attack("sleeps", "long t[2] = {1000, 0}; call(35, (long)t, 0, 0);", "timeout", linux=True),
    Attack("takes memory without limit", "while (1) { volatile char *p = (char*)call(9, 0, 1 << 24, 3);"
           " for (int i = 0; i < 1 << 24; i += 4096) p[i] = 1; }", "crashed", "memory", linux=True),
    Attack("closes all files", "for (int i = 0; i < 64; i++) call(3, i, 0, 0);", "crashed", linux=True),
    Attack("writes junk to all files", 'for (int i = 0; i < 64; i++) call(1, i, (long)"junk\\n", 5);', "crashed", "JSON", linux=True),
)  # fmt: skip


def victim(device: str) -> Kernel:
    linear, _ = (Tensor.empty(N, device=device) + 1).linear_with_vars()
    (raw,) = (call.src[0] for call in linear.src if call.src[0].op is Ops.SINK)
    return Kernel.from_ast(canonical(raw, renderer_of(device)))


def applies(attack: Attack, device: str) -> bool:
    """Whether a device has what the attack needs: OpenCL has no state, no system calls, no pages that trap."""
    if device == "CPU":
        return not attack.linux or sys.platform == "linux"
    return not (attack.linux or attack.fenced or attack.state)


def compiled(attack: Attack, kernel: Kernel, device: str) -> dict[str, Any]:
    """The attack's binary in the form in which a compiling child sends one, launched once as a whole."""
    binary = compile_schedule(kernel.ast, (), renderer_of(device), 0, sizes_of(kernel))
    space, head = ("__global ", "__kernel ") if device == "CL" else ("", "")
    source = (f"#define N {N}\n{SYSCALL if attack.linux else ''}{attack.state}\n"
              f"{head}void k({space}float* y, {space}float* x) {{ {attack.body} }}\n")  # fmt: skip
    compiler = Device[device].compiler
    library = source.encode() if device == "CL" else compiler.compile(source)
    launches = tuple(((1, 1, 1), (1, 1, 1), values) for _, _, values in binary.launches)
    return binary_to_json(replace(binary, library=library, launches=launches))


class Undermined(Runner):
    """A runner whose compilers give back the attack's binary for TRICK, once it is set."""

    binary: dict[str, Any] | None = None

    def _compile(self, child: Child, kernel: Kernel, schedule: Schedule) -> dict[str, Any]:
        if schedule == TRICK and self.binary is not None:
            return {"verdict": "ok", "binary": self.binary, "compile_seconds": 0.0, "detail": ""}
        return super()._compile(child, kernel, schedule)


@contextmanager
def undermined(device: str) -> Iterator[Undermined]:
    runner, limit = Undermined(device, workers=1), child.MEMORY_LIMIT
    child.MEMORY_LIMIT = MEMORY_LIMIT
    try:
        yield runner
    finally:
        child.MEMORY_LIMIT = limit
        runner.close()


def attack_trial(runner: Undermined, kernel: Kernel, attack: Attack) -> tuple[Trial, Trial]:
    """(what became of the attack, what became of an honest candidate after it)"""
    runner.binary = compiled(attack, kernel, runner.device)
    (trial,) = runner.measure(kernel, [TRICK], None)
    (after,) = runner.measure(kernel, [HONEST], None)
    return trial, after


def attack_duel(runner: Undermined, kernel: Kernel, attack: Attack) -> Trial | None:
    """The same in the final timing in a fresh process; None where the attack escapes."""
    runner.binary = compiled(attack, kernel, runner.device)
    runner.binaries.clear()
    try:
        runner.duel(kernel, [TRICK, (), ()])
    except Refuted as refuted:
        return refuted.trial
    return None


def judge(attack: Attack, trial: Trial | None) -> str:
    """ "" or what is not as it should be."""
    if trial is None or trial.verdict == "ok":
        return "escaped"
    if trial.verdict != attack.verdict or attack.says not in trial.detail:
        return f"should be {attack.verdict} with {attack.says!r}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = default_device()
    kernel, rows = victim(device), []
    with undermined(device) as runner:
        for attack in (a for a in ATTACKS if applies(a, device)):
            trial, after = attack_trial(runner, kernel, attack)
            final = attack_duel(runner, kernel, attack)
            problem = judge(attack, trial) or ("" if after.verdict == "ok" else f"the next trial is {after.verdict}")
            problem = problem or ("escaped the duel" if final is None else "")
            rows.append({"attack": attack.name, "verdict": trial.verdict, "detail": trial.detail,
                         "in_duel": final.verdict if final else "escaped", "alive": after.verdict, "problem": problem})  # fmt: skip
            print(f"{attack.name:40} {trial.verdict:13} {rows[-1]['in_duel']:13} {problem or trial.detail}", flush=True)
    wrong = [row for row in rows if row["problem"]]
    print(f"{device}: {len(rows)} attacks, {len(wrong)} not as they should be")
    if args.json:
        args.json.write_text(
            json.dumps({"device": device, "attacks": len(rows), "wrong": len(wrong), "rows": rows}, indent=1) + "\n"
        )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
