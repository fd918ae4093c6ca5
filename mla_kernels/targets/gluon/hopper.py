"""Hopper's asynchronous operations in the Gluon emulator: mbarriers, TMA, cp.async and products of warp groups.

A copy or product reads and writes shared memory when it executes, a random time after its issue. A product's result
exists for its partition once a wait guarantees it, whether or not it happens to have executed before.
"""

import numpy as np

from mla_kernels.language import tl
from mla_kernels.targets.gluon import layouts, memory, values
from mla_kernels.targets.gluon.elements import itemsize, rounded
from mla_kernels.targets.gluon.errors import EmulationError
from mla_kernels.targets.gluon.schedule import Clock, Partition, here, line
from mla_kernels.targets.gluon.shared import View, allocate
from mla_kernels.targets.gluon.values import Block, Pointer, constant

FUNCTIONS: dict[str, dict] = {"mbarrier": {}, "tma": {}, "async_copy": {}, "hopper": {}}


def _op(module: str, *names: str):
    def register(function):
        for name in names or (function.__name__,):
            FUNCTIONS[module][name] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------- mbarriers


class Barrier:
    """An mbarrier: the number of the phase in progress, arrivals and bytes that it lacks, and what its completed phases
    let a waiter know."""

    def __init__(self, view: View, count: int):
        number = f"[{view.base // 8}]" if view.buffer.nbytes > 8 else ""
        self.name = view.buffer.name.partition(" (")[0] + number
        self.actor = here().machine.actor(f"barrier {self.name}")
        self.count = self.missing = count
        self.bytes = 0
        self.phase = 0
        self.arriving, self.completed = Clock(), Clock()

    def arrive(self, count: int, nbytes: int, clock: Clock | None, where: str) -> None:
        """Arrivals and expected bytes (negative: copied ones) by whoever is at ``clock``."""
        if clock is not None:
            self.arriving.join(clock)
        self.missing -= count
        self.bytes += nbytes
        if self.missing < 0:
            raise EmulationError(
                f"more than {self.count} arrivals at {self.name} in its phase {self.phase}, at {where}"
            )
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            self.completed.join(self.arriving)
            self.completed.seen[self.actor] = self.phase
            self.arriving = Clock()

    def state(self) -> str:
        return (
            f"its phase {self.phase} (parity {self.phase & 1}) is in progress and lacks {self.missing} of {self.count} "
            f"arrivals and {self.bytes} bytes"
        )


def _view(view, what: str) -> View:
    if not isinstance(view, View):
        raise TypeError(f"{what} takes a shared memory descriptor, got {type(view).__name__}")
    return view


def _barrier(view: View, what: str) -> Barrier:
    _view(view, what)
    if view.dtype.name not in ("int64", "uint64") or view.numel != 1:
        raise ValueError(f"{what} takes a barrier, one int64 in shared memory, got {view!r}")
    if view.base not in view.buffer.barriers:
        raise EmulationError(f"{what} at {line()}: the barrier {view!r} was not initialised")
    return view.buffer.barriers[view.base]


@_op("mbarrier")
def init(mbarrier, count):
    here().machine.step()
    if _view(mbarrier, "mbarrier.init").numel != 1:
        raise ValueError(f"mbarrier.init takes one barrier, got {mbarrier!r}")
    mbarrier.buffer.barriers[mbarrier.base] = Barrier(mbarrier, constant(count, "mbarrier.init"))


@_op("mbarrier")
def invalidate(mbarrier):
    here().machine.step()
    _barrier(mbarrier, "mbarrier.invalidate")
    del mbarrier.buffer.barriers[mbarrier.base]


@_op("mbarrier")
def wait(mbarrier, phase, pred=True, deps=()):
    """Until the phase of this parity is complete: that in progress has the other."""
    me = here()
    me.machine.step()
    if not bool(pred):
        return
    barrier, parity = _barrier(mbarrier, "mbarrier.wait"), int(phase) & 1
    reason = lambda: f"{barrier.name}, parity {parity}: {barrier.state()}"  # noqa: E731
    me.machine.wait(lambda: barrier.phase & 1 != parity, reason)
    me.clock.join(barrier.completed)


@_op("mbarrier")
def arrive(mbarrier, *, count=1, pred=True, from_cta=None):
    me = here()
    me.machine.step()
    if bool(pred):
        _barrier(mbarrier, "mbarrier.arrive").arrive(constant(count, "mbarrier.arrive"), 0, me.clock, line())
        me.tick()


