"""e4m3 weights with one fp32 scale for each 128 rows and 128 columns: the format of DeepSeek-V3's checkpoints.

DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2; the scales are the checkpoints' ``weight_scale_inv``.
"""

import torch

BLOCK = 128
E4M3_MAX = 448.0


def quantise_fp8_block(weight: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K] and scales fp32 [ceil(N/128), ceil(K/128)] of finite fp32 weights [N, K].

    A scale is the block's largest magnitude / 448, or the next power of two from there; 1 for a block of zeros.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)  # [row blocks, 128, column blocks, 128]
    scales = blocks.abs().amax((1, 3)) / E4M3_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    scales = scales.masked_fill_(scales == 0, 1.0)
    codes = (blocks / scales[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).view(padded.shape)[:rows, :columns].contiguous(), scales


def dequantise_fp8_block(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, first_row: int = 0
) -> torch.Tensor:
    """Weights [rows, K] of codes uint8 [rows, K], rows from ``first_row`` on of the weight whose scales these are."""
    rows, columns = codes.shape
    first = first_row // BLOCK
    factors = scales[first : -(-(first_row + rows) // BLOCK)].repeat_interleave(BLOCK, 0)
    factors = factors[first_row - first * BLOCK :][:rows].to(_wide(dtype))  # [rows, column blocks]
    values = decode_e4m3(codes).to(_wide(dtype))
    whole = columns // BLOCK * BLOCK
    values[:, :whole].unflatten(1, (-1, BLOCK)).mul_(factors[:, : whole // BLOCK, None])
    if whole < columns:
        values[:, whole:].mul_(factors[:, -1:])
    return values.to(dtype)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """fp16 values of e4m3 bytes, exactly; the two NaN codes give +-480.

    The seven low bits move under fp16's exponent, which reads them 2^8 too small. torch's own cast takes ten times as
    long on a CPU.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16).mul_(256.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
