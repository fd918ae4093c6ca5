"""What the lightning indexer computes: keys, scores, and the exact choice of the best keys.

DeepSeek-V3.2, arXiv 2512.02556, section 2.1 (DeepSeek sparse attention, equation 1), and the `Indexer` of its code;
Hugging Face: `DeepseekV32Indexer` in models/deepseek_v32/modeling_deepseek_v32.py, `GlmMoeDsaIndexer` in
models/glm_moe_dsa/modeling_glm_moe_dsa.py.

Symbols: T tokens, H index heads, d head_dim, D rope_dim, S keys, B sequences, S_q query tokens of each, K top_k.
Computed in fp32, or in fp64 where an argument is fp64.
"""

import torch
from einops import einsum, rearrange

from mla_kernels.reference.latent import apply_rope, decode_e4m3, encode_e4m3, power_of_two_scale


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; wide, not rounded."""
    wide = _wide(x, weight, bias)
    values = x.to(wide)
    centred = values - values.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight.to(wide) + bias.to(wide)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rope_dim: int, rope: str, rope_first: bool = True
) -> torch.Tensor:
    """RoPE on the first (else the last) `rope_dim` values of x [..., d]; the others pass. cos, sin [..., D / 2]."""
    if rope_first:
        return torch.cat([apply_rope(x[..., :rope_dim], cos, sin, rope=rope), x[..., rope_dim:]], dim=-1)
    start = x.shape[-1] - rope_dim
    return torch.cat([x[..., :start], apply_rope(x[..., start:], cos, sin, rope=rope)], dim=-1)


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """x [..., d] times the Sylvester-Hadamard matrix times d^-0.5, an orthogonal matrix; d is a power of two.

    Entry (i, j) of the matrix is -1 where i and j share an odd number of one bits, else 1:
    d = 4: [1 1 1 1; 1 -1 1 -1; 1 1 -1 -1; 1 -1 -1 1].
    """
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return einsum(x, matrix, "... i, i j -> ... j") * x.shape[-1] ** -0.5


def rotate_indexer_query(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope_dim: int,
    rope: str,
    rope_first: bool = True,
    hadamard: bool = False,
) -> torch.Tensor:
    """RoPE and, if asked, the Hadamard transform of queries, as `write_indexer_key` treats keys.

    q [T, H, d]; cos, sin [positions, D / 2]; positions [T] integers. Returns [T, H, d], rounded once to q's dtype. A
    position outside the tables leaves zeros (the CPU op refuses it).
    """
    out = torch.zeros_like(q)
    for token, position in enumerate(positions.tolist()):
        if 0 <= position < len(cos):
            row = q[token].to(_wide(q))
            row = rotate(row, cos[position], sin[position], rope_dim=rope_dim, rope=rope, rope_first=rope_first)
            out[token] = hadamard_transform(row) if hadamard else row
    return out


def quantise_indexer_query(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn of q [..., H, d] over one power of two a head, and weights [..., H] times it.

    Head [896, 3.5, 0, ...] of weight 0.5: scale 2, codes of [448, 1.75, 0, ...], weight 1.
    """
    values = q.to(_wide(q))
    scale = power_of_two_scale(values.abs().amax(-1))
    codes = encode_e4m3(values / scale[..., None]).view(torch.float8_e4m3fn)
    return codes, (weights.to(_wide(weights)) * scale).to(_wide(weights))


