"""What DeepSeek-V4's compressors compute: one cached entry per window of tokens, and the raw tokens beside them.

Hugging Face has the same in `DeepseekV4HCACompressor`, `DeepseekV4CSACompressor` and `DeepseekV4Indexer`
(models/deepseek_v4/modeling_deepseek_v4.py); there a cache object carries unfinished windows, here a ring of the newest
tokens does.

Symbols: T new tokens, B sequences, D width of an entry, W width of a token's row (D, or 2 D with overlap), R ratio (the
tokens of a window), E entries.
"""

import torch
from einops import rearrange

from mla_kernels.reference.latent import apply_rope, encode_e4m3, power_of_two_scale, rms_norm, scatter_tokens


def rotate_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the trailing values of x [..., D], neighbours being pairs; cos, sin [..., rope_dim / 2]."""
    rope_dim = 2 * cos.shape[-1]
    passed, turned = x.split([x.shape[-1] - rope_dim, rope_dim], dim=-1)
    return torch.cat([passed, apply_rope(turned, cos, sin, rope="interleaved")], dim=-1)


def write_kv(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    *,
    layout: str | None = None,
    q_a: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor | None:
    """RMSNorm of kv [T, D] over all D, RoPE of its trailing values, written to the slots; see `reference.write_latent`.
    Returns RMSNorm of the latents of queries q_a [T, Q], times q_norm [Q], if they are given.

    cache [pages, page_size, D] in its own dtype, or uint8 in layout "fp8_v4", "fp8_v32" or "int8"
    of latents D wide.
    """
    for token, (slot, position) in enumerate(zip(slot_mapping.tolist(), positions.tolist())):
        if 0 <= slot < cache.shape[0] * cache.shape[1] and 0 <= position < len(cos):
            row = rms_norm(kv[token].to(_wide(kv, norm_weight)), norm_weight, eps=eps)
            store_row(rotate_last(row, cos[position], sin[position]), slot, cache, layout)
    return None if q_a is None else rms_norm(q_a.to(_wide(q_a, q_norm)), q_norm, eps=eps).to(q_a.dtype)


def window_entry(
    kv: torch.Tensor,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    cast_weights: bool = False,
) -> torch.Tensor:
    """RMSNorm(sum_j softmax_j(gate_j) * kv_j), rotated: the entry [D] of one window, before it is rounded.

    kv, gate [slots, D], the position bias in gate already; the softmax is over the slots, for each feature by itself.
    cos, sin [rope_dim / 2]: the row of the window's first position. ``cast_weights`` rounds the softmax's weights and
    their sum to kv's dtype, as Hugging Face does.
    """
    wide = _wide(kv, gate, norm_weight)
    weights = torch.softmax(gate.to(wide), dim=0)
    mean = (weights.to(kv.dtype) * kv if cast_weights else weights * kv.to(wide)).sum(dim=0)
    return rotate_last(rms_norm(mean.to(wide), norm_weight, eps=eps), cos, sin)


def window_slots(
    kv: torch.Tensor, gate: torch.Tensor, position_bias: torch.Tensor, window: int, *, ratio: int, overlap: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the window's softmax runs over: kv and biased gate [slots, D], from a sequence's rows [length, W].

    Without overlap its R tokens. With overlap (W = 2 D) the first halves of the window before's tokens, then the second
    halves of its own; window 0 has only the latter. With R = 2 and D = 1, rows (a b), (c d), (e f), (g h) make window 0
    of b, d and window 1 of a, c, f, h.
    """
    wide = _wide(kv, gate, position_bias)
    biased = rearrange(gate.to(wide), "(window token) width -> window token width", token=ratio) + position_bias.to(
        wide
    )
    kv = rearrange(kv, "(window token) width -> window token width", token=ratio)
    if not overlap:
        return kv[window], biased[window]
    half = kv.shape[-1] // 2
    own = kv[window, :, half:], biased[window, :, half:]
    if window == 0:
        return own
    before = kv[window - 1, :, :half], biased[window - 1, :, :half]
    return torch.cat([before[0], own[0]]), torch.cat([before[1], own[1]])