@_op("mbarrier")
def expect(mbarrier, bytes_per_cta=None, pred=True, *, bytes=None, from_cta=None):
    """One arrival, and bytes that copies will bring."""
    me = here()
    me.machine.step()
    nbytes = bytes_per_cta if bytes is None else bytes
    if bool(pred):
        _barrier(mbarrier, "mbarrier.expect").arrive(1, constant(nbytes, "mbarrier.expect"), me.clock, line())
        me.tick()


@_op("mbarrier")
def allocate_mbarrier(batch=None, two_ctas=False):
    layout = layouts.language().nvidia.hopper.mbarrier.MBarrierLayout()
    return allocate(tl.int64, [1] if batch is None else [batch, 1], layout)


@_op("hopper")
def fence_async_shared(cluster=False):
    me = here()
    me.machine.step()
    me.fence()


# ---------------------------------------------------------------------------------------------- TMA


def _box(descriptor, coord, view: View, what: str) -> list[int]:
    if not isinstance(descriptor, memory.Descriptor):
        raise TypeError(f"{what} takes a tensor descriptor, got {type(descriptor).__name__}")
    _view(view, what).aligned(what)
    if view.shape != descriptor.block_shape or view.dtype != descriptor.dtype:
        raise ValueError(f"{what}: a box {descriptor.dtype}{descriptor.block_shape} and shared memory {view!r}")
    if view.layout != descriptor.layout:
        raise ValueError(f"{what}: the descriptor's layout {descriptor.layout} and shared memory's {view.layout}")
    corner = [int(at) for at in coord]
    if len(corner) != len(descriptor.block_shape):
        raise ValueError(f"{what}: {len(corner)} coordinates for {len(descriptor.block_shape)} dimensions")
    if corner[-1] * itemsize(descriptor.dtype) % 16:
        raise ValueError(f"{what}: the last coordinate {corner[-1]} is no multiple of 16 bytes")
    return corner


@_op("tma", "async_load", "async_copy_global_to_shared")
def async_load(tensor_desc, coord, barrier, result, pred=True, multicast=False, cache_policy=None):
    me, what = here(), "a TMA load"
    if multicast:
        raise NotImplementedError("multicast is not emulated")
    me.machine.step()
    if not bool(pred):
        return
    signalled = _barrier(barrier, what)
    corner = _box(tensor_desc, coord, result, what)
    phase, where = signalled.phase, line()
    what = f"the TMA load by {me.name}"
    result.buffer.writes(result.cells, signalled.actor, phase + 1, True, what)

    def execute():
        result.put(tensor_desc.read(corner))
        if signalled.phase != phase:
            raise EmulationError(
                f"the TMA load at {where}, issued in phase {phase} of {signalled.name}, ends in its phase "
                f"{signalled.phase}: fewer bytes were expected than it copies"
            )
        signalled.arrive(0, -tensor_desc.nbytes_per_cta, None, where)

    def observed():
        if here().clock.seen[signalled.actor] <= phase:
            raise EmulationError(
                f"the TMA load at {where} is in flight at the program's end: nobody waited for {signalled.name}"
            )

    me.machine.later(execute)
    me.machine.at_end.append(observed)


@_op("tma", "async_store", "async_copy_shared_to_global")
def async_store(tensor_desc, coord, src, cache_policy=None):
    me = here()
    me.machine.step()
    what = f"the TMA store by {me.name}"
    corner = _box(tensor_desc, coord, src, "a TMA store")
    engine, where = me.stores, line()
    engine.issued += 1
    number = engine.issued
    src.buffer.reads(src.cells, engine.actor, number, True, what)

    def execute():
        tensor_desc.write(corner, src.fetch_bits())
        engine.executed += 1

    def observed():
        if here().clock.seen[engine.actor] < number:
            raise EmulationError(
                f"the TMA store at {where} may be in flight at the program's end: no store_wait covers it"
            )

    me.machine.later(execute, engine)
    me.machine.at_end.append(observed)


@_op("tma")
def store_wait(pendings, read_only=True):
    _engine_wait(here(), here().stores, here().stores.issued - constant(pendings, "store_wait"), "TMA stores")


@_op("tma")
def make_tensor_descriptor(base, shape, strides, block_shape, layout, padding_option="zero"):
    if not isinstance(base, Pointer):
        raise TypeError(f"make_tensor_descriptor takes a pointer, got {type(base).__name__}")
    shape, strides = [int(size) for size in shape], [int(stride) for stride in strides]
    return memory.Descriptor(base.argument, int(base.data), shape, strides, block_shape, layout, padding_option)


def _engine_wait(me: Partition, engine, number: int, what: str) -> None:
    """Wait until ``engine`` has executed its operations up to ``number``, and know it."""
    me.machine.step()
    me.machine.wait(lambda: engine.executed >= number, lambda: f"{engine.issued - engine.executed} {what}")
    me.clock.seen[engine.actor] = max(me.clock.seen[engine.actor], number)


