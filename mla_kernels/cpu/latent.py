"""Latent compression and the write into a paged cache, for CPU tensors."""

import torch
import torch.nn.functional as F

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
    width = kv_a.shape[1]
    latent, key = kv_a.float().split((latent_dim, width - latent_dim), -1)
    latent = F.rms_norm(latent, (latent_dim,), norm_weight.float(), eps)
    key = _rotate(key, cos.index_select(0, positions), sin.index_select(0, positions), rope)
    rows, slots = torch.cat((latent, key), -1).to(cache.dtype), slot_mapping.long()
    written = slots >= 0
    if not written.all():
        rows, slots = rows[written], slots[written]
    if cache.is_contiguous():
        cache.view(-1, width).index_copy_(0, slots, rows)
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def _rotate(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """Turn the pairs of key [tokens, rope_dim] by the angles; ``rope`` says where a pair lies before and after."""
    first, second = key.chunk(2, -1) if rope == "half" else key.unflatten(1, (-1, 2)).unbind(-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.stack(turned, -1).flatten(1) if rope == "interleaved" else torch.cat(turned, -1)
