"""DeepSeek-V4's raw tokens and compressed windows, for CPU tensors.

Windows are gathered by an index [entries, places] of rows of kv and gate, -1 where a window has no such token.
Symbols: D width of an entry, W width of a token's row (D, or 2 D with overlap).
"""

import torch

from mla_kernels.cpu.indexer import store_keys
from mla_kernels.cpu.latent import rotate, scatter_tokens

_MAX_VALUES = 1 << 17  # of kv that one step makes fp32: it and its weights stay in a core's caches


def write_kv(kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps) -> None:
    """RMSNorm and RoPE of kv [T, D] in fp32, rounded or quantised once, written to the slots."""
    angles = cos.index_select(0, positions), sin.index_select(0, positions)
    _store(_finished(kv.float(), norm_weight, *angles, eps), slot_mapping, cache, layout)


def write_kv_with_latent(q_a, q_norm, kv, *rest) -> torch.Tensor:
    """write_kv, and RMSNorm of q_a [T, Q] in fp32, rounded once."""
    write_kv(kv, *rest)
    eps = rest[-1]
    return torch.rms_norm(q_a.float(), q_norm.shape, q_norm.float(), eps).to(q_a.dtype)


def window_rows(cu_seqlens: torch.Tensor, tokens: int, ratio: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the windows of packed sequences stand: int32 [B + 1], the first entry of each sequence, and for each of
    tokens // ratio entries the row of its window's first token (-1: no window) and that token's position. On any
    device, without reading a value back."""
    begins = cu_seqlens[:-1]
    counts = torch.div((cu_seqlens[1:] - begins).clamp_min(0), ratio, rounding_mode="floor")
    ends = torch.cat((counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))
    entry = torch.arange(tokens // ratio, dtype=torch.int32, device=cu_seqlens.device)
    if begins.shape[0] == 0:
        return ends, torch.full_like(entry, -1), entry
    sequence = torch.searchsorted(ends[1:], entry, right=True).clamp_max(begins.shape[0] - 1)
    starts = (entry - ends[sequence]) * ratio
    begin = begins[sequence]
    first = begin + starts
    known = (entry < ends[-1]) & (begin >= 0) & (first + ratio <= tokens)
    return ends, torch.where(known, first, -1), torch.where(known, starts, 0)


def compress_windows(
    kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, eps, batch_invariant=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [T // ratio, D] of packed whole sequences, and where each sequence's begin."""
    ends, index, starts = _packed_windows(cu_seqlens, kv.shape[0], ratio, overlap)
    out = kv.new_zeros(kv.shape[0] // ratio, norm_weight.shape[0])
    inputs = kv, gate, position_bias, norm_weight, cos, sin
    for block, rows in _entries(inputs, index, starts, overlap, eps, batch_invariant):
        out[block] = rows.to(kv.dtype)
    return out, ends


def compress_windows_backward(grad, kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio, overlap, eps):
    """Gradients of kv, gate, position_bias and norm_weight; mla_kernels.latent.windows.backward has the mathematics."""
    _, index, starts = _packed_windows(cu_seqlens, kv.shape[0], ratio, overlap)
    kv_grad, gate_grad = torch.zeros(kv.shape, dtype=kv.dtype), torch.zeros(kv.shape, dtype=kv.dtype)
    bias_grad, norm_grad = torch.zeros_like(position_bias), torch.zeros(norm_weight.shape, dtype=torch.float32)
    norm, bias = norm_weight.float(), _bias_of_places(position_bias, overlap)
    for block in _blocks(index, norm.shape[0], alone=False):
        rows = index[block]
        x, z = _values(kv, rows, overlap), _values(gate, rows, overlap) + bias
        z = _hidden(z, rows) if overlap else z
        weights = torch.softmax(z, 1)  # [n, places, D]
        mean = (weights * x).sum(1)
        g = _turned(grad[block].float(), cos[starts[block]], -sin[starts[block]])
        scale = torch.rsqrt(mean.square().mean(1, keepdim=True) + eps)
        unit = mean * scale
        norm_grad += (g * unit).sum(0)
        g = g * norm
        mean_grad = scale * (g - unit * (g * unit).mean(1, keepdim=True))
        part = weights.mul_(mean_grad[:, None])
        _put_back(kv_grad, part, rows, overlap)
        part = part.mul_(x.sub_(mean[:, None]))
        _put_back(gate_grad, part, rows, overlap)
        total = part.sum(0)  # [places, D]
        bias_grad += torch.cat(total.split(total.shape[0] // 2), 1) if overlap else total
    return kv_grad, gate_grad, bias_grad, norm_grad.to(norm_weight.dtype)


def write_windows(
    kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, cache,
    layout, ratio, overlap, max_tokens, eps, batch_invariant=False,
) -> None:  # fmt: skip
    """Entries of the windows that new tokens complete, then the tokens into the state [slots, rows, 2, W]."""
    slots, begins = state_slots.long(), cu_seqlens[:-1].long()
    counts = (cu_seqlens[1:] - cu_seqlens[:-1]).long() * (slots >= 0)
    lengths = seq_lens.long()
    old, rows = lengths - counts, state.shape[1]
    first, windows = old // ratio, torch.where(counts > 0, lengths // ratio - old // ratio, 0)
    if windows.any():
        # rows of the state that new windows need stand before the new ones
        held_from = (first - int(overlap)).clamp_min(0) * ratio
        needed = torch.where(windows > 0, old - held_from, 0)
        sequence, place, ahead = _each(needed)
        held = state[slots[sequence], (held_from[sequence] + place) % rows]  # [held, 2, W]
        pool = (kv, gate) if len(held) == 0 else (torch.cat((held[:, 0], kv)), torch.cat((held[:, 1], gate)))
        sequence, place, _ = _each(windows)
        window = first[sequence] + place
        position = window[:, None] * ratio + torch.arange(-ratio * int(overlap), ratio)  # [entries, places]
        age = position - old[sequence, None]
        of_state = (ahead - held_from)[sequence, None] + position
        index = torch.where(age < 0, of_state, (len(held) + begins)[sequence, None] + age)
        index = torch.where(position < 0, -1, index)
        page_size = cache.shape[1] if cache.dim() == 3 else cache.shape[1] // (norm_weight.shape[0] + 4)
        pages = block_table[sequence, window // page_size].long()
        where = pages * page_size + window % page_size
        inputs = *pool, position_bias, norm_weight, cos, sin
        for block, finished in _entries(inputs, index, window * ratio, overlap, eps, batch_invariant):
            _store(finished, where[block], cache, layout)
    sequence, place, _ = _each(counts.clamp_max(rows))
    position = (lengths - counts.clamp_max(rows))[sequence] + place
    source = begins[sequence] + position - old[sequence]
    at = slots[sequence], position % rows
    state[:, :, 0].index_put_(at, kv[source])
    state[:, :, 1].index_put_(at, gate[source])


def write_paged_windows(
    states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache, layout, ratio, overlap, eps,
    batch_invariant=False,
) -> None:  # fmt: skip
    """Entries of the windows that end with tokens that have a slot, from states [pages, page_size, 2, W]."""
    ends = (slot_mapping >= 0).nonzero().squeeze(1)
    if ends.shape[0] == 0:
        return
    norm, sides, page_size = norm_weight.float(), 1 + int(overlap), states.shape[1]
    last = positions[ends].long()
    index = last[:, None] + torch.arange(1 - sides * ratio, 1)  # [entries, places]
    seen = index.clamp_min(0)
    page = block_table[sequences[ends].long()[:, None], torch.where(index < 0, last[:, None], seen) // page_size].long()
    side = torch.arange(sides * ratio) // ratio
    state = states.unflatten(3, (sides, -1))  # [pages, page_size, 2, sides, D]
    for block in _blocks(index, norm.shape[0], batch_invariant):
        x, z = state[page[block], seen[block] % page_size, :, side].unbind(2)  # [n, places, D] each
        if overlap:
            z = _hidden(z, index[block])
            x = x.masked_fill(index[block][..., None] < 0, 0.0)  # what stands there may be NaN
        weights = torch.softmax(z, 1)
        starts = last[block] + 1 - ratio
        rows = _finished((weights * x).sum(1), norm, cos[starts], sin[starts], eps)
        _store(rows, slot_mapping[ends[block]], cache, layout)


def _each(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For counts (2, 0, 1): whose each of the 3 is (0, 0, 2), its number there (0, 1, 0), and how many come before
    each (0, 2, 2)."""
    ahead = counts.cumsum(0) - counts
    whose = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return whose, torch.arange(len(whose)) - ahead[whose], ahead


def _packed_windows(cu_seqlens, tokens, ratio, overlap):
    """(ends, index [entries, places], starts) of the windows that there are."""
    ends, first, starts = window_rows(cu_seqlens, tokens, ratio)
    count = int(ends[-1])
    first, starts = first[:count].long(), starts[:count].long()
    index = first[:, None] + torch.arange(-ratio * int(overlap), ratio)
    if overlap:
        index[:, :ratio].masked_fill_((starts == 0)[:, None], -1)
    return ends, index, starts


def _entries(inputs, index, starts, overlap, eps, batch_invariant):
    """Pairs (slice of the entries, their rows [n, D] in fp32, finished)."""
    kv, gate, position_bias, norm_weight, cos, sin = inputs
    bias, norm = _bias_of_places(position_bias, overlap), norm_weight.float()
    for block in _blocks(index, norm.shape[0], batch_invariant):
        rows = index[block]
        z = _values(gate, rows, overlap).add_(bias)
        z = _hidden(z, rows) if overlap else z
        weights = z.sub_(
            z.amax(1, keepdim=True)
        ).exp_()  # torch's softmax over this dimension takes three times as long
        total = weights.sum(1)
        mean = weights.mul_(_values(kv, rows, overlap)).sum(1).div_(total)
        yield block, _finished(mean, norm, cos[starts[block]], sin[starts[block]], eps)


def _blocks(index, width, alone):
    """Slices of the entries: as many as a step takes, or one by one."""
    entries, places = index.shape
    step = 1 if alone else max(1, _MAX_VALUES // (places * width))
    for first in range(0, entries, step):
        yield slice(first, min(first + step, entries))


def _values(rows: torch.Tensor, index: torch.Tensor, overlap: bool) -> torch.Tensor:
    """A copy in fp32 [n, places, D] of the rows in the index [n, places]; with overlap the first halves of the first
    half of the places, then second halves. What is missing is 0."""
    entries, places = index.shape
    if not overlap:
        index = index.flatten()
        if bool((index[1:] - index[:-1] == 1).all()):  # windows side by side
            chosen = rows[int(index[0]) : int(index[-1]) + 1]
        else:
            chosen = rows.index_select(0, index)
        return chosen.view(entries, places, -1).to(torch.float32, copy=True)
    half, width = places // 2, rows.shape[1] // 2
    out = torch.empty(entries, places, width)
    before, own = index[:, :half], index[:, half:]
    missing = before[:, 0] < 0  # a window's whole predecessor, at the start of its sequence
    chosen = rows[:, :width].index_select(0, before.clamp_min(0).flatten())
    out[:, :half] = chosen.view(entries, half, width)
    if missing.any():
        out[missing, :half] = 0.0
    out[:, half:] = rows[:, width:].index_select(0, own.flatten()).view(entries, half, width)
    return out


def _hidden(gates: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gates [n, places, D] with -inf where a window has no token, in place."""
    missing = index[:, 0] < 0
    if missing.any():
        gates[missing, : index.shape[1] // 2] = float("-inf")
    return gates


def _bias_of_places(position_bias, overlap):
    """[places, D] of a position bias [ratio, W]."""
    return torch.cat(position_bias.chunk(2, 1)) if overlap else position_bias


def _put_back(rows: torch.Tensor, values: torch.Tensor, index: torch.Tensor, overlap: bool) -> None:
    """_values the other way round: values [n, places, D] into their places of rows [T, W]; none is taken twice."""
    values = values.to(rows.dtype)
    if not overlap:
        rows.index_copy_(0, index.flatten(), values.flatten(0, 1))
        return
    half, width = index.shape[1] // 2, values.shape[2]
    there = index[:, 0] >= 0
    rows[:, :width].index_copy_(0, index[there, :half].flatten(), values[there, :half].flatten(0, 1))
    rows[:, width:].index_copy_(0, index[:, half:].flatten(), values[:, half:].flatten(0, 1))


def _finished(x, norm_weight, cos, sin, eps) -> torch.Tensor:
    """RMSNorm of x [n, D] fp32, its trailing values turned by the angles [n, rope_dim / 2]."""
    return _turned(torch.rms_norm(x, x.shape[1:], norm_weight.float(), eps), cos, sin)


def _turned(x, cos, sin) -> torch.Tensor:
    passed, turned = x.split_with_sizes((x.shape[1] - 2 * cos.shape[1], 2 * cos.shape[1]), 1)
    return torch.cat((passed, rotate(turned, cos, sin, "interleaved")), 1)


def _store(rows, slots, cache, layout) -> None:
    """Rows [n, D] in fp32 into their slots; -1 writes nothing."""
    if layout == "indexer":
        store_keys(rows, slots, cache)
    else:
        scatter_tokens(rows, rows[:, :0], slots, cache, layout, rows.shape[1])
