"""torch_npu's lightning indexer and sparse attention; :mod:`mla_kernels.compat.torch_npu` gives them out.

Both name keys by their position in the sequence, counted from 0, and -1 for none.
"""

from dataclasses import dataclass

import torch

from mla_kernels.attention.indexer.op import indexer_logits, paged_indexer_logits
from mla_kernels.attention.indexer.select import WORKSPACE, select_keys
from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.checks import INDICES, any_requires_grad, check_int, check_no_grad, check_range, check_tensor, readable
from mla_kernels.compat.torch_npu_parts import (
    check_flag,
    check_only,
    joined,
    one_key_head,
    pages_of,
    refuse,
    same,
    side_by_side,
)
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache

_FAR = 9223372036854775807
_WINDOWS = "there are no windows in these operators; mla_kernels.window_slots has them"


@dataclass
class _Places:
    """Where each of T query tokens stands: int64 [T] tensors."""

    sequence: torch.Tensor  # its sequence
    limit: torch.Tensor  # how many keys it sees; 0 for a token of no sequence
    first: torch.Tensor  # its sequence's first key among packed ones


def _counts(name, lengths, sequences, room, device):
    """int64 [B] counts of each sequence in layout BSND; None means all of them."""
    if lengths is None:
        return torch.full((sequences,), room, device=device)
    check_tensor(name, lengths, shape=(sequences,), dtypes=INDICES, device=device)
    if readable(lengths):
        check_range(name, lengths, 0, room + 1, f"there are {room}")
    return lengths.long()


def _sums(name, lengths, rows, device, sequences=None):
    """int64 [B] sums of layout TND."""
    if lengths is None:
        raise ValueError(f"{name}: got None with layout TND, a tensor is accepted")
    check_tensor(name, lengths, shape=(sequences,), dtypes=INDICES, device=device)
    if lengths.shape[0] == 0:
        raise ValueError(f"{name}: got 0 sequences, at least 1 is accepted")
    if readable(lengths):
        check_range(name, lengths, 0, rows + 1, f"there are {rows} rows")
        if bool((lengths.diff() < 0).any()):
            raise ValueError(f"{name}: got {lengths.tolist()}, sums that never fall are accepted")
    return lengths.long()


def _places(query, layout, layout_kv, lengths, lengths_kv, names, key_shape, mode, block_table=None):
    """_Places of the tokens of query, [B, S, ...] or [T, ...]."""
    device = query.device
    token = torch.arange(query.shape[0] * (query.shape[1] if layout == "BSND" else 1), device=device)
    if layout == "BSND":
        batch, room = query.shape[:2]
        counts = _counts(names[0], lengths, batch, room, device)
        sequence, within = token // max(room, 1), token % max(room, 1)
    else:
        sums = _sums(names[0], lengths, query.shape[0], device)
        batch = sums.shape[0]
        starts = torch.cat((sums.new_zeros(1), sums[:-1]))
        counts = sums - starts
        sequence = torch.searchsorted(sums, token, right=True)
        within = torch.where(sequence < batch, token - starts[sequence.clamp(max=batch - 1)], _FAR)
        sequence = sequence.clamp(max=batch - 1)
    if block_table is not None and block_table.shape[0] != batch:
        raise ValueError(f"block_table: got {block_table.shape[0]} rows for {batch} sequences")
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    if layout_kv == "PA_BSND":
        if lengths_kv is None:
            raise ValueError(f"{names[1]}: got None with layout PA_BSND, a tensor is accepted")
        keys = _counts(names[1], lengths_kv, batch, block_table.shape[1] * key_shape[1], device)
    elif layout_kv == "BSND":
        if key_shape[0] != batch:
            raise ValueError(f"key: got {key_shape[0]} sequences, query has {batch}")
        keys = _counts(names[1], lengths_kv, batch, key_shape[1], device)
        first = torch.arange(batch, device=device) * key_shape[1]
    else:
        sums = _sums(names[1], lengths_kv, key_shape[0], device, batch)
        first = torch.cat((sums.new_zeros(1), sums[:-1]))
        keys = sums - first
    keys, counts = keys[sequence], counts[sequence]
    limit = keys - counts + within.clamp(max=1 << 40) + 1 if mode == 3 else keys
    limit = limit.clamp(min=0).masked_fill(within >= counts, 0)
    return _Places(sequence, torch.minimum(limit, keys), first[sequence])


