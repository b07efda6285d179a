"""THE adapter: the one file that imports tinygrad's compiler internals, as of tinygrad 0.14.0.

Everything above it speaks of ASTs, Opts, schedulers and binaries through the names that this file exports.
tests/autotune/test_compiler.py names every symbol used here, so that a new tinygrad breaks one test and one file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import tinygrad.codegen as codegen
import tinygrad.engine.realize as realize
from tinygrad import Device
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps
from tinygrad.codegen.opt.heuristic import hand_coded_optimizations
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.device import Allocator, Buffer, BufferSpec, TinyELF
from tinygrad.dtype import AddrSpace, DType, Invalid, dtypes, to_dtype
from tinygrad.helpers import DEV, NOOPT, TUPLE_ORDER, Context, ContextVar, getenv
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, ParamArg, UOp, axis_to_pos

from autotune.errors import DeviceError, IllegalAction
from autotune.host import clang_version, cpu_model

__all__ = [
    "AddrSpace", "AxisType", "Binary", "Buffer", "BufferSpec", "DTYPES", "DTYPE_NAMES", "DType", "Invalid", "KernelInfo",
    "Opt", "OptOps", "Ops", "ParamArg", "Renderer", "Scheduler", "UOp", "apply_opt", "axis_to_pos", "backend_of",
    "canonical", "compile_schedule", "default_device", "dtypes", "fingerprint", "hand_coded", "has_offsets", "is_tunable",
    "launches_freely", "observe_kernels", "on_device", "read_buffer", "renderer_of", "root_scheduler", "settings",
    "substitute_schedules", "targets", "threadable", "unheard", "uop_identity", "without_beam", "write_buffer",
]  # fmt: skip

Schedule = tuple[Opt, ...]
SINGLE_THREADED = {"PARALLEL": 0, "BEAM": 0}
NAME = "k"  # of the function in every compiled candidate
ALIGNMENT = 64  # bytes: a cache line, and more than the widest vector that tinygrad's code loads at once
RELEASE = "2f5e023cfa690cab"  # digest of tinygrad 0.14.0's files that make code
# environment variables that change code too and are no ContextVar, with their defaults
SWITCHES = {"THREADS": "1", "EXPAND_SSA": "0", "ALIGNED": "1", "ALLOW_HALF8": "0", "OCCUPANCY_FLOOR": "4096", "MV": "1",
            "MV_BLOCKSIZE": "4", "MV_THREADS_PER_ROW": "8", "MV_ROWS_PER_THREAD": "4", "DMC": "0", "LLVMOPT": "1"}  # fmt: skip
DTYPES: dict[str, DType] = {
    name: getattr(dtypes, name)
    for name in ("void", "weakint", "weakfloat", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
                 "uint64", "float16", "bfloat16", "float32", "float64")
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def renderer_of(device: str) -> Renderer:
    """The renderer of a device. Raises DeviceError with the cause in one line when the device cannot be opened."""
    try:
        return Device[device].renderer
    except (Exception, ExceptionGroup) as error:
        cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        raise DeviceError(
            f"device {device!r} cannot be opened ({type(cause).__name__}: {next(iter(str(cause).splitlines()), '')[:160]}); "
            "set DEV to a device that tinygrad can use here, and see that its compiler (clang for CPU) is installed"
        ) from None


def backend_of(device: str) -> str:
    """Of a device's name: all devices of one backend are served by the same schedules."""
    return device.split(":")[0]


def launches_freely(renderer: Renderer) -> bool:
    """Whether a kernel without locals may be launched in groups of any size. CUDA and HIP compile it for groups of one thread, so
    NOLOCALS gains nothing there."""
    return renderer.has_local and "launch_bounds" not in getattr(renderer, "kernel_typedef", "launch_bounds")


def fingerprint(device: str) -> dict[str, str]:
    """What a timing depends on: backend, renderer, arch, device model, compiler, tinygrad, code-changing settings."""
    renderer, opened = renderer_of(device), Device[device]
    if isinstance(renderer, ClangRenderer) and shutil.which(os.environ.get("CC", "clang")) is None:
        raise DeviceError(f"{device} compiles with clang, and there is none on PATH: apt-get install clang, or set CC")
    backend = backend_of(device)
    model = cpu_model() if backend == "CPU" else "unknown"  # the host's would say nothing of another device
    compiler = clang_version() if isinstance(renderer, ClangRenderer) else "unknown"
    return {
        "backend": backend,
        "renderer": type(renderer).__name__,
        "arch": renderer.target.arch,
        "model": getattr(opened, "device_name", None) or model,
        "compiler": getattr(opened, "driver_version", None) or compiler,
        "tinygrad": version("tinygrad"),
        **_source(),
        **{f"setting.{name}": value for name, value in sorted(settings().items())},
    }


