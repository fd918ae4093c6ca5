"""Codes decoded two at a time are, for every code, zero and scale, what they are decoded to one at a time."""

import pytest
import torch

from mla_kernels.language import tl, triton
from mla_kernels.quant import decode
from mla_kernels.quant.decode import (
    e2m1_pairs,
    e2m1_values,
    int4_pairs,
    int4_values,
    int8_pairs,
    int8_values,
    spread,
    ue8m0_bf16,
    ue8m0_values,
)
from mla_kernels.targets import interpreter

BF16 = torch.bfloat16
BYTES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def int8_kernel(codes, out, wide):
    n = tl.arange(0, 256)[None, :]
    words = tl.load(codes.to(tl.pointer_type(tl.uint16), bitcast=True) + tl.arange(0, 128)[None, :])
    tl.store(out + n, int8_pairs(words))
    tl.store(wide + n, int8_values(tl.load(codes + n), tl.bfloat16))


@triton.jit
def four_bit_kernel(
    codes, zeros, scales, out, wide, FORMAT: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr, GROUPS: tl.constexpr
):
    """All bytes in each row; ``scales`` [ROWS, GROUPS], zeros alike."""
    row, n = tl.arange(0, ROWS)[:, None], tl.arange(0, 256)[None, :]
    at = row * GROUPS + tl.arange(0, GROUPS)[None, :]
    stored, zero = tl.load(scales + at), tl.load(zeros + at).to(tl.float32)  # [ROWS, GROUPS]
    words = tl.load(codes.to(tl.pointer_type(tl.uint16), bitcast=True) + row * 0 + tl.arange(0, 128)[None, :])
    each = row * GROUPS + n // (256 // GROUPS)
    packed = tl.load(codes + row * 0 + n).to(tl.int32)
    if FORMAT == "mxfp4":
        values = e2m1_pairs(spread(words), ue8m0_bf16(stored), HIGH)
        expected = e2m1_values(packed, HIGH) * ue8m0_values(tl.load(scales + each))
    else:
        values = int4_pairs(spread(words), zero, stored, HIGH)
        factor = tl.load(scales + each).to(tl.float32)
        expected = int4_values(packed, tl.load(zeros + each).to(tl.float32), HIGH) * factor
    tl.store(out + row * 256 + n, values)
    tl.store(wide + row * 256 + n, expected.to(tl.bfloat16))


@pytest.fixture(autouse=True)
def _prepared():
    interpreter.prepare()


def same_bits(actual, expected):
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def decoded(form, zeros, scales, high):
    rows, groups = scales.shape
    out, wide = torch.zeros(2, rows, 256, dtype=BF16)
    four_bit_kernel[(1,)](BYTES, zeros, scales, out, wide, FORMAT=form, ROWS=rows, HIGH=high, GROUPS=groups)
    return out, wide


def test_every_code_of_int8():
    out, wide = torch.zeros(2, 256, dtype=BF16)
    int8_kernel[(1,)](BYTES.view(torch.int8), out, wide)
    assert torch.equal(out.float() * 64, BYTES.view(torch.int8).float())
    assert torch.equal(wide, out * 64)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_code_and_zero_of_int4(high, groups):
    """With scales of random magnitudes, negative, 0, subnormal, as large as is accepted, infinite and NaN."""
    zeros = torch.arange(16, dtype=torch.uint8).repeat(2)[:, None].repeat(1, groups)
    scales = torch.randn(32, groups) * torch.logspace(-36, 30, 32)[:, None]
    scales[:7, 0] = torch.tensor([0.0, 1.0, 2.0**-130, 2.0**-133, 2.0**121, float("inf"), float("nan")])
    zeros[16:], scales = zeros[16:].flip(1), scales.to(BF16)
    out, wide = decoded("int4", zeros, scales, high)
    codes = (BYTES >> 4 if high else BYTES & 15).double()
    half = torch.arange(256) * groups // 256
    exact = (codes - zeros.double()[:, half]) * scales.double()[:, half]
    finite = scales.float().isfinite()[:, half]
    assert torch.equal(out[finite], exact.float().bfloat16()[finite])  # five bits by eight: float32 holds the product
    same_bits(out, wide)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_code_and_scale_of_mxfp4(high, groups):
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None].repeat(1, groups)
    if groups == 2:
        scales[:, 1] = scales[:, 1].flip(0)
    out, wide = decoded("mxfp4", torch.zeros_like(scales), scales.view(torch.int8), high)
    same_bits(out, wide)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = magnitudes[(BYTES >> 4 if high else BYTES & 15).long()]
    same_bits(out[127, : 256 // groups], values[: 256 // groups].to(BF16))


def test_masks_are_of_pairs():
    """What the words' constants say in bits, once more."""
    assert decode.PAIR_E2M1.value & 0xFFFFFFFF == 0x81C081C0
    assert decode.PAIR_HIGH.value == decode.PAIR_LOW.value << 4
