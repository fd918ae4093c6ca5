"""What the sparse attention ops compute: absorbed latent attention of each token over the rows that its indices pick.

DeepSeek Sparse Attention: DeepSeek-V3.2-Exp report, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp, section 2.1,
instantiated under MLA (every head shares the picked latents). FlashMLA computes the same for given indices
(`flash_mla_sparse_fwd` and the sparse path of `flash_mla_with_kvcache`), Hugging Face with a dense mask of the picks
(`DeepseekV32Attention` in models/deepseek_v32/modeling_deepseek_v32.py).

Symbols: T tokens, B sequences, S_q query tokens of each, S rows, K top_k, R latent_dim, D rope_dim.
Dots are computed in the input dtype; softmax and log-sum-exp in fp32, or fp64 for fp64 input.
"""

from itertools import pairwise

import torch
from einops import einsum, rearrange, repeat


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    latent_dim: int = 512,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Attention of each token over the rows of `kv` that its indices pick; the latent part of a row is its value.

    q            [T, heads, R + D]: q_nope W_UK, then the rotated q_rope
    kv           [S, R + D]: latent, then rotated key
    indices      [T, K] integers: rows of kv. An index below 0 or from S on picks nothing; a row picked twice counts
                 twice
    topk_length  [T] integers or None: only the leftmost so many indices of a token count
    sink         [heads] or None: a logit that takes weight and gives no value: out is multiplied by
                 sigmoid(lse - sink); lse stays as it is. -inf is no sink, +inf makes out zero

    Returns out [T, heads, R] in q's dtype, lse [T, heads] (natural log, fp32, or fp64 for fp64 input) and, where asked
    for, max_logits [T, heads], the largest softmax_scale q . key. With nothing picked, out is 0 and both are -inf.
    Rows that nothing picks are not read. Differentiable in q, kv and sink.
    """
    picked, valid = _pick(kv, indices, topk_length)  # [T, K, R + D], [T, K]
    return _attend(q, picked, valid, softmax_scale, latent_dim, sink, return_max_logits)


def sparse_mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    extra_cache: torch.Tensor | None = None,
    extra_indices: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    latent_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over the slots of a paged cache, and over those of a second cache in one softmax with the first.

    q                  [B, S_q, heads, R + D]
    cache, extra_cache [pages, page_size, R + D]; slot = page * page_size + offset. The two may differ in page size
    indices            [B, S_q, K] integers: slots of `cache`; extra_indices [B, S_q, extra K]: slots of `extra_cache`
    topk_length        [B] integers or None, for all query tokens of a sequence; extra_topk_length alike

    Returns out [B, S_q, heads, R] and lse [B, S_q, heads]; see `sparse_mla_prefill` for the rest.
    """
    sequences, query_tokens = indices.shape[:2]
    parts = [(cache, indices, topk_length)]
    if extra_cache is not None:
        parts.append((extra_cache, extra_indices, extra_topk_length))
    picks = []
    for pages, slots, length in parts:
        length = None if length is None else repeat(length, "b -> (b s)", s=query_tokens)
        rows = rearrange(pages, "page offset dim -> (page offset) dim")
        picks.append(_pick(rows, rearrange(slots, "b s k -> (b s) k"), length))
    picked, valid = (torch.cat(part, dim=1) for part in zip(*picks))
    q_tokens = rearrange(q, "b s head dim -> (b s) head dim")
    out, lse = _attend(q_tokens, picked, valid, softmax_scale, latent_dim, sink, False)
    return out.unflatten(0, (sequences, query_tokens)), lse.unflatten(0, (sequences, query_tokens))


def window_slots(
    block_table: torch.Tensor, seq_lens: torch.Tensor, *, queries: int, window: int, page_size: int
) -> torch.Tensor:
    """Slots [B, queries, window] (int32) of the newest `window` tokens that each of the `queries` newest tokens of a
    sequence sees, itself included, in order; -1 behind them.

    block_table [B, pages]: token j of sequence b is row j % page_size of page block_table[b, j // page_size]; a page
    below 0, or one that the table does not have, holds nothing. seq_lens [B]: tokens, the newest included.
    """
    return _list_slots(block_table, seq_lens, queries, 1, window, page_size)


