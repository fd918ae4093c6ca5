"""Latent compression and the write into a paged cache, for CPU tensors."""

import torch

from mla_kernels.cpu.gemm import linear


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    latent_dim: int,
    rope: str,
    eps: float,
) -> None:
    """Project hidden [tokens, hidden_size] by weight [latent_dim + rope_dim, hidden_size], then `write_latent`."""
    kv_a = linear(hidden, weight)
    write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, latent_dim, rope, eps)


def write_latent(
    kv_a: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    latent_dim: int,
    rope: str,
    eps: float,
) -> None:
    """RMSNorm and RoPE of kv_a [tokens, latent_dim + rope_dim] in fp32, rounded once, written to the slots."""
    kv_a = kv_a.float()
    tokens, width = kv_a.shape
    latent, key = kv_a[:, :latent_dim], kv_a[:, latent_dim:]
    rows = torch.empty(tokens, width)
    scale = latent.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(latent * scale, norm_weight, out=rows[:, :latent_dim])
    _rotate(key, cos.index_select(0, positions), sin.index_select(0, positions), rope, rows[:, latent_dim:])

    rows, slots = rows.to(cache.dtype), slot_mapping.long()
    written = slots >= 0
    if not written.all():
        rows, slots = rows[written], slots[written]
    if cache.is_contiguous():
        cache.view(-1, width).index_copy_(0, slots, rows)
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def _rotate(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str, out: torch.Tensor) -> None:
    """Turn the pairs of key [tokens, rope_dim] by the angles; ``rope`` says where a pair lies in key and in out."""
    half = key.shape[1] // 2
    if rope == "half":
        first, second = key[:, :half], key[:, half:]
    else:
        first, second = key[:, 0::2], key[:, 1::2]
    if rope == "interleaved":
        out_first, out_second = out[:, 0::2], out[:, 1::2]
    else:
        out_first, out_second = out[:, :half], out[:, half:]
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