def _layouts(query, layout_query, layout_kv, name_kv, sparse_mode, pre_tokens, next_tokens):
    check_only("layout_query", layout_query, ("BSND", "TND"), "torch_npu has these")
    check_only(name_kv, layout_kv, ("BSND", "TND", "PA_BSND"), "torch_npu has these")
    if layout_kv not in ("PA_BSND", layout_query):
        raise ValueError(f"{name_kv}: got {layout_kv!r} beside queries in {layout_query!r}, the same or 'PA_BSND'")
    check_only("sparse_mode", sparse_mode, (0, 3), "torch_npu has these")
    for name, value in (("pre_tokens", pre_tokens), ("next_tokens", next_tokens)):
        check_only(name, value, (_FAR,), _WINDOWS)
    check_tensor("query", query, rank=len(layout_query))


def npu_sparse_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sparse_indices: torch.Tensor,
    scale_value: float,
    *,
    block_table: torch.Tensor | None = None,
    actual_seq_lengths_query: torch.Tensor | None = None,
    actual_seq_lengths_kv: torch.Tensor | None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = 9223372036854775807,
    next_tokens: int = 9223372036854775807,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absorbed latent attention of each token over the keys that its indices name (:func:`sparse_mla_decode` of a paged
    cache, :func:`sparse_mla_prefill` of packed keys, which is differentiable).

    Args:
        query: ``[B, S, N, D]`` or ``[T, N, D]``, bfloat16, float16 or float32: the latent part, there D 512.
        key: ``[B, S_k, 1, D]``, ``[T_k, 1, D]`` or, "PA_BSND", ``[blocks, block_size, 1, D]``. value: key, or None.
        sparse_indices: ``[B, S, 1, K]`` or ``[T, 1, K]`` int32, positions in the sequence. Entries that name no key
            that the token sees count for nothing, wherever they stand.
        scale_value: factor of the scores.
        block_table: int32 ``[B, pages]`` with "PA_BSND", else None.
        actual_seq_lengths_query, actual_seq_lengths_kv: int32 or int64 ``[B]``: tokens of each sequence, of "TND" sums
            from the first on. Needed with "TND"; the latter with "PA_BSND", where it is never a sum.
        query_rope, key_rope: the rotated parts, in the layouts of query and key; both or neither. Paged keys that are
            not :func:`cache_views` are copied in every call: those that the indices name, or the table's pages,
            whichever are fewer.
        sparse_block_size: 1. layout_query: "BSND" or "TND". layout_kv: the same, or "PA_BSND".
        sparse_mode: 3, causal, the last query at the last key; or 0, every key of the sequence.
        pre_tokens, next_tokens: the default.
        attention_mode: 2, absorbed MLA, or the default, which is taken for it.
        return_softmax_lse: whether the softmax's parts are returned.
        sinks: None: torch_npu 2.14.0 does not say what they do.

    Returns:
        (out in query's shape and dtype, 0 where a token sees nothing; the largest score and the sum of exponentials
        over it, float32 ``[B, 1, S, N]`` or ``[1, T, N]``, -inf and 0 where a token sees nothing, or empty tensors).

    Raises:
        NotImplementedError: what is refused above, several key heads, an input of the paged form that requires grad.
        TypeError, ValueError: shapes, dtypes, devices and lengths that do not fit.
    """
    _layouts(query, layout_query, layout_kv, "layout_kv", sparse_mode, pre_tokens, next_tokens)
    check_only("sparse_block_size", sparse_block_size, (1,), "indices name single keys here")
    check_only("attention_mode", attention_mode, (2, 0), "absorbed MLA, as 0 is taken here")
    check_flag(return_softmax_lse=return_softmax_lse)
    refuse("torch_npu 2.14.0 does not say what they do", sinks=sinks)
    if value is not None and not same(key, value):
        raise NotImplementedError("value: got another tensor than key, key or None is accepted (the latent is both)")
    if (query_rope is None) != (key_rope is None):
        raise ValueError("query_rope, key_rope: got one of them, both or neither are accepted")
    if query_rope is not None:
        check_tensor("query_rope", query_rope, shape=(*query.shape[:-1], None), like=query)
    *lead, heads, latent = query.shape
    q = joined(query, query_rope).reshape(-1, heads, latent + (0 if query_rope is None else query_rope.shape[-1]))
    check_tensor("sparse_indices", sparse_indices, shape=(*lead, None, None), dtypes=(torch.int32,), device=q.device)
    picks = one_key_head("sparse_indices", sparse_indices, -2).reshape(q.shape[0], -1)
    paged = layout_kv == "PA_BSND"
    if paged != (block_table is not None):
        raise ValueError(f"block_table: got {'None' if paged else 'a tensor'} with layout_kv {layout_kv!r}")
    key_lead = (None,) * (1 if layout_kv == "TND" else 2)
    for name, tensor, width in (("key", key, latent), ("key_rope", key_rope, None)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(*key_lead, None, width), like=query)
    if paged:
        check_tensor("block_table", block_table, rank=2, dtypes=(torch.int32,), device=q.device)
    lengths = actual_seq_lengths_query, actual_seq_lengths_kv
    names = "actual_seq_lengths_query", "actual_seq_lengths_kv"
    places = _places(query, layout_query, layout_kv, *lengths, names, key.shape, sparse_mode, block_table)
    seen = (picks >= 0) & (picks < places.limit[:, None])
    options = {"softmax_scale": scale_value}
    if paged:
        if return_softmax_lse:
            raise NotImplementedError("return_softmax_lse: got True with layout_kv 'PA_BSND', False is accepted there")
        cache, slots = _paged_picks(key, key_rope, block_table, picks.long(), seen, places)
        out, _ = sparse_mla_decode(q[:, None], cache, slots[:, None], **options)
        return out.view(query.shape), *q.new_empty(2, 0, dtype=torch.float32)
    rows = joined(one_key_head("key", key, -2), None if key_rope is None else one_key_head("key_rope", key_rope, -2))
    rows = rows.reshape(-1, rows.shape[-1])
    index = (picks + places.first[:, None]).masked_fill(~seen, -1).int()
    out, *parts = sparse_mla_prefill(q, rows, index, latent_dim=latent, return_max_logits=return_softmax_lse, **options)
    if not return_softmax_lse:
        return out.view(query.shape), *q.new_empty(2, 0, dtype=torch.float32)
    lse, largest = (one.detach() for one in parts)
    sums = torch.exp(lse - largest).masked_fill(largest == float("-inf"), 0.0)
    return out.view(query.shape), *(one.view(*lead, heads).unsqueeze(len(lead) - 1) for one in (largest, sums))


def _paged_picks(key, key_rope, block_table, picks, seen, places):
    """A cache and int32 slots [T, K] in it, -1 for none."""
    latents = pages_of("key", key)
    blocks, size, width = latents.shape
    pages = block_table.shape[1]
    if pages == 0 or blocks == 0:
        raise ValueError(
            f"block_table: got {pages} pages a sequence of {blocks} blocks, at least 1 of each is accepted"
        )
    seen = seen & (picks < pages * size)
    picks = picks.masked_fill(~seen, 0)
    page = block_table[places.sequence[:, None], picks // size].long()
    seen = seen & (page >= 0) & (page < blocks)
    slots = (page * size + picks % size).masked_fill(~seen, -1)
    both = latents
    if key_rope is not None:
        keys = pages_of("key_rope", key_rope)
        if keys.shape[:2] != (blocks, size):
            raise ValueError(f"key_rope: got shape {tuple(key_rope.shape)} beside a key {tuple(key.shape)}")
        both = side_by_side(latents, keys)
    if both is not None:
        return LatentCache(both, width), slots.int()
    check_no_grad("npu_sparse_flash_attention of a paged cache", key=key, key_rope=key_rope)
    if slots.numel() <= block_table.numel() * size:
        named = slots.clamp(min=0).view(-1)
        rows = torch.cat((latents.flatten(0, 1)[named], keys.flatten(0, 1)[named]), -1)
        places_of = torch.arange(slots.numel(), device=slots.device).view(slots.shape)
    else:
        named = block_table.clamp(0, blocks - 1).view(-1)
        rows = torch.cat((latents[named], keys[named]), -1).flatten(0, 1)
        places_of = places.sequence[:, None] * (pages * size) + picks
    if rows.shape[0] == 0:
        rows = rows.new_zeros(1, rows.shape[1])
    return LatentCache(rows[:, None], width), places_of.masked_fill(~seen, -1).int()


def npu_lightning_indexer(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    *,
    actual_seq_lengths_query: torch.Tensor | None = None,
    actual_seq_lengths_key: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 9223372036854775807,
    next_tokens: int = 9223372036854775807,
    return_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``sparse_count`` keys with the largest ``sum_h weights_h relu(query_h . key)`` of each token.

    Args:
        query: ``[B, S, N, D]`` or ``[T, N, D]``, bfloat16, float16 or float32; N 1 to 256, D a power of two from 32 to
            256 (there 64 and 128).
        key: ``[B, S_k, 1, D]``, ``[T_k, 1, D]`` or, "PA_BSND", ``[blocks, block_size, 1, D]``, in query's dtype.
        weights: ``[B, S, N]`` or ``[T, N]``, query's dtype or float32.
        actual_seq_lengths_query, actual_seq_lengths_key, block_table, layout_query, layout_key, sparse_mode,
            pre_tokens, next_tokens: as of :func:`npu_sparse_flash_attention`.
        sparse_count: how many, 1 to 65536.
        return_value: whether the scores are returned.

    Returns:
        (positions ``[B, S, 1, sparse_count]`` or ``[T, 1, sparse_count]`` int32 in rising order, of equal scores the
        lowest, -1 behind them where a token sees fewer; their scores in query's dtype, -inf beside -1, or an empty
        tensor).

    Raises:
        NotImplementedError: what is refused there, several key heads, an input that requires grad.
        TypeError, ValueError: shapes, dtypes, devices and lengths that do not fit.

    The scores of some tokens at a time are kept, at most 256 MiB (one token's where that is more); those of packed
    keys with ``return_value`` False are not written out at once (:func:`mla_kernels.select_keys`).
    """
    _layouts(query, layout_query, layout_key, "layout_key", sparse_mode, pre_tokens, next_tokens)
    check_flag(return_value=return_value)
    check_int("sparse_count", sparse_count, 1, 65536)
    *lead, heads, width = query.shape
    check_tensor("weights", weights, shape=(*lead, heads), dtypes=(query.dtype, torch.float32), device=query.device)
    paged = layout_key == "PA_BSND"
    if paged != (block_table is not None):
        raise ValueError(f"block_table: got {'None' if paged else 'a tensor'} with layout_key {layout_key!r}")
    check_tensor("key", key, shape=(*(None,) * (1 if layout_key == "TND" else 2), None, width), like=query)
    if any_requires_grad((query, key, weights)):
        check_no_grad("npu_lightning_indexer", query=query, key=key, weights=weights)
    if paged:
        check_tensor("block_table", block_table, rank=2, dtypes=(torch.int32,), device=query.device)
    lengths = actual_seq_lengths_query, actual_seq_lengths_key
    names = "actual_seq_lengths_query", "actual_seq_lengths_key"
    places = _places(query, layout_query, layout_key, *lengths, names, key.shape, sparse_mode, block_table)
    q, w, limit = query.reshape(-1, heads, width), weights.reshape(-1, heads).float(), places.limit.int()
    rows = one_key_head("key", key, -2)
    if paged:
        cache = IndexerCache(rows, width)
        table, room = block_table[places.sequence], block_table.shape[1] * cache.page_size
        limit = limit.clamp(max=room)  # a device does not look at lengths

        def scores(part):
            lens = limit[part]
            found = paged_indexer_logits(q[part, None], cache, w[part, None], table[part], lens, limits=lens[:, None])
            return found[:, 0], None
    else:
        rows = rows.reshape(-1, width)
        room, first = rows.shape[0], places.first.int()
        if not return_value:
            index = select_keys(q, rows, w, first, first + limit, sparse_count)
            index = torch.where(index >= 0, index - first[:, None], -1)
            return index.view(*lead, 1, sparse_count), q.new_empty(0)

        def scores(part):
            return indexer_logits(q[part], rows, w[part], first[part], (first + limit)[part]), first[part, None]

    step = max(1, WORKSPACE // max(1, 4 * room))
    found = [_best(*scores(slice(at, at + step)), sparse_count) for at in range(0, max(1, q.shape[0]), step)]
    index, best = (torch.cat(parts) for parts in zip(*found))
    values = best.to(query.dtype).view(*lead, 1, sparse_count) if return_value else q.new_empty(0)
    return index.view(*lead, 1, sparse_count), values


def _best(logits, first, count):
    """Positions [T, count] int32 of the largest logits, and these, -inf beside -1."""
    index = indexer_topk(logits, count)
    if logits.shape[1] == 0:
        best = logits.new_full(index.shape, float("-inf"))
    else:
        best = logits.gather(1, index.clamp(min=0).long()).masked_fill(index < 0, float("-inf"))
    return index if first is None else torch.where(index >= 0, index - first, -1), best
