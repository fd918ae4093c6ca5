"""Absorbed MLA decode over a paged latent cache, and the merge of partial results, for CPU tensors."""

import torch

from mla_kernels.cpu.alone import copied, joined
from mla_kernels.cpu.softmax import finished, fused_attention, fused_part, join, softmax_part
from mla_kernels.quant.cache_layout import CacheLayout, PagedTokens

_MAX_SCORES = 1 << 22  # scores held at once, 16 MiB of fp32
_MAX_ROWS = 4096  # query rows (queries x heads) handled at once
_MAX_KEYS, _MIN_KEYS = 8192, 512  # cached tokens handled at once; gathered, 8192 of V3 take 9 MiB in bfloat16
_FEW_ROWS = 16  # fewer query rows than this are multiplied in fp32
_DECODED = 1024  # quantised tokens decoded at once: what that takes stays in the processor's cache
_LOWEST = torch.finfo(torch.float32).min
_INF = float("inf")


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sink: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    window: int,
    layout: str,
    latent_dim: int,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence, so that no result depends on the rest of the batch; heads are the rows of each product.

    The work is cut into blocks whose sizes depend on the sequence's own length, the heads and the queries. With
    ``batch_invariant`` query by query, on copies of the keys: a product's bits may follow from where its operands lie.
    """
    batch, queries, heads, _ = q.shape
    cache = PagedTokens(cache, latent_dim, CacheLayout(layout))
    out = q.new_empty(batch, queries, heads, latent_dim)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32)
    step = 1 if batch_invariant else max(1, _MAX_ROWS // max(heads, 1))
    for sequence, length in enumerate(seq_lens.tolist()):
        pages = block_table[sequence]
        for first in range(0, queries, step):
            last = min(first + step, queries)
            limits = range(length - queries + first + 1, length - queries + last + 1) if causal else None
            attended, lse[sequence, first:last] = _attend(
                q[sequence, first:last], cache, pages, length, limits, window, softmax_scale, batch_invariant
            )
            if sink is not None:
                attended *= torch.sigmoid(lse[sequence, first:last] - sink).nan_to_num_(0.0).unsqueeze(-1)
            out[sequence, first:last] = attended
    return out, lse


def _attend(q, cache, pages, length, limits, window, scale, alone):
    """q [queries, heads, width] against one sequence -> out [queries, heads, latent_dim] fp32, lse [queries, heads].

    ``limits`` says how many tokens each query sees (None: all of ``length``), of which ``window`` are not too old.
    """
    queries, heads, width = q.shape
    rows = queries * heads
    seen = length if limits is None else max(limits[-1], 0)
    oldest = 0 if limits is None else max(limits[0] - window, 0)
    if seen == 0 or rows == 0:
        return torch.zeros(queries, heads, cache.latent_dim), torch.full((queries, heads), float("-inf"))
    q_rows, fused = q.reshape(1, rows, width), is_fused(q, rows, cache)
    if alone:
        q_rows = copied(q_rows)
    state = None
    for start, stop, masked in _runs(oldest, seen, limits, window):
        by_torch = fused and not masked
        most = _MAX_KEYS if by_torch else min(_MAX_KEYS, max(_MIN_KEYS, _MAX_SCORES // rows))
        block = -(-(stop - start) // -(-(stop - start) // most))  # equal blocks, not a full one and a tail
        dtype, part_of = (q.dtype, fused_part) if by_torch else (torch.float32, softmax_part)
        for first in range(start, stop, block):
            last = min(first + block, stop)
            keys = _values(_tokens(cache.data, pages, first, last), cache, dtype)[None]  # [1, block, width]
            if alone and not cache.layout.quantised:
                keys = copied(keys)
            hidden = _hidden(first, last, limits, window, heads) if masked else None
            part = part_of(q_rows.to(dtype), keys, cache.latent_dim, scale, hidden)
            state = part if state is None else join(*state, *part)
    out, lse = finished(*state)
    return out.view(queries, heads, cache.latent_dim), lse.view(queries, heads)


def is_fused(q: torch.Tensor, rows: int, cache: PagedTokens) -> bool:
    """Whether torch's fused attention multiplies, in bfloat16, and not torch.mm in float32.

    For a few rows the conversion of the keys is affordable; float16 products are slow on CPUs; int8 codes times a scale
    are no bfloat16 numbers.
    """
    kept = cache.layout is not CacheLayout.INT8
    return q.dtype == torch.bfloat16 and rows >= _FEW_ROWS and kept and fused_attention() is not None


def _runs(oldest, seen, limits, window):
    """(start, stop, masked) of tokens oldest to seen: those that only some of the queries see are masked."""
    start, stop = oldest, seen
    if limits is not None:  # of all queries: from the newest one's first token on, up to the oldest one's last
        start, stop = max(oldest, limits[-1] - window), min(seen, limits[0])
    if start >= stop:
        return [(oldest, seen, True)]
    runs = [(oldest, start, True), (start, stop, False), (stop, seen, True)]
    return [run for run in runs if run[0] < run[1]]


def _hidden(first, last, limits, window, heads):
    """[1, queries * heads, last - first]: which tokens a query does not see."""
    at, limit = torch.arange(first, last), torch.tensor(limits).unsqueeze(1)
    return ((at >= limit) | (at < limit - window)).repeat_interleave(heads, 0)[None]


def _values(tokens: torch.Tensor, cache: PagedTokens, dtype: torch.dtype) -> torch.Tensor:
    """Tokens as they lie in ``cache`` -> their values [tokens, width] in ``dtype``."""
    if not cache.layout.quantised:
        return tokens.to(dtype)
    values = torch.empty(tokens.shape[0], cache.width, dtype=dtype)
    for first in range(0, tokens.shape[0], _DECODED):
        part = PagedTokens(tokens[None, first : first + _DECODED], cache.latent_dim, cache.layout)
        latents = values[first : first + _DECODED, : cache.latent_dim]
        if cache.layout is CacheLayout.FP8_V32:
            latents = latents.unflatten(1, (part.scales.shape[-1], -1))
            latents.copy_(_e4m3_as_fp16(part.latents[0]).view(latents.shape) * (part.scales[0, :, :, None] * 256))
        else:
            torch.mul(part.latents[0], part.scales[0], out=latents)  # rounded once, to dtype
        values[first : first + _DECODED, cache.latent_dim :] = part.rope[0]
    return values


def _e4m3_as_fp16(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes -> 2^-8 of their values, exactly; torch's own conversion is not vectorised.

    The bits but the sign move under fp16's exponent, whose bias is 15, not 7.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16)


def _tokens(cache: torch.Tensor, pages: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Cached tokens start to stop of a sequence, [stop - start, width]: a view where its pages lie in order."""
    page_size = cache.shape[1]
    first = start // page_size
    pages = pages[first : -(-stop // page_size)]
    page = int(pages[0])
    count = pages.shape[0]
    if count == 1 or torch.equal(pages, torch.arange(page, page + count, dtype=pages.dtype)):
        chosen = cache[page : page + count]
    else:
        chosen = cache.index_select(0, pages)
    return chosen.reshape(count * page_size, cache.shape[2])[start - first * page_size : stop - first * page_size]


def seen_lses(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """lses with -inf for +inf beside outs that are all 0, a part that saw nothing, and NaN for +inf beside others."""
    infinite = lses == _INF
    empty = infinite & (outs == 0.0).all(-1)
    return lses.masked_fill(infinite, float("nan")).masked_fill(empty, -_INF)


def merge_states_op(outs, lses, batch_invariant):
    """Row by row of the first dimension behind the parts where ``batch_invariant``; see :mod:`.alone`."""
    if not batch_invariant or lses.dim() < 2 or lses.shape[1] == 0:
        return merge_states(outs, lses)
    rows = (slice(row, row + 1) for row in range(lses.shape[1]))
    return joined([merge_states(copied(outs[:, row]), copied(lses[:, row])) for row in rows])


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """outs [parts, ..., d], lses [parts, ...]: one pass over the parts, weighted by exp(lse - merged lse)."""
    if (lses == _INF).any():
        lses = seen_lses(outs, lses)
    lse = torch.logsumexp(lses, 0)
    weights = (lses - lse.clamp_min(_LOWEST)).exp_().unsqueeze(-1)  # [parts, ..., 1]; 0 where all parts are empty
    empty = torch.isneginf(lses)
    if empty.any():  # an empty part may hold anything
        outs = outs.masked_fill(empty.unsqueeze(-1), 0.0)
    acc = outs[0] * weights[0]  # fp32
    for part in range(1, outs.shape[0]):
        acc.addcmul_(outs[part], weights[part])
    return acc.to(outs.dtype), lse