def settings() -> dict[str, str]:
    """tinygrad's settings that change code, as they are in force here, by the environment variable that sets each; of SWITCHES
    those that are no default."""
    switched = {name: os.environ[name] for name, usual in SWITCHES.items() if os.environ.get(name, usual) != usual}
    if TUPLE_ORDER.value != 1:
        switched["TUPLE_ORDER"] = str(int(TUPLE_ORDER.value))
    return {v.key: _said(v.key, v.value) for v in codegen.to_program_config} | switched


def _said(name: str, value: Any) -> str:
    """A setting as its environment variable says it, however a program has set it: True is 1, and half is float16."""
    if name in ("DEFAULT_FLOAT", "DEFAULT_INT"):
        return DTYPE_NAMES[to_dtype(value)]
    return str(int(value) if isinstance(value, bool) else value)


@functools.cache
def _source() -> dict[str, str]:
    """Nothing for the release for which this was written; for another source that calls itself so, its digest."""
    folder, digest = Path(codegen.__file__).parent.parent, hashlib.sha256()
    for path in sorted(p for part in ("codegen", "renderer", "uop") for p in (folder / part).rglob("*.py")):
        digest.update(path.read_bytes())
    found = digest.hexdigest()[:16]
    return {} if found == RELEASE else {"source": found}


def unheard(before: Mapping[str, str]) -> list[str]:
    """Names of tinygrad's settings that the environment says otherwise than `before`: tinygrad reads each but once."""
    return sorted(name for name in ContextVar._cache if os.environ.get(name) != before.get(name))


def targets() -> str:
    """What DEV says here, each device with the renderer chosen for it; empty where nothing was said."""
    return repr(DEV)


# **** kernels, in the form in which they enter apply_opts ****


_hook = threading.Lock()  # one thread at a time puts its own function in the place of tinygrad's


class _Reached(Exception):
    """Carries the AST out of tinygrad's rewrites at the point where schedules are applied."""

    def __init__(self, ast: UOp):
        self.ast = ast


def canonical(raw: UOp, renderer: Renderer) -> UOp:
    """The AST as it enters `apply_opts`: a raw SINK after tinygrad's own first rewrites, BEAM's width cleared.

    Schedules are only meaningful on this form: the rewrites merge and split axes (an add [64,56,56] becomes [200704]).
    """
    if not hasattr(raw.arg, "opts_to_apply"):
        raise IllegalAction("not a kernel: its SINK carries no KernelInfo")
    with _hook:
        original, thread = codegen.apply_opts, threading.get_ident()

        def reached(ast: UOp, ren: Renderer, beam: int = 0) -> UOp:
            if threading.get_ident() != thread:  # another one compiles for itself
                return original(ast, ren, beam)
            raise _Reached(ast)

        codegen.apply_opts = reached
        try:
            codegen.full_rewrite_to_sink(raw.replace(arg=KernelInfo()), renderer)
        except _Reached as found:
            params = {p: p.replace(arg=replace(p.arg, device=None)) for p in found.ast.toposort() if p.op is Ops.PARAM}
            return found.ast.substitute(params)
        finally:
            codegen.apply_opts = original
    raise IllegalAction("the kernel never reached apply_opts")


def is_tunable(raw: UOp) -> bool:
    """False for kernels whose schedule the program fixes itself, and for those that are no plain kernel."""
    info = raw.arg
    plain = isinstance(info, KernelInfo) and not (info.applied_opts or info.dont_use_locals)
    return plain and raw.tag is None and info.opts_to_apply is None


def on_device(ast: UOp, renderer: Renderer) -> UOp:
    """A canonical AST whose buffers are on the renderer's device again; variables are on none."""
    device = renderer.target.device
    buffers = (p for p in ast.toposort() if p.op is Ops.PARAM and p.arg.addrspace is not AddrSpace.ALU)
    return ast.substitute({p: p.replace(arg=replace(p.arg, device=device)) for p in buffers})


