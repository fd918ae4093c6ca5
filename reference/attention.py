"""What the attention ops compute: absorbed latent attention over a paged cache, and the merging of partial results.

Multi-head latent attention: DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2 (which also says that W_UK and W_UV can
be absorbed), DeepSeek-V3 report, arXiv 2412.19437, section 2.1.1. Merging by log-sum-exp: the softmax decomposition of
FlashAttention, arXiv 2205.14135, section 3.1. Hugging Face computes the un-absorbed form: `expand_kv` of
`DeepseekV2Attention` and `eager_attention_forward` in models/deepseek_v2/modeling_deepseek_v2.py, and their twins in
models/deepseek_v3/modeling_deepseek_v3.py.

Symbols: B sequences, S_q query tokens of each sequence, R latent_dim, D rope_dim, N nope_dim, V v_dim, T cached tokens.
Dots are computed in the input dtype; softmax and log-sum-exp in fp32, or fp64 for fp64 input.
"""

import torch
from einops import einsum, rearrange, repeat

from mla_kernels.reference.latent import dequantise_cache


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    latent_dim: int,
    layout: str = "latent_16bit",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of absorbed queries over a paged cache: all heads share one key row, whose latent part is the value.

    q            [B, S_q, heads, R + D]: q_nope W_UK (see `absorb_query`), then the rotated q_rope
    cache        [pages, page_size, R + D]: latent, then rotated key (see `write_latent`); in the layouts "fp8_v32" and
                 "int8" bytes, read through `dequantise_cache` in q's dtype or, for bfloat16, in fp32 rounded to it
    block_table  [B, pages_per_seq] integers: key j of sequence b stands in page block_table[b, j // page_size], row
                 j % page_size
    seq_lens     [B] integers: keys of each sequence, its S_q newest included

    Returns out [B, S_q, heads, R] in q's dtype and lse [B, S_q, heads], natural log, fp32 (fp64 for fp64 input):
    score_j = softmax_scale q . key_j, lse = log sum_j exp(score_j), out = sum_j exp(score_j - lse) latent_j.

    causal: query i stands at position p = seq_len - S_q + i and sees keys j <= p; otherwise each query sees all seq_len
    keys. window: of these, keys j > p - window alone. A query with nothing to see (seq_len 0, or S_q > seq_len) has
    out 0 and lse -inf. Only seen cache rows are read, whatever the rest holds.
    sink         [heads] fp32: one more key of that score (softmax_scale applied) and value 0 in the denominator, which
                 makes out sigmoid(lse - sink) times as large; lse stays that of the keys. -inf is no sink, +inf zeros
                 the output.
    Invalid entries (a device skips them, the CPU op refuses them): a page outside the cache holds no keys, nor do
    positions past the end of the block table; a negative length is 0.
    """
    sequences, query_tokens, _, _ = q.shape
    if layout in ("fp8_v32", "int8"):
        cache = dequantise_cache(cache, latent_dim, layout, dtype=_wide(q)).to(q.dtype)
    out = torch.zeros_like(q[..., :latent_dim])
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=_wide(q, cache), device=q.device)
    for b in range(sequences):
        length = int(seq_lens[b])
        positions, keys = _keys_of_sequence(cache, block_table[b], length)  # [T], [T, R + D]
        for i in range(query_tokens):
            position = length - query_tokens + i
            visible = positions <= (position if causal else length - 1)
            if window is not None:
                visible &= positions > position - window
            seen = keys[visible]
            if len(seen) > 0:
                scores = softmax_scale * einsum(q[b, i], seen, "head dim, key dim -> head key")
                out[b, i], lse[b, i] = _attend(scores, seen[:, :latent_dim], "head key, key dim -> head dim")
    if sink is not None:
        out = (out * torch.sigmoid(lse - sink).nan_to_num(0.0)[..., None]).to(out.dtype)  # NaN where nothing is seen
    return out, lse


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over disjoint parts of them.

    outs [parts, ..., d], lses [parts, ...] fp32 or fp64, natural log.
    Returns out [..., d] in outs' dtype, lse [...]: lse = log sum_p exp(lses_p), out = sum_p exp(lses_p - lse) outs_p.

    A part with lse -inf saw nothing: it changes nothing and its outs are ignored, even NaN. So did one with lse +inf
    whose outs are 0 (how FlashMLA and FlashAttention write it). An lse of +inf beside other outs is an overflow, and so
    is NaN: that row's out and lse are NaN. If every part is empty, out is 0 and lse -inf. Differentiable in both
    arguments; the gradient of an empty part is 0.
    """
    wide = _wide(outs, lses)
    lses = lses.to(wide)
    unseen = (lses == torch.inf) & (outs == 0.0).all(dim=-1)  # [parts, ...]
    lses = lses.masked_fill(lses == torch.inf, torch.nan).masked_fill(unseen, -torch.inf)
    empty = lses == -torch.inf
    nothing = empty.all(dim=0)  # [...]
    largest = lses.detach().amax(dim=0).masked_fill(nothing, 0.0)
    weights = torch.exp(lses - largest)  # [parts, ...]
    total = weights.sum(dim=0).masked_fill(nothing, 1.0)
    outs_read = outs.to(wide).masked_fill(rearrange(empty, "... -> ... 1"), 0.0)
    out = einsum(weights / total, outs_read, "part ..., part ... dim -> ... dim")
    lse = (largest + torch.log(total)).masked_fill(nothing, -torch.inf)
    return out.to(outs.dtype), lse


def multi_head_attention(
    q: torch.Tensor,
    latents: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The un-absorbed form: expand latents to keys and values per head, then ordinary multi-head attention.

    q [B, S_q, heads, N + D], latents [B, T, R], k_rope [B, T, D], w_uk [heads, N, R], w_uv [heads, V, R], seq_lens [B].
    Returns out [B, S_q, heads, V] and lse [B, S_q, heads]. Visibility and empty queries as in `mla_decode`.

    Absorption, which the tests check: with q_nope and q_rope the two parts of q,
    this = expand_output(mla_decode([absorb_query(q_nope, w_uk), q_rope]), w_uv), with the same lse.
    """
    k_nope = einsum(latents, w_uk, "b t latent, head nope latent -> b t head nope")
    k_rope = repeat(k_rope, "b t rope -> b t head rope", head=q.shape[2])
    k = torch.cat([k_nope, k_rope], dim=-1)
    v = einsum(latents, w_uv, "b t latent, head v latent -> b t head v")

    scores = softmax_scale * einsum(q, k, "b s head dim, b t head dim -> b s head t")
    key = torch.arange(latents.shape[1], device=q.device)
    query = torch.arange(q.shape[1], device=q.device)
    limit = rearrange(seq_lens, "b -> b 1") - 1  # [B, S_q]: the last key that a query sees
    limit = limit - q.shape[1] + 1 + query if causal else limit + 0 * query
    scores = scores.masked_fill(key > rearrange(limit, "b s -> b s 1 1"), -torch.inf)
    return _attend(scores, v, "b s head t, b t head v -> b s head v")


def split_kv_b(weight: torch.Tensor, *, heads: int, nope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut Hugging Face's `kv_b_proj.weight` [heads * (N + V), R] into w_uk [heads, N, R] and w_uv [heads, V, R]."""
    weight = rearrange(weight, "(head dim) latent -> head dim latent", head=heads)
    return weight[:, :nope_dim], weight[:, nope_dim:]


def absorb_query(q_nope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """q_nope [..., heads, N] through W_UK: [..., heads, R], since q . (W_UK c) = (q W_UK) . c."""
    return einsum(q_nope, w_uk, "... head nope, head nope latent -> ... head latent")


def expand_output(out_latent: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """out_latent [..., heads, R] through W_UV: [..., heads, V], since sum_j p_j (W_UV c_j) = W_UV (sum_j p_j c_j)."""
    return einsum(out_latent, w_uv, "... head latent, head v latent -> ... head v")


def _keys_of_sequence(cache: torch.Tensor, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [T] and cache rows [T, R + D] of the keys below `length` that lie in valid pages."""
    num_pages, page_size, _ = cache.shape
    positions = torch.arange(min(max(length, 0), len(pages) * page_size), device=cache.device)
    page = pages[positions // page_size]
    valid = (page >= 0) & (page < num_pages)
    return positions[valid], cache[page[valid], positions[valid] % page_size]


def _attend(scores: torch.Tensor, values: torch.Tensor, pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the scores' last dimension, times values: (out in the values' dtype, lse)."""
    scores = scores.to(_wide(scores))
    lse = torch.logsumexp(scores, dim=-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    probabilities = torch.exp(scores - rearrange(shift, "... -> ... 1"))
    return einsum(probabilities.to(values.dtype), values, pattern), lse


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