def write_indexer_key(
    k: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    rope_dim: int,
    rope: str,
    rope_first: bool = True,
    hadamard: bool = False,
    eps: float = 1e-6,
) -> None:
    """LayerNorm, RoPE and, if asked, Hadamard transform of projected keys, written to their cache slots, in place.

    k                       [T, d]: hidden @ wk.weight.T
    norm_weight, norm_bias  [d]
    cos, sin                [positions, D / 2]
    positions               [T] integers: the row of the tables that belongs to a token
    slot_mapping            [T] integers: slot = page * page_size + offset; anything outside the cache writes nothing
    cache                   [pages, page_size, d] floats, or uint8 [pages, page_size * (d + 4)]: of each page first
                            page_size rows of d e4m3 codes, then page_size fp32 scales (`power_of_two_scale`)
    """
    width = k.shape[-1]
    quantised = cache.dtype == torch.uint8
    page_size = cache.shape[1] // (width + 4) if quantised else cache.shape[1]
    for token, (slot, position) in enumerate(zip(slot_mapping.tolist(), positions.tolist())):
        if not (0 <= slot < cache.shape[0] * page_size and 0 <= position < len(cos)):
            continue
        row = layer_norm(k[token], norm_weight, norm_bias, eps=eps)
        row = rotate(row, cos[position], sin[position], rope_dim=rope_dim, rope=rope, rope_first=rope_first)
        row = hadamard_transform(row) if hadamard else row
        page, offset = cache[slot // page_size], slot % page_size
        if quantised:
            scale = power_of_two_scale(row.abs().amax())
            page[offset * width : (offset + 1) * width] = encode_e4m3(row / scale)
            start = page_size * width + offset * 4
            page[start : start + 4] = scale.float()[None].view(torch.uint8)
        else:
            page[offset] = row


def scatter_indexer_keys(k: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """Finished keys k [T, d] into their slots of `cache`, in place: as they are, or as e4m3 codes of one scale each,
    2 ^ ceil(log2(max(amax, 1e-4) / 448)). What is not a slot writes nothing."""
    width = k.shape[-1]
    quantised = cache.dtype == torch.uint8
    page_size = cache.shape[1] // (width + 4) if quantised else cache.shape[1]
    for row, slot in zip(k, slot_mapping.tolist()):
        if not 0 <= slot < cache.shape[0] * page_size:
            continue
        page, offset = cache[slot // page_size], slot % page_size
        if quantised:
            row = row.to(_wide(row))
            scale = 2.0 ** (row.abs().amax().double().clamp_min(1e-4) / 448).log2().ceil()
            page[offset * width : (offset + 1) * width] = encode_e4m3(row / scale)
            start = page_size * width + offset * 4
            page[start : start + 4] = scale.float()[None].view(torch.uint8)
        else:
            page[offset] = row


def dequantise_keys(cache: torch.Tensor, *, head_dim: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values [pages, page_size, d] of an indexer cache in any layout, in `dtype`: fp32 or fp64."""
    if cache.dtype != torch.uint8:
        return cache.to(dtype)
    page_size = cache.shape[1] // (head_dim + 4)
    codes, scales = cache[:, : page_size * head_dim], cache[:, page_size * head_dim :]
    values = rearrange(decode_e4m3(codes.contiguous(), dtype), "page (token dim) -> page token dim", dim=head_dim)
    return values * scales.contiguous().view(torch.float32).to(dtype)[..., None]


def indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of every token against the keys of its range.

    q [T, H, d], values or e4m3 codes (float8_e4m3fn, with their scales in weights); k [S, d], or e4m3 codes
    (float8_e4m3fn or uint8) with k_scale [S] fp32; weights [T, H] with the factors d^-0.5 and H^-0.5 of the model
    already in them; starts, ends [T] integers.

    Returns [T, S]: sum_h weights[t, h] relu(q[t, h] . k[s]) for starts[t] <= s < ends[t], else -inf. Keys outside a
    token's range are not read.
    """
    wide = _wide(q, k, weights)
    if k_scale is not None:
        wide = torch.float64 if wide == torch.float64 or k_scale.dtype == torch.float64 else wide
        k = decode_e4m3(k.view(torch.uint8), wide) * k_scale.to(wide)[:, None]
    logits = torch.full((len(q), len(k)), -torch.inf, dtype=wide, device=q.device)
    for token in range(len(q)):
        start, end = max(int(starts[token]), 0), min(int(ends[token]), len(k))
        if start < end:
            dots = einsum(q[token].to(wide), k[start:end].to(wide), "head dim, key dim -> head key")
            logits[token, start:end] = einsum(weights[token].to(wide), torch.relu(dots), "head, head key -> key")
    return logits


def paged_indexer_logits(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of the S_q newest tokens of each sequence against its cached keys.

    q [B, S_q, H, d]; cache as in `write_indexer_key`; weights [B, S_q, H]; block_table [B, P]; seq_lens [B]; limits
    [B, S_q]. Returns [B, S_q, P * page_size]: query i sees keys 0 .. seq_len - S_q + i, or with limits the first
    min(limits[b, i], seq_len), others are -inf, and so are the keys of a page outside the cache.
    """
    keys = dequantise_keys(cache, head_dim=q.shape[-1], dtype=_wide(q, weights, cache))
    pages, page_size, _ = keys.shape
    sequences, queries = q.shape[:2]
    logits = []
    for b in range(sequences):
        page = block_table[b].long()
        valid = (page >= 0) & (page < pages)
        k = rearrange(keys[page.clamp(0, pages - 1)], "page token dim -> (page token) dim")
        ends = int(seq_lens[b]) - queries + 1 + torch.arange(queries)
        ends = ends if limits is None else limits[b].clamp_max(int(seq_lens[b]))
        own = indexer_logits(q[b], k, weights[b], torch.zeros(queries), ends)
        logits.append(own.masked_fill(~valid.repeat_interleave(page_size), -torch.inf))
    return torch.stack(logits) if logits else keys.new_empty(0, queries, block_table.shape[1] * page_size)


def indexer_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the `top_k` largest values of each row stand, in ascending order; -1 fills up where there are fewer.

    logits [T, S]; starts, ends [T] restrict row t to starts[t] <= s < ends[t]. Of equal values the ones with the lowest
    index are chosen; NaN and -inf never are. Returns int32 [T, K].

    Row [1, 3, NaN, 3, -inf, 3] with top_k 2 gives [1, 3], with top_k 5 [0, 1, 3, 5, -1].
    """
    chosen = torch.full((len(logits), top_k), -1, dtype=torch.int32, device=logits.device)
    for token, row in enumerate(logits):
        start = 0 if starts is None else max(int(starts[token]), 0)
        end = len(row) if ends is None else min(int(ends[token]), len(row))
        allowed = [s for s in range(start, end) if row[s] > -torch.inf]
        values = row.tolist()
        best = sorted(sorted(allowed, key=lambda s: -values[s])[:top_k])  # sorted is stable: ties keep their order
        chosen[token, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


def select_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    *,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`indexer_topk` of `indexer_logits`: the rows of the best keys, int32 [T, K]."""
    return indexer_topk(indexer_logits(q, k, weights, starts, ends, k_scale=k_scale), top_k)


def select_slots(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: int,
    *,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cache slots of the best keys, int32 [B, S_q, K], in the order of the keys' positions; -1 fills up.

    Position p of sequence b stands in slot block_table[b, p // page_size] * page_size + p % page_size.
    """
    logits = paged_indexer_logits(q, cache, weights, block_table, seq_lens, limits=limits)
    page_size = cache.shape[1] // (q.shape[-1] + 4) if cache.dtype == torch.uint8 else cache.shape[1]
    slots = torch.full((*q.shape[:2], top_k), -1, dtype=torch.int32, device=q.device)
    for b, rows in enumerate(logits):
        positions = indexer_topk(rows, top_k).long()
        found = positions >= 0
        page = block_table[b][(positions // page_size).clamp_min(0)]
        slots[b] = torch.where(found, page * page_size + positions % page_size, -1).to(torch.int32)
    return slots


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