def root_scheduler(ast: UOp, renderer: Renderer) -> Scheduler:
    """tinygrad's own schedule state with nothing applied."""
    scheduler = Scheduler(ast, renderer)
    scheduler.convert_loop_to_global()
    return scheduler


def threadable(scheduler: Scheduler) -> set[UOp]:
    """The loops that THREAD may split, tinygrad's "globalizable" ones."""
    return set(scheduler._globalizable_rngs())


def apply_opt(scheduler: Scheduler, opt: Opt) -> Scheduler:
    """A new scheduler with one more Opt. Raises IllegalAction where tinygrad refuses."""
    after = scheduler.copy()
    try:
        after.apply_opt(opt)
    except (KernelOptError, ZeroDivisionError) as error:  # the latter where padding to a multiple of none is asked for
        raise IllegalAction(f"{opt}: {error}") from None
    return after


def hand_coded(ast: UOp, renderer: Renderer) -> Schedule:
    """The schedule of tinygrad's heuristic: what an untuned program runs. Under NOOPT that is none."""
    scheduler = root_scheduler(ast, renderer)
    if NOOPT or any(u.op is Ops.STAGE for u in ast.backward_slice):
        return ()
    return tuple(hand_coded_optimizations(scheduler).applied_opts)


def uop_identity(ast: UOp) -> str:
    """A digest of the AST that is the same in every process and on every machine."""
    return ast.key.hex()


# **** binaries ****


@dataclass(frozen=True)
class Binary:
    """A compiled candidate as plain data, so that it can be run in another process than the one that compiled it.

    `launches` has (global size, local size, values of its variables) for each assignment of the symbolic sizes.
    `code_hash` tells whether two schedules gave the same binary.
    """

    library: bytes
    signature: tuple[tuple[str | None, int, str, tuple[int, ...]], ...]  # of each argument: name, slot, dtype, shape
    slots: tuple[int, ...]  # of the buffers, in the order of the arguments
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    launches: tuple[tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int | None, ...]], ...]

    @property
    def code_hash(self) -> str:
        return hashlib.sha256(self.library).hexdigest()[:16]

    def load(self, device: str) -> Callable[[dict[int, Buffer], int], float]:
        """A function (buffers by slot, which launch) -> seconds of one run."""
        signature = tuple((name, slot, getattr(dtypes, dtype), shape) for name, slot, dtype, shape in self.signature)
        runtime: Any = Device[device].runtime(TinyELF(self.library, NAME, renderer_of(device).target, signature))

        def run(buffers: dict[int, Buffer], launch: int) -> float:
            global_size, local_size, values = self.launches[launch]
            args = [buffers[slot].get_buf(device) for slot in self.slots]
            seconds = runtime(*args, global_size=global_size, local_size=local_size, vals=values, wait=True)
            assert seconds is not None  # it was asked to wait
            return seconds

        return run


def _binary(prg: UOp, sizes: Sequence[dict[str, int]]) -> Binary:
    """The plain data of a compiled tinygrad program."""
    info = prg.arg
    launches = tuple((*info.launch_dims(values), info.vals(values)) for values in sizes)
    signature = tuple((name, slot, DTYPE_NAMES[dtype], tuple(n for n in shape if isinstance(n, int)))
                      for name, slot, dtype, shape in prg.to_elf().signature)  # fmt: skip
    return Binary(prg.src[3].arg, signature, tuple(info.globals), tuple(info.outs), tuple(info.ins), launches)


def has_offsets(device: str) -> bool:
    """Whether a buffer of this device may begin inside another one."""
    return type(Device[device].allocator)._offset is not Allocator._offset


def write_buffer(buffer: Buffer, data: memoryview) -> None:
    """Copy bytes to a device buffer, done when this returns."""
    buffer.allocator._copyin(buffer._buf, data)
    Device[buffer.device].synchronize()


def read_buffer(buffer: Buffer, data: memoryview) -> None:
    """Copy a device buffer into writable bytes."""
    buffer.allocator._copyout(data, buffer._buf)


