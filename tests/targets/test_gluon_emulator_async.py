"""The Gluon emulator's partitions and barriers: what goes wrong is found, and said."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mla_kernels.targets.gluon import emulator
from mla_kernels.targets.gluon.errors import DeadlockError, EmulationError, RaceError

copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
GRID = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))


def nvmma(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


def box(x: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, cols], nvmma(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# A product of tiles by a producer and a consumer


@gluon.jit
def _produce(a_desc, b_desc, ring, bars, steps, STAGES: gl.constexpr, FAULT: gl.constexpr):
    a, b = ring
    full, empty = bars
    for k in range(steps):
        stage = k % STAGES
        lap = k // STAGES
        if FAULT == "wrong phase":
            lap += 1
        if FAULT != "stage reused early":
            mbarrier.wait(empty.index(stage), (lap & 1) ^ 1)
        bar = full.index(stage)
        if FAULT == "too few bytes":
            mbarrier.expect(bar, a_desc.block_type.nbytes)
        else:
            mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_load(a_desc, [0, k * 64], bar, a.index(stage))
        tma.async_load(b_desc, [0, k * 64], bar, b.index(stage))


@gluon.jit
def _consume(c_ptr, ring, bars, steps, N: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr):
    a, b = ring
    full, empty = bars
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    acc = gl.zeros([64, N], gl.float32, layout=ACC)
    for k in range(steps):
        stage = k % STAGES
        if FAULT != "no wait":
            mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        acc = warpgroup_mma(a.index(stage), b.index(stage).permute((1, 0)), acc, is_async=True)
        if FAULT != "released early":
            acc = warpgroup_mma_wait(0, [acc])
        if FAULT != "never released":
            mbarrier.arrive(empty.index(stage))
        if FAULT == "released twice":
            mbarrier.arrive(empty.index(stage))
        if FAULT == "released early":
            acc = warpgroup_mma_wait(0, [acc])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, ACC))
    gl.store(c_ptr + rows[:, None] * N + cols[None, :], acc)


@gluon.jit
def _barriers(NUMBER: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    return made


@gluon.jit
def pipeline_kernel(a_desc, b_desc, c_ptr, steps, N: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr):
    a = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], a_desc.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 64], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = _barriers(STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        if FAULT != "barrier forgotten":
            mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (c_ptr, (a, b), (full, empty), steps, N, STAGES, FAULT)),
            (_produce, (a_desc, b_desc, (a, b), (full, empty), steps, STAGES, FAULT)),
        ],
        [1], [24],
    )  # fmt: skip


def _pipeline(fault="", steps=7, seed=0, **options):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, 64 * steps, generator=generator).bfloat16() for rows in (64, 128))
    c = torch.full((64, 128), float("nan"))
    constants = {"N": 128, "STAGES": 2, "FAULT": fault}
    emulator.run(pipeline_kernel, (1,), (box(a, 64, 64), box(b, 128, 64), c, steps), constants, seed=seed, **options)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-4, atol=1e-3)
    return c


@pytest.mark.parametrize("seed", range(4))
def test_pipeline(seed):
    assert _pipeline(seed=seed).equal(_pipeline(seed=seed, delay=0.0))


FAULTS = [
    (
        "no wait",
        RaceError,
        "the read of a product by the default partition .* is not ordered after the TMA load|the TMA ",
    ),
    (
        "stage reused early",
        EmulationError,
        r"is not ordered after the |more than 1 arrivals at full\[",
    ),
    (
        "released early",
        RaceError,
        "the TMA load by worker 1 .* is not ordered after the read of a product by the default",
    ),
    ("never released", DeadlockError, r"worker 1 \(_produce\) waits at test_\w+.py:\d+ for empty.made\[0\], parity 0"),
    (
        "too few bytes",
        EmulationError,
        "deadlock|is not ordered after|ends in its phase [1-9]: fewer bytes were expected",
    ),
    (
        "wrong phase",
        DeadlockError,
        r"empty.made\[0\], parity 0: its phase 0 \(parity 0\) is in progress and lacks 1 of 1",
    ),
    ("released twice", EmulationError, "deadlock|is not ordered after|more than 1 arrivals"),
    ("barrier forgotten", EmulationError, "the barrier View.* of empty.made .* was not initialised"),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault, kind, message", FAULTS)
def test_faults_of_a_protocol_are_found(fault, kind, message, seed):
    with pytest.raises(kind, match=message):
        _pipeline(fault, seed=seed)


def test_a_deadlock_names_everyone_s_barrier_and_phase():
    with pytest.raises(DeadlockError) as raised:
        _pipeline("never released")
    words = (
        "pipeline_kernel, program (0, 0, 0): deadlock, nothing is in flight: ",
        "the default partition (_consume) waits at test_gluon_emulator_async.py:",
        " for full[0], parity 1: its phase 1 (parity 1) is in progress and lacks 1 of 1 arrivals and 0 bytes",
        "worker 1 (_produce) waits at test_gluon_emulator_async.py:",
    )
    assert all(word in str(raised.value) for word in words), raised.value


# ---------------------------------------------------------------------------------------------------------------------
# Partitions


@gluon.jit
def _say(memory, bars, y_ptr, turn, ROUNDS: gl.constexpr):
    """Two partitions count by turns in one cell of shared memory."""
    ping, pong = bars
    n = gl.arange(0, 128, layout=LINE)
    for i in range(ROUNDS):
        if turn == 0:
            mbarrier.wait(pong, (i & 1) ^ 1)
            memory.store(memory.load(LINE) + 1 if i > 0 else gl.zeros([128], gl.int32, layout=LINE))
            mbarrier.arrive(ping, count=2)
        else:
            mbarrier.wait(ping, i & 1)
            memory.store(memory.load(LINE) * 2)
            mbarrier.arrive(pong)
            mbarrier.arrive(pong, pred=i < 0)
    if turn == 1:
        gl.store(y_ptr + n, memory.load(LINE))


@gluon.jit
def turns_kernel(y_ptr, ROUNDS: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int32, [128], FLAT)
    ping = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    pong = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ping, count=2)
    mbarrier.init(pong, count=1)
    bars = (ping, pong)
    gl.warp_specialize([(_say, (memory, bars, y_ptr, 0, ROUNDS)), (_say, (memory, bars, y_ptr, 1, ROUNDS))], [4], [24])
    mbarrier.invalidate(ping)


def test_barriers_count_and_alternate():
    y = torch.zeros(128, dtype=torch.int32)
    emulator.run(turns_kernel, (1,), (y,), {"ROUNDS": 5})
    expected = 0
    for _ in range(4):
        expected = (expected * 2) + 1
    assert y.eq(expected * 2).all()


@gluon.jit
def _write(memory, y_ptr, value: gl.constexpr, ORDERED: gl.constexpr):
    n = gl.arange(0, 128, layout=LINE)
    for _ in range(4):
        gl.store(y_ptr + n, n * 0 + value)
    if not ORDERED:
        memory.store(n * 0 + value)


@gluon.jit
def rivals_kernel(y_ptr, ORDERED: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int32, [128], FLAT)
    parts = [
        (_write, (memory, y_ptr, 1, ORDERED)),
        (_write, (memory, y_ptr, 2, ORDERED)),
        (_write, (memory, y_ptr, 3, ORDERED)),
    ]
    gl.warp_specialize(parts, [4, 4], [24, 24])


def _rivals(seed):
    y = torch.zeros(128, dtype=torch.int32)
    emulator.run(rivals_kernel, (1,), (y,), {"ORDERED": True}, seed=seed)
    assert y.eq(y[0]).all()
    return y[0].item()


def test_a_seed_decides_the_order():
    first = [_rivals(seed) for seed in range(12)]
    assert set(first) == {1, 2, 3} and first == [_rivals(seed) for seed in range(12)]


def test_unordered_stores_are_found():
    with pytest.raises(RaceError, match=r"the store by .* of 512 bytes of memory .* is not ordered after the store by"):
        emulator.run(rivals_kernel, (1,), (torch.zeros(128, dtype=torch.int32),), {"ORDERED": False})


@gluon.jit
def _returns(x):
    return x * 2


@gluon.jit
def _given(x):
    x * 2


@gluon.jit
def partitions_kernel(y_ptr, CASE: gl.constexpr):
    n = gl.arange(0, 128, layout=LINE)
    if CASE == "result":
        x = gl.warp_specialize([(_returns, (n,)), (_given, (n.shape[0],))], [1], [24])
        gl.store(y_ptr + n, x)
    elif CASE == "block":
        gl.warp_specialize([(_returns, (n,)), (_given, (n,))], [1], [24])
    elif CASE == "counts":
        gl.warp_specialize([(_returns, (n,)), (_given, (1,))], [1, 1], [24])
    elif CASE == "worker":
        gl.warp_specialize([(_returns, (n,)), (_stray, (y_ptr,))], [4], [24])
    elif CASE == "endless":
        gl.warp_specialize([(_returns, (n,)), (_endless, (y_ptr,))], [4], [24])


@gluon.jit
def _stray(y_ptr):
    gl.store(y_ptr + 128, 1)


@gluon.jit
def _endless(y_ptr):
    while gl.load(y_ptr) < 1:
        gl.store(y_ptr + 1, 1)


def test_partitions():
    y = torch.zeros(128, dtype=torch.int32)
    emulator.run(partitions_kernel, (1,), (y,), {"CASE": "result"})
    assert y.equal(torch.arange(0, 256, 2, dtype=torch.int32))
    for case, message in (
        ("block", r"worker _given is given a block \[128\]; workers take scalars"),
        ("counts", r"1 workers, but worker_num_warps is \[1, 1\]"),
        (
            "worker",
            r"worker 1 \(_stray\), test_gluon_emulator_async.py:\d+: store at .*: element 128 of argument y_ptr",
        ),
    ):
        with pytest.raises(EmulationError, match=message):
            emulator.run(partitions_kernel, (1,), (y,), {"CASE": case})
    with pytest.raises(EmulationError, match=r"not ended within 0.5 s; in progress: test_gluon_emulator_async.py:"):
        emulator.run(partitions_kernel, (1,), (y * 0,), {"CASE": "endless"}, limit_s=0.5)


@gluon.jit
def leaving_kernel(x_desc):
    memory = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [0, 0], bar, memory)
    mbarrier.wait(bar, 0, pred=gl.program_id(0) > 0)


def test_a_program_does_not_end_before_its_copies():
    with pytest.raises(EmulationError, match="is in flight at the program's end: nobody waited for bar"):
        emulator.run(leaving_kernel, (2,), (box(torch.randn(64, 64), 64, 64),))


@gluon.jit
def _gather(x_ptr, memory, bars):
    full, empty = bars
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    for i in range(3):
        mbarrier.wait(empty, (i & 1) ^ 1)
        copy_async(memory, x_ptr + (i * 64 + rows)[:, None] * 64 + cols[None, :])
        async_copy.mbarrier_arrive(full, increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _sum(y_ptr, memory, bars, FENCE: gl.constexpr):
    full, empty = bars
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    acc = gl.zeros([64, 64], gl.float32, layout=ACC)
    for i in range(3):
        mbarrier.wait(full, i & 1)
        if FENCE:
            fence_async_shared()
        acc = warpgroup_mma_wait(0, [warpgroup_mma(memory, memory.permute((1, 0)), acc, is_async=True)])
        mbarrier.arrive(empty)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    gl.store(y_ptr + (rows[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, ACC))[None, :]), acc)


@gluon.jit
def gathering_kernel(x_ptr, y_ptr, LAYOUT: gl.constexpr, FENCE: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=128)
    mbarrier.init(empty, count=1)
    bars = (full, empty)
    gl.warp_specialize([(_sum, (y_ptr, memory, bars, FENCE)), (_gather, (x_ptr, memory, bars))], [4], [24])


def test_gathers_by_a_worker_need_a_fence_before_products():
    x, y = torch.randn(192, 64).bfloat16(), torch.empty(64, 64)
    args = {"LAYOUT": nvmma(x.dtype)}
    emulator.run(gathering_kernel, (1,), (x, y), {**args, "FENCE": True})
    torch.testing.assert_close(y, sum(p.float() @ p.float().T for p in x.split(64)), rtol=1e-5, atol=1e-3)
    with pytest.raises(RaceError, match="has no fence_async_shared between it and the asynchronous copy by worker 1"):
        emulator.run(gathering_kernel, (1,), (x, y), {**args, "FENCE": False})


@gluon.jit
def counted_kernel(x_ptr, COUNT: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.float32, [128], FLAT)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=COUNT)
    copy_async(memory, x_ptr + gl.arange(0, 128, layout=LINE))
    async_copy.mbarrier_arrive(bar, increment_count=False)
    mbarrier.wait(bar, 0)


def test_every_thread_arrives_after_its_copies():
    emulator.run(counted_kernel, (1,), (torch.randn(128),), {"COUNT": 128})
    with pytest.raises(
        EmulationError, match=r"\(0, 0, 0\): more than 1 arrivals at bar in its phase 0, at test_gluon_emu"
    ):
        emulator.run(counted_kernel, (1,), (torch.randn(128),), {"COUNT": 1})
    with pytest.raises(DeadlockError, match=r"for bar, parity 0: its phase 0 .* lacks 128 of 256 arrivals"):
        emulator.run(counted_kernel, (1,), (torch.randn(128),), {"COUNT": 256})
