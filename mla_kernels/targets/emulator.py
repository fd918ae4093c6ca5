"""NPU emulator: the IR that the Ascend compiler reads, executed natively on CPU tensors.

A kernel goes through triton-ascend's front end and triton-adapter exactly as for the device; from there upstream MLIR
passes and LLVM make x86-64 code of it instead of Ascend code, gcc links it, and ctypes launches it, each program of the
grid in turn on two threads. What it shows: that the kernel's Ascend lowering computes the right values. What it does
not show: speed, the closed last compiler stage, and races between cores (a program runs undisturbed on one thread, and
kernels with atomics run on one thread alone).

An int argument of value 1 stays an argument, where Triton's launch would make a constant of it.

Whatever the lowering holds that the emulator has no meaning for is an EmulationError, never skipped.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS, Chip
from mla_kernels.targets.guard_pages import GuardedCopies, SharedInteger, call_in_child

HERE = Path(__file__).parent
THREADS = 2
OPTIMISE = True
"""Whether LLVM optimises what is built from now on. A kernel of a few small tiles runs in less time than that takes."""

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# MLIR scalar type -> C type, struct code padded to 8 bytes
SCALARS = {
    "i1": ("int8_t", "b7x"),
    "i8": ("int8_t", "b7x"),
    "i16": ("int16_t", "h6x"),
    "i32": ("int32_t", "i4x"),
    "i64": ("int64_t", "q"),
    "f32": ("float", "f4x"),
    "f64": ("double", "d"),
}


class EmulationError(RuntimeError):
    """A kernel did not lower, did not link, or died; the message names the stage and gives its words."""


class Program:
    """A linked kernel: ``library`` holds its launcher, ``arguments`` maps its run-time arguments to MLIR types."""

    def __init__(self, function: str, library: Path, arguments: Mapping[str, str], atomic: bool):
        self.function = function
        self.names = tuple(arguments)
        self.threads = 1 if atomic else THREADS  # atomics are lowered to plain read-modify-write
        codes = ["q" if kind.startswith("memref") else SCALARS[kind][1] for kind in arguments.values()]
        self.pack = struct.Struct("<" + "".join(codes)).pack
        loaded = ctypes.CDLL(str(library))
        self.watch, self.entry = loaded.emulator_watch, loaded.emulator_launch
        self.watch.argtypes = [ctypes.c_void_p]
        self.entry.restype = ctypes.c_long
        self.entry.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 4]

    def __call__(self, grid: tuple[int, int, int], values: Sequence[int | float]) -> int:
        """Run every program of ``grid`` on ``values`` (addresses for pointers); peak bytes one program allocated."""
        peak = self.entry(self.pack(*values), *grid, self.threads)
        if peak < 0:
            raise EmulationError(f"{self.function}: one program allocated more than the emulator's arena of 16 GiB")
        return peak


def launch(kernel, chip: Chip, grid: int, args: Sequence, constants: Mapping) -> None:
    """Run a declared kernel (:class:`mla_kernels.launch.Kernel`) with ``grid`` programs as ``chip`` would lower it.

    Args:
        args: CPU tensors, ints and floats in the declared order. A pointer's element type is its tensor's dtype; an int
            is i32 unless it needs 64 bits.
        constants: the kernel's constexpr arguments.
    """
    key = (kernel.source_hash, kernel.name, chip.architecture, *map(_type_key, args), *constants.items())
    program = _programs.get(key)
    if program is None:
        if chip.vendor != "ascend":
            raise EmulationError(f"{kernel.name}: the emulator runs Ascend lowerings, not {chip.name}")
        types = dict(zip(kernel.arguments, map(triton_type, args), strict=True))
        for name, declared in kernel.arguments.items():
            if (declared[0] == "*") != (types[name][0] == "*") or (declared[0] == "i" and types[name] == "fp32"):
                raise TypeError(f"{kernel.name}: argument {name} is declared {declared}, got {types[name]}")
        program = build(kernel.source, kernel.name, types, constants, chip.architecture)
        _programs[key] = program
    _execute(program, (grid, 1, 1), args)


def run(
    source: str,
    function: str,
    types: Mapping[str, str],
    constants: Mapping,
    grid: tuple[int, ...],
    args: Sequence,
    chip: Chip = CHIPS["ascend910b"],
) -> None:
    """Run ``function`` of the module text ``source``: the level below :func:`launch`, without a declaration.

    Args:
        types: run-time argument -> Triton type ("*bf16", "i32", ...), in the kernel's order.
        grid: one to three extents.
    """
    program = build(source, function, types, constants, chip.architecture)
    _execute(program, (*grid, *(1,) * (3 - len(grid))), args)


_programs: dict[tuple, Program] = {}
_guard: tuple[str, ...] = ()


@contextlib.contextmanager
def guarded(sides: tuple[str, ...] = ("end", "start")):
    """Within the block each launch runs in a child process, on copies of its tensors that touch inaccessible memory.

    Once for each of ``sides``: "start" has the inaccessible pages right before a tensor, "end" right after it. An
    access that leaves its tensor raises EmulationError, which names the argument; results are copied back after the
    last run. Views of one storage keep overlapping as they did, with the guards around what they cover together.
    """
    global _guard
    if not sides or set(sides) - {"start", "end"}:
        raise ValueError(f"sides {sides!r}: 'start' and 'end' are accepted")
    before, _guard = _guard, tuple(sides)
    try:
        yield
    finally:
        _guard = before


def _execute(program: Program, grid: tuple[int, int, int], args: Sequence) -> None:
    if _guard:
        run_in_child(program, grid, args, _guard)
    else:
        program(grid, [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args])


def run_in_child(program: Program, grid: tuple[int, int, int], args: Sequence, sides: Sequence[str]) -> None:
    """A launch in a forked child, once for each of ``sides`` on copies guarded there; the last run's results are kept.

    Raises EmulationError where the child dies, with the tensors untouched.
    """
    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(GuardedCopies(tuple(args), side)) for side in sides]
        fault = stack.enter_context(SharedInteger())

        def call() -> None:
            program.watch(fault.address)
            for each in copies:
                program(grid, [arg if at is None else at for arg, at in zip(args, each.addresses)])

        status, died_of = call_in_child(call)
        if died_of in (signal.SIGSEGV, signal.SIGBUS):
            where = _where(program, copies, fault.value)
            raise EmulationError(f"{program.function}: died of signal {died_of}: out-of-bounds access {where}")
        if died_of:
            raise EmulationError(f"{program.function}: died of signal {died_of}")
        if status:
            raise EmulationError(f"{program.function}: the program failed in its child process (arena exhausted)")
        copies[-1].copy_back()


def _where(program: Program, copies: Sequence[GuardedCopies], address: int) -> str:
    for place in filter(None, (each.locate(address) for each in copies)):
        name, distance = program.names[place[0]], place[1]
        edge = "before the start" if distance < 0 else "past the end"
        return f"{abs(distance)} bytes {edge} of {name}"
    return f"at {address:#x}, far from every tensor"


def _type_key(arg):
    """What the lowering depends on, cheap to compute."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype
    if type(arg) is int:
        return -(1 << 31) <= arg < 1 << 31
    return type(arg)