def entry_slots(
    block_table: torch.Tensor, seq_lens: torch.Tensor, *, queries: int, ratio: int, page_size: int, max_entries: int
) -> torch.Tensor:
    """Slots [B, queries, max_entries] (int32) of the entries, one for `ratio` tokens, that are complete for each of the
    `queries` newest tokens of a sequence: entry i from position (i + 1) * ratio - 1 on; -1 behind them.

    block_table [B, pages]: the pages of entries; seq_lens [B]: tokens.
    """
    return _list_slots(block_table, seq_lens, queries, ratio, max_entries, page_size)


def prefill_rows(
    cu_seqlens: torch.Tensor,
    *,
    tokens: int,
    window: int,
    entry_cu_seqlens: torch.Tensor | None = None,
    ratio: int | None = None,
    max_entries: int | None = None,
    picks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices of `sparse_mla_prefill` over the rows [T tokens of packed sequences | E entries of the same sequences].

    cu_seqlens        [B + 1]: where sequences begin among the T `tokens`
    entry_cu_seqlens  [B + 1] or None: where their entries, one for `ratio` tokens and at most `max_entries` of a
                      sequence, begin among the E
    picks             [T, K] or None: of the E entries those that a token attends to (below 0: none), in place of all
                      that are complete at its position

    Returns rows [T, window + max_entries or K] (int32): the newest `window` tokens of its sequence up to a token and -1
    behind them, then its entries and -1 behind them (picks: where they stand).
    """
    starts, columns = cu_seqlens.tolist(), 0
    if picks is not None:
        columns = picks.shape[1]
    elif entry_cu_seqlens is not None:
        columns = max_entries
    rows = torch.full((tokens, window + columns), -1, dtype=torch.int32)
    for sequence, (start, end) in enumerate(pairwise(starts)):
        for token in range(start, end):
            seen = torch.arange(max(start, token + 1 - window), token + 1)
            rows[token, : len(seen)] = seen
            if picks is not None:
                rows[token, window:] = torch.where(picks[token] < 0, -1, tokens + picks[token])
            elif entry_cu_seqlens is not None:
                count = (token - start + 1) // ratio
                rows[token, window : window + count] = tokens + int(entry_cu_seqlens[sequence]) + torch.arange(count)
    return rows


def _list_slots(block_table, seq_lens, queries, ratio, width, page_size):
    slots = torch.full((len(block_table), queries, width), -1, dtype=torch.int32)
    for row, (pages, length) in enumerate(zip(block_table.tolist(), seq_lens.tolist())):
        for query in range(queries):
            seen = max(length - queries + query + 1, 0) // ratio
            for column, place in enumerate(range(max(seen - width, 0), seen)):
                if place // page_size < len(pages) and pages[place // page_size] >= 0:
                    slots[row, query, column] = pages[place // page_size] * page_size + place % page_size
    return slots


def _pick(rows: torch.Tensor, indices: torch.Tensor, length: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [S, dim], indices [T, K] -> picked rows [T, K, dim], zero where nothing is picked, and which picks count."""
    valid = (indices >= 0) & (indices < len(rows))
    if length is not None:
        valid = valid & (torch.arange(indices.shape[1], device=indices.device) < rearrange(length, "t -> t 1"))
    picked = torch.zeros(*indices.shape, rows.shape[1], dtype=rows.dtype, device=rows.device)
    picked[valid] = rows[indices[valid].long()]
    return picked, valid


def _attend(q, picked, valid, softmax_scale, latent_dim, sink, return_max_logits):
    """q [T, heads, R + D] over picked [T, K, R + D] where valid [T, K]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = softmax_scale * einsum(q, picked, "t head dim, t key dim -> t head key").to(wide)
    scores = scores.masked_fill(rearrange(~valid, "t key -> t 1 key"), -torch.inf)
    empty = rearrange(~valid.any(dim=1), "t -> t 1")  # [T, 1]
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1)  # no NaN in the gradient of an empty row
    weights = torch.exp(scores - lse[..., None])  # [T, heads, K]
    out = einsum(weights.to(q.dtype), picked[..., :latent_dim], "t head key, t key dim -> t head dim")
    if sink is not None:
        out = (out * torch.sigmoid(lse - sink.to(wide))[..., None]).to(q.dtype)
    lse = lse.masked_fill(empty, -torch.inf)
    if not return_max_logits:
        return out, lse
    floor = torch.full_like(lse, -torch.inf)[..., None]  # for K = 0
    return out, lse, torch.cat([scores.detach(), floor], dim=-1).amax(dim=-1)
