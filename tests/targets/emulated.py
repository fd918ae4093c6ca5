"""Kernels and calls that several tests of the NPU emulator share."""

from mla_kernels.language import tl, triton
from mla_kernels.targets import emulator
from mla_kernels.targets.source import python_function, standalone


def run(kernel, grid, *args, **constants):
    """Launch a jit function of a test file; argument types follow from ``args``."""
    names = python_function(kernel).__code__.co_varnames
    types = {name: emulator.triton_type(arg) for name, arg in zip(names, args)}
    emulator.run(standalone(kernel), python_function(kernel).__name__, types, constants, grid, args)


def relative_error(actual, exact):
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


@triton.jit
def matmul_kernel(
    a, b, c, rows, columns, depth, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        left = tl.load(
            a + m[:, None] * stride_a + at[None, :], mask=(m[:, None] < rows) & (at[None, :] < depth), other=0.0
        )
        right = tl.load(
            b + at[:, None] * stride_b + n[None, :], mask=(at[:, None] < depth) & (n[None, :] < columns), other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    tl.store(c + m[:, None] * stride_c + n[None, :], total.to(c.dtype.element_ty), mask=inside)


def matmul(a, b, c, rows=None):
    (m, k), n = a.shape, b.shape[1]
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
    sizes = (rows or m, n, k, a.stride(0), b.stride(0), c.stride(0))
    run(matmul_kernel, grid, a, b, c, *sizes, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64)


@triton.jit
def gather_kernel(table, index, out, rows, columns, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    source = tl.load(index + row, mask=row < rows, other=0)
    value = tl.load(table + source[:, None] * columns + column[None, :], mask=column[None, :] < columns, other=0.0)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)