def triton_type(arg) -> str:
    """The Triton type that ``arg`` is launched as: "*bf16", "i32", "fp32", ..."""
    if isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise EmulationError(f"got a tensor on {arg.device}: the emulator takes CPU tensors")
        if arg.dtype not in POINTERS:
            raise EmulationError(f"got a tensor of {arg.dtype}: no pointer type for it")
        return POINTERS[arg.dtype]
    if isinstance(arg, bool):
        return "i1"
    if isinstance(arg, int):
        return "i32" if -(1 << 31) <= arg < 1 << 31 else "i64"
    if isinstance(arg, float):
        return "fp32"
    raise EmulationError(f"got an argument of type {type(arg).__name__}: tensors, ints and floats are accepted")


# Building: compile service, then gcc; kept in the cache folder


def build(
    source: str, function: str, types: Mapping[str, str], constants: Mapping, architecture: str = "Ascend910B3"
) -> Program:
    """The linked program, from the cache where it is there. EmulationError names the stage that refused the kernel."""
    family = architecture if architecture.startswith("Ascend950") else "Ascend910B3"  # A2 and A3 share their lowering
    made_by = _cpu_level(), OPTIMISE, _own_version()
    return _build(json.dumps([source, function, list(types.items()), list(constants.items()), family, *made_by]))


