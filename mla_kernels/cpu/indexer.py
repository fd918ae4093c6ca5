"""The lightning indexer for CPU tensors: keys into their cache, scores in blocks, the exact choice of the best keys."""

import functools

import torch
import torch.nn.functional as F

from mla_kernels.cpu.alone import each
from mla_kernels.cpu.gemm import linear
from mla_kernels.cpu.latent import decode_e4m3

_MAX_LANES = 1 << 22  # values of a row block held at once, 16 MiB of fp32
_MAX_KEYS = 2048  # keys made fp32 at once
_KEY_STEP = 256  # of these, a block of tokens takes whole steps
_LEAST_AMAX = 448 * 2.0**-13  # no scale is chosen below that of this largest magnitude,
_LEAST_KEY = 1e-4  # or of this one where keys are stored as they come


def indexer_topk(
    logits: torch.Tensor, top_k: int, starts: torch.Tensor | None, ends: torch.Tensor | None
) -> torch.Tensor:
    """Rows in blocks; what lies outside a row's range counts as -inf."""
    rows, columns = logits.shape
    out = torch.full((rows, top_k), -1, dtype=torch.int32)
    wanted = min(top_k, columns)
    if rows == 0 or wanted == 0:
        return out
    step = max(1, _MAX_LANES // columns)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        values = logits[block].nan_to_num(float("-inf"), float("inf"), float("-inf"))
        _hide(values, None if starts is None else starts[block], None if ends is None else ends[block], 0)
        out[block, :wanted] = _best(values, wanted)
    return out


def _hide(values: torch.Tensor, starts: torch.Tensor | None, ends: torch.Tensor | None, first: int) -> None:
    """Make everything outside [starts, ends) of values [rows, columns first..] -inf, in place."""
    column = torch.arange(first, first + values.shape[1])
    if starts is not None and int(starts.max()) > first:
        values.masked_fill_(column < starts.unsqueeze(1), float("-inf"))
    if ends is not None and int(ends.min()) < first + values.shape[1]:
        values.masked_fill_(column >= ends.unsqueeze(1), float("-inf"))


def _best(values: torch.Tensor, wanted: int) -> torch.Tensor:
    """Indices of the largest values of each row, lowest index first among equals, ascending; -1 for -inf."""
    columns = values.shape[1]
    best, index = values.topk(wanted, sorted=False)
    least = best.amin(1, keepdim=True)
    index = index.masked_fill_(best == float("-inf"), columns).sort(1).values
    # torch chooses any of several equal values: rows that leave one of the least out are done again
    tied = ((values >= least).sum(1) > wanted) & (least.squeeze(1) > float("-inf"))
    if tied.any():
        values, least = values[tied], least[tied]
        above, equal = values > least, values == least
        missing = wanted - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
        index[tied] = chosen.nonzero()[:, 1].view(-1, wanted)
    return index.masked_fill_(index == columns, -1).to(torch.int32)


def indexer_logits(q, k, weights, starts, ends, k_scale) -> torch.Tensor:
    """q [T, H, d] against k [S, d]: values, or codes (uint8) with k_scale [S] -> [T, S] fp32."""
    out = torch.full((q.shape[0], k.shape[0]), float("-inf"))
    _score(q, lambda first, last: _values(k[first:last], k_scale, first, last), weights, starts, ends, out)
    return out


def paged_indexer_logits(q, cache, head_dim, weights, block_table, seq_lens, limits) -> torch.Tensor:
    """Sequence by sequence; its keys are gathered and made fp32 in blocks of pages."""
    sequences, queries = q.shape[:2]
    page_size = _page_size(cache, head_dim)
    out = torch.full((sequences, queries, block_table.shape[1] * page_size), float("-inf"))
    for sequence, length in enumerate(seq_lens.tolist()):
        if length > 0:
            starts, ends = _seen(length, queries, limits, sequence)
            keys = _cached(cache, head_dim, block_table[sequence])
            _score(q[sequence], keys, weights[sequence], starts, ends, out[sequence, :, :length])
    return out


def by_query(function):
    """``function`` of q, cache, head_dim, weights, block_table, seq_lens, maybe more, and limits, with one more
    argument, batch_invariant. With it, each query of each sequence is taken alone, from a copy; see :mod:`.alone`."""

    def run(*args):
        q, cache, head_dim, weights, block_table, seq_lens, *more, limits, batch_invariant = args
        if not batch_invariant or 0 in q.shape[:2]:
            return function(*args[:-1])
        queries = q.shape[1]
        results = []
        for query in range(queries):
            own, lengths, seen = slice(query, query + 1), seq_lens, None
            if limits is None:
                lengths = (seq_lens - (queries - 1 - query)).clamp_min(0)
            else:
                seen = limits[:, own]
            one = q[:, own], cache, head_dim, weights[:, own], block_table, lengths, *more, seen
            results.append(each(function, one, (0, 3, 4, 5, len(one) - 1)))
        return torch.cat(results, 1)

    return run


def select_keys(q, k, weights, starts, ends, k_scale, top_k) -> torch.Tensor:
    """Logits of a block of tokens, then its best keys."""
    chosen = torch.empty(q.shape[0], top_k, dtype=torch.int32)
    step = max(1, _MAX_LANES // max(k.shape[0], 1))
    for first in range(0, q.shape[0], step):
        block = slice(first, first + step)
        logits = indexer_logits(q[block], k, weights[block], starts[block], ends[block], k_scale)
        chosen[block] = indexer_topk(logits, top_k, None, None)
    return chosen


def select_slots(q, cache, head_dim, weights, block_table, seq_lens, top_k, limits) -> torch.Tensor:
    """Sequence by sequence: logits of a block of its queries, their best keys, and the slots of these."""
    sequences, queries = q.shape[:2]
    page_size = _page_size(cache, head_dim)
    slots = torch.full((sequences, queries, top_k), -1, dtype=torch.int32)
    for sequence, length in enumerate(seq_lens.tolist()):
        if length <= 0:
            continue
        starts, ends = _seen(length, queries, limits, sequence)
        keys = _cached(cache, head_dim, block_table[sequence])
        step = max(1, _MAX_LANES // length)
        for first in range(0, queries, step):
            block = slice(first, first + step)
            logits = torch.full((len(starts[block]), length), float("-inf"))
            _score(q[sequence, block], keys, weights[sequence, block], starts[block], ends[block], logits)
            position = indexer_topk(logits, top_k, None, None)
            page = block_table[sequence][(position // page_size).clamp_min_(0)]
            slots[sequence, block] = torch.where(position < 0, position, page * page_size + position % page_size)
    return slots


def _score(q, keys, weights, starts, ends, out) -> None:
    """Scores of q [T, H, d] against ``keys(first, last)`` [n, d] fp32, where they are seen, into out [T, S] of -inf."""
    tokens, heads, width = q.shape
    total, weights = out.shape[1], weights.float()
    if tokens == 0 or total == 0:
        return
    low, high = max(int(starts.min()), 0), min(int(ends.max()), total)
    block = min(_MAX_KEYS, max(high - low, 1))
    step = max(1, _MAX_LANES // (heads * block))
    for first in range(low, high, block):
        last = min(first + block, high)
        k = None
        for token in range(0, tokens, step):
            rows = slice(token, token + step)
            # of this block what the tokens may see, in few different sizes: oneDNN prepares itself for each
            start = max(int(starts[rows].min()) - first, 0) // _KEY_STEP * _KEY_STEP
            stop = min(-(-(int(ends[rows].max()) - first) // _KEY_STEP) * _KEY_STEP, last - first)
            if start >= stop:
                continue
            k = keys(first, last).contiguous() if k is None else k
            dots = linear(q[rows].reshape(-1, width).float(), k[start:stop]).relu_().view(-1, heads, stop - start)
            logits = torch.bmm(weights[rows].unsqueeze(1), dots).squeeze(1)
            _hide(logits, starts[rows], ends[rows], first + start)
            out[rows, first + start : first + stop] = logits


def _values(k: torch.Tensor, scale: torch.Tensor | None, first: int, last: int) -> torch.Tensor:
    """Rows of keys in fp32."""
    return k.float() if scale is None else _decoded(k) * scale[first:last].unsqueeze(1)


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of e4m3 bytes (uint8)."""
    return decode_e4m3(codes.view(torch.int8))


def _page_size(cache: torch.Tensor, head_dim: int) -> int:
    return cache.shape[1] // (head_dim + 4) if cache.dtype == torch.uint8 else cache.shape[1]


def _cached(cache: torch.Tensor, head_dim: int, pages: torch.Tensor):
    """A function (first, last) -> fp32 keys [last - first, head_dim] of one sequence."""
    page_size = _page_size(cache, head_dim)

    def keys(first: int, last: int) -> torch.Tensor:
        start = first // page_size
        chosen = cache.index_select(0, pages[start : -(-last // page_size)])
        if cache.dtype == torch.uint8:
            codes, scale = chosen.split((page_size * head_dim, page_size * 4), 1)
            values = _decoded(codes.reshape(-1, head_dim)) * scale.contiguous().view(torch.float32).view(-1, 1)
        else:
            values = chosen.view(-1, head_dim).float()
        return values[first - start * page_size : last - start * page_size]

    return keys


def _seen(length: int, queries: int, limits: torch.Tensor | None, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of the newest tokens of a sequence: query i sees keys up to length - queries + i, or its limit."""
    if limits is None:
        ends = torch.arange(length - queries + 1, length + 1, dtype=torch.int32)
    else:
        ends = limits[sequence].clamp_max(length)
    return torch.zeros_like(ends), ends


def write_indexer_key(
    k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, rope_dim, rope, rope_first, hadamard, eps
) -> None:
    """k [T, d]: LayerNorm, RoPE and Hadamard transform in fp32, rounded or quantised, written to the slots."""
    width = k.shape[1]
    rows = F.layer_norm(k.float(), (width,), norm_weight.float(), norm_bias.float(), eps)
    angles = cos.index_select(0, positions), sin.index_select(0, positions)
    store_keys(transformed(rows, *angles, rope_dim, rope, rope_first, hadamard), slot_mapping, cache)


def scatter_keys(k: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """k [T, d] as it is, or quantised as :func:`mla_kernels.scatter_indexer_keys` says, into the slots."""
    store_keys(k.float() if cache.dtype == torch.uint8 else k, slot_mapping, cache, _LEAST_KEY)


def store_keys(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor, least: float = _LEAST_AMAX) -> None:
    """Finished keys [T, d], rounded or quantised, into their slots; those of slot -1 nowhere."""
    width, slots = rows.shape[1], slot_mapping.long()
    written = slots >= 0
    rows, slots = rows[written], slots[written]
    page_size = _page_size(cache, width)
    page, offset = slots // page_size, slots % page_size
    if cache.dtype != torch.uint8:
        cache[page, offset] = rows.to(cache.dtype)
        return
    codes, scale = _quantised(rows, least)
    cache[:, : page_size * width].unflatten(1, (page_size, width))[page, offset] = codes
    cache[:, page_size * width :].view(torch.float32)[page, offset] = scale


def transformed(x, cos, sin, rope_dim, rope, rope_first, hadamard) -> torch.Tensor:
    """x [..., d] fp32, its first or last values rotated, and the whole through the Hadamard matrix."""
    passed = x.shape[-1] - rope_dim
    sizes = (rope_dim, passed) if rope_first else (passed, rope_dim)
    parts = list(x.split(sizes, -1))
    turned = 0 if rope_first else 1
    parts[turned] = _rotate(parts[turned], cos, sin, rope)
    x = torch.cat(parts, -1)
    return x @ _hadamard(x.shape[-1]) if hadamard else x


@functools.cache
def _hadamard(width: int) -> torch.Tensor:
    """The Sylvester-Hadamard matrix times width^-0.5."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * width**-0.5


def quantise_query(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [..., H, d], weights times their scales [..., H])."""
    codes, scale = _quantised(q.float())
    return codes.view(torch.float8_e4m3fn), weights * scale


def _quantised(rows: torch.Tensor, least: float = _LEAST_AMAX) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 bytes [..., d] and power-of-two scales [...], those of a largest magnitude of ``least`` or more; rows with
    NaN or infinities have scale NaN and codes 0x7F."""
    amax = rows.abs().amax(-1)
    mantissa, exponent = torch.frexp(amax.clamp_min(least) / 448)
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    scale = scale.masked_fill(~amax.isfinite(), float("nan"))
    values = rows / scale.unsqueeze(-1)
    codes = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill_(values.isnan(), 0x7F), scale


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: str) -> torch.Tensor:
    """Turn the pairs of x [..., D] by the angles [..., D / 2]; ``rope`` says where a pair lies before and after."""
    first, second = x.chunk(2, -1) if rope == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.stack(turned, -1).flatten(-2) if rope == "interleaved" else torch.cat(turned, -1)
