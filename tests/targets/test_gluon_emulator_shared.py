"""The Gluon emulator's shared memory: bytes, layouts, views, TMA and cp.async."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mla_kernels.targets.gluon import emulator
from mla_kernels.targets.gluon.errors import EmulationError, OutOfBoundsError, RaceError

GRID = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
COPY = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def nvmma(bits: int, width: int = 128) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=2)


@gluon.jit
def bytes_kernel(x_ptr, y_ptr, LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, VIEW: gl.constexpr):
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, GRID))
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, GRID))
    at = rows[:, None] * N + cols[None, :]
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    memory = gl.allocate_shared_memory(dtype, [M, N], LAYOUT)
    if VIEW != "poison":
        memory.store(gl.load(x_ptr + at))
    if VIEW == "bytes":
        n = gl.arange(0, M * N, layout=LINE)
        gl.store(y_ptr + n, memory.reinterpret(dtype, [M * N], FLAT).load(LINE))
    elif VIEW == "tiles":
        tiles = memory._reinterpret(dtype, [2, M, N // 2], LAYOUT)
        for i in gl.static_range(2):
            row = gl.arange(0, N // 2, layout=gl.SliceLayout(0, GRID))
            half = rows[:, None] * N + (row + i * (N // 2))[None, :]
            gl.store(y_ptr + half, tiles.index(i).load(GRID))
    elif VIEW == "wrong shape":
        halves = memory.reinterpret(dtype, [2, M // 2, N], LAYOUT)
        few = gl.arange(0, M // 2, layout=gl.SliceLayout(1, GRID))
        for i in gl.static_range(2):
            gl.store(y_ptr + (few + i * (M // 2))[:, None] * N + cols[None, :], halves.index(i).load(GRID))
    elif VIEW == "slices":
        rest = gl.arange(0, N // 4, layout=gl.SliceLayout(0, GRID))
        part = memory.slice(N // 4, N // 4, dim=1)
        gl.store(y_ptr + rows[:, None] * N + (rest + N // 4)[None, :], part.load(GRID))
    elif VIEW == "permuted":
        turned = gl.arange(0, N, layout=gl.SliceLayout(1, GRID))[:, None] * M
        turned = turned + gl.arange(0, M, layout=gl.SliceLayout(0, GRID))[None, :]
        gl.store(y_ptr + turned, memory.permute((1, 0)).load(GRID))
    elif VIEW == "poison":
        gl.store(y_ptr + at, memory.load(GRID))
    elif VIEW == "too large":
        memory.reinterpret(dtype, [2, M, N], LAYOUT)
    elif VIEW == "index":
        memory.reinterpret(dtype, [2, M, N // 2], LAYOUT).index(2)


def _view(x: torch.Tensor, view: str, layout=None) -> torch.Tensor:
    y = torch.full_like(x, 7)
    layout = layout or nvmma(8 * x.element_size())
    emulator.run(bytes_kernel, (1,), (x, y), {"LAYOUT": layout, "M": x.shape[0], "N": x.shape[1], "VIEW": view})
    return y


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_swizzled_tiles(dtype, width):
    """Tiles of [rows, width bytes] one after another; 16-byte chunk c of row r at c ^ (r // (128 // width))."""
    x = torch.arange(64 * 128).view(64, 128).to(dtype)
    size = x.element_size()
    chunks = x.view(64, 128 * size // width, width // 16, 16 // size).transpose(0, 1)  # [tiles, rows, chunks, elements]
    row, chunk = torch.arange(64)[:, None], torch.arange(width // 16)
    expected = torch.empty_like(chunks)
    expected[:, row, chunk ^ (row // (128 // width)) % (width // 16)] = chunks[:, row, chunk]
    assert _view(x, "bytes", nvmma(8 * size, width)).flatten().equal(expected.flatten())


def test_generic_swizzle_and_rows():
    x = torch.arange(32 * 64, dtype=torch.int32).view(32, 64)
    found = _view(x, "bytes", gl.SwizzledSharedLayout(4, 2, 8, [1, 0]))
    row, chunk = torch.arange(32)[:, None], torch.arange(16)
    expected = torch.empty(32, 16, 4, dtype=torch.int32)
    expected[row, chunk ^ (row // 2) % 8] = x.view(32, 16, 4)[row, chunk]
    assert found.flatten().equal(expected.flatten())
    assert _view(x, "bytes", gl.SwizzledSharedLayout(1, 1, 1, [0, 1])).flatten().equal(x.T.flatten())


def test_views():
    x = torch.randn(64, 128).bfloat16()
    assert _view(x, "tiles").equal(x)
    assert not _view(x, "wrong shape").equal(x)
    assert _view(x, "permuted").flatten().equal(x.T.flatten())
    part = _view(x, "slices")
    assert part[:, 32:64].equal(x[:, 32:64]) and part[:, :32].eq(7).all() and part[:, 64:].eq(7).all()


def test_fresh_memory_is_poisoned():
    assert _view(torch.randn(8, 64).bfloat16(), "poison").isnan().all()
    assert _view(torch.randn(8, 64), "poison").isnan().all()
    assert _view(torch.zeros(8, 128, dtype=torch.int8), "poison").eq(-1).all()


def test_views_outside_are_refused():
    x = torch.randn(64, 128).bfloat16()
    with pytest.raises(OutOfBoundsError, match=r"of 16384 bytes as 32768 bytes"):
        _view(x, "too large")
    with pytest.raises(OutOfBoundsError, match=r"index 2 of a view \[2, 64, 64\] of memory \(bf16\[64, 128\]"):
        _view(x, "index")
    with pytest.raises(EmulationError, match="elements of 16 bits cannot have the layout"):
        _view(x, "poison", nvmma(8))
    with pytest.raises(EmulationError, match="a row of 64 bytes is no multiple of 128"):
        _view(x[:, :32].contiguous(), "poison")


@gluon.jit
def boxes_kernel(x_desc, y_desc, row, col, FAULT: gl.constexpr):
    memory = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes + (16 if FAULT == "bytes" else 0))
    tma.async_load(x_desc, [row, col], bar, memory)
    if FAULT != "wait":
        mbarrier.wait(bar, 0)
    if FAULT == "double":
        memory.store(memory.load(GRID) + memory.load(GRID))
    if FAULT == "double with fence":
        memory.store(memory.load(GRID) + memory.load(GRID))
        fence_async_shared()
    tma.async_store(y_desc, [row, col], memory)
    if FAULT != "store_wait":
        tma.store_wait(0)


def _boxes(x, y, row, col, fault="", block=(64, 64), **padding):
    layout = nvmma(8 * x.element_size())
    x_desc = TensorDescriptor.from_tensor(x, list(block), layout, **padding)
    y_desc = TensorDescriptor.from_tensor(y, list(block), layout)
    emulator.run(boxes_kernel, (1,), (x_desc, y_desc, row, col), {"FAULT": fault})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8])
def test_tma_boxes(dtype):
    x = torch.randn(100, 272).mul(8).abs().to(dtype)
    y, bits = torch.full((100, 272), 1).to(dtype), torch.int8 if x.element_size() == 1 else dtype
    _boxes(x, y, 16, 48, block=(32, 128))
    expected = torch.full((100, 272), 1).to(dtype)
    expected.view(bits)[16:48, 48:176] = x.view(bits)[16:48, 48:176]
    assert y.view(bits).equal(expected.view(bits))


def test_tma_outside_reads_zeros_and_writes_nothing():
    x, y = torch.randn(100, 96), torch.full((200, 160), 5.0)
    _boxes(x, y, 80, 64)
    assert y[80:100, 64:96].equal(x[80:, 64:]) and y[100:144, 64:128].eq(0).all() and y[80:144, 96:128].eq(0).all()
    y.fill_(5)
    _boxes(x, y, -16, -32)
    assert y[:48, :32].equal(x[:48, :32]) and y[48:].eq(5).all() and y[:, 32:].eq(5).all()
    y.fill_(5)
    _boxes(x, y, 80, 64, padding="nan")
    assert y[100:144, 64:128].isnan().all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fault, kind, message",
    [
        ("wait", RaceError, "the TMA store by the kernel .* is not ordered after the TMA load by the kernel"),
        ("bytes", EmulationError, r"deadlock.* for bar, parity 0: .*lacks 0 of 1 arrivals and 16 bytes"),
        ("double", RaceError, "has no fence_async_shared between it and the store by the kernel"),
        ("store_wait", EmulationError, "TMA store at .* may be in flight at the program's end"),
    ],
)
def test_tma_faults(fault, kind, message, seed):
    x, y = torch.randn(64, 64), torch.empty(64, 64)
    with pytest.raises(kind, match=message):
        _boxes(x, y, 0, 0, fault)
    _boxes(x, y, 0, 0, "double with fence")
    assert y.equal(x + x)


def test_tma_refuses_what_does_not_fit():
    x = torch.randn(64, 64)
    with pytest.raises(EmulationError, match="the last coordinate 1 is no multiple of 16 bytes"):
        _boxes(x, torch.empty(64, 64), 0, 1)
    layouts = nvmma(32), nvmma(32, 64)
    x_desc, y_desc = (TensorDescriptor.from_tensor(torch.randn(64, 64), [64, 64], layout) for layout in layouts)
    with pytest.raises(EmulationError, match=r"the descriptor's layout .* and shared memory's"):
        emulator.run(boxes_kernel, (1,), (x_desc, y_desc, 0, 0), {"FAULT": ""})


@gluon.jit
def gathered_kernel(x_ptr, index_ptr, y_ptr, size, WAIT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of x by index through cp.async: in two groups, or announced at a barrier."""
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    memory = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, 32, N], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1 if WAIT == "incremented" else 128)
    for i in gl.static_range(2):
        index = gl.load(index_ptr + i * 32 + rows)
        live = (index >= 0) & (i * 32 + rows < size)
        copy_async(memory.index(i), x_ptr + index[:, None] * N + cols[None, :], mask=live[:, None])
        async_copy.commit_group()
    if WAIT == "groups":
        async_copy.wait_group(1)
        first = memory.index(0).load(LAYOUT)
        async_copy.wait_group(0)
    elif WAIT == "one group":
        async_copy.wait_group(1)
        first = memory.index(0).load(LAYOUT)
    elif WAIT == "barrier":
        async_copy.mbarrier_arrive(bar, increment_count=False)
        mbarrier.wait(bar, 0)
        first = memory.index(0).load(LAYOUT)
    elif WAIT == "incremented":
        async_copy.mbarrier_arrive(bar)
        mbarrier.arrive(bar)
        mbarrier.wait(bar, 0)
        first = memory.index(0).load(LAYOUT)
    at = rows[:, None] * N + cols[None, :]
    gl.store(y_ptr + at, first)
    gl.store(y_ptr + 32 * N + at, memory.index(1).load(LAYOUT))


@pytest.mark.parametrize("wait", ["groups", "barrier", "incremented"])
def test_asynchronous_gathers(wait):
    x, index = torch.randn(90, 64).bfloat16(), torch.randint(0, 90, (64,), dtype=torch.int32)
    index[5], y = -1, torch.empty(64, 64).bfloat16()
    emulator.run(gathered_kernel, (1,), (x, index, y, 60), {"WAIT": wait, "N": 64, "LAYOUT": COPY})
    expected = x[index.long()]
    expected[5], expected[60:] = 0, 0
    assert y.equal(expected)


def test_an_asynchronous_gather_must_be_waited_for_and_stay_inside():
    x, index, y = torch.randn(90, 64), torch.randint(0, 90, (64,), dtype=torch.int32), torch.empty(64, 64)
    with pytest.raises(RaceError, match=r"the load by the kernel .* is not ordered after the asynchronous copy"):
        emulator.run(gathered_kernel, (1,), (x, index, y, 64), {"WAIT": "one group", "N": 64, "LAYOUT": COPY})
    index[40] = 90
    with pytest.raises(
        OutOfBoundsError, match=r"element 5760 of argument x_ptr .* at \(8, 0\) of the block \[32, 64\]"
    ):
        emulator.run(gathered_kernel, (1,), (x, index, y, 64), {"WAIT": "groups", "N": 64, "LAYOUT": COPY})
    with pytest.raises(EmulationError, match=r"cp.async copies 4 to 16 bytes a thread, got 2"):
        args = x.bfloat16(), index, y.bfloat16(), 64
        emulator.run(gathered_kernel, (1,), args, {"WAIT": "groups", "N": 64, "LAYOUT": GRID.value})


@gluon.jit
def older_names_kernel(x_ptr, y_ptr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Names that one version of Triton has and another not, and descriptors made in the kernel."""
    x_desc = tma.make_tensor_descriptor(x_ptr, [64, N], [N, 1], [64, 64], LAYOUT)
    y_desc = tma.make_tensor_descriptor(y_ptr, [64, N], [N, 1], [64, 64], LAYOUT)
    memory = gl.allocate_shared_memory(gl.float32, [64, 64], LAYOUT)
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, 64 * 64 * 4)
    tma.async_copy_global_to_shared(x_desc, [0, 32], bar, memory)
    mbarrier.wait(bar, 0)
    gl.thread_barrier()
    gl.barrier()
    tma.async_copy_shared_to_global(y_desc, [0, 0], memory)
    tma.store_wait(pendings=0)


def test_names_of_every_version():
    x, y = torch.randn(64, 96), torch.zeros(64, 96)
    emulator.run(older_names_kernel, (1,), (x, y), {"N": 96, "LAYOUT": nvmma(32)})
    assert y[:, :64].equal(x[:, 32:]) and y[:, 64:].eq(0).all()
