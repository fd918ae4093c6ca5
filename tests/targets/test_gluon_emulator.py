"""The Gluon emulator's language: values, types, layouts, global memory, what it follows and what it refuses."""

import subprocess
import sys

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_kernels.targets.gluon import emulator
from mla_kernels.targets.gluon.errors import EmulationError, OutOfBoundsError

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
GRID = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
FACTOR = gl.constexpr(3)
alias = gl.arange


@gluon.jit
def _tripled(x, ADD: gl.constexpr = 1):
    return x * FACTOR + ADD


@gluon.jit
def copy_kernel(x_ptr, y_ptr, size, shift, N: gl.constexpr, OTHER: gl.constexpr):
    n = gl.program_id(0) * N + alias(0, N, layout=LINE)
    if OTHER is None:
        x = gl.load(x_ptr + n + shift, mask=n < size)
    else:
        x = gl.load(x_ptr + n + shift, mask=n < size, other=OTHER)
    gl.store(y_ptr + n, x)


@gluon.jit
def rounded_kernel(x_ptr, y_ptr, OP: gl.constexpr, N: gl.constexpr):
    n = gl.arange(0, N, layout=LINE)
    x = gl.load(x_ptr + n)
    if OP == "cast":
        y = x.to(y_ptr.dtype.element_ty)
    elif OP == "square":
        y = x * x
    elif OP == "exp2":
        y = gl.exp2(x.to(gl.float32))
    elif OP == "bitcast":
        y = x.to(gl.int32, bitcast=True)
    elif OP == "quotient":
        y = x // 4
    elif OP == "remainder":
        y = x % 4
    elif OP == "shift":
        y = (x >> 1) ^ ((x & 6) << 28)
    elif OP == "clamp":
        y = gl.where((x > -1.0) & ~(x >= 1.0), x, gl.minimum(gl.maximum(x, -1.0), 1.0))
    elif OP == "tripled":
        y = _tripled(_tripled(x), ADD=0)
    gl.store(y_ptr + n, y)


def _elementwise(op: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.numel(), dtype=dtype)
    emulator.run(rounded_kernel, (1,), (x, y), {"OP": op, "N": x.numel()})
    return y


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_masked_loads(dtype):
    x = torch.randn(256).mul(3).to(dtype)
    y = torch.zeros(256).to(dtype)
    emulator.run(copy_kernel, (2,), {"size": 200, "x_ptr": x, "y_ptr": y, "shift": 0}, {"N": 128, "OTHER": 1})
    assert y[:200].float().equal(x[:200].float()) and y[200:].float().eq(1).all()


def test_masked_elements_without_other_are_poison():
    x, y = torch.randn(128), torch.zeros(128)
    emulator.run(copy_kernel, (1,), (x, y, 100, 0), {"N": 128, "OTHER": None})
    assert y[:100].equal(x[:100]) and y[100:].isnan().all()


def test_wild_pointers_name_kernel_argument_and_element():
    x, y = torch.randn(3, 128)[1:2], torch.zeros(256)
    emulator.run(copy_kernel, (1,), (x, y, 128, 128), {"N": 128, "OTHER": 0.0})  # the storage goes on behind x
    with pytest.raises(OutOfBoundsError, match=r"copy_kernel, program \(0, 0, 0\).*element 256 of argument x_ptr"):
        emulator.run(copy_kernel, (1,), (x, y, 128, 129), {"N": 128, "OTHER": 0.0})
    with pytest.raises(OutOfBoundsError, match="element -129 of argument x_ptr"):
        emulator.run(copy_kernel, (1,), (x, y, 128, -129), {"N": 128, "OTHER": 0.0})
    with pytest.raises(OutOfBoundsError, match=r"program \(2, 0, 0\).*store at .*: element 256 of argument y_ptr"):
        emulator.run(copy_kernel, (3,), (x, y, 256, 0), {"N": 128, "OTHER": 0.0})


