"""int8 weights with one fp32 scale for each row (output channel), symmetric: value = code * scale."""

import torch


def quantise_int8_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K], -127 to 127, and scales fp32 [N] of finite fp32 weights [N, K].

    A scale is the row's largest magnitude / 127; 1 for a row of zeros.
    """
    scales = weight.abs().amax(1) / 127
    scales = scales.masked_fill_(scales == 0, 1.0)
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def dequantise_int8_channel(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights [N, K]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return codes.to(wide).mul_(scales.to(wide)[:, None]).to(dtype)