@functools.cache
def _build(key: str) -> Program:
    source, function, types, constants, architecture, cpu, optimise, _ = json.loads(key)
    folder = service.cache_folder() / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{function}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    library, about = folder / f"{base}.so", folder / f"{base}.json"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            job = {
                "action": "emulate",
                "source": source,
                "function": function,
                "signature": dict(types),
                "constexprs": dict(constants),
                "vendor": "ascend",
                "architecture": architecture,
                "options": {"cpu": cpu, "optimise": optimise},
                "output": f"{scratch}/kernel",
            }
            answer = service.pool().submit("ascend", job).result()
            if not answer["ok"]:
                raise EmulationError(f"{function}: {answer['reason']}")
            _link(function, answer, Path(scratch), optimise)
            (Path(scratch) / "about.json").write_text(json.dumps({k: answer[k] for k in ("args", "atomic")}))
            # several processes may build the same program: each file appears whole, the library last
            os.replace(f"{scratch}/kernel.ttadapter.mlir", folder / f"{base}.ttadapter.mlir")
            os.replace(f"{scratch}/about.json", about)
            os.replace(f"{scratch}/kernel.so", library)
    told = json.loads(about.read_text())
    names = [name for name, _ in types]
    return Program(function, library, dict(zip(names, _user_arguments(told["args"]), strict=True)), told["atomic"])


def _user_arguments(arguments: Sequence[str]) -> Sequence[str]:
    """Without the two workspace pointers in front and the grid's extents and ids behind."""
    return arguments[2:-6]


def _link(function: str, answer: Mapping, scratch: Path, optimise: bool) -> None:
    """Link the assembly with the launcher of its arguments."""
    launcher = _launcher(function, tuple(answer["args"]), optimise)
    assembly = (scratch / "kernel.s").read_text()
    (scratch / "kernel.s").write_text(assembly.replace(f"_mlir_ciface_{answer['name']}", "_mlir_ciface_kernel"))
    _gcc(function, ["-shared", "-pthread", "-Wl,-z,defs", str(launcher), "kernel.s", "-o", "kernel.so", "-lm"], scratch)


def _launcher(function: str, types: tuple[str, ...], optimise: bool) -> Path:
    """The compiled launcher of kernels that take these MLIR types, the compiler's own arguments included."""
    arguments = _user_arguments(types)
    unknown = [a for a in arguments if not a.startswith("memref") and a not in SCALARS]
    if unknown:
        raise EmulationError(f"{function}: no C type for arguments of type {', '.join(unknown)}")
    pointers = [i for i, argument in enumerate(arguments) if argument.startswith("memref")]
    calls = [f"&m[{i}]," if i in pointers else f"*({SCALARS[a][0]} *)&a[{i}]," for i, a in enumerate(arguments)]
    text = (HERE / "emulator_launcher.c").read_text()
    for name, value in {
        "DECLARATION": ", ".join("Memref *" if a.startswith("memref") else SCALARS[a][0] for a in types),
        "COUNT": str(len(arguments) or 1),
        "MEMREFS": " ".join(f"m[{i}] = (Memref){{(void *)a[{i}], (void *)a[{i}], 0, 1L << 40, 1}};" for i in pointers),
        "ARGUMENTS": " ".join(calls),
    }.items():
        text = text.replace(f"@{name}@", value)
    level = "-O2" if optimise else "-O0"
    folder = service.cache_folder() / "emulator"
    compiled = folder / f"launcher-{hashlib.sha256((text + level).encode()).hexdigest()[:20]}.o"
    if not compiled.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            (Path(scratch) / "launcher.c").write_text(text)
            _gcc(function, [level, "-fno-strict-aliasing", "-fPIC", "-c", "launcher.c", "-o", "launcher.o"], scratch)
            os.replace(f"{scratch}/launcher.o", compiled)
    return compiled


def _gcc(function: str, arguments: Sequence[str], folder: str | Path) -> None:
    try:
        result = subprocess.run(["gcc", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise EmulationError(f"{function}: gcc is not installed, and the emulator links with it") from error
    if result.returncode:
        raise EmulationError(f"{function}: linking failed: {result.stderr[:1500]}")


@functools.cache
def _cpu_level() -> str:
    """The widest x86-64 level of this machine, by LLVM's name."""
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512vl" in flags and "avx512dq" in flags:
        return "x86-64-v4"
    return "x86-64-v3" if "avx2" in flags else "x86-64-v2"


@functools.cache
def _own_version() -> str:
    """Changes whenever the code that makes programs does."""
    files = sorted([*HERE.glob("ascend_*.py"), HERE / "emulator.py", HERE / "emulator_launcher.c"])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