def test_bfloat16_rounds_to_nearest_even():
    x = torch.randn(1024)
    x[:3] = torch.tensor([float("nan"), float("inf"), 1.00390625])
    low = x.bfloat16()
    assert _elementwise("cast", x, torch.bfloat16).view(torch.int16).equal(low.view(torch.int16))
    assert _elementwise("square", low, torch.bfloat16)[1:].equal((low * low)[1:])
    assert _elementwise("exp2", low, torch.float32)[3:].allclose(low[3:].float().exp2())


def test_float8_saturates_and_widens():
    x = torch.cat([torch.randn(125), torch.tensor([1e6, -1e6, 0.0019])])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    low = _elementwise("cast", x, torch.float8_e4m3fn)
    assert low.view(torch.uint8).equal(expected.view(torch.uint8))
    assert _elementwise("cast", low, torch.bfloat16).equal(expected.bfloat16())


def test_integers_are_the_machine_s():
    x = torch.tensor([-9, -8, -1, 0, 1, 7, 8, 2**31 - 1] * 16, dtype=torch.int32)
    assert _elementwise("quotient", x, torch.int32).equal(torch.div(x, 4, rounding_mode="trunc"))
    assert _elementwise("remainder", x, torch.int32).equal(torch.fmod(x, 4))
    assert _elementwise("shift", x, torch.int32).equal((x >> 1) ^ ((x & 6) << 28))
    assert _elementwise("bitcast", x.view(torch.float32), torch.int32).equal(x)
    assert _elementwise("square", x, torch.int32).equal(x * x)  # wraps
    assert _elementwise("cast", x, torch.int8).equal(x.to(torch.int8))


def test_where_and_extremes():
    x = torch.randn(128) * 2
    x[0] = float("nan")
    y = _elementwise("clamp", x, torch.float32)
    assert y[1:].equal(x[1:].clamp(-1, 1)) and y[0] == -1  # of a number and NaN the number


def test_functions_constants_and_defaults_are_followed():
    x = torch.arange(128, dtype=torch.int32)
    assert _elementwise("tripled", x, torch.int32).equal((x * 3 + 1) * 3)


@gluon.jit
def _larger(a, i, b, j):
    keep = (a > b) | ((a == b) & (i < j))
    return gl.where(keep, a, b), gl.where(keep, i, j)


@gluon.jit
def reductions_kernel(x_ptr, best_ptr, where_ptr, total_ptr, M: gl.constexpr, N: gl.constexpr):
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, GRID))
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, GRID))
    x = gl.load(x_ptr + rows[:, None] * N + cols[None, :])
    gl.store(best_ptr + rows, gl.max(x, 1))
    at = gl.expand_dims(cols, 0) + rows[:, None] * 0
    best, index = gl.reduce((x, at), 1, _larger)
    gl.store(where_ptr + rows, index)
    gl.store(total_ptr, gl.sum(gl.sum(x, 0), 0) + gl.sum(gl.where(best == gl.max(x, axis=1), 0.0, 1.0), 0))


def test_reductions():
    x = torch.randn(8, 64)
    best, where, total = torch.empty(8), torch.empty(8, dtype=torch.int32), torch.empty(1)
    emulator.run(reductions_kernel, (1,), (x, best, where, total), {"M": 8, "N": 64})
    assert best.equal(x.max(1).values) and where.equal(x.argmax(1).int())
    assert total.allclose(x.sum(), atol=1e-4)


@gluon.jit
def shapes_kernel(x_ptr, y_ptr, STEP: gl.constexpr):
    n = gl.arange(0, 128, layout=LINE)
    x = gl.load(x_ptr + n)
    if STEP == "split":
        x = gl.convert_layout(x, gl.BlockedLayout([2], [32], [4], [0]))
        a, b = gl.split(gl.reshape(x, [64, 2]))
        x = gl.convert_layout(gl.reshape(gl.join(b, a), [128]), LINE)
    elif STEP == "permute":
        x = gl.convert_layout(x.reshape([4, 32]).permute((1, 0)).reshape([128]), LINE)
    elif STEP == "mixed layouts":
        x = x + gl.arange(0, 128, layout=gl.SliceLayout(0, GRID)).to(gl.float32)
    elif STEP == "too many warps":
        x = gl.convert_layout(x, gl.BlockedLayout([1], [32], [8], [0]))
    elif STEP == "wrong axis":
        x = gl.max(x[:, None], 1)
    elif STEP == "condition":
        if x > 0:
            x = -x
    elif STEP == "range":
        for i in range(gl.program_id(0), 3):
            x += i.to(gl.float32)
        for i in gl.static_range(2):
            gl.static_assert(i < 2)
            x += i
    gl.store(y_ptr + n, x)