def compile_schedule(
    ast: UOp, schedule: Schedule, renderer: Renderer, max_uops: int = 0, sizes: Sequence[dict[str, int]] = ({},)
) -> Binary:
    """Compile a canonical AST with a schedule, as a program would run it, to be launched with each of `sizes`.

    Raises IllegalAction where an Opt cannot be applied, OverflowError when the lowered kernel has more than
    `max_uops` operations (0: no limit), and whatever the compiler raises.
    """
    scheduler = root_scheduler(on_device(ast, renderer), renderer)
    for opt in schedule:
        scheduler = apply_opt(scheduler, opt)
    with Context(**SINGLE_THREADED):
        prg = codegen.to_program(scheduler.get_optimized_ast(name_override=NAME), renderer)
        if max_uops and len(prg.src[1].src) > max_uops:
            raise OverflowError(f"{len(prg.src[1].src)} operations after lowering, more than {max_uops}")
        prg = _with_local_size(prg, renderer)
    codegen.to_program_cache.clear()  # thousands of candidates pass through: keep none
    return _binary(prg, sizes)


def _with_local_size(prg: UOp, renderer: Renderer) -> UOp:
    """Kernels without locals get their launch size from tinygrad's sampling, here with its random order pinned."""
    if prg.arg.local_size is not None or not renderer.has_local:
        return prg
    device = renderer.target.device
    params = sorted(
        (u for u in prg.src[0].toposort() if u.op is Ops.PARAM and u.arg.slot >= 0), key=lambda u: u.arg.slot
    )
    call = prg.call(*[UOp.new_buffer(device, p.max_numel(), p.dtype) for p in params])
    state = random.getstate()
    random.seed(0)
    try:
        sized = realize.optimize_local_size(call, prg)
    finally:
        random.setstate(state)
    return prg if sized is None else sized.src[0]


@contextlib.contextmanager
def without_beam() -> Iterator[None]:
    """No search of tinygrad's own inside, whatever the environment asks for: neither by BEAM nor, in a TinyJit, by JITBEAM."""
    asked, forget = os.environ.pop("JITBEAM", None), cast(Any, getenv).cache_clear
    forget()  # tinygrad remembers what it has read
    try:
        with Context(BEAM=0):
            yield
    finally:
        if asked is not None:
            os.environ["JITBEAM"] = asked
        forget()


# **** programs of the user: seeing their kernels, and giving them schedules ****

OnLaunch = Callable[[UOp, str, dict[str, int]], None]
ScheduleOf = Callable[[UOp, Renderer, str], Schedule | None]


@contextlib.contextmanager
def observe_kernels(on_launch: OnLaunch) -> Iterator[None]:
    """Call `on_launch(raw SINK, device, variable values)` for every kernel launch, replays of a TinyJit included.

    A kernel is told as the program made it, whatever schedule it was given. Those of programs that were compiled before this
    context was entered are found through tinygrad's own cache.
    """
    with _HOOKS.active(_HOOKS.observers, _Observer(on_launch)):
        yield


@contextlib.contextmanager
def substitute_schedules(schedule_of: ScheduleOf) -> Iterator[None]:
    """While active, each kernel compiled in this process takes `schedule_of(raw SINK, renderer, device)`, None leaves it alone.

    Where several are active the last that was entered is asked first. The schedule travels in `KernelInfo.opts_to_apply`, so
    tinygrad's parallel compilation goes on working.
    """
    with _HOOKS.active(_HOOKS.substitutions, schedule_of):
        yield


def _offset(arg: UOp) -> int:
    """Bytes from the start of its buffer at which an argument of a kernel begins; of one on several devices what divides all."""
    if arg.op in (Ops.MSTACK, Ops.MSELECT, Ops.AFTER):
        return math.gcd(*map(_offset, arg.src if arg.op is Ops.MSTACK else arg.src[:1]))
    if arg.op is Ops.BUFFER:  # as nearly all are; what a view begins at is found by rewriting
        return _foreign(arg)
    if arg.op is Ops.PARAM or (view := arg.contiguous_view()) is None:
        return 0
    return view[1] * view[0].dtype.itemsize + _foreign(view[0].base)


def _foreign(base: UOp) -> int:
    """The address of memory that is not tinygrad's own; 0 for what it allocates itself, which is aligned."""
    options = getattr(base.buffer, "options", None) if base.op is Ops.BUFFER and base.is_realized else None
    return getattr(options, "external_ptr", None) or 0


