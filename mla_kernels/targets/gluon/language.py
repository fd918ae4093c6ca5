"""Functions of ``triton.experimental.gluon.language`` in the emulator."""

import functools
import math

import numpy as np

from mla_kernels.language import tl
from mla_kernels.targets.gluon import layouts, memory, shared, values
from mla_kernels.targets.gluon.elements import carrier, rounded
from mla_kernels.targets.gluon.errors import EmulationError
from mla_kernels.targets.gluon.schedule import here, line
from mla_kernels.targets.gluon.values import FUNCTIONS, Block, Pointer, arithmetic, as_block, constant, placed


def _op(*names: str):
    def register(function):
        for name in names or (function.__name__.strip("_"),):
            FUNCTIONS[name] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------- making blocks

FUNCTIONS["load"], FUNCTIONS["store"] = memory.load, memory.store
FUNCTIONS["allocate_shared_memory"] = shared.allocate


@_op()
def arange(start, end, layout=None):
    start, end = constant(start, "arange"), constant(end, "arange")
    return placed(np.arange(start, end, dtype=np.int32), tl.int32, layout)


@_op()
def full(shape, value, dtype, layout=None):
    shape = tuple(constant(size, "a shape") for size in shape)
    return placed(np.full(shape, values.cast(as_block(value), dtype)), dtype, layout)


@_op()
def zeros(shape, dtype, layout=None):
    return full(shape, 0, dtype, layout)


@_op()
def cast(input, dtype, fp_downcast_rounding=None, bitcast=False):
    return as_block(input).to(dtype, fp_downcast_rounding, bitcast)


@_op()
def convert_layout(value, layout, assert_trivial=False):
    return placed(as_block(value).data, value.dtype, layout)


# ---------------------------------------------------------------------------------------------- shapes


@_op()
def expand_dims(input, axis):
    return as_block(input).expand_dims(axis)


@_op()
def permute(input, *order):
    return as_block(input).permute(*order)


@_op()
def trans(input, *order):
    return as_block(input).permute(*order)


@_op()
def reshape(input, *shape):
    return as_block(input).reshape(*shape)


@_op()
def ravel(x):
    return as_block(x).reshape([x.numel])


@_op()
def split(a):
    return as_block(a).split()


@_op()
def join(a, b):
    x, y, dtype, _ = values.promoted(a, b, "join")
    return Block(np.stack(np.broadcast_arrays(x, y), -1), dtype, layouts.INFERRED)


@_op()
def broadcast(input, other):
    x, y, layout = values.broadcast(as_block(input), as_block(other), "broadcast")
    x, y = np.broadcast_arrays(x, y)
    return input.like(x, layout), other.like(y, layout)


@_op()
def gather(src, index, axis):
    src, index = as_block(src), as_block(index)
    return src.like(np.take_along_axis(src.data, index.data.astype(np.int64), axis), index.layout)


# ---------------------------------------------------------------------------------------------- elementwise


def _unary(name, function, floats=True):
    def compute(x):
        x = as_block(x)
        if floats and not x.dtype.is_floating():
            raise TypeError(f"{name} takes floats, got {x.dtype}")
        return Block(rounded(function(x.data), x.dtype), x.dtype, x.layout)

    FUNCTIONS[name] = compute


for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil"):
    _unary(_name, getattr(np, _name))
_unary("sqrt_rn", np.sqrt)
_unary("rsqrt", lambda x: 1 / np.sqrt(x))
_unary("erf", np.vectorize(math.erf, otypes=[np.float32]))
_unary("abs", np.abs, floats=False)

for _name in ("add", "sub", "mul"):
    FUNCTIONS[_name] = functools.partial(arithmetic, _name)


@_op("fdiv", "div_rn")
def fdiv(x, y, ieee_rounding=False):
    return arithmetic("truediv", x, y)


@_op()
def fma(x, y, z):
    product, addend, dtype, layout = values.promoted(arithmetic("mul", x, y), z, "fma")
    if dtype.name in ("fp32", "fp64"):
        first, second, _, _ = values.promoted(x, y, "fma")
        exact = first.astype(np.float64) * second.astype(np.float64) + addend
        return Block(rounded(exact, dtype), dtype, layout)
    return Block(rounded(product + addend, dtype), dtype, layout)


