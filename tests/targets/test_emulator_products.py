"""Matrix products of the NPU emulator: tiles of every shape and type, summed in blocks of vectors or in plain loops."""

import pytest
import torch

from mla_kernels.language import tl, triton
from tests.targets.emulated import run


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left, right = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    before = tl.load(c + m[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, before, input_precision="ieee"))


@triton.jit
def batched_product_kernel(a, b, c, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    g, m, n, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + g[:, None, None] * M * K + m[None, :, None] * K + k[None, None, :])
    right = tl.load(b + g[:, None, None] * K * N + k[None, :, None] * N + n[None, None, :])
    out = c + g[:, None, None] * M * N + m[None, :, None] * N + n[None, None, :]
    tl.store(out, tl.dot(left, right, tl.load(out), input_precision="ieee"))


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (16, 32, 16)),
        (torch.float32, (32, 128, 64)),
        (torch.bfloat16, (16, 64, 32)),
        (torch.float16, (16, 16, 128)),
        (torch.int8, (16, 32, 32)),
    ],
    ids=str,
)
def test_products_of_tiles(dtype, sizes):
    rows, columns, length = sizes
    a, b, c = (torch.randint(-9, 9, shape) for shape in ((rows, length), (length, columns), (rows, columns)))
    c = c.to(torch.float32 if dtype.is_floating_point else torch.int32)
    exact = (a @ b + c.long()).to(c.dtype)  # whole numbers: nothing is rounded
    run(product_kernel, (1,), a.to(dtype), b.to(dtype), c, M=rows, N=columns, K=length)
    assert torch.equal(c, exact)


def test_a_batch_of_products():
    a, b, c = torch.randint(-9, 9, (3, 4, 16, 16)).float()
    exact = a @ b + c
    run(batched_product_kernel, (1,), a, b, c, B=4, M=16, N=16, K=16)
    assert torch.equal(c, exact)
