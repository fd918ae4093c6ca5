"""Heads of queries and of attention's output for CPU tensors: norm and rotation; the indexer's queries."""

import torch

from mla_kernels.cpu.indexer import transformed
from mla_kernels.cpu.prolog import rotate


def rotate_heads(x, cos, sin, positions, rope_dim, rope, rope_first, norm_eps, inverse) -> torch.Tensor:
    """x [T, H, d]: the norm of each head, if asked, and the rotation, in fp32, rounded once."""
    part = _part(x, rope_dim, rope_first).float()
    if norm_eps is None:
        out = x.clone(memory_format=torch.contiguous_format)
    else:
        scale = _scale(x, norm_eps)
        out = torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype))
        part = part * scale
    _part(out, rope_dim, rope_first).copy_(_turned(part, *_angles(cos, sin, positions), rope, inverse))
    return out


def rotate_heads_backward(grad, x, cos, sin, positions, rope_dim, rope, rope_first, norm_eps, inverse) -> torch.Tensor:
    """The gradient of x [T, H, d] from that of its rotated norm; ``inverse`` says how the gradient is rotated.

    With s = 1 / sqrt(mean(x^2) + eps), n = s x: d x = s (g - n mean(g n)).
    """
    scale = _scale(x, norm_eps)
    normed, grad = x.float() * scale, grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    part = _part(grad, rope_dim, rope_first)
    part.copy_(_turned(part.clone(), *_angles(cos, sin, positions), rope, inverse))
    shared = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, shared, value=-1).mul_(scale).to(x.dtype)


def rotate_indexer_query(q, cos, sin, positions, rope_dim, rope, rope_first, hadamard) -> torch.Tensor:
    """q [T, H, d]: RoPE and Hadamard transform in fp32, rounded once."""
    angles = cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)
    return transformed(q.float(), *angles, rope_dim, rope, rope_first, hadamard).to(q.dtype)


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept: fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _part(x: torch.Tensor, rope_dim: int, rope_first: bool) -> torch.Tensor:
    """The rotated values, a view."""
    return x[..., :rope_dim] if rope_first else x[..., x.shape[-1] - rope_dim :]


def _angles(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)


def _turned(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str, inverse: bool) -> torch.Tensor:
    """Pairs of part [..., D] fp32 by the angles, or back to where they were before."""
    if not inverse:
        return rotate(part, cos, sin, rope)
    if rope != "interleaved_to_half":
        return rotate(part, cos, -sin, rope)
    first, second = rotate(part, cos, -sin, "half").chunk(2, -1)
    return torch.stack((first, second), -1).flatten(-2)
