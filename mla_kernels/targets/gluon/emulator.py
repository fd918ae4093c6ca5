"""Emulator of Gluon kernels for Hopper: a kernel's own code runs on a CPU, on CPU tensors.

What it executes is the Python function behind a ``@gluon.jit`` object, with the names that it uses (``gl``,
``mbarrier``, ``tma``, ``warpgroup_mma``, other jitted functions, ``gl.constexpr`` globals) replaced by those of this
room. It shows wrong values, deadlocks, waits for a wrong phase, buffers reused too early, unordered accesses to shared
memory, missing fences, accumulators used in flight and wild pointers. It does not model warps, registers, clusters or
time, does not compile (the compiler refuses more than this does), and sums in another order than a device; products of
float8 are summed in float32, of which Hopper keeps about 14 bits.

An operation that it does not know raises NotImplementedError with its name; nothing is skipped.
"""

import builtins
import inspect
import itertools
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from mla_kernels.targets.gluon import hopper, language, memory, values
from mla_kernels.targets.gluon.errors import DeadlockError, EmulationError
from mla_kernels.targets.gluon.schedule import Machine

_TABLES = {"gl": language.FUNCTIONS, **hopper.FUNCTIONS}


def run(
    fn,
    grid: Sequence[int],
    args: Sequence | Mapping[str, object],
    constants: Mapping[str, object] | None = None,
    *,
    num_warps: int = 4,
    seed: int = 0,
    delay: float = 8.0,
    limit_s: float = 60.0,
    assembly: Mapping[str, Callable] | None = None,
) -> None:
    """Execute a Gluon kernel, one program of the grid after another; results are in the tensors given.

    Args:
        fn: what ``@gluon.jit`` made of the kernel.
        grid: one to three numbers of programs.
        args: values of the parameters that are not in ``constants``, in order or by name. CPU tensors are pointers,
            ``TensorDescriptor`` objects of ``triton.experimental.gluon.nvidia.hopper`` over CPU tensors are TMA
            descriptors, numbers are scalars (int32 where they fit, float32).
        constants: values of the ``gl.constexpr`` parameters.
        num_warps: warps of the kernel's default partition.
        seed: with the same one the same operations meet in the same order.
        delay: how long asynchronous operations take, in operations of a partition: each takes 0 to 4 times that. With
            0 each executes at once.
        limit_s: wall time after which a program is given up; a deadlock is found without it.
        assembly: text of inline assembly -> function of NumPy arrays that says what it computes.

    Raises:
        EmulationError: or one of its kinds ``DeadlockError``, ``RaceError``, ``OutOfBoundsError``
            (:mod:`mla_kernels.targets.gluon.errors`); also around any other error inside the kernel. Every message
            begins with kernel and program, and names partition and line.
        NotImplementedError: an operation that is not emulated, by name.
        TypeError: arguments that are not the kernel's parameters.
    """
    grid = tuple(int(size) for size in grid)
    if not 1 <= len(grid) <= 3 or any(size < 0 for size in grid):
        raise ValueError(f"grid must be one to three numbers of programs, got {grid}")
    grid += (1,) * (3 - len(grid))
    code = _function(fn)
    kernel = Translation().function(code)
    bound = _bind(code, args, constants or {})
    for z, y, x in itertools.product(*(range(size) for size in reversed(grid))):
        machine = Machine(f"{seed} {x} {y} {z}", delay, limit_s)
        machine.program, machine.grid, machine.assembly = (x, y, z), grid, dict(assembly or {})
        _program(machine, code.__name__, kernel, bound, num_warps)


def _program(machine: Machine, name: str, kernel: Callable, bound: Mapping, num_warps: int) -> None:
    main = machine.main("the kernel", num_warps)
    try:
        with np.errstate(all="ignore"):
            kernel(**bound)
            for check in machine.at_end:
                check()
    except Exception as failure:
        failure = machine.failure or failure
        known = isinstance(failure, (EmulationError, NotImplementedError))
        text = f"{failure}" if known else f"{type(failure).__name__}: {failure}"
        place = "" if isinstance(failure, DeadlockError) else f"{(machine.failed or main).name}{_where(failure)}: "
        message = f"{name}, program {machine.program}: {place}{text}"
        raise (type(failure) if known else EmulationError)(message) from failure
    finally:
        machine.close()


def _where(failure: BaseException) -> str:
    """The last line of the kernel in a failure's traceback."""
    found, entry = "", failure.__traceback__
    while entry is not None:
        path = entry.tb_frame.f_code.co_filename
        if entry.tb_frame.f_globals.get("__emulated__"):
            found = f", {path.rpartition('/')[2]}:{entry.tb_lineno}"
        entry = entry.tb_next
    return found


def _function(fn) -> types.FunctionType:
    """The Python function behind a jitted one."""
    code = getattr(fn, "fn", None)
    if not isinstance(code, types.FunctionType):
        raise TypeError(f"fn must be what @gluon.jit returns, got {type(fn).__name__}")
    return code