# ---------------------------------------------------------------------------------------------- cp.async


@_op("async_copy", "async_load", "async_copy_global_to_shared")
def copy_async(smem, pointer, mask=None, cache_modifier=None, eviction_policy=None, volatile=False, cache_policy=None):
    """Masked elements become zeros."""
    me = here()
    _view(smem, "async_copy")
    pointer, active, _ = memory._mask(memory._pointer(pointer, "async_copy"), mask, "async_copy")
    if smem.shape != pointer.shape or smem.dtype != pointer.dtype.element_ty:
        raise ValueError(f"async_copy: pointers {pointer.dtype}{pointer.shape} and shared memory {smem!r}")
    if type(pointer.layout).__name__ == "BlockedLayout":
        nbytes = pointer.layout.size_per_thread[pointer.layout.order[0]] * itemsize(smem.dtype)
        if nbytes < 4:
            raise ValueError(f"cp.async copies 4 to 16 bytes a thread, got {nbytes} by {pointer.layout}")
    me.machine.step()
    memory._places(pointer, active, "asynchronous copy")
    engine = me.copies
    engine.issued += 1
    number = engine.issued
    what = f"the asynchronous copy by {me.name}"
    smem.buffer.writes(smem.cells, engine.actor, number, False, what)

    def execute():
        smem.put(memory.read(pointer, active, "asynchronous copy"))
        engine.executed += 1

    me.machine.later(execute, engine)


@_op("async_copy")
def commit_group():
    me = here()
    me.machine.step()
    me.groups.append(me.copies.issued)


@_op("async_copy")
def wait_group(num_outstanding=0):
    me = here()
    done = len(me.groups) - constant(num_outstanding, "wait_group")
    _engine_wait(me, me.copies, me.groups[done - 1] if done > 0 else 0, "asynchronous copies")


@_op("async_copy")
def mbarrier_arrive(mbarrier, increment_count=True):
    """Every thread of the partition arrives once its copies up to here are done."""
    me = here()
    me.machine.step()
    barrier, threads, engine = _barrier(mbarrier, "async_copy.mbarrier_arrive"), 32 * me.num_warps, me.copies
    if increment_count:
        barrier.missing += threads
    clock, where = me.clock.copy(), line()
    clock.seen[engine.actor] = engine.issued
    me.machine.later(lambda: barrier.arrive(threads, 0, clock, where), engine)
    me.tick()


# ---------------------------------------------------------------------------------------------- products


class Accumulator:
    """The registers that an asynchronous product will fill."""

    def __init__(self, shape, layout, dtype, partition: Partition, number: int):
        self.shape, self.layout, self.dtype = shape, layout, dtype
        self.partition, self.number, self.where = partition, number, line()
        self.data: np.ndarray | None = None  # filled when the product executes
        self.taken_at: str | None = None

    @property
    def type(self):
        return values.BlockType(self.dtype, self.shape, self.layout)

    def unusable(self) -> str:
        if self.taken_at:
            return f"the accumulator of the product at {self.where}, handed on at {self.taken_at}, is used at {line()}"
        return f"the accumulator of the product at {self.where} is used at {line()} while in flight: wait for it first"

    def take(self) -> None:
        """Hand the registers on, to the next product or to what a wait returns."""
        if self.taken_at or self.partition is not here():
            raise EmulationError(self.unusable())
        self.taken_at = line()

    def _refuse(self, *operands):
        raise EmulationError(self.unusable())

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise EmulationError(self.unusable())


for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "lt", "le", "gt", "ge",
    "eq", "ne", "radd", "rsub", "rmul", "rtruediv", "neg", "getitem", "bool", "index",
):  # fmt: skip
    setattr(Accumulator, f"__{_name}__", Accumulator._refuse)

_OPERANDS = {"fp16": 16, "bf16": 16, "fp32": 8, "fp8e4nv": 32, "fp8e5": 32, "int8": 32, "uint8": 32}
"""Element types of products, and how many elements of K an instruction takes."""


