"""The Gluon emulator's products of warp groups: values, what is in flight, what the tensor cores do not take."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from mla_kernels.targets.gluon import emulator
from mla_kernels.targets.gluon.errors import EmulationError, RaceError

GRID = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))


def nvmma(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


@gluon.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, LAYOUT: gl.constexpr, K: gl.constexpr, INSTR_K: gl.constexpr, CASE: gl.constexpr
):
    """c = a @ b^T, both [64, K]."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, GRID))
    cols = gl.arange(0, K, layout=gl.SliceLayout(0, GRID))
    at = rows[:, None] * K + cols[None, :]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, INSTR_K])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, INSTR_K // 8)
    a = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [64, K], LAYOUT)
    b = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [64, K], LAYOUT)
    a.store(gl.load(a_ptr + at))
    b.store(gl.load(b_ptr + at))
    if CASE != "no fence":
        fence_async_shared()
    zero = gl.zeros([64, 64], c_ptr.dtype.element_ty, layout=ACC)
    right = b.permute((1, 0))
    if CASE == "synchronous":
        c = warpgroup_mma(a, right, zero)
    elif CASE == "registers":
        c = warpgroup_mma(a.load(LEFT), right, zero + 5, use_acc=zero_is_kept(1), is_async=True)
        c = warpgroup_mma_wait(0, [c])
    elif CASE == "twice":
        c = warpgroup_mma(a, right, warpgroup_mma_init(zero), is_async=True)
        other = warpgroup_mma(a, right, zero, is_async=True)
        c = warpgroup_mma_wait(1, [c]) + 1
        c = c + warpgroup_mma_wait(0, [other])
    elif CASE == "used in flight":
        c = warpgroup_mma(a, right, zero, is_async=True) * 2
    elif CASE == "stored in flight":
        c = warpgroup_mma(a, right, zero, is_async=True)
    elif CASE == "waited for another":
        c = warpgroup_mma(a, right, zero, is_async=True)
        d = warpgroup_mma(a, right, zero, is_async=True)
        c, d = warpgroup_mma_wait(1, [c, d])
        c = c + d
    elif CASE == "given away":
        c = warpgroup_mma(a, right, zero, is_async=True)
        d = warpgroup_mma(a, right, c, is_async=True)
        warpgroup_mma_wait(0, [d])
        c = warpgroup_mma_wait(0, [c])
    elif CASE == "overwritten":
        c = warpgroup_mma(a, right, zero, is_async=True)
        b.store(gl.load(a_ptr + at))
        c = warpgroup_mma_wait(0, [c])
    elif CASE == "descriptor as dependency":
        c = warpgroup_mma(a, right, zero, is_async=True)
        c, d = warpgroup_mma_wait(0, [c, a])
    else:
        c = warpgroup_mma(a, b, zero) if CASE == "not permuted" else warpgroup_mma(a, right, zero)
    out = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))[:, None] * 64
    gl.store(c_ptr + (out + gl.arange(0, 64, layout=gl.SliceLayout(0, ACC))[None, :]), c)


@gluon.jit
def zero_is_kept(x):
    return gl.program_id(0) == x


def _product(case, dtype=torch.bfloat16, K=128, result=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(64, K, generator=generator).mul(2).to(dtype) for _ in range(2))
    c = torch.zeros(64, 64, dtype=result)
    constants = {"LAYOUT": nvmma(dtype), "K": K, "INSTR_K": 32 // dtype.itemsize, "CASE": case}
    emulator.run(product_kernel, (1,), (a, b, c), constants, seed=seed)
    return c, (a.double() @ b.double().T).to(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_products(dtype):
    result = torch.int32 if dtype == torch.int8 else torch.float32
    for case in ("synchronous", "registers"):
        torch.testing.assert_close(*_product(case, dtype, result=result), rtol=1e-5, atol=1e-3)


def test_products_of_float32_read_19_bits():
    c, exact = _product("synchronous", torch.float32)
    error = (c - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 2e-3


def test_products_in_order():
    c, one = _product("twice")
    torch.testing.assert_close(c, 2 * one + 1, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "case, kind, message",
    [
        (
            "no fence",
            RaceError,
            "by the asynchronous proxy has no fence_async_shared between it and the store by the kernel",
        ),
        ("used in flight", EmulationError, r"the product at \S+ is used at \S+ while in flight: wait for it first"),
        ("stored in flight", EmulationError, "while in flight: wait for it first"),
        ("waited for another", EmulationError, "while in flight: wait for it first"),
        (
            "given away",
            EmulationError,
            r"the product at \S+, handed on at test_gluon_emulator_products.py:\d+, is used at",
        ),
        (
            "overwritten",
            RaceError,
            "the store by the kernel .* is not ordered after the read of a product by the kernel",
        ),
        ("descriptor as dependency", EmulationError, "takes products and registers as deps"),
    ],
)
def test_products_in_flight(case, kind, message, seed):
    with pytest.raises(kind, match=message):
        _product(case, seed=seed)


def test_products_refuse_what_the_tensor_cores_do():
    with pytest.raises(EmulationError, match=r"warpgroup_mma of \[64, 128\] and \[64, 128\] into \[64, 64\]"):
        _product("not permuted")
    for case, message in (
        ("across", "operands of fp8e4nv must be contiguous along K"),
        ("warps", "a layout of 8 warps in a partition of 4"),
        ("instruction", r"an instruction of fp8e4nv has the shape \[16, N, 32\], got \[16, 128, 16\]"),
        ("types", "warpgroup_mma of fp8e4nv and bf16"),
        ("layout", "takes shared memory of NVMMASharedLayout"),
    ):
        with pytest.raises(EmulationError, match=message):
            emulator.run(refused_kernel, (1,), (), {"LAYOUT": nvmma(torch.int8), "CASE": case})


@gluon.jit
def refused_kernel(LAYOUT: gl.constexpr, CASE: gl.constexpr):
    K: gl.constexpr = 16 if CASE == "instruction" else 32
    WARPS: gl.constexpr = 2 if CASE == "warps" else 1
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, WARPS], instr_shape=[16, 128, K])
    a = gl.allocate_shared_memory(gl.float8e4nv, [64, 128], LAYOUT)
    b = gl.allocate_shared_memory(gl.float8e4nv, [128, 128], LAYOUT)
    if CASE == "types":
        b = gl.allocate_shared_memory(gl.bfloat16, [128, 128], gl.NVMMASharedLayout(128, 16, 2))
    elif CASE == "layout":
        b = gl.allocate_shared_memory(gl.float8e4nv, [128, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    warpgroup_mma(a, b, gl.zeros([64, 128], gl.float32, layout=ACC))
