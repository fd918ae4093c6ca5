"""e4m3 and int8 in kernels, bit for bit against torch.float8_e4m3fn and the reference, for every code and tie."""

import numpy as np
import pytest
import torch

from mla_kernels.language import tl, triton
from mla_kernels.quant.fp8 import decode_e4m3, encode_e4m3, power_of_two_scale, quantise_e4m3
from mla_kernels.quant.int8 import divide_by_127, quantise_int8
from mla_kernels.reference import latent as reference
from mla_kernels.targets import interpreter
from tests.targets import emulated

BLOCK = 4096
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["interpret", "npu-emulated"])
def run(request):
    """run(kernel, programs, *args): a test's own kernel on that backend."""

    def interpret(kernel, programs, *args, **constants):
        interpreter.prepare()
        with np.errstate(all="ignore"):
            kernel[(programs,)](*args, **constants)

    def emulate(kernel, programs, *args, **constants):
        emulated.run(kernel, (programs,), *args, **constants)

    return interpret if request.param == "interpret" else emulate


def padded(values):
    """Values as whole blocks, zeros behind them."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK))


@triton.jit
def decode_kernel(codes, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, decode_e4m3(tl.load(codes + at)))


@triton.jit
def encode_kernel(values, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, encode_e4m3(tl.load(values + at)))


@triton.jit
def scale_kernel(amax, out, inverse_out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale, inverse = power_of_two_scale(tl.load(amax + at))
    tl.store(out + at, scale)
    tl.store(inverse_out + at, inverse)


@triton.jit
def divide_kernel(values, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, divide_by_127(tl.load(values + at)))


@triton.jit
def quantise_kernel(values, codes, scales, ROWS: tl.constexpr, WIDTH: tl.constexpr, INT8: tl.constexpr):
    row = tl.program_id(0)
    if INT8:
        at = row * WIDTH + tl.arange(0, WIDTH)
        code, scale = quantise_int8(tl.load(values + at))
        tl.store(codes + at, code)
        tl.store(scales + row, scale)
    else:
        at = row * ROWS * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        code, scale = quantise_e4m3(tl.load(values + at))
        tl.store(codes + at, code)
        tl.store(scales + row * ROWS + tl.arange(0, ROWS), scale)


def test_every_code_decodes(run):
    codes, out = torch.arange(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.float16)
    run(decode_kernel, 1, codes, out, BLOCK=256)
    expected = codes.view(torch.float8_e4m3fn).float()
    expected[0x7F], expected[0xFF] = 480.0, -480.0  # what fp16 makes of the two NaN
    assert torch.equal(out.float(), expected)
    assert torch.equal(out.signbit(), codes >= 0x80)  # -0, too
    signed = torch.zeros_like(out)
    run(decode_kernel, 1, codes.view(torch.int8), signed, BLOCK=256)
    assert torch.equal(signed.view(torch.int16), out.view(torch.int16))


def dense_values():
    """Every code, every middle between two and the numbers next to it; every bfloat16; random bits; what saturates."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    around = torch.cat((values, middles, torch.tensor([464.0, 480.0, 2.0**-10, 2.0**-11])))
    around = torch.cat((around, *(torch.nextafter(around, torch.tensor(end)) for end in (INF, -INF))))
    bfloat16 = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 14,)).to(torch.int32).view(torch.float32)
    near_subnormal = torch.randn(1 << 12) * 2.0**-8
    beyond = torch.tensor([449.0, 1e9, INF, NAN, 0.0])
    return torch.cat((around, -around, bfloat16, random, near_subnormal, beyond, -beyond))


def test_encode_rounds_to_nearest_even(run):
    values = padded(dense_values())
    codes = torch.full((len(values),), 85, dtype=torch.uint8)
    run(encode_kernel, len(values) // BLOCK, values, codes, BLOCK=BLOCK)
    expected = reference.encode_e4m3(values)
    wrong = (codes != expected).nonzero().flatten()[:5]
    assert torch.equal(codes, expected), f"{values[wrong]}: got {codes[wrong]}, expected {expected[wrong]}"
    in_range = values.abs() < 464  # where torch does not give NaN
    assert torch.equal(codes[in_range], values[in_range].to(torch.float8_e4m3fn).view(torch.uint8))
    assert (codes[values.isnan()] == 0x7F).all()
    assert (codes[values >= 448] == 0x7E).all() and (codes[values <= -448] == 0xFE).all()


def test_codes_survive_decode_and_encode(run):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    values = padded(codes.view(torch.float8_e4m3fn).float())
    out = torch.zeros(len(values), dtype=torch.uint8)
    run(encode_kernel, len(values) // BLOCK, values, out, BLOCK=BLOCK)
    assert torch.equal(out[: len(codes)], codes)


def test_power_of_two_scales(run):
    """Around every 448 x 2^k, and at random."""
    edges = 448 * 2.0 ** torch.arange(-30, 119).float()
    edges = torch.cat((edges, *(torch.nextafter(edges, torch.tensor(end)) for end in (INF, 0.0))))
    amax = padded(torch.cat((edges, torch.rand(1000) * 1e3, torch.tensor([0.0, 1e-45, 3e38]))))
    scale, inverse = torch.zeros(2, len(amax))
    run(scale_kernel, len(amax) // BLOCK, amax, scale, inverse, BLOCK=BLOCK)
    assert torch.equal(scale, reference.power_of_two_scale(amax))
    assert torch.equal(inverse, 1 / scale)
    exact = torch.log2(torch.clamp_min(amax.double() / 448, 1e-4)).ceil().exp2()  # 448 x 2^k divides exactly
    assert torch.equal(scale.double(), exact)


def test_division_by_127_is_correctly_rounded(run):
    mantissas = (torch.randint(0, 1 << 23, (1 << 15,), dtype=torch.int32) + (127 << 23)).view(torch.float32)
    values = mantissas * 2.0 ** torch.randint(-90, 90, (len(mantissas),))
    out = torch.zeros_like(values)
    run(divide_kernel, len(values) // BLOCK, values, out, BLOCK=BLOCK)
    assert torch.equal(out, values / 127)


def test_division_by_127_for_every_mantissa():
    """The kernel's three lines in torch, for all 2^23 mantissas."""
    a = (torch.arange(1 << 23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    inverse = torch.tensor(1 / 127)
    q = a * inverse
    assert torch.equal(q + ((a - 128 * q) + q) * inverse, a / 127)


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantise(run, layout):
    """512 values a row: magnitudes from 1e-8 to 1e8, zeros, exact powers of two, subnormals, NaN and infinities."""
    values = torch.randn(24, 512) * torch.logspace(-8, 8, 24)[:, None]
    values[1] = 0.0
    values[2, :128], values[2, 5] = 0.0, 448.0 * 4
    values[3, :128], values[3, 5] = 1.0, 448.0 * 4.000001
    values[4] = 127.0 * torch.linspace(-1, 1, 512).round(decimals=2)
    values[5] = 1e-42
    values[6, 300], values[7, 7], values[8, 511] = NAN, INF, -INF
    codes = torch.full((24, 512), 85, dtype=torch.int8)
    expected_codes, expected_scales = reference.quantise_latent(values, layout)
    scales = torch.zeros_like(expected_scales)
    tile = {"ROWS": 1, "WIDTH": 512, "INT8": True} if layout == "int8" else {"ROWS": 4, "WIDTH": 128, "INT8": False}
    run(quantise_kernel, 24, values, codes, scales, **tile)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, expected_codes.view(torch.int8))
    assert scales.isnan().sum() == 3
