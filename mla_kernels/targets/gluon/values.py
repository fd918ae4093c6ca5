"""Register values of the Gluon emulator: blocks with their layouts, pointers, arithmetic.

Floats of 8 and 16 bits are rounded to nearest even after every operation. Types are promoted by the installed Triton's
own rules. Integers wrap; ``//`` and ``%`` truncate as in C.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from mla_kernels.language import tl
from mla_kernels.targets.gluon import layouts
from mla_kernels.targets.gluon.elements import carrier, convert, decode, encode, itemsize, rounded
from mla_kernels.targets.gluon.errors import EmulationError
from mla_kernels.targets.gluon.layouts import INFERRED
from mla_kernels.targets.gluon.schedule import here

FUNCTIONS: dict[str, Callable] = {}
"""The language's functions by name (:mod:`mla_kernels.targets.gluon.language` fills it); most are methods of blocks."""


class Block:
    """A scalar (shape ``[]``) or a block in registers."""

    __slots__ = ("data", "dtype", "layout")

    def __init__(self, data, dtype, layout=None):
        self.data, self.dtype, self.layout = data, dtype, layout

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def numel(self):
        return self.data.size

    @property
    def type(self):
        return BlockType(self.dtype, self.shape, self.layout)

    @property
    def T(self):
        return self.permute((1, 0))

    def like(self, data, layout=None):
        """The same kind of value with other elements."""
        return Block(data, self.dtype, layout)

    def to(self, dtype, fp_downcast_rounding=None, bitcast=False):
        if fp_downcast_rounding not in (None, "rtne"):
            raise NotImplementedError(f"rounding {fp_downcast_rounding!r} is not emulated")
        if bitcast:
            if itemsize(dtype) != itemsize(self.dtype):
                raise ValueError(f"Cannot bitcast {self.dtype} to {dtype}: their sizes differ")
            return Block(decode(encode(self.data, self.dtype), dtype), dtype, self.layout)
        return Block(convert(self.data, self.dtype, dtype), dtype, self.layout)

    cast = to

    def permute(self, *order):
        order = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
        return self.like(self.data.transpose([int(i) for i in order] or None), INFERRED)

    trans = permute

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
        return self.like(self.data.reshape([int(size) for size in shape]), INFERRED)

    def expand_dims(self, axis):
        axis = axis + self.data.ndim + 1 if axis < 0 else axis
        layout = self.layout
        if layout not in (None, INFERRED):
            if type(layout).__name__ != "SliceLayout" or layout.dim != axis:
                raise ValueError(f"expand_dims at axis {axis} takes a block of SliceLayout({axis}, ...), got {layout}")
            layout = layout.parent
        return self.like(np.expand_dims(self.data, axis), layout)

    def split(self):
        if self.data.shape[-1] != 2:
            raise ValueError(f"split takes a block whose last dimension is 2, got shape {self.shape}")
        return self.like(self.data[..., 0], INFERRED), self.like(self.data[..., 1], INFERRED)

    def __getitem__(self, key):
        key = key if isinstance(key, tuple) else (key,)
        if any(part is not None and part != slice(None) for part in key):
            raise TypeError(f"a block is indexed with ':' and None alone, got {key}")
        value = self
        for axis, part in enumerate(key):
            if part is None:
                value = value.expand_dims(axis)
        return value

    def _scalar(self, use):
        if self.data.ndim:
            raise TypeError(f"a block of shape {self.shape} cannot be {use}; only a scalar can")
        return self.data.item()

    def __bool__(self):
        return bool(self._scalar("a condition"))

    def __index__(self):
        value = self._scalar("an integer")
        if not isinstance(value, (int, bool)):
            raise TypeError(f"a scalar of {self.dtype} cannot be an integer; only one of an integer type can")
        return int(value)

    __hash__ = None

    def __repr__(self):
        return f"Block({self.dtype}, {self.shape}, {self.layout})"

    def __neg__(self):
        return self.like(rounded(np.negative(self.data), self.dtype), self.layout)

    def __invert__(self):
        if self.dtype.is_floating():
            raise TypeError(f"~ takes integers, got {self.dtype}")
        return self.like(np.asarray(~self.data), self.layout)

    def __getattr__(self, name):
        """Methods that are functions of the language too: x.max(1) is gl.max(x, 1)."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            raise NotImplementedError(f"the method {name!r} of a block is not emulated")
        return functools.partial(FUNCTIONS[name], self)


class BlockType:
    """What ``x.type`` answers: element_ty, scalar, shape, layout."""

    def __init__(self, element_ty, shape, layout):
        self.element_ty = self.scalar = element_ty
        self.shape, self.layout = shape, layout

    @property
    def nbytes(self):
        return math.prod(self.shape) * itemsize(self.element_ty)

    def is_block(self):
        return bool(self.shape)

    def get_block_shapes(self):
        return self.shape


class Pointer(Block):
    """Addresses into one argument: bytes from the start of its storage."""

    __slots__ = ("argument",)

    def __init__(self, argument, data, dtype, layout=None):
        super().__init__(data, dtype, layout)
        self.argument = argument

    def like(self, data, layout=None):
        return Pointer(self.argument, data, self.dtype, layout)

    def to(self, dtype, fp_downcast_rounding=None, bitcast=False):
        if dtype.is_ptr():
            return Pointer(self.argument, self.data, dtype, self.layout)
        if dtype.name not in ("int64", "uint64"):
            raise ValueError(f"a pointer casts to another pointer or 64-bit integer, got {dtype}")
        return Block((self.data + self.argument.address).astype(carrier(dtype)), dtype, self.layout)

    cast = to

    def _moved(self, by, sign):
        if isinstance(by, float) or (isinstance(by, Block) and by.dtype.is_floating()):
            raise TypeError("a pointer moves by integers, got floats")
        by = as_block(by)
        x, y, layout = broadcast(self, by, "pointer arithmetic")
        return self.like(x + sign * y.astype(np.int64) * itemsize(self.dtype.element_ty), layout)

    def __add__(self, by):
        return self._moved(by, 1)

    __radd__ = __add__

    def __sub__(self, by):
        return self._moved(by, -1)


# ---------------------------------------------------------------------------------------------- arithmetic


@functools.cache
def _rules():
    from triton.language.semantic import TritonSemantic

    return object.__new__(TritonSemantic)


@functools.cache
def _common(a, a_is_number, b, b_is_number, division):
    return _rules().computation_type_impl(a, a_is_number, b, b_is_number, division)


def _type_of(value):
    """The element type of a block, or that which Triton gives to a number."""
    if isinstance(value, Block):
        return value.dtype
    if isinstance(value, bool):
        return tl.int1
    if isinstance(value, float):
        narrow = not math.isfinite(value) or value == 0 or 2**-126 <= abs(value) < 2**128
        return tl.float32 if narrow else tl.float64
    for dtype, low, high in ((tl.int32, -(2**31), 2**31), (tl.uint32, 0, 2**32), (tl.int64, -(2**63), 2**63)):
        if low <= value < high:
            return dtype
    return tl.uint64


def placed(data: np.ndarray, dtype, layout) -> Block:
    """A new block; raises ValueError where its layout does not fit its rank or the partition's warps."""
    layout = layouts.known(layout)
    if layout is not None and layout is not INFERRED:
        layouts.check(layout, data.ndim, here().num_warps)
    return Block(data, dtype, layout)


