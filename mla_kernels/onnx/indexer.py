"""The lightning indexer in ONNX."""

import torch

from mla_kernels.onnx.caches import indexer_page_size, indexer_values, write_indexer_rows
from mla_kernels.onnx.latent import table_rows
from mla_kernels.onnx.numbers import decode_e4m3, encode_e4m3, power_of_two_scale, wide
from mla_kernels.reference.indexer import hadamard_transform, layer_norm, rotate


def _values(x):
    return decode_e4m3(x) if x.dtype in (torch.uint8, torch.float8_e4m3fn) else wide(x)


def indexer_logits(q, k, weights, starts, ends, k_scale=None, batch_invariant=False):
    """[T, S]: T * heads * S products at once."""
    keys = _values(k)
    if k_scale is not None:
        keys = keys * k_scale.unsqueeze(1)
    place = torch.arange(k.shape[0])
    seen = (place >= starts.unsqueeze(1)) & (place < ends.unsqueeze(1))
    return torch.where(seen, _scores(_values(q), keys.t(), weights), -torch.inf)


def _scores(q, keys, weights):
    """[..., S] of q [..., H, d], keys [..., d, S] and weights [..., H]."""
    dots = torch.relu(torch.matmul(q, keys))
    return torch.matmul(wide(weights).unsqueeze(-2), dots).squeeze(-2)


def paged_indexer_logits(q, cache, head_dim, weights, block_table, seq_lens, limits=None, batch_invariant=False):
    queries = q.shape[1]
    keys, known = indexer_values(cache, head_dim, block_table)  # [B, S, d]
    lengths = seq_lens.to(torch.int64).unsqueeze(1)
    ends = lengths - queries + 1 + torch.arange(queries)  # [B, S_q]
    if limits is not None:
        ends = torch.minimum(limits.to(torch.int64), lengths)
    seen = (torch.arange(keys.shape[1]) < ends.unsqueeze(2)) & known.unsqueeze(1)
    logits = _scores(_values(q), keys.transpose(1, 2).unsqueeze(1), weights)
    return torch.where(seen, logits, -torch.inf)


def indexer_topk(logits, top_k, starts=None, ends=None):
    """ONNX's TopK gives the lowest index first among equals, as the op does."""
    columns = logits.shape[1]
    place = torch.arange(columns)
    seen = logits > -torch.inf  # no NaN
    if starts is not None:
        seen = seen & (place >= starts.unsqueeze(1))
    if ends is not None:
        seen = seen & (place < ends.unsqueeze(1))
    values = torch.where(seen, logits, -torch.inf)
    filled = torch.cat((values, values.new_full((logits.shape[0], top_k), -torch.inf)), 1)
    best, index = filled.topk(top_k, dim=1)
    index = torch.where(best == -torch.inf, columns, index)
    index = index.topk(top_k, dim=1, largest=False).values
    return torch.where(index == columns, -1, index).to(torch.int32)


def select_keys(q, k, weights, starts, ends, k_scale, top_k, batch_invariant=False):
    return indexer_topk(indexer_logits(q, k, weights, starts, ends, k_scale), top_k)


def select_slots(q, cache, head_dim, weights, block_table, seq_lens, top_k, limits=None, batch_invariant=False):
    logits = paged_indexer_logits(q, cache, head_dim, weights, block_table, seq_lens, limits)
    sequences, queries, columns = logits.shape
    places = indexer_topk(logits.reshape(-1, columns), top_k).to(torch.int64).reshape(sequences, -1)
    page_size = indexer_page_size(cache, head_dim)
    page = block_table.to(torch.int64).gather(1, places.clamp(min=0) // page_size)
    slots = torch.where(places < 0, -1, page * page_size + places % page_size)
    return slots.reshape(sequences, queries, top_k).to(torch.int32)


def write_indexer_key(
    k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, rope_dim, rope, rope_first=True,
    hadamard=False, eps=1e-6, batch_invariant=False,
):  # fmt: skip
    rows = layer_norm(wide(k), wide(norm_weight), wide(norm_bias), eps=eps)
    angles = table_rows(cos, positions), table_rows(sin, positions)
    rows = rotate(rows, *angles, rope_dim=rope_dim, rope=rope, rope_first=rope_first)
    return write_indexer_rows(hadamard_transform(rows) if hadamard else rows, slot_mapping, cache)


def scatter_indexer_keys(k, slot_mapping, cache):
    """Of magnitudes below 1e-4 the scale is that of 1e-4."""
    return write_indexer_rows(wide(k), slot_mapping, cache, 1e-4 / 448)


def rotate_indexer_query(
    q, cos, sin, positions, rope_dim, rope, rope_first=True, hadamard=False, batch_invariant=False
):
    angles = table_rows(cos, positions).unsqueeze(1), table_rows(sin, positions).unsqueeze(1)
    values = rotate(wide(q), *angles, rope_dim=rope_dim, rope=rope, rope_first=rope_first)
    return (hadamard_transform(values) if hadamard else values).to(q.dtype)


def quantise_indexer_query(q, weights):
    """The codes' values, cast to float8_e4m3fn, which holds them exactly."""
    values = wide(q)
    scale = power_of_two_scale(values.abs().amax(-1))
    codes = encode_e4m3(values / scale.unsqueeze(-1))
    return decode_e4m3(codes).to(torch.float8_e4m3fn), wide(weights) * scale
