"""Emulator of Gluon kernels for Hopper: a kernel's own code runs on a CPU, on CPU tensors.

What it executes is the source behind a ``@gluon.jit`` object, with the names that it uses (``gl``, ``mbarrier``,
``tma``, ``warpgroup_mma``, other jitted functions, ``gl.constexpr`` globals) replaced by those of this folder. It shows
wrong values, deadlocks, waits for a wrong phase, buffers reused too early, unordered accesses to shared memory, missing
fences, accumulators used in flight and wild pointers. It does not model warps, registers, clusters or time, does not
compile (the compiler refuses more than this does), and sums in another order than a device; products of float8 are
summed in float32, of which Hopper keeps about 14 bits.

An operation that it does not know raises NotImplementedError with its name; nothing is skipped.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from mla_kernels.targets.gluon import memory, values
from mla_kernels.targets.gluon.errors import DeadlockError, EmulationError
from mla_kernels.targets.gluon.schedule import Machine
from mla_kernels.targets.gluon.translation import Translation


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
    code = getattr(fn, "fn", None)
    if not isinstance(code, types.FunctionType):
        raise TypeError(f"fn must be what @gluon.jit returns, got {type(fn).__name__}")
    translation = Translation()
    kernel = translation.function(fn)
    bound = _bind(code, args, constants or {}, translation)
    for z, y, x in itertools.product(*(range(size) for size in reversed(grid))):
        machine = Machine((x, y, z), grid, assembly or {}, seed, delay, limit_s)
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
        nowhere = isinstance(failure, DeadlockError) or machine.executing
        place = "" if nowhere else f"{(machine.failed or main).name}{_where(failure)}: "
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


def _bind(code: types.FunctionType, args, constants: Mapping, translation: Translation) -> dict:
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
    constant = {name for name, p in parameters.items() if "constexpr" in str(p.annotation)} | constants.keys()
    return {
        name: translation.value(value) if name in constant else _argument(name, value) for name, value in given.items()
    }


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
