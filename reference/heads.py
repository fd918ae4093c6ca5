"""What DeepSeek-V4 does to the heads of queries, and undoes on attention's output.

Hugging Face: `DeepseekV4UnweightedRMSNorm` and `apply_rotary_pos_emb` in models/deepseek_v4/modeling_deepseek_v4.py.

Symbols: T tokens, H heads, d head_dim, D rope_dim. Computed in fp32, or in fp64 where x is fp64.
"""

import torch
from einops import rearrange

from mla_kernels.reference.indexer import rotate


def rotate_heads(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope_dim: int,
    rope: str = "interleaved",
    rope_first: bool = False,
    norm_eps: float | None = None,
    inverse: bool = False,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + norm_eps) over each head, if asked, then RoPE of its last (else first) `rope_dim` values.

    x [T, H, d]; cos, sin [positions, D / 2]; positions [T] integers. `inverse` turns by minus the angle, and puts the
    values of "interleaved_to_half" back beside each other. Returns [T, H, d], rounded once to x's dtype;
    differentiable. A position outside the tables leaves zeros (the CPU op refuses it).
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm_eps is not None:
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm_eps)
    known = (positions >= 0) & (positions < cos.shape[0])
    place = positions.long().clamp(0, cos.shape[0] - 1)
    cos, sin = rearrange(cos[place], "t d -> t 1 d"), rearrange(sin[place], "t d -> t 1 d")
    options = {"rope_dim": rope_dim, "rope_first": rope_first}
    if not inverse:
        values = rotate(values, cos, sin, rope=rope, **options)
    elif rope != "interleaved_to_half":
        values = rotate(values, cos, -sin, rope=rope, **options)
    else:
        values = rotate(values, cos, -sin, rope="half", **options)
        start = 0 if rope_first else x.shape[-1] - rope_dim
        parts = values[..., :start], values[..., start : start + rope_dim], values[..., start + rope_dim :]
        values = torch.cat((parts[0], rearrange(parts[1], "... (two d) -> ... (d two)", two=2), parts[2]), -1)
    return (values * rearrange(known, "t -> t 1 1")).to(x.dtype)
