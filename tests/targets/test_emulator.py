"""Values that the NPU emulator computes, against torch, on kernels of its own."""

import re
import subprocess

import pytest
import torch

from mla_kernels import launch
from mla_kernels.language import tl, triton
from mla_kernels.targets import emulator, service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.source import standalone
from tests.attention.indexer_problems import make_paged
from tests.targets.emulated import gather_kernel, matmul, relative_error, run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("optimise", [False, True])
@each_dtype
def test_matmul(dtype, optimise, monkeypatch):
    monkeypatch.setattr(emulator, "OPTIMISE", optimise)
    torch.manual_seed(0)
    a, b = torch.randn(50, 100).to(DTYPES[dtype]), torch.randn(100, 70).to(DTYPES[dtype])
    c = torch.full((50, 70), float("nan"), dtype=DTYPES[dtype])
    matmul(a, b, c)
    assert relative_error(c, a.double() @ b.double()) < TOLERANCE[dtype]


def test_matmul_of_views():
    torch.manual_seed(0)
    wide = torch.randn(50, 200)
    c = torch.zeros(50, 90)
    with emulator.guarded():
        matmul(wide[:, :100], torch.randn(100, 70), c[:, 10:80])
    assert c[:, :10].eq(0).all() and c[:, 80:].eq(0).all() and c[:, 10:80].ne(0).all()


