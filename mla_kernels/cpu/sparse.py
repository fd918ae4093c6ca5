"""Sparse MLA for CPU tensors, and its gradients.

Picked rows are gathered, then multiplied in batches over tokens. Many tokens over few rows take every row instead, and
the products of blocks of tokens are weighted by how often each token picks each row: see ``_dense_rows``.
"""

import torch

from mla_kernels.cpu.alone import copied, joined
from mla_kernels.cpu.attention import is_fused
from mla_kernels.cpu.gemm import linear
from mla_kernels.cpu.latent import decode_e4m3, v4_values
from mla_kernels.cpu.softmax import finished, fused_attention, fused_part, join, softmax_part
from mla_kernels.quant.cache_layout import SCALE_BLOCK, CacheLayout, PagedTokens

_MAX_GATHERED = 1 << 20  # numbers of picked rows held at once, 2 MiB of bfloat16
_MAX_SCORES = 1 << 20  # scores held at once, 4 MiB of fp32
_MAX_PICKS = 4096  # picks of one token handled at once
_FIXED_PICKS = 512  # the same where bits must not depend on the batch: always so many, absent ones among them
_FEW_HEADS = 16  # in the backward pass fewer heads than this are multiplied in fp32
_DENSE_TOKENS = 32  # from this many tokens on, and
_DENSE_ROWS = 4  # at most this many rows a pick, all rows are multiplied: what that adds costs less than gathering;
_DENSE_ROWS_MANY_HEADS = 2  # more than 32 heads get more out of the rows that they gather
_DENSE_SCORES = 1 << 21  # scores of a block of tokens over all rows, 8 MiB of fp32
_LOWEST = torch.finfo(torch.float32).min


def sparse_mla_prefill(
    q, kv, indices, softmax_scale, latent_dim, topk_length, sink, max_logits=True, batch_invariant=False,
):  # fmt: skip
    """q [T, heads, width], kv [S, width], indices [T, top_k] -> out, lse, max_logits (empty unless asked for)."""
    cache = PagedTokens(kv[:, None], latent_dim, CacheLayout.of(kv.dtype))
    dtype = q.dtype if is_fused(q, q.shape[1], cache) and not max_logits else torch.float32
    rows = None if batch_invariant else _dense_rows(q, kv, indices, topk_length, dtype)
    if batch_invariant:
        results = _one_by_one(q, [(cache, indices, topk_length)], softmax_scale, latent_dim, sink, dtype)
    elif rows is not None:
        results = _dense_forward(q, rows, indices, softmax_scale, latent_dim, topk_length, sink)
    else:
        results = _forward(q, [(cache, indices, topk_length)], softmax_scale, latent_dim, sink, dtype)
    return results if max_logits else (*results[:2], results[2].new_empty(0))


def sparse_mla_decode(
    q, cache, indices, softmax_scale, layout, latent_dim, topk_length, sink, extra_cache, extra_indices,
    extra_topk_length, batch_invariant=False,
):  # fmt: skip
    """q [B, S_q, heads, width], indices [B, S_q, top_k] of cache slots -> out, lse."""
    sources = [(PagedTokens(cache, latent_dim, CacheLayout(layout)), indices.flatten(0, 1), topk_length)]
    if extra_cache is not None:
        extra = PagedTokens(extra_cache, latent_dim, CacheLayout(layout))
        sources.append((extra, extra_indices.flatten(0, 1), extra_topk_length))
    queries = q.shape[1]
    dtype = q.dtype if is_fused(q, q.shape[2], sources[0][0]) else torch.float32
    sources = [(c, i, None if n is None else n.repeat_interleave(queries)) for c, i, n in sources]
    forward = _one_by_one if batch_invariant else _forward
    out, lse, _ = forward(q.flatten(0, 1), sources, softmax_scale, latent_dim, sink, dtype)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])