class _Observer:
    """One active `observe_kernels`."""

    def __init__(self, on_launch: OnLaunch):
        self.on_launch = on_launch
        self.raw_of: dict[bytes, UOp] = {}

    def compiled(self, linear: UOp, compiled: UOp) -> None:
        for before, after in zip(linear.src, compiled.src, strict=True):  # its calls, one by one
            if before.op is Ops.CALL and before.src[0].op is Ops.SINK and after.src[0].op is Ops.PROGRAM:
                self.raw_of[after.src[0].src[0].key] = before.src[0]

    def launched(self, ctx: Any, call: UOp) -> None:
        for device, kernel_call in realize.get_call_kernels(call):
            for program in _programs_of(kernel_call.src[0]):
                if (raw := self.raw_of.get(program.src[0].key)) is not None:
                    self.on_launch(raw, device, ctx.var_vals)


class _Hooks:
    """What stands in tinygrad's way while any context is active: contexts overlap, in several threads, and end in any order."""

    def __init__(self) -> None:
        self.observers: list[_Observer] = []
        self.substitutions: list[ScheduleOf] = []
        self.unaligned: set[UOp] = set()  # kernels that were seen to work on views, as the program made them
        self._lock = threading.Lock()
        self._originals: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    @contextlib.contextmanager
    def active(self, hooks: list[Any], hook: Any) -> Iterator[None]:
        with self._lock:
            if not (self.observers or self.substitutions):
                compile_original, track_original = realize.lower_and_compile, realize.track_stats
                realize.lower_and_compile = functools.partial(self._compile, compile_original)
                realize.track_stats = functools.partial(self._track, track_original)
                self._originals = compile_original, track_original
            hooks.append(hook)
        try:
            yield
        finally:
            with self._lock:
                hooks.remove(hook)
                if not (self.observers or self.substitutions) and self._originals is not None:
                    realize.lower_and_compile, realize.track_stats = self._originals

    def _compile(self, original: Callable[[UOp], UOp], linear: UOp) -> UOp:
        changed: dict[UOp, UOp] = {}
        for call in linear.toposort() if self.substitutions else ():
            if call.op is Ops.CALL and call.src[0].op is Ops.SINK and is_tunable(call.src[0]):
                schedule = None if self._unaligned(call) else self._schedule_of(call)
                if schedule is not None:
                    raw = call.src[0]
                    info = replace(raw.arg, opts_to_apply=schedule, beam=0)
                    changed[call] = call.replace(src=(raw.replace(arg=info), *call.src[1:]))
        compiled = original(linear.substitute(changed, name="tuned schedules") if changed else linear)
        for observer in tuple(self.observers):
            observer.compiled(linear, compiled)
        return compiled

    def _unaligned(self, call: UOp) -> bool:
        """Whether a kernel works, or has worked here, on a view that begins anywhere in its buffer. Code with vectors crashes there,
        and no trial has shown it: all are made with buffers of their own. A TinyJit's capture hides its inputs, its first call does not.
        """
        raw = call.src[0]
        if any(_offset(arg) % ALIGNMENT for arg in call.src[1:] if not arg.is_bound_var):
            self.unaligned.add(raw)
        return raw in self.unaligned

    def _schedule_of(self, call: UOp) -> Schedule | None:
        found = realize._get_call_to_compile(call)
        if found is None:
            return None
        device = call.device if isinstance(call.device, str) else call.device[0]  # as tinygrad chooses the renderer
        asked = (schedule_of(call.src[0], found[1], device) for schedule_of in reversed(tuple(self.substitutions)))
        return next((schedule for schedule in asked if schedule is not None), None)

    def _track(self, original: Callable[..., None], ctx: Any, call: UOp, st: Any, ets: Any) -> None:
        for observer in tuple(self.observers):
            observer.launched(ctx, call)
        original(ctx, call, st, ets)


_HOOKS = _Hooks()


def _programs_of(ast: UOp) -> list[UOp]:
    if ast.op is Ops.PROGRAM:
        return [ast]
    if ast.op is Ops.CUSTOM_FUNCTION and ast.arg == "graph":
        return [c.src[0] for c in ast.src[0].src if c.src[0].op is Ops.PROGRAM]
    return []


def default_device() -> str:
    """The device that DEV or tinygrad's own choice names."""
    try:
        return Device.DEFAULT
    except (Exception, ExceptionGroup) as error:
        raise DeviceError(f"no device can be used ({error}); set DEV, for example DEV=CPU") from None
