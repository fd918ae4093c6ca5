"""Shared memory of the Gluon emulator: bytes, layouts, views, and who may touch what.

A buffer is an array of bytes filled with 0xFF (NaN in every float type). A view says where its elements stand by its
layout: ``NVMMASharedLayout`` as consecutive tiles of [rows, swizzle width], 16-byte chunks swizzled; ``Swizzled...`` by
its formula. An example, bfloat16 and 128 bytes: [64, 256] is four tiles [64, 64], 8,192 bytes each, so that a
reinterpretation as [4, 64, 64] finds columns 64 to 127 at index 1, and any other shape finds numbers in disorder.

Every cell of a buffer (16 bytes; 4 in a small buffer) remembers its last write and each actor's last read. An access is
a RaceError unless the one before it, if either writes, is known to the partition's clock to have ended; so is an access
of the asynchronous proxy (products and TMA) to what ordinary stores wrote, with no ``fence_async_shared`` between.
"""

import dataclasses
import functools
import math

import numpy as np

from mla_kernels.targets.gluon import values
from mla_kernels.targets.gluon.elements import BITS, decode, encode, itemsize
from mla_kernels.targets.gluon.errors import OutOfBoundsError, RaceError
from mla_kernels.targets.gluon.schedule import Clock, Machine, assigned, here, line
from mla_kernels.targets.gluon.values import Block, constant

_SMALL_BUFFER = 4096
_PERIOD = {128: 1024, 64: 512, 32: 256, 0: 128}
"""Bytes after which a swizzle pattern repeats: an operand of TMA or a product starts at a multiple."""


