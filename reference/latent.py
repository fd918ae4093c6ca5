"""What the latent ops compute: RMSNorm on the latent, RoPE on the rest, one row of a paged cache per token.

Multi-head latent attention caches, per token, a normalised latent vector and one rotated key that all heads share
(DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2, equations 9 to 15; DeepSeek-V3 report, arXiv 2412.19437, section
2.1.1). Hugging Face has the same lines in the forward pass of `DeepseekV2Attention`
(models/deepseek_v2/modeling_deepseek_v2.py) and `DeepseekV3Attention` (models/deepseek_v3/modeling_deepseek_v3.py).

Symbols: T tokens, H hidden size, R latent_dim, D rope_dim.
"""

import torch
from einops import einsum, pack, rearrange, unpack

ROPE_MODES = ("interleaved_to_half", "interleaved", "half")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., R], weight [R]. Computed in fp32, or in fp64 where an argument is fp64, and rounded once, to x's dtype
    (Hugging Face rounds before it multiplies by the weight as well; the two agree in fp32).
    Returns [..., R]. A row of zeros gives zeros.
    """
    wide = _wide(x, weight)
    values = x.to(wide)
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return (values * torch.rsqrt(mean_square + eps) * weight.to(wide)).to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rope: str) -> torch.Tensor:
    """Rotate D/2 pairs of numbers, pair i by the angle whose cosine and sine are cos[..., i] and sin[..., i].

    x [..., D]; cos, sin broadcast to [..., D/2]. Computed in fp32, or in fp64 where an argument is fp64; returned in
    x's dtype. A pair (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). `rope` says where the pairs (a, a'), (b, b'),
    (c, c') stand in x and in the result, here for D = 6:

    - "interleaved_to_half": reads a a' b b' c c', writes a b c a' b' c'. DeepSeek-V3 with `rope_interleave=True`
      (`apply_rotary_pos_emb_interleave`).
    - "interleaved": reads and writes a a' b b' c c'. DeepSeek-V2 (`apply_rotary_emb`, complex numbers).
    - "half": reads and writes a b c a' b' c'. DeepSeek-V3 with `rope_interleave=False` (`apply_rotary_pos_emb`).

    Scores depend on q . k alone, so any order serves as long as queries and keys share it.
    Raises ValueError for another `rope`.
    """
    if rope not in ROPE_MODES:
        raise ValueError(f"rope {rope!r}: must be one of {ROPE_MODES}")
    wide = _wide(x, cos, sin)
    pairs_in = "... (half pair) -> ... half pair" if rope == "half" else "... (pair half) -> ... half pair"
    pairs_out = "... half pair -> ... (pair half)" if rope == "interleaved" else "... half pair -> ... (half pair)"
    first, second = rearrange(x.to(wide), pairs_in, half=2).unbind(dim=-2)  # [..., D/2] each
    cos, sin = cos.to(wide), sin.to(wide)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)  # [..., 2, D/2]
    return rearrange(rotated, pairs_out).to(x.dtype)


def write_latent(
    kv_a: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    rope: str,
    eps: float = 1e-6,
) -> None:
    """Normalise and rotate projected tokens, and write them to their cache slots, in place.

    kv_a          [T, R + D]: hidden @ kv_a_proj_with_mqa.weight.T
    norm_weight   [R]
    cos, sin      [positions, D / 2] tables, fp32 or wider
    positions     [T] integers: the row of the tables that belongs to a token
    slot_mapping  [T] integers: where a token goes, slot = page * page_size + offset
    cache         [pages, page_size, R + D], written in its own dtype: RMSNorm(kv_a[:, :R]), then RoPE(kv_a[:, R:])

    With page_size 16, slot 35 is cache[2, 3]. Slot -1 marks a padding token and writes nothing; so does any other slot
    outside the cache and any position outside the tables (the CPU op refuses these two, a device skips them). All
    other slots keep what they hold. Slots of one call must differ from each other.
    """
    pages, page_size, _ = cache.shape
    for token, (slot, position) in enumerate(zip(slot_mapping.tolist(), positions.tolist())):
        if not (0 <= slot < pages * page_size and 0 <= position < len(cos)):
            continue
        latent, key = unpack(kv_a[token], [[latent_dim], [cache.shape[-1] - latent_dim]], "*")
        latent = rms_norm(latent, norm_weight, eps=eps)
        key = apply_rope(key, cos[position], sin[position], rope=rope)
        cache[slot // page_size, slot % page_size], _ = pack([latent, key], "*")


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    latent_dim: int,
    rope: str,
    eps: float = 1e-6,
) -> None:
    """Down-project hidden states and write the latents: `write_latent` of kv_a = hidden @ weight.T.

    hidden [T, H], weight [R + D, H] (Hugging Face: kv_a_proj_with_mqa.weight, no bias); the rest as in `write_latent`.
    """
    kv_a = einsum(hidden, weight, "token hidden, out hidden -> token out")
    write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, latent_dim=latent_dim, rope=rope, eps=eps)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