def _forward(q, sources, scale, latent_dim, sink, dtype):
    """Blocks of tokens against blocks of picks, whose sizes depend on heads, widths and the number of picks alone.

    In bfloat16 torch's fused attention multiplies, and the largest scores are not known.
    """
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, latent_dim)
    lse, max_logits = (torch.full((tokens, heads), float("-inf")) for _ in range(2))
    part_of = softmax_part if dtype == torch.float32 else fused_part
    for token in _blocks(tokens, _tokens_at_once(q, max(indices.shape[1] for _, indices, _ in sources))):
        q_block = q[token].to(dtype)
        state = None
        for cache, indices, lengths in sources:
            ids, seen = _picks(cache.num_slots, indices[token], None if lengths is None else lengths[token])
            for pick in _blocks(ids.shape[1], _MAX_PICKS):
                rows = _gather(cache, ids[:, pick], seen[:, pick], dtype)  # [tokens, picks, width]
                hidden = None if seen[:, pick].all() else ~seen[:, None, pick]
                part = part_of(q_block, rows, latent_dim, scale, hidden)
                state = part if state is None else join(*state, *part)
        if state is None:
            out[token] = 0.0
            continue
        max_logits[token] = state[2].masked_fill(state[1] == 0.0, float("-inf")).squeeze(-1)
        attended, lse[token] = finished(*state)
        if sink is not None:
            attended.mul_(_gate(lse[token], sink).unsqueeze(-1))
        out[token] = attended
    return out, lse, max_logits


def _one_by_one(q, sources, scale, latent_dim, sink, dtype):
    """:func:`_forward` with bits that do not depend on other tokens or on the number of absent picks: a token at a
    time, in products of one size, over copies of rows, which lie on the same bytes of a cache line."""
    results = []
    for token in range(q.shape[0]):
        one = slice(token, token + 1)
        few = []
        for cache, indices, lengths in sources:
            picks = indices[one] if lengths is None else indices[one, : max(int(lengths[token]), 0)]
            used = ((picks[0] >= 0) & (picks[0] < cache.num_slots)).nonzero()
            count = int(used[-1]) + 1 if used.numel() else 0
            for first in range(0, count, _FIXED_PICKS):
                block = torch.full((1, _FIXED_PICKS), -1, dtype=indices.dtype)
                part = picks[:, first : min(first + _FIXED_PICKS, count)]
                block[:, : part.shape[1]] = part
                few.append((cache, block, None))
        row = copied(q[one])
        results.append(
            _forward(row, few or [(sources[0][0], sources[0][1][one, :0], None)], scale, latent_dim, sink, dtype)
        )
    if not results:
        return _forward(q, sources, scale, latent_dim, sink, dtype)
    return joined(results)


def sparse_mla_prefill_backward(
    q, kv, indices, out, lse, out_grad, lse_grad, softmax_scale, latent_dim, topk_length, sink
):
    """Gradients of q, kv and sink (fp32 [heads]), block by block as forward; see attention/sparse/backward.py."""
    tokens, heads, _ = q.shape
    dtype = torch.float32 if q.dtype == torch.float16 or heads < _FEW_HEADS else q.dtype
    all_rows = _dense_rows(q, kv, indices, topk_length, dtype)
    cache = PagedTokens(kv[:, None], latent_dim, CacheLayout.of(kv.dtype))
    q_grad = torch.zeros(q.shape, dtype=q.dtype)
    kv_grad = torch.zeros(kv.shape, dtype=torch.float32)
    sink_grad = torch.zeros(heads, dtype=torch.float32)
    step = _tokens_at_once(q, indices.shape[1]) if all_rows is None else _dense_tokens(q, all_rows)
    for token in _blocks(tokens, step):
        q_block, grad = q[token].to(dtype), out_grad[token].float()
        delta = (grad * out[token].float()).sum(-1, keepdim=True)  # [tokens, heads, 1]
        shift = delta - lse_grad[token].unsqueeze(-1)
        if sink is not None:
            gate = _gate(lse[token], sink).unsqueeze(-1)
            sink_grad -= ((1.0 - gate) * delta).sum((0, 2))
            shift = gate * delta - lse_grad[token].unsqueeze(-1)
            grad = grad * gate
        grad = grad.to(dtype)
        base = lse[token].clamp_min(_LOWEST).unsqueeze(-1)
        ids, seen = _picks(kv.shape[0], indices[token], None if topk_length is None else topk_length[token])
        if all_rows is not None:
            part = _counted_rows(ids, seen)
            if part is not None:
                arguments = (q_block, grad, all_rows[part[0]], part[1], base, shift, softmax_scale)
                q_grad[token], rows_grad = _dense_gradients(*arguments)
                kv_grad[part[0]] += rows_grad
            continue
        acc = torch.zeros(q_block.shape, dtype=torch.float32)
        for pick in _blocks(ids.shape[1], _MAX_PICKS):
            rows = _gather(cache, ids[:, pick], seen[:, pick], dtype)
            scores = torch.bmm(q_block, rows.transpose(1, 2)).float().mul_(softmax_scale)
            weights = scores.sub_(base).exp_().masked_fill_(~seen[:, None, pick], 0.0)  # [tokens, heads, picks]
            toward = torch.bmm(grad, rows[..., :latent_dim].transpose(1, 2)).float()
            scores_grad = toward.sub_(shift).mul_(weights).mul_(softmax_scale).to(dtype)
            acc += torch.bmm(scores_grad, rows)
            rows_grad = torch.bmm(scores_grad.transpose(1, 2), q_block).float()
            rows_grad[..., :latent_dim] += torch.bmm(weights.to(dtype).transpose(1, 2), grad)
            kv_grad.index_add_(0, ids[:, pick].flatten(), rows_grad.flatten(0, 1))  # an absent pick adds 0 to row 0
        q_grad[token] = acc
    return q_grad, kv_grad.to(kv.dtype), sink_grad