def constant(value, what: str) -> int:
    """An integer that is known when the kernel is compiled."""
    if not isinstance(value, int):
        raise TypeError(f"{what} takes a constant (gl.constexpr), got {value!r}")
    return value


def as_block(value, dtype=None) -> Block:
    """A number as a scalar; a block as it is. Raises where ``value`` is neither, and for products in flight."""
    if isinstance(value, Block):
        return value
    if isinstance(value, (bool, int, float)):
        dtype = dtype or _type_of(value)
        return Block(rounded(np.asarray(value), dtype), dtype)
    unusable = getattr(value, "unusable", None)
    if unusable:
        raise EmulationError(unusable())
    raise TypeError(f"expected a block or a number, got {type(value).__name__}")


def cast(value, dtype) -> np.ndarray:
    """The elements of a block or number as ``dtype``."""
    if not isinstance(value, Block):
        return as_block(value, dtype).data
    return convert(value.data, value.dtype, dtype)


def broadcast(a: Block, b: Block, what: str):
    """(elements of a, elements of b, layout), both of one shape; layouts and ranks must agree as for the compiler."""
    if a.data.ndim == 0 or b.data.ndim == 0:
        return a.data, b.data, a.layout if a.data.ndim else b.layout
    layout = layouts.agree(a.layout, b.layout, what)
    if a.data.ndim != b.data.ndim:
        raise ValueError(f"Cannot broadcast in {what}, rank mismatch: {a.shape}, {b.shape}")
    x, y = np.broadcast_arrays(a.data, b.data) if a.data.shape != b.data.shape else (a.data, b.data)
    return x, y, layout


