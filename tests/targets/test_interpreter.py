"""The interpreter's bfloat16 is corrected, and the traffic counter counts what a person would."""

import numpy as np
import pytest
import torch

from mla_kernels.language import tl, triton
from mla_kernels.targets import interpreter
from mla_kernels.targets.traffic import Traffic


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])  # [M, K]
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])  # [K, N]
    c = tl.dot(a, b, input_precision="ieee")  # [M, N]
    tl.store(c_ptr + m[:, None] * N + n[None, :], c.to(c_ptr.dtype.element_ty))


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n).to(y_ptr.dtype.element_ty))


@triton.jit
def unwidened_kernel(x_ptr, y_ptr, N: tl.constexpr, OP: tl.constexpr):
    n = tl.arange(0, N)
    x, first = tl.load(x_ptr + n), tl.load(x_ptr)
    if OP == "add":
        y = x + first
    elif OP == "negate":
        y = -x
    elif OP == "fma":
        y = tl.fma(x, x, first)
    elif OP == "multiply":
        y = x * first
    elif OP == "abs":
        y = tl.abs(x)
    elif OP == "compare":
        y = tl.where(x < first, x, first)
    else:
        y = tl.where(n < 8, x, first)
    tl.store(y_ptr + n, y)


@triton.jit
def masked_copy_kernel(x_ptr, y_ptr, size, N: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n, mask=n < size, other=0.0), mask=n < size)


@pytest.fixture(autouse=True)
def _prepared():
    interpreter.prepare()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    c = torch.empty(16, 16, dtype=torch.float32)
    matmul_kernel[(1,)](a, b, c, M=16, N=16, K=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_rounding_to_bfloat16_is_torchs():
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, 3.4e38, -3.4e38, 1.00390625, 1.01171875])
    x = torch.cat([special, torch.randn(503) * torch.logspace(-30, 30, 503)])
    y = torch.empty(512, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=512)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    assert np.isnan(interpreter.bf16_to_fp32(interpreter.fp32_to_bf16(np.array([np.nan], np.float32)))).all()


def test_integers_reach_bfloat16_as_numbers():
    x, y = torch.arange(-8, 8, dtype=torch.int32), torch.empty(16, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=16)
    assert torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("op", ["add", "negate", "abs", "compare"])
def test_arithmetic_on_bfloat16_is_refused(op):
    x, y = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="got an operand in bfloat16; a kernel computes in float32"):
        unwidened_kernel[(1,)](x, y, N=16, OP=op)
    unwidened_kernel[(1,)](x.half(), y.half(), N=16, OP=op)


@pytest.mark.parametrize("op", ["multiply", "fma"])
def test_products_of_bfloat16_are_rounded_once(op):
    x, y = torch.randn(512).bfloat16(), torch.empty(512, dtype=torch.bfloat16)
    x[0], x[1:3] = 2.0**-30, 1.0625  # squared 1 + 2^-3 + 2^-8, in the middle of two numbers
    unwidened_kernel[(1,)](x, y, N=512, OP=op)
    wide, first = x.double(), 2.0**-30
    exact = wide * wide + first if op == "fma" else wide * first
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8).all()
    if op == "fma":
        assert (y[1:3] == 1.1328125).all()  # rounded to float32 first it would be the even one, 1.125
    else:
        assert torch.equal(y, exact.float().bfloat16())  # float32 holds the products
    largest, subnormal = torch.tensor([3e38, 2.0, -2.0, 0.0]).bfloat16(), torch.tensor([2.0**-127, 3.0, 0.5, 0.0])
    for values in (largest, subnormal.bfloat16()):
        out = torch.empty(4, dtype=torch.bfloat16)
        unwidened_kernel[(1,)](values, out, N=4, OP="multiply")
        assert torch.equal(out, (values.float() * values[0].float()).bfloat16())


def test_a_choice_between_bfloat16_values_is_none():
    x, y = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    unwidened_kernel[(1,)](x, y, N=16, OP="where")
    assert torch.equal(y, torch.cat((x[:8], x[:1].expand(8))))


def test_traffic_leaves_masked_lanes_out():
    x, y = torch.randn(100), torch.empty(100)
    with Traffic() as traffic:
        masked_copy_kernel[(4,)](x, y, 100, N=32)
    assert torch.equal(x, y)
    assert (traffic.loaded, traffic.stored, traffic.requested) == (400, 400, 800)


def test_traffic_counts_dots():
    a, b, c = torch.randn(16, 32), torch.randn(32, 16), torch.empty(16, 16)
    with Traffic() as traffic:
        matmul_kernel[(1,)](a, b, c, M=16, N=16, K=32)
    assert traffic.flops == 2 * 16 * 16 * 32
    assert traffic.dots == {(16, 16, 32): 1}
    with Traffic() as again:
        pass
    assert again.requested == 0


def test_the_interpreter_of_triton_3_6_needs_an_older_numpy():
    for triton_version, numpy_version in (((3, 6), "2.3.5"), ((3, 7), "2.4.6"), ((3, 9), "2.5.2")):
        interpreter.check_numpy(triton_version, numpy_version)
    with pytest.raises(RuntimeError, match=r"numpy 2\.5\.2 is .* of Triton 3\.6 needs numpy<2\.4"):
        interpreter.check_numpy((3, 6), "2.5.2")
