"""The adapter: what it needs of tinygrad is there, and means what autotune/compiler.py says."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import U4, add_one, kernel_of, kernels_of, raw_kernels
from tinygrad import Context, Tensor, codegen, dtypes, helpers
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.codegen.opt.search import actions as beam_actions
from tinygrad.engine import realize

import autotune
from autotune import compiler, host
from autotune.compiler import (
    AxisType,
    KernelInfo,
    Ops,
    Opt,
    OptOps,
    canonical,
    hand_coded,
    renderer_of,
)
from autotune.errors import DeviceError, IllegalAction
from autotune.space import ACTIONS, N_ACTIONS, STOP, STOP_INDEX

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "autotune" / "compiler.py").read_text()
INSTALL = (ROOT / "autotune" / "install.py").read_text()  # which knows the BEAM cache


def programs() -> list[Tensor]:
    x, image = Tensor.empty(64, 96), Tensor.empty(1, 8, 14, 14)
    return [x @ Tensor.empty(96, 48), image.conv2d(Tensor.empty(16, 8, 3, 3), padding=1).relu(), x.sum(), x.max(0), x.T.contiguous(),
            (x.half() * 3).exp()]  # fmt: skip


def sizes(kernel) -> list[tuple[str, int]]:
    ranges = [u for u in kernel.ast.toposort() if u.op is Ops.RANGE]
    return sorted((u.arg[-1].name, int(u.vmax) + 1) for u in ranges)


def test_every_symbol_exists():
    tree, found = ast.parse(SOURCE + INSTALL), 0
    modules = {"codegen": codegen, "realize": realize}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinygrad"):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name), (
                    f"tinygrad lost {node.module}.{name.name}"
                )
                found += 1
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"tinygrad lost {node.value.id}.{node.attr}"
            found += 1
    assert found > 30
    for method in ("convert_loop_to_global", "apply_opt", "copy", "get_optimized_ast", "_globalizable_rngs"):
        assert hasattr(Scheduler, method)


def test_pinned_version_is_named_everywhere():
    assert version("tinygrad") == autotune.TINYGRAD
    assert f"tinygrad {autotune.TINYGRAD}" in SOURCE
    assert f"tinygrad=={autotune.TINYGRAD}" in (ROOT / "setup.py").read_text()


def test_another_version_is_refused_in_one_line():
    code = ("import importlib.metadata as m\nfound = m.version\nm.version = lambda name: '0.13.0' if name == 'tinygrad' else found(name)\n"
            "try: import autotune\nexcept ImportError as error: print(error)")  # fmt: skip
    (line,) = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert "0.13.0" in line and f"tinygrad=={autotune.TINYGRAD}" in line


def test_canonical_merges_the_axes_of_an_add():
    (raw,) = raw_kernels(Tensor.empty(64, 56, 56) + Tensor.empty(64, 56, 56))
    assert len([u for u in raw.toposort() if u.op is Ops.RANGE]) == 3
    assert sizes(kernel_of(Tensor.empty(64, 56, 56) + Tensor.empty(64, 56, 56))) == [("WEAK", 200704)]


def test_canonical_merges_the_space_of_a_1x1_convolution():
    image, weight = Tensor.empty(1, 64, 14, 14), Tensor.empty(128, 64, 1, 1)
    assert sizes(kernel_of(image.conv2d(weight))) == [("REDUCE", 64), ("WEAK", 128), ("WEAK", 196)]
    padded = kernel_of(image.conv2d(Tensor.empty(128, 64, 3, 3), padding=1))  # these may not merge
    assert sizes(padded) == [("REDUCE", 3), ("REDUCE", 3), ("REDUCE", 64), ("WEAK", 14), ("WEAK", 14), ("WEAK", 128)]


def test_canonical_forgets_beam_and_device():
    (raw,) = raw_kernels(Tensor.empty(40) + 1)
    renderer = renderer_of("CPU")
    wide = canonical(raw.replace(arg=KernelInfo(beam=4, name="mine")), renderer)
    assert wide is canonical(raw, renderer)
    assert all(u.arg.device is None for u in wide.toposort() if u.op is Ops.PARAM)
    assert canonical(raw, renderer) is not canonical(raw_kernels(Tensor.empty(40) + 2)[0], renderer)


def test_canonical_leaves_tinygrad_as_it_was():
    before = codegen.apply_opts
    with pytest.raises(IllegalAction):
        canonical(Tensor.empty(3).uop.sink().replace(arg=None), renderer_of("CPU"))
    add_one()
    assert codegen.apply_opts is before


def test_vocabulary_begins_with_beams_actions():
    assert list(ACTIONS[:193]) == beam_actions
    assert [a.op for a in ACTIONS[193:-1]] == [OptOps.PADTO] * 7 + [OptOps.NOLOCALS]
    assert ACTIONS[STOP_INDEX] is STOP and N_ACTIONS == 202 and len(set(ACTIONS)) == N_ACTIONS


def applied_untuned(raw, device: str) -> tuple[Opt, ...]:
    """The schedule that tinygrad gives a kernel when it compiles it for a program."""
    params = {
        p: p.replace(arg=type(p.arg)(**{**vars(p.arg), "device": device})) for p in raw.toposort() if p.op is Ops.PARAM
    }
    return codegen.to_program(raw.substitute(params), renderer_of(device)).src[0].arg.applied_opts


def agree(device: str) -> int:
    changed = 0
    for raw in raw_kernels(*programs()):
        ours = hand_coded(canonical(raw, renderer_of(device)), renderer_of(device))
        assert ours == tuple(applied_untuned(raw, device))
        changed += bool(ours)
    return changed


def test_hand_coded_is_what_an_untuned_program_runs():
    assert agree("CPU") >= 4


def test_under_noopt_an_untuned_program_runs_nothing_of_it():
    kernel = kernel_of(Tensor.empty(64, 96) @ Tensor.empty(96, 48))
    assert hand_coded(kernel.ast, renderer_of("CPU"))
    with Context(NOOPT=1):
        assert hand_coded(kernel.ast, renderer_of("CPU")) == ()
        assert agree("CPU") == 0


@pytest.mark.cl
def test_hand_coded_is_what_an_untuned_program_runs_on_cl(cl):
    assert agree("CL") >= 4


def keys_elsewhere(device: str) -> list[str]:
    """The keys of programs() in a process with another hash seed, captured on another default device."""
    code = ("import sys, json; sys.path.insert(0, 'tests/autotune')\nfrom test_compiler import programs\nfrom tiny import kernels_of\n"
            f"print(json.dumps([k.key for k in kernels_of(*programs(), device={device!r})]))")  # fmt: skip
    env = {**os.environ, "PYTHONHASHSEED": "4711", "DEV": device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_key_does_not_depend_on_the_process():
    here = [k.key for k in kernels_of(*programs())]
    assert keys_elsewhere("CPU") == here and len(set(here)) == len(here)


@pytest.mark.cl
def test_key_does_not_depend_on_the_device(cl):
    asts = [k.ast for k in kernels_of(*programs())]
    same = [a is k.ast for a, k in zip(asts, kernels_of(*programs(), device="CL"), strict=True)]
    pairs = zip(keys_elsewhere("CL"), [k.key for k in kernels_of(*programs())], strict=True)
    assert sum(same) >= 4 and [a == b for a, b in pairs] == same


def test_an_illegal_opt_is_typed():
    with pytest.raises(IllegalAction):
        compiler.compile_schedule(
            add_one().ast, (Opt(OptOps.UPCAST, 0, 7),), renderer_of("CPU")
        )  # 7 does not divide 300


def test_compiled_schedules_are_the_ones_asked_for():
    kernel, renderer = add_one(), renderer_of("CPU")
    plain, tiled = (compiler.compile_schedule(kernel.ast, s, renderer) for s in ((), (U4,)))
    assert plain.code_hash != tiled.code_hash and (plain.outputs, plain.inputs) == ((0,), (1,))
    with pytest.raises(OverflowError):
        compiler.compile_schedule(kernel.ast, (U4,), renderer, max_uops=3)


def test_a_device_that_cannot_be_opened_is_one_line():
    with pytest.raises(DeviceError) as caught:
        renderer_of("NO_SUCH_DEVICE")
    assert "NO_SUCH_DEVICE" in str(caught.value) and "\n" not in str(caught.value)


def test_another_device_is_not_described_by_this_machine(monkeypatch):
    renderer = SimpleNamespace(target=SimpleNamespace(arch="sm_90"))
    monkeypatch.setattr(compiler, "renderer_of", lambda device: renderer)
    monkeypatch.setattr(compiler, "Device", {"CUDA:1": object(), "CPU": object()})
    fields, own = compiler.fingerprint("CUDA:1"), compiler.fingerprint("CPU")
    assert (fields["backend"], fields["model"], fields["compiler"]) == ("CUDA", "unknown", "unknown")
    assert own["model"] != "unknown" and own["compiler"] == "unknown"  # not clang's renderer


@pytest.mark.parametrize(("lines", "model"), [
    ("processor : 0\nmodel name : Some CPU\ncpu family : 6\nmodel : 207\nstepping : 2\n\nprocessor : 1", "Some CPU 6 207 2"),
    ("processor : 0\nCPU implementer : 0x41\nCPU architecture: 8\nCPU variant : 0x3\nCPU part : 0xd0c\nCPU revision : 1", "0x41 8 0x3 0xd0c 1"),
])  # fmt: skip
def test_processors_without_a_name_are_told_apart(monkeypatch, lines, model):
    """ARM's /proc/cpuinfo has none of the fields of x86's."""
    monkeypatch.setattr(Path, "read_text", lambda self: lines)
    assert host.cpu_model() == model


def test_a_setting_is_one_however_it_was_set():
    plain = compiler.settings()
    for value in ("half", "HALF", "float16", dtypes.half):
        with Context(DEFAULT_FLOAT=value, NOLOCALS=True):
            assert compiler.settings() == {**plain, "DEFAULT_FLOAT": "float16", "NOLOCALS": "1"}
    with Context(TUPLE_ORDER=0):
        assert compiler.settings() == {**plain, "TUPLE_ORDER": "0"}
    assert (plain["DEFAULT_FLOAT"], plain["DEFAULT_INT"]) == ("float32", "int32")


def test_nothing_is_searched_inside_whatever_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("JITBEAM", "3")
    helpers.getenv.cache_clear()
    asked = lambda: (helpers.getenv("JITBEAM", helpers.BEAM.value), helpers.BEAM.value)  # as TinyJit asks  # noqa: E731
    with Context(BEAM=2):
        assert asked() == (3, 2)
        with pytest.raises(ZeroDivisionError), compiler.without_beam():
            assert asked() == (0, 0)
            raise ZeroDivisionError
        assert asked() == (3, 2)
    monkeypatch.undo()
    helpers.getenv.cache_clear()


def test_locals_make_globals_of_output_axes():
    kernel = add_one()
    types = [r.arg[-1] for r in compiler.root_scheduler(kernel.ast, renderer_of("CPU")).rngs]
    assert types == [AxisType.WEAK]


def test_threads_that_look_at_kernels_leave_tinygrad_as_it_was(monkeypatch):
    """Four at once, each of which sees its own kernel; a fifth rewrites one meanwhile, all the way."""
    original, rewrite = codegen.apply_opts, codegen.full_rewrite_to_sink
    raws = [raw for program in programs()[:4] for raw in raw_kernels(program)]

    def slowly(*args, **more):
        time.sleep(0.05)
        return rewrite(*args, **more)

    monkeypatch.setattr(codegen, "full_rewrite_to_sink", slowly)
    alone, cpu = [canonical(raw, renderer_of("CPU")) for raw in raws], renderer_of("CPU")
    with ThreadPoolExecutor(5) as pool:
        found = [pool.submit(canonical, raw, cpu) for raw in raws * 3]
        whole = [pool.submit(slowly, raws[0].replace(arg=KernelInfo()), cpu) for _ in range(4)]
        assert [one.result() for one in found] == alone * 3
        assert {one.result() for one in whole} == {rewrite(raws[0].replace(arg=KernelInfo()), cpu)}
    assert codegen.apply_opts is original


def test_what_changes_code_is_part_of_the_device(monkeypatch):
    """Also a variable that is no ContextVar, and a tinygrad that calls itself 0.14.0 and is not."""
    own = compiler.default_device()
    plain = compiler.fingerprint(own)
    assert "source" not in plain and not set(compiler.SWITCHES) & set(compiler.settings())
    monkeypatch.setenv("THREADS", "1")  # the default
    assert compiler.fingerprint(own) == plain
    monkeypatch.setenv("THREADS", "0")
    assert compiler.fingerprint(own) == {**plain, "setting.THREADS": "0"}
    monkeypatch.delenv("THREADS")
    compiler._source.cache_clear()
    monkeypatch.setattr(compiler, "RELEASE", "another")
    try:
        assert compiler.fingerprint(own).keys() - plain.keys() == {"source"}
    finally:
        compiler._source.cache_clear()
