"""The indexer's scores in DeepGEMM's layouts, for CPU tensors: those of :mod:`mla_kernels.cpu.indexer` over keys that
are made values first."""

import torch

from mla_kernels.cpu import indexer
from mla_kernels.cpu.alone import copied
from mla_kernels.quant.mxfp4 import decode_e2m1, decode_ue8m0, exponents_of

_GROUP = 32  # columns that share an exponent


def mqa_logits(q, k, k_scale, form, weights, starts, ends, out, compact, clean, batch_invariant) -> None:
    """q [T, H, d] against k [S, bytes] -> out [T, C], with ``compact`` from each token's first key on."""
    if batch_invariant and len(q) != 1:
        for row in range(len(q)):
            one = slice(row, row + 1)
            own = copied(q[one]), k, k_scale, form, copied(weights[one]), starts[one], ends[one], out[one]
            mqa_logits(*own, compact, clean, False)
        return
    values = dequantised(k.view(torch.uint8), k_scale, form)
    logits = indexer.indexer_logits(_queries(q, form), values, weights, starts, ends, None)
    if not compact:
        out.copy_(logits)
        return
    column = torch.arange(out.shape[1])
    place = starts.clamp_min(0).unsqueeze(1) + column
    seen = place < ends.clamp_max(logits.shape[1]).unsqueeze(1)
    place = place.clamp_max_(max(logits.shape[1] - 1, 0))
    if logits.shape[1]:
        out.copy_(torch.where(seen, logits.gather(1, place), float("-inf")))
    else:
        out.fill_(float("-inf"))


def paged_mqa_logits(q, cache, form, weights, block_table, limits, out, clean, batch_invariant) -> None:
    """q [B, S_q, H, d] against the first limits [B, S_q] keys of each sequence -> out [B * S_q, C]."""
    sequences, tokens, heads, width = q.shape
    if batch_invariant and sequences * tokens != 1:
        for row in range(sequences * tokens):
            one, place = slice(row, row + 1), (row // tokens, row % tokens)
            own = copied(q[place][None, None]), cache, form, copied(weights[one])
            paged_mqa_logits(*own, block_table[place[0]][None], limits[place][None, None], out[one], clean, False)
        return
    key_bytes = width // 2 if form == "mxfp4" else width
    page_size = cache.shape[1] // (key_bytes + 4)
    q, weights = _queries(q, form), weights.view(sequences, tokens, heads)
    out.fill_(float("-inf"))
    for sequence, length in enumerate(limits.amax(1).tolist() if tokens else []):
        length = min(length, block_table.shape[1] * page_size, out.shape[1])
        if length <= 0:
            continue
        pages = cache.index_select(0, block_table[sequence, : -(-length // page_size)])
        codes, scale = pages.split((page_size * key_bytes, page_size * 4), 1)
        scale = scale.contiguous().view(torch.float32 if form == "fp8" else torch.int32).view(-1)
        k = dequantised(codes.reshape(-1, key_bytes), scale, form)[:length]
        ends = limits[sequence]
        rows = slice(sequence * tokens, (sequence + 1) * tokens)
        logits = indexer.indexer_logits(q[sequence], k, weights[sequence], torch.zeros_like(ends), ends, None)
        out[rows, :length] = logits


def _queries(q, form):
    """Queries as fp32 in the order of the keys' columns."""
    q = q.float()
    return q.unflatten(-1, (2, -1)).mT.flatten(-2) if form == "mxfp4" else q  # even columns stand before odd ones


def dequantised(codes, scale, form):
    """fp32 keys [S, d] of bytes [S, ...] and their scales [S]: fp32, or int32 of four exponents."""
    if form == "fp8":
        return indexer._decoded(codes) * scale.unsqueeze(1)
    if form == "mxfp4":
        values = torch.stack((decode_e2m1(codes << 4), decode_e2m1(codes & 0xF0)), -1).flatten(1).float()
    else:
        values = indexer._decoded(codes)
    powers = decode_ue8m0(exponents_of(scale))
    return values * powers[:, : -(-values.shape[1] // _GROUP)].repeat_interleave(_GROUP, 1)