def _extreme(name, quiet, propagating):
    """The number where one operand is NaN, as the hardware's min and max, unless asked to propagate NaN."""

    def compute(x, y, propagate_nan=None):
        if not isinstance(x, Block) and not isinstance(y, Block):
            return (max if name == "maximum" else min)(x, y)
        a, b, dtype, layout = values.promoted(x, y, name)
        every = propagate_nan is not None and propagate_nan == tl.PropagateNan.ALL
        return Block(rounded((propagating if every else quiet)(a, b), dtype), dtype, layout)

    FUNCTIONS[name] = compute


_extreme("maximum", np.fmax, np.maximum)
_extreme("minimum", np.fmin, np.minimum)


@_op()
def clamp(x, min, max, propagate_nan=None):
    return FUNCTIONS["minimum"](FUNCTIONS["maximum"](x, min, propagate_nan), max, propagate_nan)


@_op()
def where(condition, x, y):
    condition = as_block(condition)
    if isinstance(x, Pointer) and isinstance(y, Pointer):
        if x.argument is not y.argument:
            raise NotImplementedError("where between pointers into two arguments is not emulated")
        first, second, dtype, layout = x.data, y.data, x.dtype, layouts.agree(x.layout, y.layout, "where")
    else:
        first, second, dtype, layout = values.promoted(x, y, "where")
    if condition.data.ndim and (first.ndim or second.ndim):
        layout = layouts.agree(condition.layout, layout, "where")
        if condition.data.ndim != max(first.ndim, second.ndim):
            raise ValueError(f"Cannot broadcast in where, rank mismatch: {condition.shape}, {list(first.shape)}")
    elif condition.data.ndim:
        layout = condition.layout
    data = np.asarray(np.where(condition.data != 0, first, second))
    return Pointer(x.argument, data, dtype, layout) if dtype.is_ptr() else Block(data, dtype, layout)


@_op()
def cdiv(x, div):
    if isinstance(x, int) and isinstance(div, int):
        return -(-x // div)
    return (as_block(x) + (as_block(div) - 1)) // div


# ---------------------------------------------------------------------------------------------- reductions


def _reduce(input, axis, keep_dims, compute):
    """``compute(array, axis)`` over one axis, or over all with None."""
    if axis is None:
        input, axis = input.reshape([input.numel]), 0
    axis = int(axis)
    if not 0 <= axis < input.data.ndim:
        raise ValueError(f"axis {axis} of a block {input.shape}")
    found = np.asarray(compute(input.data, axis))
    layout = None if found.ndim == 0 else layouts.sliced(input.layout, axis)
    result = Block(found, input.dtype, layout)
    return result.expand_dims(axis) if keep_dims and found.ndim else result


def _widened(input):
    """What Triton reduces: bfloat16 as float32, narrow integers as 32 bits."""
    input = as_block(input)
    if input.dtype.name == "bf16":
        return input.to(tl.float32)
    if input.dtype.is_int() and input.dtype.primitive_bitwidth < 32:
        return input.to(tl.int32 if input.dtype.is_int_signed() or input.dtype.name == "int1" else tl.uint32)
    return input


@_op("sum")
def sum_(input, axis=None, keep_dims=False, dtype=None):
    input = _widened(input) if dtype is None else as_block(input).to(dtype)
    return _reduce(input, axis, keep_dims, lambda x, axis: rounded(np.sum(x, axis, dtype=x.dtype), input.dtype))


def _extreme_of(name, quiet, place):
    def compute(input, axis=None, return_indices=False, return_indices_tie_break_left=True, keep_dims=False):
        input = _widened(input)
        best = _reduce(input, axis, keep_dims, lambda x, axis: quiet.reduce(x, axis))
        if not return_indices:
            return best
        where = _reduce(input, axis, keep_dims, lambda x, axis: place(x, axis).astype(np.int32))
        return best, Block(where.data, tl.int32, where.layout)

    FUNCTIONS[name] = compute


_extreme_of("max", np.fmax, np.argmax)
_extreme_of("min", np.fmin, np.argmin)


@_op()
def cumsum(input, axis=0, reverse=False, dtype=None):
    input = _widened(input) if dtype is None else as_block(input).to(dtype)
    data = np.flip(input.data, axis) if reverse else input.data
    total = np.cumsum(data, axis, dtype=data.dtype)
    return input.like(rounded(np.flip(total, axis) if reverse else total, input.dtype), input.layout)


@_op()
def reduce(input, axis, combine_fn, keep_dims=False):
    """A reduction by the kernel's own function, in halves."""
    several = isinstance(input, (tuple, list))
    parts = [as_block(part) for part in (input if several else (input,))]
    if axis is None:
        parts, axis = [part.reshape([part.numel]) for part in parts], 0
    layout = parts[0].layout
    moved = [np.moveaxis(part.data, axis, 0) for part in parts]
    while moved[0].shape[0] > 1:
        half = moved[0].shape[0] // 2
        first, second = ([Block(x[s], p.dtype) for x, p in zip(moved, parts)] for s in (slice(half), slice(half, None)))
        found = combine_fn(*first, *second)
        moved = [as_block(x).data for x in (found if several else (found,))]
    results = []
    for x, part in zip(moved, parts):
        data = np.asarray(x[0])
        result = part.like(data, None if data.ndim == 0 else layouts.sliced(layout, axis))
        results.append(result.expand_dims(axis) if keep_dims else result)
    return tuple(results) if several else results[0]


# ---------------------------------------------------------------------------------------------- the program


@_op()
def program_id(axis):
    return as_block(int(here().machine.program[axis]), tl.int32)


@_op()
def num_programs(axis):
    return as_block(int(here().machine.grid[axis]), tl.int32)


@_op()
def num_warps():
    return here().num_warps


@_op()
def num_ctas():
    return 1


@_op("barrier", "thread_barrier")
def barrier(*, cluster=False):
    """Warps of a partition are one here."""
    if cluster:
        raise NotImplementedError("barriers of a cluster are not emulated")
    here().machine.step()


@_op()
def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs=None):
    functions_and_args = list(functions_and_args)
    for name, given in (("worker_num_warps", worker_num_warps), ("worker_num_regs", worker_num_regs)):
        if given is not None and len(given) != len(functions_and_args) - 1:
            raise ValueError(f"warp_specialize: {len(functions_and_args) - 1} workers, but {name} is {given}")
    me = here()
    workers = []
    for number, ((function, args), warps) in enumerate(zip(functions_and_args[1:], worker_num_warps), 1):
        for argument in args:
            if isinstance(argument, Block) and argument.data.ndim:
                raise ValueError(f"worker {function.__name__} is given a block {argument.shape}; workers take scalars")
        workers.append((f"worker {number} ({function.__name__})", int(warps), functools.partial(function, *args)))
    function, args = functions_and_args[0]
    name, me.name = me.name, f"the default partition ({function.__name__})"
    result = me.machine.specialize(functools.partial(function, *args), workers)
    me.name = name
    return result


