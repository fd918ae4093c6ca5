"""MXFP4: e2m1 codes with one power of two for each 32 columns, a byte biased by 127 (ue8m0; 255 is NaN).

OCP Microscaling Formats (MX) v1.0, sections 5.3.3, 5.4.1 and 6.3, in the arrangement of
:mod:`mla_kernels.quant.nibbles`. A code: sign, two bits of exponent (bias 1), one of mantissa; 0, 0.5, 1, 1.5, 2, 3, 4
and 6 with either sign.
"""

import torch

from mla_kernels.quant.nibbles import by_column, pack_nibbles

GROUP = 32
MIDDLES_UP = (0.75, 1.75, 3.5)  # between neighbours; a tie goes to the upper one, whose mantissa bit is 0
MIDDLES_DOWN = (0.25, 1.25, 2.5, 5.0)


def quantise_mxfp4(weight: torch.Tensor, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [N, packed_bytes(K)] and scales uint8 [N, K / 32] of finite fp32 weights [N, K].

    The scale is 2^(floor(log2(largest magnitude)) - 2), as section 6.3 has it: what lies above 6 scales becomes 6.
    ``search``: the scale above it where that gives the smaller squared error.
    """
    groups = weight.unflatten(1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    scales = torch.frexp(amax).exponent + 124  # floor(log2(amax)) is that exponent less 1; then - 2 + 127
    scales = scales.masked_fill_(amax == 0, 0).clamp_(0, 254)
    if search:
        upper = (scales + 1).clamp_(max=254)
        scales = torch.where(_error(groups, upper) < _error(groups, scales), upper, scales)
    codes = encode_e2m1(torch.ldexp(groups, 127 - scales[..., None])).flatten(1)
    return pack_nibbles(codes, 0), scales.to(torch.uint8)


def _error(groups, scales):
    scaled = torch.ldexp(groups, 127 - scales[..., None])
    values = scaled - decode_e2m1(encode_e2m1(scaled) << 4)
    return torch.ldexp(values, scales[..., None] - 127).square_().sum(-1)


def dequantise_mxfp4(packed: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights [N, columns]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low, high = decode_e2m1(packed << 4), decode_e2m1(packed & 0xF0)
    values = by_column(low, high, columns).to(wide).unflatten(1, (-1, GROUP))
    return values.mul_(decode_ue8m0(scales).to(wide)[..., None]).flatten(1).to(dtype)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 (uint8) of fp32 values, rounded to nearest even, at most 6."""
    magnitude = values.abs()
    codes = torch.signbit(values).to(torch.uint8) << 3
    for middle in MIDDLES_DOWN:
        codes += magnitude > middle
    for middle in MIDDLES_UP:
        codes += magnitude >= middle
    return codes


def decode_e2m1(upper: torch.Tensor) -> torch.Tensor:
    """fp16 values of codes in the upper nibbles of uint8; the lower nibbles must be 0.

    The three low bits of a code move under fp16's exponent, which reads them 2^14 too small.
    """
    bits = upper.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    return bits.bitwise_left_shift_(5).bitwise_and_(-0x7200).view(torch.float16).mul_(2.0**14)


def exponents_of(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., 4]: the bytes of int32 words [...], lowest first, where each is an exponent (ue8m0)."""
    return torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1)


def decode_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """fp32 powers of two of bytes."""
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return powers.masked_fill_(scales == 255, float("nan"))
