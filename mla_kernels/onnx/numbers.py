"""Numbers of few bits as ONNX can compute them: it reads no bytes as floats (BitCast came with opset 26), so codes are
looked up in tables and bytes put together by integers. All of it is exact.

Tables are tensors of this module, which exporters keep as constants: a tensor made in a decomposition is detached in
place, which torch.export refuses. torch 2.13 and older lose constants there, so that graphs make the tables themselves.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

_LEAST, _MOST = -149, 127  # exponents of fp32's powers of two, subnormal ones included


class Tables(NamedTuple):
    """2^-149 to 2^127, and the values of e4m3fn and e2m1 codes; fp32."""

    powers: torch.Tensor
    e4m3: torch.Tensor
    e2m1: torch.Tensor


def _powers():
    return torch.exp2(torch.arange(_LEAST, _MOST + 1, dtype=torch.float32))


def _small_floats(bits, fraction, bias):
    """Values of codes of ``bits`` bits: a sign, an exponent and ``fraction`` bits behind it; none is special."""
    code, half, steps = torch.arange(1 << bits), 1 << (bits - 1), 1 << fraction
    exponent = code % half // steps
    whole = code % steps + steps * (exponent > 0).to(torch.int64)
    values = whole.to(torch.float32) * _powers()[exponent.clamp(min=1) - bias - fraction - _LEAST]
    return torch.where(code >= half, -values, values)


def _e4m3():
    return torch.where(torch.arange(256) % 128 == _NAN, torch.nan, _small_floats(8, 3, 7))


def _e2m1():
    return _small_floats(4, 1, 1)


E4M3_MAX = 448.0
_NAN = 0x7F
_made = (_powers, _e4m3, _e2m1)
_kept = Tables(*(make() for make in _made)) if torch.__version__ >= (2, 15) else None
_tables: ContextVar[Tables | None] = ContextVar("tables", default=_kept)


def wide(x: torch.Tensor) -> torch.Tensor:
    """fp32, in which all forms compute: ONNX runtimes have few 16-bit operators on CPUs."""
    return x.to(torch.float32)


@contextlib.contextmanager
def tables(*given: torch.Tensor) -> Iterator[None]:
    """Within the block these tensors are the tables: the body of a Scan takes its tensors as arguments."""
    token = _tables.set(Tables(*given))
    try:
        yield
    finally:
        _tables.reset(token)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 x / sqrt(mean(x^2) + eps) * weight. Not by a square: of 16-bit x onnxscript would make RMSNormalization of
    it at opset 23, with two dtypes, which onnxruntime 1.32 refuses."""
    values = wide(x)
    return values * torch.rsqrt((values * values).mean(-1, keepdim=True) + eps) * wide(weight)


def _table(place: int) -> torch.Tensor:
    """One of those that are given, or of this module, or made."""
    given = _tables.get()
    return _made[place]() if given is None else given[place]


def all_tables() -> list[torch.Tensor]:
    """What :func:`tables` takes."""
    return [_table(place) for place in range(len(_made))]


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """fp32 2^exponents of int64 exponents from -149 to 127."""
    return _table(0)[exponents - _LEAST]


def floor_log2(values: torch.Tensor) -> torch.Tensor:
    """int64 floor(log2(values)) of positive normal fp32 values; the logarithm's own rounding is put right."""
    guess = torch.log2(values).floor().to(torch.int64).clamp(-126, 127)
    guess = guess - (values < power_of_two(guess)).to(torch.int64)
    return guess + (values >= power_of_two((guess + 1).clamp(max=127))).to(torch.int64) * (guess < 127).to(torch.int64)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3fn codes, uint8 or float8_e4m3fn."""
    if codes.dtype == torch.float8_e4m3fn:
        return codes.to(torch.float32)
    return _table(1)[codes.to(torch.int64)]


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """uint8 e4m3fn codes of fp32 values: to nearest even, at most 448, NaN is 0x7F."""
    exponent, eighths = _eighths(values.abs())
    minus = (values < 0) | ((values == 0) & (1.0 / values < 0))
    # a sum of both fields: below 2^-6 eighths are below 8, and 16 of them are the next exponent's first code
    code = 8 * (exponent + 6) + eighths.to(torch.int64) + 128 * minus.to(torch.int64)
    return torch.where(values.isnan(), _NAN, code).to(torch.uint8)


def _eighths(magnitude):
    """Exponents from -6 and the nearest whole eighths of their powers of two, at most 448; NaN is 0."""
    clamped = torch.where(magnitude.isnan(), 0.0, magnitude.clamp(max=E4M3_MAX))
    exponent = floor_log2(clamped.clamp(min=2.0**-6))
    return exponent, torch.round(clamped / power_of_two(exponent - 3))


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of int64 e2m1 codes from 0 to 15."""
    return _table(2)[codes]


