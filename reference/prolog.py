"""What stands around latent attention: hidden states to queries and cached tokens, attended latents to values.

DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2 and appendix C (the full formulas; W_UK goes into the query, W_UV
into the output); DeepSeek-V3 report, arXiv 2412.19437, section 2.1.1, equations 1 to 9. Hugging Face has the same lines
before `past_key_values.update` in the forward pass of `DeepseekV2Attention` and `DeepseekV3Attention`, un-absorbed.

Symbols: T tokens, H hidden size, Q q_lora_rank, R latent_dim, D rope_dim, N nope_dim, V v_dim.
Products are computed in the input dtype, norms and rotations in fp32 (fp64 for fp64 input).
"""

import torch
from einops import einsum, rearrange

from .latent import apply_rope, rms_norm, write_latent


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
    *,
    latent_dim: int,
    layout: str | None = None,
    rope: str,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The norm of the query's latent, and `write_latent` of the key's.

    q_a [T, Q], q_norm [Q]: returns RMSNorm(q_a) * q_norm [T, Q], of every token, cached or not.
    kv_a [T, R + D] and all that follows: see `write_latent`.
    """
    places = (cos, sin, positions, slot_mapping, cache)
    write_latent(kv_a, kv_norm, *places, latent_dim=latent_dim, layout=layout, rope=rope, eps=eps)
    return rms_norm(q_a, q_norm, eps=eps)


def absorb_query(
    q: torch.Tensor, w_uk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, rope: str
) -> torch.Tensor:
    """Queries as the latent cache is asked: q_nope through W_UK, then q_rope rotated.

    q [T, heads, N + D], w_uk [heads, N, R], cos and sin [positions, D / 2], positions [T]: each token's row of them
    (brought into the tables, as a device does; the CPU op refuses others).
    Returns [T, heads, R + D] in q's dtype: q_nope W_UK, since q . (W_UK c) = (q W_UK) . c, then RoPE(q_rope).
    """
    q_nope, q_rope = q.split([w_uk.shape[1], q.shape[-1] - w_uk.shape[1]], dim=-1)
    latent = einsum(q_nope, w_uk, "token head nope, head nope latent -> token head latent")
    positions = positions.long().clamp(0, len(cos) - 1)
    cos, sin = (rearrange(table[positions], "token pair -> token 1 pair") for table in (cos, sin))
    return torch.cat([latent, apply_rope(q_rope, cos, sin, rope=rope)], dim=-1)


def expand_output(out: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """Attended latents through W_UV, the heads side by side: out [T, heads, R], w_uv [heads, V, R] -> [T, heads V]."""
    values = einsum(out, w_uv, "token head latent, head v latent -> token head v")
    return rearrange(values, "token head v -> token (head v)")


def mla_prolog(
    hidden: torch.Tensor,
    weights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    layout: str | None = None,
    rope: str,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of an attention layer before the attention: absorbed queries, and the tokens in the cache.

    hidden [T, H]. `weights` has the attributes
      down       [Q + R + D, H], q_a_proj above kv_a_proj_with_mqa, or the two as a pair
      down_bias  None, or as `down` without the last dimension
      q_norm     [Q], or None for Q = 0: then q_up takes the hidden states (DeepSeek-V2-Lite)
      kv_norm    [R]
      q_up       [heads * (N + D), Q or H]
      w_uk       [heads, N, R]
    The rest as in `norm_and_write`. Returns the queries [T, heads, R + D] and the normalised q latent [T, Q].
    """
    down = torch.cat(weights.down) if isinstance(weights.down, tuple) else weights.down
    both = einsum(hidden, down, "token hidden, out hidden -> token out")
    if weights.down_bias is not None:
        both = both + (torch.cat(weights.down_bias) if isinstance(weights.down_bias, tuple) else weights.down_bias)
    q_rank = 0 if weights.q_norm is None else len(weights.q_norm)
    q_a, kv_a = both.split([q_rank, len(down) - q_rank], dim=-1)
    options = {"latent_dim": latent_dim, "layout": layout, "rope": rope, "eps": eps}
    places = (cos, sin, positions, slot_mapping, cache)
    if weights.q_norm is None:
        write_latent(kv_a, weights.kv_norm, *places, **options)
        q_latent, source = q_a, hidden
    else:
        q_latent = source = norm_and_write(q_a, weights.q_norm, kv_a, weights.kv_norm, *places, **options)
    q = einsum(source, weights.q_up, "token depth, out depth -> token out")
    q = rearrange(q, "token (head dim) -> token head dim", head=len(weights.w_uk))
    return absorb_query(q, weights.w_uk, cos, sin, positions, rope=rope), q_latent