def _check_product(a, b, acc, me: Partition) -> None:
    layout = acc.layout
    _view(b, "warpgroup_mma's b").aligned("warpgroup_mma's b")
    if isinstance(a, View):
        a.aligned("warpgroup_mma's a")
    if len(a.shape) != 2 or b.rank != 2 or [a.shape[0], b.shape[1]] != list(acc.shape) or a.shape[1] != b.shape[0]:
        raise ValueError(f"warpgroup_mma of {a.shape} and {b.shape} into {list(acc.shape)}")
    if a.dtype.name not in _OPERANDS or (a.dtype != b.dtype and not (a.dtype.is_fp8() and b.dtype.is_fp8())):
        raise ValueError(f"warpgroup_mma of {a.dtype} and {b.dtype}; both must be one of {', '.join(_OPERANDS)}")
    if type(layout).__name__ != "NVMMADistributedLayout" or layout.version[0] != 3:
        raise ValueError(f"the accumulator of warpgroup_mma takes an NVMMADistributedLayout of version 3, got {layout}")
    if layouts.warps_of(layout) != me.num_warps or layout.warps_per_cta[0] % 4:
        raise ValueError(f"warpgroup_mma by {me.num_warps} warps in groups of four, but its layout is {layout}")
    k = _OPERANDS[a.dtype.name]
    if list(layout.instr_shape)[2] != k or layout.instr_shape[0] != 16:
        raise ValueError(f"an instruction of {a.dtype} has the shape [16, N, {k}], got {layout.instr_shape}")
    wide = layout.instr_shape[1] * layout.warps_per_cta[1]
    if a.shape[0] % 64 or a.shape[1] % k or acc.shape[1] % min(wide, acc.shape[1]):
        raise ValueError(f"warpgroup_mma of {a.shape} and {b.shape} by instructions {layout.instr_shape}")
    for operand in (a, b):
        if isinstance(operand, View) and operand.layout.swizzle_byte_width == 0:
            raise NotImplementedError(f"products of shared memory without a swizzle are not emulated: {operand!r}")
    if itemsize(a.dtype) != 2:
        for operand, major in ((a, False), (b, True)):
            if isinstance(operand, View) and operand.layout.transposed != major:
                raise ValueError(f"operands of {a.dtype} must be contiguous along K, got {operand!r}")
    if not isinstance(a, View) and a.layout is not layouts.INFERRED:
        kind = type(a.layout).__name__
        if kind != "DotOperandLayout" or a.layout.operand_index != 0 or a.layout.parent != layout:
            raise ValueError(f"a in registers takes DotOperandLayout(0, {layout}, ...), got {a.layout}")
        width = 4 // itemsize(a.dtype)
        if a.layout.k_width != width:
            raise ValueError(f"a in registers of {a.dtype} takes k_width {width}, got {a.layout}")


def _multiply(x: np.ndarray, y: np.ndarray, dtype) -> np.ndarray:
    """Summed in float64 and rounded once: in float32 NumPy gives a row other bits beside others, on some processors."""
    if dtype.name == "fp32":  # tensor cores read 19 bits of it
        x, y = ((np.ascontiguousarray(z).view(np.uint32) & 0xFFFFE000).view(np.float32) for z in (x, y))
    with np.errstate(over="ignore", invalid="ignore"):
        return (x.astype(np.float64) @ y.astype(np.float64)).astype(np.int32 if dtype.is_int() else np.float32)


@_op("hopper")
def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False):
    me = here()
    if not isinstance(a, View):
        a = values.as_block(a)
    if not isinstance(acc, Accumulator):
        acc = values.as_block(acc)
    _check_product(a, b, acc, me)
    me.machine.step()
    keep, engine = bool(use_acc), me.products
    if isinstance(acc, Accumulator):
        acc.take()
    engine.issued += 1
    result = Accumulator(list(acc.shape), acc.layout, acc.dtype, me, engine.issued)
    for operand in (a, b):
        if isinstance(operand, View):
            what = f"the read of a product by {me.name}"
            operand.buffer.reads(operand.cells, engine.actor, engine.issued, True, what)

    def execute():
        left = a.fetch() if isinstance(a, View) else a.data
        product = _multiply(left, b.fetch(), a.dtype)
        result.data = rounded(product + acc.data if keep else product, result.dtype)
        engine.executed += 1

    me.machine.later(execute, engine)
    return result if is_async else warpgroup_mma_wait(0, [result])


@_op("hopper")
def warpgroup_mma_init(value):
    return values.as_block(value)


@_op("hopper")
def warpgroup_mma_wait(num_outstanding=0, deps=None):
    """All products but the last ``num_outstanding`` are done; those of ``deps`` among them become blocks."""
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    me = here()
    done = me.products.issued - constant(num_outstanding, "warpgroup_mma_wait")
    _engine_wait(me, me.products, done, "products")
    results = []
    for dep in deps:
        if isinstance(dep, View):
            raise ValueError(f"warpgroup_mma_wait takes products and registers as deps, got {dep!r}")
        if isinstance(dep, Accumulator) and dep.number <= done:
            dep.take()
            dep = Block(dep.data, dep.dtype, dep.layout)
        results.append(dep)
    return results[0] if len(results) == 1 else tuple(results)