def _dense_rows(q, kv, indices, lengths, dtype):
    """kv in ``dtype`` for products over all rows, rows that nothing picks finite; None where picks are to be gathered.

    One token's result has other bits there, since its sums run over all rows; which of both it is depends on the
    shapes, but for non-finite rows that are picked: they must reach the tokens that picked them alone.
    """
    tokens, heads, _ = q.shape
    rows, top_k = kv.shape[0], indices.shape[1]
    limit = top_k * (_DENSE_ROWS if heads <= 32 else _DENSE_ROWS_MANY_HEADS)
    if tokens < _DENSE_TOKENS or rows > limit or rows * heads > _DENSE_SCORES:
        return None
    broken = ~kv.isfinite().all(1)
    if broken.any():
        ids, seen = _picks(rows, indices, lengths)
        if (broken[ids] & seen).any():
            return None
        kv = kv.masked_fill(broken.unsqueeze(1), 0.0)
    return kv.to(dtype)


def _dense_tokens(q, rows):
    return max(1, _DENSE_SCORES // (rows.shape[0] * q.shape[1]))


def _counted_rows(ids, seen):
    """The rows from the first to the last one picked, and how often each token picks each, fp32 [tokens, rows]."""
    if not seen.any():
        return None
    first = int(torch.where(seen, ids, torch.iinfo(ids.dtype).max).amin())
    rows = slice(first, int(ids.amax()) + 1)  # an absent pick's id is 0
    counts = torch.zeros(ids.shape[0], rows.stop - first)
    return rows, counts.scatter_add_(1, (ids - first).clamp_min_(0), seen.float())


def _dense_forward(q, kv, indices, scale, latent_dim, lengths, sink):
    """Blocks of tokens against all the rows between the first and the last one that a token of the block picks."""
    tokens, heads, _ = q.shape
    out = q.new_zeros(tokens, heads, latent_dim)
    lse, max_logits = (torch.full((tokens, heads), float("-inf")) for _ in range(2))
    attend = _dense_softmax if kv.dtype == torch.float32 else _dense_fused
    for token in _blocks(tokens, _dense_tokens(q, kv)):
        part = _counted_rows(*_picks(kv.shape[0], indices[token], None if lengths is None else lengths[token]))
        if part is None:
            continue
        rows, counts = part
        nothing = (~counts.any(1)).unsqueeze(1)
        acc, part_lse, top = attend(q[token].to(kv.dtype), kv[rows], counts, scale, latent_dim)
        lse[token] = part_lse.masked_fill(nothing, float("-inf"))
        if top is not None:
            max_logits[token] = top.masked_fill(nothing, float("-inf"))
        if sink is not None:
            acc = acc * _gate(lse[token], sink).unsqueeze(-1)
        out[token] = acc.masked_fill(nothing.unsqueeze(2), 0.0)
    return out, lse, max_logits


def _dense_softmax(q, rows, counts, scale, latent_dim):
    """q [tokens, heads, width] over rows, each as often as counts [tokens, rows] says: out, lse and largest score, in
    fp32. What a token without a pick gets is finite."""
    shape = q.shape[:2]
    logits = _product(q.flatten(0, 1), rows.t()).unflatten(0, shape)
    bias = counts.log().masked_fill_(~counts.any(1, keepdim=True), 0.0).unsqueeze(1)
    scores = torch.add(bias, logits, alpha=scale)
    top = scores.amax(-1)
    weights = scores.softmax(-1)
    lse = top - weights.amax(-1).log_()
    if counts.amax() > 1.0:  # the logarithm of a count is no part of a logit
        top = scores.sub_(bias.clamp_min(0.0)).amax(-1)
    return _product(weights.flatten(0, 1), rows[:, :latent_dim]).unflatten(0, shape), lse, top


def _dense_fused(q, rows, counts, scale, latent_dim):
    """The same of bfloat16, without the largest score."""
    shape = q.shape[:2]
    bias = counts.log().repeat_interleave(shape[1], 0)[None, None]  # [1, 1, tokens * heads, rows]
    rows = rows[None, None]
    out, lse = fused_attention()(q.flatten(0, 1)[None, None], rows, rows, attn_mask=bias, scale=scale)
    return out[0, 0, :, :latent_dim].unflatten(0, shape), lse.view(shape), None


def _dense_gradients(q, grad, rows, counts, base, shift, scale):
    """Gradients of q [tokens, heads, width] and of rows, whose latents are as wide as grad."""
    shape, latent_dim = q.shape, grad.shape[2]
    q, grad = q.flatten(0, 1), grad.flatten(0, 1)
    logits = _product(q, rows.t()).unflatten(0, shape[:2])
    scores = torch.add(counts.log().unsqueeze(1), logits, alpha=scale)
    weights = scores.sub_(base).exp_()
    toward = _product(grad, rows[:, :latent_dim].t()).unflatten(0, shape[:2])
    scores_grad = torch.sub(toward, shift).mul_(weights).mul_(scale).to(q.dtype).flatten(0, 1)
    weights = weights.to(q.dtype).flatten(0, 1)
    rows_grad = _product(scores_grad.t(), q).float()
    rows_grad[:, :latent_dim] += _product(weights.t(), grad)
    return _product(scores_grad, rows).unflatten(0, shape[:2]), rows_grad


def _product(x, y):
    """x [m, k] times y [k, n], of any strides."""
    return linear(x.contiguous(), y.t().contiguous()) if x.dtype == torch.float32 else torch.mm(x, y)


def _tokens_at_once(q, picks):
    picks = max(1, min(picks, _MAX_PICKS))
    return max(1, min(_MAX_GATHERED // (picks * q.shape[2]), _MAX_SCORES // (picks * q.shape[1])))


def _blocks(count, step):
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _picks(num_slots, indices, lengths):
    """Slots, 0 where an index picks nothing, and which of them count: int64 and bool [tokens, picks]."""
    seen = (indices >= 0) & (indices < num_slots)
    if lengths is not None:
        seen &= torch.arange(indices.shape[1]) < lengths.unsqueeze(1)
    return indices.long().masked_fill_(~seen, 0), seen


def _gather(cache, ids, seen, dtype):
    """Picked rows [tokens, picks, width] in ``dtype``, zero where nothing is picked."""
    data, flat = cache.data, ids.flatten()
    if cache.layout is CacheLayout.FP8_V4:
        rows = v4_values(data, cache.latent_dim, flat)
    elif cache.page_size == 1 or cache.num_pages == 1 or data.stride(0) == cache.page_size * data.stride(1):
        stride = data.stride(0) if cache.page_size == 1 else data.stride(1)
        rows = data.as_strided((cache.num_slots, data.shape[2]), (stride, 1)).index_select(0, flat)
    else:
        rows = data[flat // cache.page_size, flat % cache.page_size]
    if cache.layout.quantised and cache.layout is not CacheLayout.FP8_V4:
        rows = _dequantise(PagedTokens(rows[None], cache.latent_dim, cache.layout), dtype)
    rows = rows.to(dtype)
    absent = (~seen).flatten().nonzero().squeeze(1)
    if absent.numel():
        rows.index_fill_(0, absent, 0.0)  # index_select returned a copy
    return rows.unflatten(0, ids.shape)


def _dequantise(rows: PagedTokens, dtype: torch.dtype) -> torch.Tensor:
    """A cache of one page -> its values [tokens, width] in ``dtype``, which those of int8 need to be float32."""
    codes, scales = rows.latents[0], rows.scales[0]
    if rows.layout is CacheLayout.FP8_V32:
        values = decode_e4m3(codes.view(torch.int8)).unflatten(-1, (-1, SCALE_BLOCK)) * scales.unsqueeze(-1)
    else:
        values = codes.float().unsqueeze(-2) * scales.unsqueeze(-1)
    return torch.cat([values.flatten(-2).to(dtype), rows.rope[0].to(dtype)], -1)


def _gate(lse, sink):
    """sigmoid(lse - sink) [tokens, heads], 1 for a row that saw nothing."""
    return torch.sigmoid(lse.clamp_min(_LOWEST) - sink).masked_fill_(torch.isneginf(lse), 1.0)