# ---------------------------------------------------------------------------------------------- hints and checks


@_op("max_contiguous", "max_constancy", "expect_zero")
def hint(input, *given):
    return input


@_op()
def multiple_of(input, values):
    number = values[0] if isinstance(values, (list, tuple)) else values
    if isinstance(input, Block) and input.data.ndim == 0 and int(input.data) % int(number):
        raise EmulationError(f"multiple_of at {line()}: {int(input.data)} is no multiple of {number}")
    return input


@_op("static_print", "device_print")
def print_(*args, **kwargs):
    return None


@_op()
def static_assert(cond, msg=""):
    if not bool(cond):
        raise EmulationError(f"static_assert at {line()}: {msg}")


@_op("device_assert", "assume")
def device_assert(cond, msg="", mask=None):
    held = as_block(cond).data
    if mask is not None:
        held = held | ~as_block(mask).data
    if not held.all():
        raise EmulationError(f"an assertion at {line()} does not hold: {msg}")


@_op()
def static_range(*bounds):
    return range(*(constant(bound, "static_range") for bound in bounds))


@_op("range")
def range_(*bounds, **hints):
    """Loop variables of ``range`` are scalars of 32 bits."""
    bounds = [bound if isinstance(bound, int) else int(as_block(bound)) for bound in bounds]
    return (as_block(i, tl.int32) for i in range(*bounds))


@_op()
def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    """A prefetch does nothing; any other assembly must have been given a meaning (:func:`emulator.run`)."""
    args = [as_block(argument) for argument in args]
    for text, meaning in here().machine.assembly.items():
        if text in asm:
            found = meaning(*(argument.data for argument in args))
            return Block(rounded(np.asarray(found), dtype), dtype, args[0].layout)
    if "prefetch" in asm:
        return Block(np.zeros(args[0].data.shape, carrier(dtype)), dtype, args[0].layout)
    raise NotImplementedError(f"inline assembly at {line()} is not emulated, nor was its meaning given: {asm}")