def test_shapes():
    x, y = torch.randn(128), torch.empty(128)
    emulator.run(shapes_kernel, (1,), (x, y), {"STEP": "split"})
    assert y.equal(x.view(64, 2).flip(1).reshape(-1))
    emulator.run(shapes_kernel, (1,), (x, y), {"STEP": "permute"})
    assert y.equal(x.view(4, 32).T.reshape(-1))
    emulator.run(shapes_kernel, (1,), (x, y), {"STEP": "range"})
    assert y.allclose(x + 4)


@pytest.mark.parametrize(
    "step, message",
    [
        ("mixed layouts", "Layout mismatch in add"),
        ("too many warps", "a layout of 8 warps in a partition of 4"),
        ("wrong axis", r"takes a block of SliceLayout\(1, ...\)"),
        ("condition", r"a block of shape \[128\] cannot be a condition"),
    ],
)
def test_what_the_compiler_refuses(step, message):
    with pytest.raises(EmulationError, match=rf"shapes_kernel, program \(0, 0, 0\): the kernel, .*py:\d+: .*{message}"):
        emulator.run(shapes_kernel, (1,), (torch.randn(128), torch.empty(128)), {"STEP": step})


@gluon.jit
def grid_kernel(y_ptr, WIDTH: gl.constexpr):
    x, y, z = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    at = (z * gl.num_programs(1) + y) * gl.num_programs(0) + x
    gl.store(y_ptr + at, at * WIDTH + gl.num_warps())


def test_grids():
    for grid in ((5,), (3, 2), (2, 3, 4)):
        count = torch.Size(grid).numel()
        y = torch.zeros(count, dtype=torch.int32)
        emulator.run(grid_kernel, grid, (y,), {"WIDTH": 2}, num_warps=8)
        assert y.equal(torch.arange(count, dtype=torch.int32) * 2 + 8)


