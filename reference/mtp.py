"""The inputs of layers of multi-token prediction, in any dtype, float64 included."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] over its root mean square, times weight [H]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def mtp_input(embeds, hidden, enorm, hnorm, eh_proj, eps):
    """DeepSeek-V3's: embeds, hidden [..., H], eh_proj [H, 2 H] -> [..., H]. The embedding comes first."""
    return torch.cat((rms_norm(embeds, enorm, eps), rms_norm(hidden, hnorm, eps)), -1) @ eh_proj.T


def v4_mtp_input(embeds, streams, enorm, hnorm, e_proj, h_proj, eps):
    """DeepSeek-V4's: embeds [..., H], streams [..., N, H], projections [H, H] -> [..., N, H]."""
    return (rms_norm(embeds, enorm, eps) @ e_proj.T).unsqueeze(-2) + rms_norm(streams, hnorm, eps) @ h_proj.T
