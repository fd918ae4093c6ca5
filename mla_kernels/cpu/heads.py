"""Heads of queries and of attention's output for CPU tensors: norm and rotation; the indexer's queries."""

import torch

from mla_kernels.cpu.indexer import transformed
from mla_kernels.cpu.prolog import rotate

_MAX_VALUES = 1 << 18  # of x made fp32 at once: 1 MiB, which stays in a core's caches


def rotate_heads(x, cos, sin, positions, rope_dim, rope, rope_first, norm_eps, inverse) -> torch.Tensor:
    """x [T, H, d]: the norm of each head, if asked, and the rotation, in fp32, rounded once."""
    if norm_eps is not None:
        return _normed(x, *_angles(cos, sin, positions), rope_dim, rope, rope_first, norm_eps, inverse)
    part = _part(x, rope_dim, rope_first).float()
    out = x.clone(memory_format=torch.contiguous_format)
    _part(out, rope_dim, rope_first).copy_(_turned(part, *_angles(cos, sin, positions), rope, inverse))
    return out


def _normed(x, cos, sin, rope_dim, rope, rope_first, eps, inverse) -> torch.Tensor:
    """A few tokens at a time: torch's product of 16 and 32 bits takes several times as long as that of fp32."""
    out = torch.empty(x.shape, dtype=x.dtype)
    step = max(1, _MAX_VALUES // max(1, x.shape[1] * x.shape[2]))
    for first in range(0, x.shape[0], step):
        some = slice(first, first + step)
        values = x[some].float()
        values = torch.mul(values, _scale(values, eps), out=out[some] if x.dtype == torch.float32 else values)
        part = _part(values, rope_dim, rope_first)
        part.copy_(_turned(part, cos[some], sin[some], rope, inverse))
        if x.dtype != torch.float32:
            out[some] = values
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
