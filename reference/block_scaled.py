"""Codes of 8 and 4 bits with scales of blocks, their products, and the indexer's scores over them: DeepGEMM's.

OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3; DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2;
DeepSeek-V3.2, arXiv 2512.02556, section 2.1. Computed in fp64.
"""

import torch
from einops import einsum

from mla_kernels.reference.indexer import indexer_logits
from mla_kernels.reference.latent import decode_e4m3

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """fp64 [..., 2 n] of bytes [..., n]: the low nibble is the even column. 0x2F is (-6, 1)."""
    nibbles = torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).flatten(-2).long()
    magnitudes = torch.tensor(E2M1, dtype=torch.float64)[nibbles & 7]
    return torch.where(nibbles > 7, -magnitudes, magnitudes)


def decode_scales(scales: torch.Tensor) -> torch.Tensor:
    """fp64 of fp32 scales, or of int32 [..., n]: four exponents (ue8m0) each, lowest byte first, [..., 4 n].

    0x7F is 1, 0x80 is 2: the word 0x807F is the scales 1, 2, 2^-127, 2^-127.
    """
    if scales.dtype != torch.int32:
        return scales.double()
    exponents = torch.stack([(scales >> shift) & 255 for shift in (0, 8, 16, 24)], -1).flatten(-2)
    return torch.pow(2.0, exponents.double() - 127).masked_fill(exponents == 255, torch.nan)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, *, gran_mn: int, gran_k: int) -> torch.Tensor:
    """fp64 [..., rows, K] of e4m3 codes: scale [i // gran_mn, k // gran_k] belongs to code [i, k]."""
    rows, depth = codes.shape[-2:]
    factors = decode_scales(scales).repeat_interleave(gran_mn, -2)[..., :rows, :]
    factors = factors.repeat_interleave(gran_k, -1)[..., :depth]
    return decode_e4m3(codes.contiguous().view(torch.uint8), torch.float64) * factors


def scaled_product(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    groups: torch.Tensor | None = None,
    *,
    gran_a: int = 128,
    gran_n: int = 128,
    gran_b: int = 128,
) -> torch.Tensor:
    """a [..., M, K] times b [..., N, K] transposed. With groups [M] row r of a [M, K] is multiplied by b[groups[r]],
    and gives zeros where that is -1."""
    x = dequantise(a, a_scale, gran_mn=1, gran_k=gran_a)
    w = dequantise(b, b_scale, gran_mn=gran_n, gran_k=gran_b)
    if groups is None:
        return einsum(x, w, "... m k, ... n k -> ... m n")
    rows = [x[r] @ w[g].T if g >= 0 else x.new_zeros(w.shape[1]) for r, g in enumerate(groups.tolist())]
    return torch.stack(rows)


def mx_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp64 [..., d] of e4m3 codes, or pairs of e2m1 codes (int8), and int32 [...]: an exponent for 32 columns each."""
    fp4 = codes.dtype == torch.int8
    values = decode_e2m1(codes) if fp4 else decode_e4m3(codes.view(torch.uint8), torch.float64)
    factors = decode_scales(scales[..., None])
    return values * factors.repeat_interleave(32, -1)[..., : values.shape[-1]]


def mqa_logits(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, columns: int = 0
) -> torch.Tensor:
    """`indexer_logits` of values; with ``columns`` as [T, columns] whose column 0 is each token's first key.

    Starts [1, 0], ends [3, 1], 4 keys, 2 columns: rows [l(0, 1), l(0, 2)] and [l(1, 0), -inf].
    """
    logits = indexer_logits(q, k, weights, starts, ends)
    if not columns:
        return logits
    out = logits.new_full((len(q), columns), -torch.inf)
    for token, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        seen = logits[token, max(start, 0) : min(end, len(k))][:columns]
        out[token, : len(seen)] = seen
    return out


def prenorm_product(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x @ fn.T, the sum of squares of each row of x) of x [T, K], fn [N, K]."""
    return x.double() @ fn.double().T, x.double().square().sum(-1)
