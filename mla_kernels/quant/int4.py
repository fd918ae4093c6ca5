"""Four-bit integers in groups of 32, 64 or 128 columns: value = (code - zero) * scale.

The format of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), in the arrangement of
:mod:`mla_kernels.quant.nibbles`.
"""

import torch

from mla_kernels.quant.nibbles import pack_nibbles, unpack_nibbles

GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO = 8
LARGEST_SCALE = 2.0**122  # NVIDIA chips decode bfloat16 scales times 64 (decode.int4_pairs)
SHRINKAGE = tuple(1 - 0.05 * step for step in range(9))  # parts of a group's range that a search tries


def check_int4_scales(where: str, scales: torch.Tensor) -> None:
    """Refuse scales in bfloat16 that chips would not all decode to the same numbers. Reads the values."""
    if scales.dtype == torch.bfloat16 and not bool((scales.abs() < LARGEST_SCALE).all()):
        largest = float(scales.abs().max()) if scales.numel() else 0.0
        raise ValueError(f"{where}: got scales up to {largest:.3g}; in bfloat16 magnitudes below 2^122 are accepted")


def quantise_int4(
    weight: torch.Tensor, group_size: int, symmetric: bool, scale_dtype: torch.dtype, search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Bytes [N, packed_bytes(K)], scales [N, K / group_size] and zeros uint8 (None if symmetric) of fp32 [N, K].

    symmetric: scale = largest magnitude / 7, zero 8. Else scale = (largest - smallest) / 15, 0 counted among the
    values, and zero the code nearest to 0. ``search``: of nine ranges, from the whole down to 0.6 of it, each group
    takes the one with the smallest squared error.
    """
    groups = weight.unflatten(1, (-1, group_size))
    best = None
    for part in SHRINKAGE if search else (1.0,):
        codes, scales, zeros = _choose(groups, symmetric, scale_dtype, part)
        if not search:
            best = codes, scales, zeros
            break
        restored = (codes.float() - zeros[..., None]) * scales.float()[..., None]
        error = (restored - groups).square_().sum(-1)
        if best is None:
            best, least = (codes, scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(
            torch.where(better[..., None] if new.dim() == 3 else better, new, old)
            for new, old in zip((codes, scales, zeros), best)
        )
    codes, scales, zeros = best
    zeros = zeros.to(torch.uint8)
    fill = SYMMETRIC_ZERO if symmetric else zeros.repeat_interleave(group_size, 1)
    return pack_nibbles(codes.flatten(1), fill), scales, None if symmetric else zeros


def _choose(groups, symmetric, scale_dtype, part):
    """Codes [N, groups, group], scales and fp32 zeros [N, groups], for ``part`` of each group's range."""
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    scales = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    scales = (scales * part).to(scale_dtype)
    scales = scales.masked_fill_(scales == 0, 1.0)
    wide = scales.float()
    zeros = torch.full_like(wide, SYMMETRIC_ZERO) if symmetric else (-low * part / wide).round_().clamp_(0, 15)
    codes = (groups / wide[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
    return codes.to(torch.uint8), scales, zeros


def dequantise_int4(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [N, columns], rounded once, to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = unpack_nibbles(packed, columns).to(wide).unflatten(1, (scales.shape[1], -1))
    values -= SYMMETRIC_ZERO if zeros is None else zeros.to(wide)[..., None]
    return values.mul_(scales.to(wide)[..., None]).flatten(1).to(dtype)