def _bind(code: types.FunctionType, args, constants: Mapping) -> dict:
    """Parameter -> emulated value."""
    parameters = inspect.signature(code).parameters
    if not isinstance(args, Mapping):
        free = [name for name in parameters if name not in constants]
        if len(args) > len(free):
            raise TypeError(f"{code.__name__} takes {len(free)} arguments beside its constants, got {len(args)}")
        args = dict(zip(free, args))
    given = {**args, **constants}
    unknown = sorted(given.keys() - parameters.keys())
    missing = [name for name, p in parameters.items() if name not in given and p.default is inspect.Parameter.empty]
    if unknown or missing or args.keys() & constants.keys():
        both = sorted(args.keys() & constants.keys())
        raise TypeError(f"{code.__name__}: missing {missing}, unknown {unknown}, given twice {both}")
    translate = Translation().value
    constant = {name for name, p in parameters.items() if "constexpr" in str(p.annotation)} | constants.keys()
    return {name: translate(value) if name in constant else _argument(name, value) for name, value in given.items()}


def _argument(name: str, value):
    if isinstance(value, torch.Tensor):
        return memory.Argument(name, value).pointer()
    if hasattr(value, "block_shape"):
        return memory.Descriptor.of(name, value)
    if isinstance(value, (tuple, list)):
        return tuple(_argument(f"{name}[{i}]", part) for i, part in enumerate(value))
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        return values.as_block(value)
    raise TypeError(f"argument {name} must be a CPU tensor, a TensorDescriptor, a number or None, got {type(value)}")


class _Module:
    """A module of Triton inside a kernel."""

    def __init__(self, module, translation: "Translation"):
        self._module, self._translation = module, translation

    def __getattr__(self, name):
        table = _TABLES[_table(self._module.__name__)]
        if name in table:
            return table[name]
        if not hasattr(self._module, name):
            raise AttributeError(f"{self._module.__name__} has no {name!r}")
        return self._translation.value(getattr(self._module, name))


def _table(module: str) -> str:
    """Where functions of a module of Triton are looked up."""
    last = module.rpartition(".")[2]
    if last in _TABLES:
        return last
    return "gl"


class Translation:
    """Kernel objects -> emulated ones, each once."""

    def __init__(self):
        self._functions: dict[object, Callable] = {}

    def value(self, value):
        """What a kernel sees in place of ``value``."""
        if isinstance(value, types.ModuleType):
            return _Module(value, self) if value.__name__.startswith("triton") else value
        kind = type(value).__name__
        if kind == "constexpr":
            return self.value(value.value)
        if kind == "ConstexprFunction":
            return value.fn
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(self.value(part) for part in value)
        if isinstance(getattr(value, "fn", None), types.FunctionType):  # jitted
            table = _TABLES["gl"] if value.fn.__module__.startswith("triton.") else {}
            return table.get(value.fn.__name__) or self._named(value.fn) or self.function(value.fn)
        if isinstance(value, types.FunctionType) and value.__module__.startswith("triton."):
            return self._named(value) or _unknown(f"{value.__module__}.{value.__name__}")
        if isinstance(value, type) and value.__name__ in ("static_range", "range") and "triton" in value.__module__:
            return language.FUNCTIONS[value.__name__]
        if isinstance(value, type) and value.__name__ == "constexpr":
            return _unwrapped
        if getattr(value, "__triton_aggregate__", False):
            raise NotImplementedError(f"aggregates are not emulated: {value}")
        if isinstance(value, types.FunctionType):
            raise NotImplementedError(f"a kernel calls {value.__name__}, which is not jitted")
        return value

    @staticmethod
    def _named(function: types.FunctionType):
        """The emulated function of Triton's of this name, or None. Some are in the language and in Hopper's module."""
        if not function.__module__.startswith("triton."):
            return None
        name = function.__name__
        for table in (_TABLES[_table(function.__module__)], _TABLES["hopper"], _TABLES["gl"]):
            if name in table:
                return table[name]
        return None

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """The same code with its global names and closure translated."""
        if function in self._functions:
            return self._functions[function]
        scope = {"__emulated__": True, "__builtins__": builtins, "__name__": function.__module__}
        scope |= {"range": language.FUNCTIONS["range"]}
        scope |= {"min": language.FUNCTIONS["minimum"], "max": language.FUNCTIONS["maximum"]}
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copy = types.FunctionType(function.__code__, scope, function.__name__, None, cells or None)
        self._functions[function] = copy  # before what it calls: a function may name itself
        for name in _names(function.__code__):
            if name in function.__globals__:
                scope[name] = self.value(function.__globals__[name])
        for cell, original in zip(cells, function.__closure__ or ()):
            cell.cell_contents = self.value(original.cell_contents)
        copy.__defaults__ = None if function.__defaults__ is None else tuple(map(self.value, function.__defaults__))
        keywords = function.__kwdefaults__
        copy.__kwdefaults__ = keywords and {name: self.value(value) for name, value in keywords.items()}
        return copy


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function may read."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _unwrapped(value):
    """``gl.constexpr(x)`` in a kernel."""
    return value


def _unknown(name: str) -> Callable:
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"{name} is not emulated")

    return refuse
