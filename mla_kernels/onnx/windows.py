"""DeepSeek-V4's windows and lists of slots in ONNX: all entries that new tokens could complete, and which are.

Symbols: T tokens, B sequences, D width of an entry, W of a token's row (D, or 2 D with overlap), N entries.
"""

import torch

from mla_kernels.onnx.caches import put, write_indexer_rows, write_rows
from mla_kernels.onnx.numbers import rms_norm, wide
from mla_kernels.reference.windows import rotate_last

_SLOTS = (1 << 31) - 1  # slots are int32 numbers


def window_slots(block_table, seq_lens, queries, window, page_size):
    return _newest(block_table, seq_lens, queries, 1, window, page_size)


def entry_slots(block_table, seq_lens, queries, ratio, page_size, max_entries):
    return _newest(block_table, seq_lens, queries, ratio, max_entries, page_size)


def _newest(block_table, seq_lens, queries, ratio, width, page_size):
    sequences, pages = block_table.shape
    lengths = seq_lens.to(torch.int64).unsqueeze(1) + (torch.arange(queries) + 1 - queries)
    seen = lengths.clamp(min=0) // ratio  # [B, queries]
    places = (seen - width).clamp(min=0).unsqueeze(2) + torch.arange(width)
    absent = (places >= seen.unsqueeze(2)) | (places >= pages * page_size)
    index = (places // page_size).clamp(max=pages - 1).reshape(sequences, -1)
    page = block_table.to(torch.int64).gather(1, index).reshape(sequences, queries, width)
    absent = absent | (page < 0) | (page >= _SLOTS // page_size)
    return torch.where(absent, -1, page * page_size + places % page_size).to(torch.int32)


def compress_windows(
    kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, eps=1e-6, batch_invariant=False
):
    tokens = kv.shape[0]
    begins = cu_seqlens[:-1].to(torch.int64)
    counts = (cu_seqlens[1:].to(torch.int64) - begins).clamp(min=0) // ratio
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    entry = torch.arange(tokens // ratio)
    sequence, number = _owners(ends, entry)
    known = entry < ends[-1]
    first = torch.where(known, begins.index_select(0, sequence) + number * ratio, 0)
    index = first.unsqueeze(1) + torch.arange(-ratio * int(overlap), ratio)  # [N, places]
    absent = (torch.arange(index.shape[1]) < ratio * int(overlap)) & (number == 0).unsqueeze(1)
    index = torch.where(absent, -1, index)
    starts = torch.where(known, number * ratio, 0)
    rows = _entries(kv, gate, position_bias, norm_weight, cos, sin, index, starts, overlap, eps)
    return torch.where(known.unsqueeze(1), rows, 0.0).to(kv.dtype), ends.to(torch.int32)


def _owners(ends, entry):
    """Of each entry the sequence that it belongs to, by ends [B + 1], and its number there."""
    sequence = (entry.unsqueeze(1) >= ends[1:]).to(torch.int64).sum(1).clamp(max=ends.shape[0] - 2)
    return sequence, entry - ends.index_select(0, sequence)


def _entries(kv, gate, position_bias, norm_weight, cos, sin, index, starts, overlap, eps):
    """fp32 entries [N, D] of windows: index [N, places] of rows of kv and gate, -1 where there is none; starts [N]."""
    missing = (index < 0).unsqueeze(2)
    values, gates = (_places(x, index.clamp(min=0), overlap) for x in (kv, gate))
    bias = torch.cat(position_bias.chunk(2, 1)) if overlap else position_bias
    gates = torch.where(missing, -torch.inf, gates + wide(bias))
    weights = torch.softmax(gates, 1)
    mean = (weights * torch.where(missing, 0.0, values)).sum(1)
    angles = wide(cos).index_select(0, starts), wide(sin).index_select(0, starts)
    return rotate_last(rms_norm(mean, norm_weight, eps), *angles)


def _places(rows, index, overlap):
    """fp32 [N, places, D]; with overlap first halves of the first half of the places, then second halves."""
    entries, places = index.shape
    chosen = wide(rows).index_select(0, index.flatten()).reshape(entries, places, rows.shape[1])
    if not overlap:
        return chosen
    half, width = places // 2, rows.shape[1] // 2
    return torch.cat((chosen[:, :half, :width], chosen[:, half:, width:]), 1)


def write_windows(
    kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, cache,
    layout, ratio, overlap, max_tokens, eps=1e-6, batch_invariant=False,
):  # fmt: skip
    """The new state and the new cache."""
    tokens, slots, held_rows = kv.shape[0], state.shape[0], state.shape[1]
    own = state_slots.to(torch.int64)
    begins, lengths = cu_seqlens[:-1].to(torch.int64), seq_lens.to(torch.int64)
    known = (own >= 0) & (own < slots)
    counts = torch.where(known, cu_seqlens[1:].to(torch.int64) - begins, 0)
    old = lengths - counts
    windows = torch.where(counts > 0, lengths // ratio - old // ratio, 0)
    ends = torch.cat((windows.new_zeros(1), windows.cumsum(0)))
    entry = torch.arange(tokens // ratio + state_slots.shape[0])  # no more can be completed
    sequence, number = _owners(ends, entry)
    window = (old // ratio).index_select(0, sequence) + number
    window = torch.where(entry < ends[-1], window, 0)
    position = window.unsqueeze(1) * ratio + torch.arange(-ratio * int(overlap), ratio)  # [N, places]
    age = position - old.index_select(0, sequence).unsqueeze(1)  # below 0: in the state
    of_state = own.clamp(0, slots - 1).index_select(0, sequence).unsqueeze(1) * held_rows + position % held_rows
    of_new = slots * held_rows + begins.index_select(0, sequence).unsqueeze(1) + age
    index = torch.where(age < 0, of_state, of_new.clamp(max=slots * held_rows + tokens - 1))
    index = torch.where(position < 0, -1, index)
    flat = state.reshape(slots * held_rows, 2, state.shape[3])
    pool = (torch.cat((flat[:, part], new.to(flat.dtype))) for part, new in ((0, kv), (1, gate)))
    rows = _entries(*pool, position_bias, norm_weight, cos, sin, index, window * ratio, overlap, eps)
    width = norm_weight.shape[0]
    page_size = cache.shape[1] if cache.dim() == 3 else cache.shape[1] // (width + 4)
    of_page = block_table.to(torch.int64).index_select(0, sequence)  # [N, pages]
    page = of_page.gather(1, (window // page_size).clamp(max=block_table.shape[1] - 1).unsqueeze(1)).squeeze(1)
    slot = torch.where(entry < ends[-1], page * page_size + window % page_size, -1)
    if layout == "indexer":
        new_cache = write_indexer_rows(rows, slot, cache)
    else:
        new_cache = write_rows(rows, rows[:, :0], slot, cache, layout, width)
    return _new_state(kv, gate, flat, own, begins, counts, lengths, held_rows).reshape(state.shape), new_cache


def write_paged_windows(
    states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache, layout, ratio, overlap,
    eps=1e-6, batch_invariant=False,
):  # fmt: skip
    """The new cache; of all T tokens the window that ends there, or would."""
    pages, page_size, _, row = states.shape
    ends = slot_mapping >= 0
    last = torch.where(ends, positions.to(torch.int64), ratio - 1)
    position = last.unsqueeze(1) + torch.arange(1 - ratio * (1 + int(overlap)), 1)  # [T, places]
    of_sequence = block_table.to(torch.int64).index_select(0, torch.where(ends, sequences.to(torch.int64), 0))
    page = of_sequence.gather(1, (position.clamp(min=0) // page_size).clamp(max=block_table.shape[1] - 1))
    absent = (position < 0) | ~ends.unsqueeze(1)
    index = torch.where(absent, -1, page * page_size + position % page_size)
    flat = states.reshape(pages * page_size, 2, row)
    bias = norm_weight.new_zeros(ratio, row)  # the gates hold theirs
    rows = _entries(flat[:, 0], flat[:, 1], bias, norm_weight, cos, sin, index, last + 1 - ratio, overlap, eps)
    if layout == "indexer":
        return write_indexer_rows(rows, slot_mapping, cache)
    return write_rows(rows, rows[:, :0], slot_mapping, cache, layout, norm_weight.shape[0])


def _new_state(kv, gate, flat, own, begins, counts, lengths, held_rows):
    """The state's rows with the newest tokens of every sequence."""
    token = torch.arange(kv.shape[0])
    inside = (token.unsqueeze(1) >= begins) & (token.unsqueeze(1) < begins + counts)  # [T, B]
    sequence = inside.to(torch.int64).argmax(1)
    begin, count, length = (x.index_select(0, sequence) for x in (begins, counts, lengths))
    position = length - count + token - begin
    kept = inside.any(1) & (position >= length - held_rows)
    places = torch.where(kept, own.index_select(0, sequence) * held_rows + position % held_rows, -1)
    return put(torch.stack((kv, gate), 1), places, flat)