def promoted(a, b, what: str, division: bool = False):
    """(elements, elements, common dtype, layout) of two operands."""
    if not isinstance(a, (Block, bool, int, float)) or not isinstance(b, (Block, bool, int, float)):
        as_block(a), as_block(b)
    numbers = not isinstance(a, Block), not isinstance(b, Block)
    dtype = _common(_type_of(a), numbers[0], _type_of(b), numbers[1], division)
    own = [value.layout if isinstance(value, Block) else None for value in (a, b)]
    x, y = (Block(cast(value, dtype), dtype, layout) for value, layout in zip((a, b), own))
    x, y, layout = broadcast(x, y, what)
    return x, y, dtype, layout


def _quotient(x, y):
    if np.any(y == 0):
        raise EmulationError("an integer is divided by zero")
    quotient = np.abs(x) // np.abs(y)
    return np.where((x < 0) != (y < 0), -quotient, quotient) if np.issubdtype(x.dtype, np.signedinteger) else x // y


def _remainder(x, y):
    if np.issubdtype(x.dtype, np.floating):
        return np.fmod(x, y)
    return x - _quotient(x, y) * y


_ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": _quotient,
    "mod": _remainder, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
    "rshift": np.right_shift,
}  # fmt: skip
_COMPARISON = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_INTEGERS_ONLY = {"floordiv", "and", "or", "xor", "lshift", "rshift"}


def arithmetic(name: str, a, b) -> Block:
    """``a OP b`` by the compiler's rules."""
    if isinstance(b, Pointer) and name == "add":
        return b + a
    x, y, dtype, layout = promoted(a, b, name, division=name in ("truediv", "floordiv", "mod"))
    if name in _INTEGERS_ONLY and dtype.is_floating():
        raise TypeError(f"{name} takes integers, got {_type_of(a)} and {_type_of(b)}")
    if name == "truediv" and not dtype.is_floating():
        x, y, dtype = x.astype(np.float32), y.astype(np.float32), tl.float32
    if name in ("add", "sub", "mul") and dtype.name == "int1":
        raise TypeError(f"{name} of booleans is not emulated; cast them to integers first")
    return Block(rounded(_ARITHMETIC[name](x, y), dtype), dtype, layout)


def comparison(name: str, a, b) -> Block:
    x, y, _, layout = promoted(a, b, name)
    return Block(np.asarray(_COMPARISON[name](x, y)), tl.int1, layout)


def _operators():
    def forward(compute, name):
        return lambda self, other: compute(name, self, other)

    def backward(compute, name):
        return lambda self, other: compute(name, other, self)

    for name in _ARITHMETIC:
        setattr(Block, f"__{name}__", forward(arithmetic, name))
        setattr(Block, f"__r{name}__", backward(arithmetic, name))
    for name in _COMPARISON:
        setattr(Block, f"__{name}__", forward(comparison, name))


_operators()
