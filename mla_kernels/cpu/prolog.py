"""The prolog of latent attention and its way out, for CPU tensors."""

import torch
import torch.nn.functional as F

from mla_kernels.cpu.gemm import linear
from mla_kernels.cpu.latent import write_latent

_FEW_TOKENS = 16  # up to so many, bfloat16 weights as the left factor are multiplied where they lie, else copied first


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """The pairs of x [..., rope_dim] turned, in fp32; cos and sin broadcast to [..., rope_dim / 2]. Differentiable."""
    values = x.float().contiguous()
    if rope == "half":
        first, second = values.chunk(2, -1)
        turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
        return torch.cat(turned, -1)
    turned = torch.view_as_real(torch.view_as_complex(values.unflatten(-1, (-1, 2))) * torch.complex(cos, sin))
    return (turned if rope == "interleaved" else turned.transpose(-1, -2)).flatten(-2)


def norm_and_write(
    q_a: torch.Tensor,
    q_norm: torch.Tensor,
    kv_a: torch.Tensor,
    kv_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    layout: str,
    latent_dim: int,
    rope: str,
    eps: float,
) -> torch.Tensor:
    """`write_latent` of kv_a [tokens, latent_dim + rope_dim]; the norm of q_a [tokens, q_lora] is returned."""
    write_latent(kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps)
    return F.rms_norm(q_a.float(), (q_a.shape[1],), q_norm.float(), eps).to(q_a.dtype)


def mla_prolog(
    hidden: torch.Tensor,
    down: list[torch.Tensor],
    down_bias: list[torch.Tensor],
    q_norm: torch.Tensor | None,
    kv_norm: torch.Tensor,
    q_up: torch.Tensor,
    w_uk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    layout: str,
    latent_dim: int,
    rope: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [tokens, hidden_size] to the absorbed queries and the q latent [tokens, q_lora], by packed weights where
    there are any."""
    parts = [linear(hidden, weight) for weight in down]
    parts = [part + bias for part, bias in zip(parts, down_bias)] if down_bias else parts
    places = (cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps)
    if q_norm is None:
        write_latent(parts[0], kv_norm, *places)
        q_latent, q = hidden.new_empty(hidden.shape[0], 0), linear(hidden, q_up)
    else:
        q_a, kv_a = parts if len(parts) == 2 else parts[0].tensor_split((q_norm.shape[0],), 1)
        q_latent = norm_and_write(q_a, q_norm, kv_a, kv_norm, *places)
        q = linear(q_latent, q_up)
    return absorb_query(q.unflatten(1, (w_uk.shape[0], -1)), w_uk, cos, sin, positions, rope), q_latent


def absorb_query(
    q: torch.Tensor, w_uk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, rope: str
) -> torch.Tensor:
    """q [tokens, heads, nope + rope_dim] to [tokens, heads, latent + rope_dim]."""
    nope = w_uk.shape[1]
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype  # float16 products have no fast CPU kernel
    by_head = q[..., :nope].transpose(0, 1)  # [heads, tokens, nope]
    latent = torch.bmm(by_head.to(wide), w_uk.to(wide)).transpose(0, 1).to(q.dtype)
    cos, sin = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    return torch.cat((latent, rotate(q[..., nope:], cos, sin, rope).to(q.dtype)), -1)


def expand_output(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """out [tokens, heads, latent] to [tokens, heads * v]."""
    wide = torch.float32 if out.dtype == torch.float16 else out.dtype
    if wide == torch.bfloat16 and out.shape[0] <= _FEW_TOKENS:
        values = torch.bmm(w_uv, out.permute(1, 2, 0)).permute(2, 0, 1)
    else:
        values = torch.bmm(out.transpose(0, 1).to(wide), w_uv.transpose(1, 2).to(wide)).transpose(0, 1)
    return values.flatten(1).to(out.dtype).contiguous()  # as compilers are told that it is