class Geometry:
    """Where the elements of a view stand, from its start, in elements; ``dense`` if they fill ``nbytes`` bytes."""

    def __init__(self, index: np.ndarray, size: int, dense: bool):
        self.index, self.size, self.dense = index, size, dense
        self.nbytes = index.size * size
        self._derived: dict = {}

    def derived(self, key, make) -> "Geometry":
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def permuted(self, order: tuple[int, ...]) -> "Geometry":
        return self.derived(order, lambda: Geometry(self.index.transpose(order), self.size, self.dense))

    def cut(self, start: int, length: int, axis: int) -> "Geometry":
        place = (slice(None),) * axis + (slice(start, start + length),)
        return self.derived((start, length, axis, ""), lambda: Geometry(self.index[place], self.size, False))

    def reshaped(self, shape: tuple[int, ...]) -> "Geometry":
        return self.derived(("shape", *shape), lambda: Geometry(self.index.reshape(shape), self.size, self.dense))

    def cells(self, base: int, grain: int):
        """The cells of ``grain`` bytes that the view touches when it starts at byte ``base``."""
        if self.dense:
            return slice(base // grain, -(-(base + self.nbytes) // grain))
        key = "cells", base % grain, grain
        if key not in self._derived:
            self._derived[key] = np.unique((base % grain + self.index.ravel() * self.size) // grain)
        return self._derived[key] + base // grain


def _nvmma(shape, layout, size):
    rank = min(layout.rank, len(shape))
    tile, width = tuple(shape[-rank:]), layout.swizzle_byte_width
    if layout.element_bitwidth != 8 * size:
        raise ValueError(f"elements of {8 * size} bits cannot have the layout {layout}")
    if getattr(layout, "fp4_padded", False) or getattr(layout, "cga_layout", None):
        raise NotImplementedError(f"fp4 padding and clusters are not emulated: {layout}")
    if layout.transposed and rank != 2:
        raise NotImplementedError(f"a transposed layout of rank {rank} is not emulated")
    stored = tile[::-1] if layout.transposed else tile
    rows, inner = math.prod(stored[:-1]), stored[-1]
    width = width or inner * size
    if inner * size % width:
        raise ValueError(f"a row of {inner * size} bytes is no multiple of {width}: {list(shape)}, {layout}")
    row, column = np.divmod(np.arange(rows * inner, dtype=np.int64), inner)
    panel, column = np.divmod(column * size, width)
    byte = panel * rows * width + row * width + column
    if layout.swizzle_byte_width:
        byte ^= (byte >> 7 & layout.swizzle_byte_width // 16 - 1) << 4
    index = (byte // size).reshape(stored)
    return index.T if layout.transposed else index


def _swizzled(shape, layout, size):
    rank = min(len(layout.order), len(shape))
    tile, order = shape[-rank:], layout.order
    places = np.indices(tile, dtype=np.int64)
    if rank > 1:
        phase = places[order[1]] // layout.per_phase % layout.max_phase
        column = places[order[0]]
        places[order[0]] = (column // layout.vec ^ phase) * layout.vec + column % layout.vec
    index, stride = np.zeros(tile, np.int64), 1
    for axis in order[:rank]:
        index += places[axis] * stride
        stride *= tile[axis]
    return index


@functools.lru_cache(maxsize=512)
def geometry(shape: tuple[int, ...], layout, size: int) -> Geometry:
    kind = {"NVMMASharedLayout": _nvmma, "SwizzledSharedLayout": _swizzled, "MBarrierLayout": _swizzled}
    if type(layout).__name__ not in kind:
        raise NotImplementedError(f"the shared layout {layout} is not emulated")
    tile = kind[type(layout).__name__](shape, layout, size)
    lead = shape[: len(shape) - tile.ndim]
    starts = np.arange(math.prod(lead), dtype=np.int64).reshape(*lead, *(1,) * tile.ndim) * tile.size
    return Geometry(starts + tile, size, True)


class Buffer:
    """One allocation."""

    def __init__(self, machine: Machine, nbytes: int, kind: str):
        self.machine = machine
        self.nbytes = nbytes
        self.data = np.full(-(-nbytes // 16) * 16, 0xFF, np.uint8)
        self.grain = 4 if nbytes <= _SMALL_BUFFER else 16
        cells = self.data.size // self.grain
        self.writer = np.zeros(cells, np.int64)
        self.written = np.zeros(cells, np.int64)
        self.generic = np.zeros(cells, np.bool_)
        self.readers: dict[int, np.ndarray] = {}
        self.barriers: dict[int, object] = {}
        self.name = f"{assigned() or f'buffer {machine.buffers}'} ({kind}, {line()})"
        machine.buffers += 1

    def _report(self, bad: np.ndarray, cells, actors, moments: np.ndarray, what: str, problem: str):
        """Raise for the first bad cell; ``actors`` and ``moments`` say of each cell whose access it was before."""
        moment = int(moments[bad][0])
        actor = actors if isinstance(actors, int) else int(actors[bad][0])
        byte = np.arange(self.written.size)[cells][bad][0] * self.grain
        done = self.machine.log.get((actor, moment), self.machine.names[actor])
        raise RaceError(
            f"{what} at {line()} of {bad.sum() * self.grain} bytes of {self.name}, the first at byte {byte}, "
            f"{problem} {done}"
        )

    def _after_writes(self, clock: Clock, cells, asynchronous: bool, what: str) -> None:
        writer, written = self.writer[cells], self.written[cells]
        bad = written > clock.seen[writer]
        if bad.any():
            self._report(bad, cells, writer, written, what, "is not ordered after")
        if asynchronous:
            bad = self.generic[cells] & (written > clock.fenced[writer])
            if bad.any():
                problem = "by the asynchronous proxy has no fence_async_shared between it and"
                self._report(bad, cells, writer, written, what, problem)

    def reads(self, cells, actor: int, moment: int, asynchronous: bool, what: str) -> None:
        """Check and note a read that ``actor`` makes at its ``moment``, issued by this thread's partition."""
        self._after_writes(here().clock, cells, asynchronous, what)
        if actor not in self.readers:
            self.readers[actor] = np.zeros(self.written.size, np.int64)
        self.readers[actor][cells] = moment
        self.machine.log.setdefault((actor, moment), f"{what} at {line()}")

    def writes(self, cells, actor: int, moment: int, asynchronous: bool, what: str) -> None:
        """Check and note a write likewise."""
        clock = here().clock
        self._after_writes(clock, cells, asynchronous, what)
        for reader, moments in self.readers.items():
            bad = moments[cells] > clock.seen[reader]
            if bad.any():
                self._report(bad, cells, reader, moments[cells], what, "is not ordered after")
        self.writer[cells], self.written[cells] = actor, moment
        self.generic[cells] = not asynchronous
        self.machine.log.setdefault((actor, moment), f"{what} at {line()}")


class View:
    """What Gluon calls a shared memory descriptor."""

    def __init__(self, buffer: Buffer, base: int, dtype, layout, place: Geometry, whole: bool = True):
        self.buffer, self.base, self.dtype, self.layout, self.place = buffer, base, dtype, layout, place
        self.whole = whole
        """Neither cut nor permuted: its elements can be indexed by the first dimension and reinterpreted."""

    @property
    def shape(self):
        return list(self.place.index.shape)

    @property
    def rank(self):
        return self.place.index.ndim

    @property
    def numel(self):
        return self.place.index.size

    @property
    def nbytes_per_cta(self):
        return self.place.nbytes

    @property
    def type(self):
        return values.BlockType(self.dtype, self.shape, self.layout)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"{name!r} of a shared memory descriptor is not emulated")

    def __repr__(self):
        return f"View({self.dtype}, {self.shape}, byte {self.base} of {self.buffer.name})"

    @property
    def cells(self):
        return self.place.cells(self.base, self.buffer.grain)

    def _elements(self) -> np.ndarray:
        return self.buffer.data.view(BITS[itemsize(self.dtype)])[self.base // itemsize(self.dtype) :]

    def fetch(self) -> np.ndarray:
        """The elements now, unchecked."""
        return decode(self._elements().take(self.place.index), self.dtype)

    def fetch_bits(self) -> np.ndarray:
        return self._elements().take(self.place.index)

    def put(self, bits: np.ndarray) -> None:
        """Write the elements' bits now, unchecked."""
        self._elements()[self.place.index] = bits

    def aligned(self, what: str) -> None:
        """Raise unless TMA and products can take this view."""
        kind = type(self.layout).__name__
        if kind != "NVMMASharedLayout":
            raise ValueError(f"{what} takes shared memory of NVMMASharedLayout, got {self.layout}")
        period = _PERIOD[self.layout.swizzle_byte_width]
        if self.base % period:
            raise ValueError(f"{what} takes a view that starts at a multiple of {period} bytes, got {self!r}")

    # ------------------------------------------------------------------------------------------ Gluon's methods

    def load(self, layout=None):
        me = here()
        me.machine.step()
        self.buffer.reads(self.cells, me.actor, me.tick(), False, f"the load by {me.name}")
        return values.placed(self.fetch(), self.dtype, layout)

    def store(self, value):
        me = here()
        value = values.as_block(value)
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(
                f"a block {value.dtype}{value.shape} is stored to {self.dtype}{self.shape}: they must match"
            )
        me.machine.step()
        self.buffer.writes(self.cells, me.actor, me.tick(), False, f"the store by {me.name}")
        self.put(encode(value.data, self.dtype))

    def index(self, index):
        index, count = int(index), self.place.index.shape[0]
        if not self.whole:
            raise NotImplementedError("index of a permuted or sliced view is not emulated")
        if not 0 <= index < count:
            raise OutOfBoundsError(f"index {index} of a view {self.shape} of {self.buffer.name}")
        shape, order = tuple(self.shape[1:]), getattr(self.layout, "order", None)
        if len(shape) < (self.layout.rank if order is None else len(order)):
            raise ValueError(f"index of a view {self.shape} whose layout {self.layout} spans all its dimensions")
        place = geometry(shape, self.layout, itemsize(self.dtype))
        return View(self.buffer, self.base + index * place.nbytes, self.dtype, self.layout, place)

    def slice(self, start, length, dim=0):
        start, length, dim = (constant(value, "slice") for value in (start, length, dim))
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise OutOfBoundsError(f"slice [{start}, {start + length}) of dimension {dim} of a view {self.shape}")
        return View(self.buffer, self.base, self.dtype, self.layout, self.place.cut(start, length, dim), False)

    def permute(self, order):
        order = tuple(constant(axis, "permute") for axis in order)
        if sorted(order) != list(range(self.rank)):
            raise ValueError(f"permute of a view {self.shape} by {order}")
        layout = self.layout
        if type(layout).__name__ == "NVMMASharedLayout" and order != tuple(range(self.rank)):
            layout = _transposed(layout)
        return View(self.buffer, self.base, self.dtype, layout, self.place.permuted(order), False)

    def reshape(self, shape):
        shape = tuple(constant(size, "a shape") for size in shape)
        if math.prod(shape) != self.numel:
            raise ValueError(f"reshape of a view {self.shape} to {list(shape)}")
        return View(self.buffer, self.base, self.dtype, self.layout, self.place.reshaped(shape), False)

    def reinterpret(self, dtype=None, shape=None, layout=None):
        dtype, layout = dtype or self.dtype, layout or self.layout
        shape = tuple(self.shape if shape is None else (constant(size, "a shape") for size in shape))
        if not self.whole:
            raise NotImplementedError("reinterpretation of a permuted or sliced view is not emulated")
        place = geometry(shape, layout, itemsize(dtype))
        if place.nbytes > self.place.nbytes:
            raise OutOfBoundsError(
                f"{self!r} of {self.place.nbytes} bytes as {place.nbytes} bytes {dtype}{list(shape)}"
            )
        return View(self.buffer, self.base, dtype, layout, place)

    _reinterpret = reinterpret

    def _keep_alive(self):
        return None


@functools.cache
def _transposed(layout):
    return dataclasses.replace(layout, transposed=not layout.transposed)


def allocate(dtype, shape, layout, value: Block | None = None) -> View:
    """``gl.allocate_shared_memory``."""
    shape = tuple(constant(size, "a shape") for size in shape)
    place = geometry(shape, layout, itemsize(dtype))
    machine = here().machine
    view = View(Buffer(machine, place.nbytes, f"{dtype}{list(shape)}"), 0, dtype, layout, place)
    if value is not None:
        view.store(value)
    return view