def compress_windows(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of packed whole sequences, and where each sequence's begin.

    kv, gate          [T, W]: hidden @ kv_proj.weight.T and hidden @ gate_proj.weight.T
    position_bias     [R, W], added to the gate of the token at that place of its window
    norm_weight       [D]
    cos, sin          [positions, rope_dim / 2]
    cu_seqlens        [B + 1] integers: sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1], from position 0

    Returns (entries [T // R, D] in kv's dtype, int32 [B + 1]). Sequence b of length n has n // R entries; those of all
    sequences stand one after another, and rows behind the last are 0. Differentiable.
    """
    entries, ends = [], [0]
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        count = (end - start) // ratio
        rows = slice(start, start + count * ratio)
        for window in range(count):
            slots = window_slots(kv[rows], gate[rows], position_bias, window, ratio=ratio, overlap=overlap)
            angles = cos[window * ratio], sin[window * ratio]
            entries.append(window_entry(*slots, norm_weight, *angles, eps=eps))
        ends.append(ends[-1] + count)
    width = norm_weight.shape[0]
    entries += [norm_weight.new_zeros(width, dtype=_wide(kv))] * (kv.shape[0] // ratio - len(entries))
    packed = torch.stack(entries).to(kv.dtype) if entries else kv.new_zeros(0, width)
    return packed, torch.tensor(ends, dtype=torch.int32)


def write_windows(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    cache: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    max_tokens: int,
    layout: str | None = None,
    eps: float = 1e-6,
) -> None:
    """Keep new tokens in the state, and write the entries of all windows that they complete, in place.

    state         [slots, rows, 2, W]: kv (0) and gate (1) of a sequence's newest tokens, position p in row p % rows
    state_slots   [B]: the slot of each sequence; a sequence without one (-1) is skipped
    cu_seqlens    [B + 1]: the rows of kv and gate that are a sequence's new tokens
    seq_lens      [B]: its length with them
    block_table   [B, P]: its pages of entries; entry e goes to slot block_table[b, e // page_size] * page_size +
                  e % page_size
    cache         as `write_kv` has it, or in layout "indexer" an indexer's cache as `write_indexer_key` has it
    max_tokens    no sequence has more new tokens
    """
    if (cu_seqlens[1:] - cu_seqlens[:-1]).gt(max_tokens).any():
        raise ValueError(f"max_tokens {max_tokens}: a sequence has more new tokens")
    rows = state.shape[1]
    page_size = entries_of_a_page(cache, norm_weight.shape[0], layout)
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        slot, length = int(state_slots[b]), int(seq_lens[b])
        old = length - (end - begin)
        if end == begin or not 0 <= slot < len(state):
            continue
        first = max(old // ratio - overlap, 0) * ratio  # of the oldest token that a window needs
        held = state[slot, [position % rows for position in range(first, old)]]  # [old - first, 2, W]
        whole_kv, whole_gate = torch.cat([held[:, 0], kv[begin:end]]), torch.cat([held[:, 1], gate[begin:end]])
        whole = (length - first) // ratio * ratio
        for window in range(old // ratio, length // ratio):
            place = window - first // ratio
            slots = window_slots(
                whole_kv[:whole], whole_gate[:whole], position_bias, place, ratio=ratio, overlap=overlap
            )
            angles = cos[window * ratio], sin[window * ratio]
            row = window_entry(*slots, norm_weight, *angles, eps=eps)
            page = int(block_table[b, window // page_size])
            store_row(row, page * page_size + window % page_size, cache, layout)
        for position in range(max(old, length - rows), length):
            state[slot, position % rows, 0] = kv[begin + position - old]
            state[slot, position % rows, 1] = gate[begin + position - old]


def write_paged_windows(
    states: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    sequences: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    layout: str | None = None,
    eps: float = 1e-6,
) -> None:
    """Write the entries of the windows that end with tokens which have a slot, in place.

    states        [pages, page_size, 2, W]: of each token kv, then its gate with the position bias in it
    positions     [T]: each token's position
    slot_mapping  [T]: where the entry of its window goes; -1: it ends no window
    sequences     [T]: its row of the table
    block_table   [B, P]: pages of states; position p lies in row p % page_size of page block_table[b, p // page_size]
    cache         as `write_windows` has it
    """
    page_size, width = states.shape[1], norm_weight.shape[0]
    for slot, last, b in zip(slot_mapping.tolist(), positions.tolist(), sequences.tolist()):
        if slot < 0:
            continue
        rows = []
        for position in range(max(last + 1 - ratio * (1 + overlap), 0), last + 1):
            state = states[block_table[b, position // page_size], position % page_size]  # [2, W]
            newer = overlap and position > last - ratio
            rows.append(state[:, width:] if newer else state[:, :width])
        kv, gate = torch.stack(rows, dim=1)
        angles = cos[last + 1 - ratio], sin[last + 1 - ratio]
        store_row(window_entry(kv, gate, norm_weight, *angles, eps=eps), slot, cache, layout)


def entries_of_a_page(cache: torch.Tensor, width: int, layout: str | None) -> int:
    return cache.shape[1] // (width + 4) if layout == "indexer" and cache.dtype == torch.uint8 else cache.shape[1]


def store_row(row: torch.Tensor, slot: int, cache: torch.Tensor, layout: str | None) -> None:
    """One row [D] into its slot, rounded or quantised once."""
    width = row.shape[0]
    page_size = entries_of_a_page(cache, width, layout)
    page, offset = cache[slot // page_size], slot % page_size
    if layout in ("fp8_v32", "fp8_v4", "int8"):
        scatter_tokens(row[None], row[None, :0], torch.tensor([slot]), cache, latent_dim=width, layout=layout)
    elif cache.dtype == torch.uint8:
        scale = power_of_two_scale(row.abs().amax())
        page[offset * width : (offset + 1) * width] = encode_e4m3(row / scale)
        start = page_size * width + offset * 4
        page[start : start + 4] = scale.float()[None].view(torch.uint8)
    else:
        page[offset] = row.to(cache.dtype)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
