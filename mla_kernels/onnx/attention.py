"""Attention ops in ONNX: scores of all keys that a table names, masked; no loop over sequences."""

import torch

from mla_kernels.onnx.caches import paged_values, slot_values
from mla_kernels.onnx.numbers import wide
from mla_kernels.reference import attention as reference

_LOWEST = torch.finfo(torch.float32).min


def softmax(scores: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, lse and largest score over the last axis of fp32 scores; 0 and -inf where nothing is seen."""
    scores = torch.where(seen, scores, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest.clamp(min=_LOWEST))
    total = weights.sum(-1, keepdim=True)
    lse = (torch.log(total) + largest.clamp(min=_LOWEST)).squeeze(-1)
    empty = total.squeeze(-1) == 0.0
    return weights / torch.where(total == 0.0, 1.0, total), torch.where(empty, -torch.inf, lse), largest.squeeze(-1)


def gate(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """out times sigmoid(lse - sink); 0 where nothing is seen."""
    if sink is None:
        return out
    gate = torch.sigmoid(lse - sink)
    return out * torch.where(gate.isnan(), 0.0, gate).unsqueeze(-1)


def mla_decode(
    q, cache, block_table, seq_lens, sink, softmax_scale, causal, window, layout, latent_dim, batch_invariant=False
):
    """q [B, S, heads, width]; every page of the table is read, of B * pages_per_seq * page_size rows in fp32."""
    queries = q.shape[1]
    keys, known = paged_values(cache, layout, latent_dim, block_table)  # [B, T, width], [B, T]
    seen = decode_mask(queries, keys.shape[1], seq_lens, causal, window) & known.unsqueeze(1)
    keys = torch.where(seen.any(1).unsqueeze(2), keys, 0.0)  # rows that nobody sees may hold anything
    scores = torch.matmul(wide(q), keys.transpose(1, 2).unsqueeze(1)) * softmax_scale  # [B, S, heads, T]
    weights, lse, _ = softmax(scores, seen.unsqueeze(2))
    out = torch.matmul(weights, keys[:, :, :latent_dim].unsqueeze(1))
    return gate(out, lse, sink).to(q.dtype), lse


def decode_mask(queries, length, seq_lens, causal, window):
    """Which of a table's tokens each query sees: [B, queries, length]."""
    place = torch.arange(length)
    lengths = seq_lens.to(torch.int64).reshape(-1, 1, 1)
    if not causal:
        return (place < lengths).expand(-1, queries, -1)
    limit = lengths - queries + 1 + torch.arange(queries).reshape(1, -1, 1)
    return (place < limit) & (place >= limit - window) & (place < lengths)


def mla_prefill(
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=True,
    batch_invariant=False,
):  # fmt: skip
    """One masked product of all queries with all keys: heads * Tq * Tk scores."""
    nope = k.shape[2]
    query, key, value = (wide(x).transpose(0, 1) for x in (q, k, v))  # [H, T, .]
    scores = torch.matmul(query[:, :, :nope], key.transpose(1, 2))
    if k_rope is not None:
        scores = scores + torch.matmul(query[:, :, nope:], wide(k_rope).t())
    seen = prefill_mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal)
    weights, lse, _ = softmax(scores * softmax_scale, seen)
    value = torch.where(seen.any(0).unsqueeze(1), value, 0.0)
    return torch.matmul(weights, value).transpose(0, 1).to(q.dtype).contiguous(), lse.transpose(0, 1).contiguous()


def prefill_mask(cu_seqlens_q, cu_seqlens_k, queries, keys, causal):
    """Which keys each query sees: [queries, keys]."""
    of_query, query_place, query_length = _sequences(cu_seqlens_q, queries)
    of_key, key_place, key_length = _sequences(cu_seqlens_k, keys)
    seen = (of_query.unsqueeze(1) == of_key) & (of_query < cu_seqlens_q.shape[0] - 1).unsqueeze(1)
    if causal:  # aligned at the end
        shift = key_length.unsqueeze(0) - query_length.unsqueeze(1)
        seen = seen & (key_place <= query_place.unsqueeze(1) + shift)
    return seen


def _sequences(cu_seqlens, rows):
    """Of each row its sequence (their number for padding), its place there, and the sequence's length; int64 [rows]."""
    ends = cu_seqlens.to(torch.int64)
    row = torch.arange(rows)
    sequence = (row.unsqueeze(1) >= ends[1:]).to(torch.int64).sum(1)
    own = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    begin = ends[:-1].index_select(0, own)
    return sequence, row - begin, ends[1:].index_select(0, own) - begin


def sparse_mla_prefill(
    q, kv, indices, softmax_scale, latent_dim=512, topk_length=None, sink=None, max_logits=True, batch_invariant=False
):
    """q [T, heads, width], kv [S, width], indices [T, K]: T * K picked rows in fp32."""
    keys, seen = _picked(lambda slots: wide(kv).index_select(0, slots), kv.shape[0], indices, topk_length)
    out, lse, largest = _attend(q, keys, seen, softmax_scale, latent_dim, sink)
    return out, lse, largest if max_logits else largest.new_zeros(0)


def sparse_mla_decode(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length=None, sink=None, extra_cache=None,
    extra_indices=None, extra_topk_length=None, batch_invariant=False,
):  # fmt: skip
    """The same of q [B, S, heads, width] over slots of a cache, and of a second one in the same softmax."""
    sequences, queries = q.shape[:2]
    parts = [(cache, indices, topk_length)]
    if extra_cache is not None:
        parts.append((extra_cache, extra_indices, extra_topk_length))
    found = []
    for data, slots, length in parts:
        length = None if length is None else length.repeat_interleave(queries)
        found.append(
            _picked(
                lambda places, data=data: slot_values(data, layout, latent_dim, places),
                data.shape[0] * data.shape[1],
                slots.flatten(0, 1),
                length,
            )
        )
    keys, seen = (torch.cat(part, 1) for part in zip(*found))
    out, lse, _ = _attend(q.flatten(0, 1), keys, seen, softmax_scale, latent_dim, sink)
    return out.reshape(sequences, queries, *out.shape[1:]), lse.reshape(sequences, queries, lse.shape[1])


def _picked(values, slots, indices, length):
    """Rows [T, K, width] of indices [T, K], zeros where one picks nothing, and whether each picks."""
    tokens, picks = indices.shape
    seen = (indices >= 0) & (indices < slots)
    if length is not None:
        seen = seen & (torch.arange(picks) < length.unsqueeze(1))
    rows = values(torch.where(seen, indices, 0).to(torch.int64).flatten())
    return torch.where(seen.unsqueeze(2), rows.reshape(tokens, picks, rows.shape[1]), 0.0), seen


def _attend(q, keys, seen, softmax_scale, latent_dim, sink):
    scores = torch.matmul(wide(q), keys.transpose(1, 2)) * softmax_scale  # [T, heads, K]
    weights, lse, largest = softmax(scores, seen.unsqueeze(1))
    return gate(torch.matmul(weights, keys[:, :, :latent_dim]), lse, sink).to(q.dtype), lse, largest


def merge_states(outs, lses, batch_invariant=False):
    """The reference, in fp32."""
    out, lse = reference.merge_states(wide(outs), lses)
    return out.to(outs.dtype), lse