def round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """fp32 values as e4m3fn holds them."""
    exponent, eighths = _eighths(values.abs())
    rounded = torch.where(values < 0, -eighths, eighths) * power_of_two(exponent - 3)
    return torch.where(values.isnan(), torch.nan, rounded)


def power_of_two_scale(amax: torch.Tensor, smallest: float = 1e-4) -> torch.Tensor:
    """2^ceil(log2(max(amax / 448, smallest))), exactly; NaN where amax is not finite."""
    least = (amax / E4M3_MAX).clamp(smallest, 1e38)
    exponent = floor_log2(least)
    exponent = exponent + (least > power_of_two(exponent)).to(torch.int64)
    return torch.where(amax.isfinite(), power_of_two(exponent), torch.nan)


def e8m0(codes: torch.Tensor) -> torch.Tensor:
    """fp32 2^(code - 127) of uint8 codes, NaN for 255."""
    codes = codes.to(torch.int64)
    return torch.where(codes == 255, torch.nan, power_of_two(codes.clamp(max=254) - 127))


def floats_of_bytes(data: torch.Tensor) -> torch.Tensor:
    """fp32 [..., n] of bytes [..., 4 n], the lowest first."""
    b = data.unflatten(-1, (-1, 4)).to(torch.int64)
    fraction = b[..., 0] + 256 * b[..., 1] + 65536 * (b[..., 2] % 128)
    return _assembled(fraction, 2 * (b[..., 3] % 128) + b[..., 2] // 128, b[..., 3] // 128, 23)


def bfloat16_of_bytes(data: torch.Tensor) -> torch.Tensor:
    """fp32 values [..., n] of bfloat16 in bytes [..., 2 n], the lowest first."""
    b = data.unflatten(-1, (-1, 2)).to(torch.int64)
    return _assembled(b[..., 0] % 128, 2 * (b[..., 1] % 128) + b[..., 0] // 128, b[..., 1] // 128, 7)


def _assembled(fraction, exponent, sign, bits):
    """fp32 of its fields; ``bits`` of the fraction."""
    whole = fraction + torch.where(exponent > 0, 1 << bits, 0)
    value = whole.to(torch.float32) * power_of_two(exponent.clamp(1, 254) - 127 - bits)
    special = torch.where(fraction == 0, torch.inf, torch.nan)
    value = torch.where(exponent == 255, special, value)
    return torch.where(sign == 1, -value, value)


def bytes_of_floats(values: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 4 n] of fp32 [..., n]; NaN as 0x7FC00000."""
    magnitude = values.abs()
    finite, normal = magnitude.isfinite(), magnitude >= 2.0**-126
    exponent = floor_log2(torch.where(finite & normal, magnitude, 1.0))
    # by two powers: one alone would be beyond fp32 for the smallest and the largest magnitudes
    scaled = torch.where(normal & finite, magnitude, 1.0) * power_of_two((-exponent).clamp(-126, 126))
    scaled = scaled * power_of_two(-exponent - (-exponent).clamp(-126, 126))  # 1 to 2
    fraction = ((scaled - 1.0) * 2.0**23).to(torch.int64)
    small = (torch.where(normal | ~finite, 0.0, magnitude) * 2.0**126 * 2.0**23).to(torch.int64)
    field = torch.where(normal, exponent + 127, 0)
    fraction = torch.where(normal, fraction, small)
    field = torch.where(finite, field, 255)
    fraction = torch.where(finite, fraction, torch.where(values.isnan(), 1 << 22, 0))
    minus = ((values < 0) | ((values == 0) & (1.0 / values < 0))).to(torch.int64)
    parts = (
        fraction % 256,
        fraction // 256 % 256,
        field % 2 * 128 + fraction // 65536,
        minus * 128 + field // 2,
    )
    return torch.stack(parts, -1).flatten(-2).to(torch.uint8)


def bytes_of_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2 n] of fp32 [..., n], rounded to bfloat16."""
    exact = bytes_of_floats(values.to(torch.bfloat16).to(torch.float32)).unflatten(-1, (-1, 4))
    return exact[..., 2:].flatten(-2)


def nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 codes [rows, columns] of :func:`mla_kernels.quant.nibbles.pack_nibbles`'s bytes."""
    packed = packed.to(torch.int64)
    halves = torch.stack((packed % 16, packed // 16), 1)  # [rows, 2, bytes]
    codes = halves.unflatten(2, (-1, 64)).transpose(1, 2).flatten(1)
    rest = columns % 128
    return codes if rest == 0 else torch.cat((codes[:, : columns - rest], codes[:, -rest:]), 1)