@gluon.jit
def assigned_kernel(y_ptr, CASE: gl.constexpr):
    count = 3
    lower, upper = (-3, 4)
    count += 1
    if CASE == "division":
        gl.store(y_ptr, (lower // 2) * 10 + count.to(gl.int64))  # -10 + 4: towards zero, as at run time
    elif CASE == "range":
        gl.static_range(count)
    elif CASE == "shape":
        gl.arange(0, upper, layout=LINE)


def test_assigned_numbers_are_of_run_time():
    y = torch.zeros(1, dtype=torch.int64)
    emulator.run(assigned_kernel, (1,), (y,), {"CASE": "division"})
    assert y.item() == -6
    for case, what in (("range", "static_range"), ("shape", "arange")):
        with pytest.raises(EmulationError, match=rf"{what} takes a constant \(gl.constexpr\), got Block\(int32"):
            emulator.run(assigned_kernel, (1,), (y,), {"CASE": case})


def load(x):
    """Named as one of the language's functions, which the kernels above call."""


def _plain(x):
    return x


@gluon.jit
def unknown_kernel(y_ptr, OP: gl.constexpr):
    if OP == "atomic":
        gl.atomic_add(y_ptr, 1)
    elif OP == "assembly":
        one = gl.arange(0, 128, layout=LINE)
        two = gl.inline_asm_elementwise("add.s32 $0, $1, $1;", "=r,r", [one], dtype=gl.int32, is_pure=True, pack=1)
        gl.store(y_ptr + one, two)
    elif OP == "prefetch":
        gl.inline_asm_elementwise("prefetch.global.L2 [$1];", "=r,l", [y_ptr.to(gl.int64)], gl.int32, False, 1)
    elif OP == "attribute":
        gl.load(y_ptr).histogram(4)


def test_unknown_operations_are_named():
    y = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"unknown_kernel.*atomic_add is not emulated"):
        emulator.run(unknown_kernel, (1,), (y,), {"OP": "atomic"})
    with pytest.raises(NotImplementedError, match=r"add.s32 \$0"):
        emulator.run(unknown_kernel, (1,), (y,), {"OP": "assembly"})
    with pytest.raises(NotImplementedError, match="'histogram'"):
        emulator.run(unknown_kernel, (1,), (y,), {"OP": "attribute"})
    emulator.run(unknown_kernel, (1,), (y,), {"OP": "prefetch"})
    emulator.run(unknown_kernel, (1,), (y,), {"OP": "assembly"}, assembly={"add.s32 $0, $1, $1": lambda x: x + x})
    assert y.equal(torch.arange(128, dtype=torch.int32) * 2)


def test_plain_functions_are_refused():
    @gluon.jit
    def kernel(y_ptr):
        gl.store(y_ptr, _plain(1))

    with pytest.raises(NotImplementedError, match="_plain, which is not jitted"):
        emulator.run(kernel, (1,), (torch.zeros(1),))


def test_closures_are_followed():
    factor = gl.constexpr(7)

    @gluon.jit
    def kernel(y_ptr, x):
        gl.store(y_ptr, _tripled(x) * factor)

    y = torch.zeros(1, dtype=torch.int64)
    emulator.run(kernel, (1,), (y, 2**40))
    assert y.item() == (2**40 * 3 + 1) * 7


@pytest.mark.parametrize(
    "args, constants, message",
    [
        ((torch.zeros(4),), {"N": 128}, r"missing \['y_ptr', 'size', 'shift', 'OTHER'\]"),
        ((), {"M": 1}, r"unknown \['M'\]"),
        ((torch.zeros(4),) * 7, {"N": 128, "OTHER": None}, "takes 4 arguments beside its constants, got 7"),
        (("x", torch.zeros(4), 4, 0), {"N": 128, "OTHER": None}, "argument x_ptr must be a CPU tensor"),
    ],
)
def test_arguments(args, constants, message):
    with pytest.raises(TypeError, match=message):
        emulator.run(copy_kernel, (1,), args, constants)


def test_what_is_run_and_where():
    with pytest.raises(TypeError, match=r"must be what @gluon.jit returns, got function"):
        emulator.run(_plain, (1,), ())
    with pytest.raises(ValueError, match=r"one to three numbers of programs, got \(1, 1, 1, 1\)"):
        emulator.run(grid_kernel, (1, 1, 1, 1), (torch.zeros(1),), {"WIDTH": 1})
    with pytest.raises(ValueError, match="argument y_ptr is on meta"):
        emulator.run(grid_kernel, (1,), (torch.zeros(1, device="meta"),), {"WIDTH": 1})


def test_nothing_imports_gluon_before_a_run():
    text = (
        "import sys, triton; before = set(sys.modules); import mla_kernels, mla_kernels.targets.gluon.emulator; "
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('triton.experimental')))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@gluon.jit
def functions_kernel(x_ptr, y_ptr, z_ptr, OP: gl.constexpr):
    n = gl.arange(0, 128, layout=LINE)
    x, y = gl.load(x_ptr + n), gl.load(y_ptr + n)
    if OP == "fma":
        z = gl.fma(x, y, x)
    elif OP == "clamp":
        z = gl.clamp(x, 0.5, 1.0)
    elif OP == "div_rn":
        z = gl.div_rn(x, y)
    elif OP == "fdiv":
        z = gl.fdiv(gl.mul(x, y), gl.add(x, gl.sub(y, x)))
    elif OP == "neg":
        z = gl.abs(-x)
    elif OP == "cumsum":
        z = gl.cumsum(x, 0)
    elif OP == "min":
        z = gl.full([128], 0, gl.float32, layout=LINE) + gl.min(x, 0)
    elif OP == "gather":
        z = gl.gather(x, 127 - n, 0)
    elif OP == "cdiv":
        gl.static_assert(gl.cdiv(7, 2) == 4)
        z = x + gl.cdiv(gl.load(x_ptr + 128).to(gl.int32), 2)
    elif OP == "broadcast":
        flat = gl.arange(0, 128, layout=gl.SliceLayout(1, GRID))
        a, b = gl.broadcast(gl.cast(flat, gl.float32)[:, None], gl.zeros([1, 32], gl.float32, layout=GRID))
        turned = gl.permute(gl.trans(a), (1, 0)) + b
        z = gl.convert_layout(gl.sum(turned, 1), LINE) + gl.convert_layout(gl.ravel(x.reshape([2, 64])), LINE)
    elif OP == "sqrt":
        z = gl.sqrt(x)
    elif OP == "sqrt_rn":
        z = gl.sqrt_rn(x)
    elif OP == "rsqrt":
        z = gl.rsqrt(x)
    elif OP == "exp":
        z = gl.exp(x)
    elif OP == "log":
        z = gl.log(x)
    elif OP == "log2":
        z = gl.log2(x)
    elif OP == "sin":
        z = gl.sin(x)
    elif OP == "cos":
        z = gl.cos(x)
    elif OP == "erf":
        z = gl.erf(x)
    elif OP == "floor":
        z = gl.floor(x)
    elif OP == "ceil":
        z = gl.ceil(x)
    gl.store(z_ptr + n, z)