@triton.jit
def softmax_kernel(x, y, log_sum, columns, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf")).to(tl.float32) * scale
    peak = tl.max(value, 0)
    weight = tl.exp(value - peak)
    total = tl.sum(weight, 0)
    tl.store(y + row * columns + at, (weight / total).to(y.dtype.element_ty), mask=at < columns)
    tl.store(log_sum + row, peak + tl.log(total))


@each_dtype
def test_softmax(dtype):
    torch.manual_seed(0)
    x = (torch.randn(9, 100) * 3).to(DTYPES[dtype])
    y, log_sum = torch.empty_like(x), torch.empty(9)
    with emulator.guarded():
        run(softmax_kernel, (9,), x, y, log_sum, 100, 0.5, BLOCK=128)
    assert relative_error(y, torch.softmax(x.double() * 0.5, 1)) < TOLERANCE[dtype]
    assert relative_error(log_sum, torch.logsumexp(x.double() * 0.5, 1)) < 1e-6


@triton.jit
def reduce_kernel(x, biggest, smallest, total, which, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    place = x + row[:, None] * columns + at[None, :]
    inside = at[None, :] < columns
    tl.store(biggest + row, tl.max(tl.load(place, mask=inside, other=-float("inf")), 1))
    tl.store(smallest + row, tl.min(tl.load(place, mask=inside, other=float("inf")), 1))
    tl.store(total + row, tl.sum(tl.load(place, mask=inside, other=0.0), 1))
    tl.store(which + row, tl.argmax(tl.load(place, mask=inside, other=-float("inf")), 1))


def test_reductions():
    torch.manual_seed(0)
    x = torch.randn(16, 50)
    x[3, 40] = x[3, 20] = 9.0  # the lower index wins
    biggest, smallest, total = torch.empty(3, 16)
    which = torch.empty(16, dtype=torch.int32)
    run(reduce_kernel, (1,), x, biggest, smallest, total, which, 50, ROWS=16, BLOCK=64)
    assert biggest.equal(x.amax(1)) and smallest.equal(x.amin(1)) and which[3] == 20
    assert which.equal(x.argmax(1).int())
    assert relative_error(total, x.double().sum(1)) < 1e-6


@triton.jit
def minimum_index_kernel(x, y, columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < columns, other=-float("inf"))
    tl.store(y, tl.min(tl.where(value == tl.max(value, 0), at, BLOCK), 0))


def test_first_index_of_maximum():
    x, y = torch.zeros(50), torch.zeros(1, dtype=torch.int32)
    x[[17, 30]] = 5.0
    run(minimum_index_kernel, (1,), x, y, 50, BLOCK=64)
    assert y.item() == 17


@triton.jit
def scan_kernel(x, up, down, product, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0)
    tl.store(up + at, tl.cumsum(value, 0), mask=at < count)
    tl.store(down + at, tl.cumsum(value, 0, reverse=True), mask=at < count)
    tl.store(product + at, tl.cumprod(value, 0), mask=at < count)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_scans(dtype):
    torch.manual_seed(0)
    x = torch.randint(1, 3, (20,)).to(dtype)
    up, down, product = torch.zeros(3, 20, dtype=dtype)
    run(scan_kernel, (1,), x, up, down, product, 20, BLOCK=32)
    assert up.equal(x.cumsum(0).to(dtype)) and down.equal(x.flip(0).cumsum(0).flip(0).to(dtype))
    assert product.equal(x.cumprod(0).to(dtype))


@triton.jit
def integer_kernel(x, y, out, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a & b)
    tl.store(out + stride + at, a | b)
    tl.store(out + 2 * stride + at, a ^ b)
    tl.store(out + 3 * stride + at, a << (b & 7))
    tl.store(out + 4 * stride + at, a >> (b & 7))
    tl.store(out + 5 * stride + at, a // b)
    tl.store(out + 6 * stride + at, a % b)
    tl.store(out + 7 * stride + at, tl.where(a < b, a, b) + (a == b).to(a.dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype):
    torch.manual_seed(0)
    x, y = torch.randint(-1000, 1000, (64,)).to(dtype), torch.randint(1, 50, (64,)).to(dtype)
    if dtype == torch.int64:
        x *= 1 << 40
    out = torch.zeros(8, 64, dtype=dtype)
    run(integer_kernel, (1,), x, y, out, 64, BLOCK=64)
    quotient = torch.div(x, y, rounding_mode="trunc")  # as C divides
    expected = [x & y, x | y, x ^ y, x << (y & 7), x >> (y & 7), quotient, x - quotient * y, torch.minimum(x, y)]
    expected[7] += (x == y).to(dtype)
    for row, want in enumerate(expected):
        assert out[row].equal(want), f"operation {row}"


@triton.jit
def convert_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.mark.parametrize(
    "source, target",
    [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")],
)
def test_conversions_round_to_nearest_even(source, target):
    torch.manual_seed(0)
    x = (torch.randn(1024) * torch.logspace(-4, 3, 1024)).to(DTYPES[source])
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    x[4:7] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan")])  # ties between two bf16 numbers
    y = torch.empty(1024, dtype=DTYPES[target])
    run(convert_kernel, (1,), x, y, BLOCK=1024)
    assert torch.equal(y.nan_to_num(nan=7.0), x.to(DTYPES[target]).nan_to_num(nan=7.0))


@each_dtype
def test_gather_rows(dtype):
    torch.manual_seed(0)
    table = torch.randn(20, 64).to(DTYPES[dtype])
    index, out = torch.randint(0, 20, (33,), dtype=torch.int32), torch.empty(33, 64, dtype=DTYPES[dtype])
    with emulator.guarded():
        run(gather_kernel, (3,), table, index, out, 33, 64, BLOCK_N=16, BLOCK_D=64)
    assert out.equal(table[index.long()])


def test_gather_by_int64():
    torch.manual_seed(0)
    table, index = torch.randn(20, 64), torch.randint(0, 20, (33,))
    out = torch.empty(33, 64)
    run(gather_kernel, (3,), table, index, out, 33, 64, BLOCK_N=16, BLOCK_D=64)
    assert out.equal(table[index])


@triton.jit
def permute_on_chip_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, tl.gather(value, at ^ 1, 0))
    tl.store(out + BLOCK + at, tl.flip(value, 0))
    tl.store(out + 2 * BLOCK + at, tl.sort(value))


def test_permutations_on_chip():
    torch.manual_seed(0)
    x, out = torch.randn(64), torch.empty(3, 64)
    run(permute_on_chip_kernel, (1,), x, out, BLOCK=64)
    assert out[0].equal(x.view(32, 2).flip(1).flatten()) and out[1].equal(x.flip(0)) and out[2].equal(x.sort().values)


@triton.jit
def ragged_sum_kernel(x, lengths, y, items, stride, BLOCK: tl.constexpr):
    """Persistent over items; each a loop with a run-time bound, loaded as a scalar."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        length = tl.load(lengths + item)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x + item.to(tl.int64) * stride + at, mask=at < length, other=0.0)
        if length > 0:
            tl.store(y + item, tl.sum(total, 0))


def test_loops_with_run_time_bounds():
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 63, 64, 65, 200, 7, 0, 128], dtype=torch.int32)
    x, y = torch.randn(9, 200), torch.full((9,), -1.0)
    for i, length in enumerate(lengths):
        x[i, length:] = float("nan")
    with emulator.guarded():
        run(ragged_sum_kernel, (4,), x, lengths, y, 9, 200, BLOCK=64)
    expected = torch.stack([row[:n].double().sum() if n else torch.tensor(-1.0) for row, n in zip(x, lengths)])
    assert relative_error(y, expected) < 1e-6


@triton.jit
def repeated_kernel(x, y, items, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for item in range(items):
        if item % 2 == 0:
            total = tl.cumsum(total, 0) + tl.load(x + at)
    tl.store(y + at, total)


def test_memory_of_a_program_does_not_grow_with_its_loop():
    x, y = torch.randn(64), torch.zeros(64)
    types = {"x": "*fp32", "y": "*fp32", "items": "i32"}
    program = emulator.build(standalone(repeated_kernel), "repeated_kernel", types, {"BLOCK": 64})
    peaks = [program((1, 1, 1), (x.data_ptr(), y.data_ptr(), items)) for items in (2, 200)]
    assert peaks[0] == peaks[1] < 4096


@triton.jit
def wide_integer_kernel(y, value):
    tl.store(y, value + 1)


def test_integer_arguments_beyond_32_bits():
    y = torch.zeros(1, dtype=torch.int64)
    run(wide_integer_kernel, (1,), y, 1 << 40)
    assert y.item() == (1 << 40) + 1


@triton.jit
def column_sum_kernel(x, y, columns, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * columns + at, mask=at < columns, other=0.0)
    tl.atomic_add(y + at, value, mask=at < columns)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_contiguous_atomics(dtype):
    x = torch.arange(300).view(6, 50).to(dtype)
    y = torch.zeros(50, dtype=dtype)
    run(column_sum_kernel, (6,), x, y, 50, BLOCK=64)
    assert y.equal(x.sum(0).to(dtype))


def test_launch_of_a_declared_kernel(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", {})
    kernel = launch.Kernel(
        column_sum_kernel,
        arguments={"x": "*T", "y": "*T", "columns": "i32"},
        statics=("BLOCK",),
        tiles={},
        rule=lambda *_: {},
        memory=lambda *_: {},
        cost=lambda *_: launch.Cost(0, 0),
        work=lambda *_: launch.Work(1, 0, 0),
        cases=(),
        uses_dot=False,
    )
    chip, statics = CHIPS["ascend950"], {"BLOCK": 64}
    x, y = torch.arange(300.0).view(6, 50), torch.zeros(50)
    with launch.on_cpu("npu-emulated", "ascend950"):
        kernel.launch(chip, 6, (x, y, 50), statics, {})
        assert y.equal(x.sum(0))
        kernel.launch(chip, 6, (x.long(), y.zero_().long(), 50), statics, {})  # the tensors' dtype decides
        with pytest.raises(TypeError, match="argument y is declared"):
            kernel.launch(chip, 6, (x, 3, 50), statics, {})
        with pytest.raises(emulator.EmulationError, match="not sm_90"):
            kernel.launch(CHIPS["sm_90"], 6, (x, y, 50), statics, {})


def test_no_allocation_leaves_the_arena(tmp_path, monkeypatch):
    """LLVM makes one calloc of a malloc and a fill with zeros: what it returned was given back to the arena."""
    monkeypatch.setattr(service, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(emulator, "_programs", {})
    monkeypatch.setattr(emulator, "_own_version", lambda: str(tmp_path))  # nothing that was built before
    with launch.on_cpu("npu-emulated"):
        make_paged([130, 70], layout="fp8").run()
    (library,) = (tmp_path / "emulator").glob("*.so")
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
    assert "memset" in names and not re.search(r"\b(malloc|calloc|realloc|free)\b", names)
