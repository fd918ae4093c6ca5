"""Codes of e4m3 decoded four at a time are, for every code, what they are decoded to one at a time."""

import pytest
import torch

from mla_kernels.language import tl, triton
from mla_kernels.quant.fp8 import (
    AS_BYTES,
    AS_E4M3,
    AS_FNUZ,
    AS_HALVES,
    HALF_UNIT,
    decode_e4m3,
    e4m3_operand,
    e4m3_pointer,
    e4m3_swapped,
    e4m3_values,
    product_form,
    product_unit,
)
from mla_kernels.quant.fp8_block import decode_e4m3 as bytes_to_fp16
from mla_kernels.targets import interpreter
from mla_kernels.targets.chips import CHIPS

BYTES = torch.arange(256, dtype=torch.uint8)
WIDE = tl.constexpr(1024)


@pytest.fixture(autouse=True)
def _prepared():
    interpreter.prepare()


@pytest.fixture
def codes():
    """[4, 1024]: every code at every place of a word, beside others."""
    rows = torch.stack([BYTES.repeat(4).roll(shift) for shift in range(4)])
    rows[1], rows[2] = rows[1].flip(0), rows[2, torch.randperm(1024)]
    return rows.contiguous()


@triton.jit
def operand_kernel(codes, out, FP8: tl.constexpr):
    row = tl.arange(0, 4)[:, None]
    words = tl.load(e4m3_pointer(codes + row * WIDE, FP8) + tl.arange(0, WIDE // 4)[None, :])
    tl.store(out + row * WIDE + tl.arange(0, WIDE)[None, :], e4m3_operand(words, FP8).to(tl.float32))


@triton.jit
def values_kernel(codes, out, FP8: tl.constexpr, SWAPPED: tl.constexpr):
    row = tl.arange(0, 4)[:, None]
    words = tl.load(e4m3_pointer(codes + row * WIDE, FP8) + tl.arange(0, WIDE // (4 if FP8 > 1 else 1))[None, :])
    if SWAPPED:  # noqa: SIM108 - only one of both is for these words
        values = e4m3_swapped(words, out.dtype.element_ty)
    else:
        values = e4m3_values(words, out.dtype.element_ty, FP8)
    tl.store(out + row * WIDE + tl.arange(0, WIDE)[None, :], values)


@triton.jit
def single_kernel(codes, out):
    n = tl.arange(0, WIDE)
    tl.store(out + n, decode_e4m3(tl.load(codes + n)))


@triton.jit
def product_kernel(a, b, out, FP8: tl.constexpr):
    """a [16, 32] by b [16, 32], as bytes and as FP8."""
    n = tl.arange(0, 16)
    WORDS: tl.constexpr = 8 if FP8 > 1 else 32
    k = tl.arange(0, WORDS)[None, :]
    x = e4m3_operand(tl.load(e4m3_pointer(a + n[:, None] * 32, FP8) + k), FP8)
    w = e4m3_operand(tl.load(e4m3_pointer(b + n[:, None] * 32, FP8) + k), FP8)
    total = tl.dot(x, tl.trans(w), input_precision="ieee")
    tl.store(out + n[:, None] * 16 + n[None, :], total * product_unit(FP8))


def swapped(values):
    return values.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(-3)


def test_one_by_one():
    out = torch.zeros(1024, dtype=torch.float16)
    single_kernel[(1,)](BYTES.repeat(4).view(torch.int8), out)
    expected = BYTES.view(torch.float8_e4m3fn).float()
    expected[[0x7F, 0xFF]] = torch.tensor([480.0, -480.0])
    assert torch.equal(out[:256].view(torch.int16), expected.half().view(torch.int16))  # -0 is -0
    assert torch.equal(bytes_to_fp16(BYTES).view(torch.int16), expected.half().view(torch.int16))


def test_every_code_as_halves(codes):
    out = torch.zeros(4, 1024)
    operand_kernel[(1,)](codes.view(torch.int8), out, FP8=AS_HALVES.value)
    expected = swapped(bytes_to_fp16(codes).float() / HALF_UNIT.value)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_every_code_as_fnuz(codes):
    out = torch.zeros(4, 1024)
    operand_kernel[(1,)](codes.view(torch.int8), out, FP8=AS_FNUZ.value)
    expected = bytes_to_fp16(codes).float() / 2
    expected[expected == 0] = 0.0  # no -0
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", [AS_BYTES, AS_HALVES, AS_FNUZ])
def test_every_code_in_order(codes, form, dtype):
    out = torch.zeros(4, 1024, dtype=dtype)
    values_kernel[(1,)](codes.view(torch.int8), out, FP8=form.value, SWAPPED=False)
    expected, bits = bytes_to_fp16(codes).to(dtype), torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_out_of_order(codes, dtype):
    out = torch.zeros(4, 1024, dtype=dtype)
    values_kernel[(1,)](codes.view(torch.int8), out, FP8=AS_HALVES.value, SWAPPED=True)
    unit = HALF_UNIT.value if dtype == torch.float16 else 1
    expected = swapped(bytes_to_fp16(codes).float() / unit).to(dtype)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("form", [AS_BYTES, AS_HALVES, AS_FNUZ])
def test_products_are_the_same(form):
    codes = torch.randint(0, 256, (2, 16, 32), dtype=torch.uint8)
    codes[0, :3], codes[1, 1:4] = torch.tensor([1, 0x80, 0x87], dtype=torch.uint8)[:, None], 0x03  # subnormal, -0
    out = torch.zeros(16, 16)
    product_kernel[(1,)](*codes.view(torch.int8), out, FP8=form.value)
    a, b = bytes_to_fp16(codes).double()
    assert torch.equal(out, (a @ b.T).float())  # products have 8 bits, sums of 32 at most 8 + 5 + 29: fp32 rounds once


def test_which_chip_takes_codes_how():
    forms = {name: product_form(chip) for name, chip in CHIPS.items()}
    assert {name for name, form in forms.items() if form == AS_HALVES.value} == {"sm_80", "sm_86"}
    assert {name for name, form in forms.items() if form == AS_FNUZ.value} == {"gfx942"}
    assert {form for name, form in forms.items() if name.startswith("ascend")} == {AS_BYTES.value}
    assert forms["sm_90"] == forms["gfx950"] == AS_E4M3.value
    assert product_form(CHIPS["sm_80"], False) == product_form(CHIPS["gfx942"], False) == AS_BYTES.value