FUNCTIONS = {
    "fma": lambda x, y: x * y + x,
    "clamp": lambda x, y: x.clamp(0.5, 1.0),
    "div_rn": lambda x, y: x / y,
    "fdiv": lambda x, y: x,
    "neg": lambda x, y: x.abs(),
    "cumsum": lambda x, y: x.cumsum(0),
    "min": lambda x, y: x.min().expand(128),
    "gather": lambda x, y: x.flip(0),
    "cdiv": lambda x, y: x + 4,
    "broadcast": lambda x, y: x + torch.arange(128) * 32,
    "sqrt_rn": lambda x, y: x.sqrt(),
}


@pytest.mark.parametrize(
    "op", [*FUNCTIONS, "sqrt", "rsqrt", "exp", "log", "log2", "sin", "cos", "erf", "floor", "ceil"]
)
def test_functions(op):
    x, y, z = torch.rand(129) * 3 + 0.01, torch.rand(128) + 0.5, torch.empty(128)
    x[128] = 7.5
    emulator.run(functions_kernel, (1,), (x, y, z), {"OP": op})
    x = x[:128].double()
    expected = FUNCTIONS[op](x, y.double()) if op in FUNCTIONS else getattr(torch, op)(x)
    torch.testing.assert_close(z.double(), expected.double(), rtol=1e-5, atol=1e-5)


@gluon.jit
def hints_kernel(x, CASE: gl.constexpr):
    x = gl.max_contiguous(gl.multiple_of(x, 8), 8)
    gl.static_print(x)
    gl.static_assert(gl.num_ctas() == 1)
    if CASE == "assume":
        gl.assume(x > 8)
    elif CASE == "device_assert":
        gl.device_assert(x > 8, "x is small")
    elif CASE == "static_assert":
        gl.static_assert(CASE == "", "never")


def test_hints_are_held_to():
    emulator.run(hints_kernel, (1,), (16,), {"CASE": "assume"})
    for x, case, message in (
        (12, "", "multiple_of at .*: 12 is no multiple of 8"),
        (8, "assume", "an assertion at .* does not hold"),
        (8, "device_assert", "does not hold: x is small"),
        (8, "static_assert", "static_assert at .*: never"),
    ):
        with pytest.raises(EmulationError, match=message):
            emulator.run(hints_kernel, (1,), (x,), {"CASE": case})
