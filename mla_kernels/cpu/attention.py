"""Absorbed MLA decode over a paged latent cache, and the merge of partial results, for CPU tensors."""

import torch

_MAX_SCORES = 1 << 22  # scores held at once, 16 MiB of fp32
_MAX_ROWS = 4096  # query rows (queries x heads) handled at once
_MAX_KEYS, _MIN_KEYS = 8192, 512  # cached tokens handled at once; gathered, 8192 of V3 take 9 MiB in bfloat16
_FEW_ROWS = 16  # fewer query rows than this are multiplied in fp32, whose conversion of the keys is then affordable
_LOWEST = torch.finfo(torch.float32).min


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    latent_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence, so that no result depends on the rest of the batch; heads are the rows of each product.

    The work is cut into blocks whose sizes depend on the sequence's own length, the heads and the queries.
    """
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, latent_dim)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32)
    step = max(1, _MAX_ROWS // max(heads, 1))
    for sequence, length in enumerate(seq_lens.tolist()):
        pages = block_table[sequence]
        for first in range(0, queries, step):
            last = min(first + step, queries)
            limits = range(length - queries + first + 1, length - queries + last + 1) if causal else None
            out[sequence, first:last], lse[sequence, first:last] = _attend(
                q[sequence, first:last], cache, pages, length, limits, softmax_scale, latent_dim
            )
    return out, lse


def _attend(q, cache, pages, length, limits, scale, latent_dim):
    """q [queries, heads, width] against one sequence -> out [queries, heads, latent_dim], lse [queries, heads].

    ``limits`` says how many tokens each query sees (None: all of ``length``).
    """
    queries, heads, width = q.shape
    rows = queries * heads
    seen = length if limits is None else max(limits[-1], 0)
    if seen == 0 or rows == 0:
        return q.new_zeros(queries, heads, latent_dim), torch.full((queries, heads), float("-inf"))
    # bfloat16 products are fast on CPUs that have it, but round their scores, which a few rows do not average out;
    # float16 ones are slow
    dtype = torch.float32 if q.dtype == torch.float16 or rows < _FEW_ROWS else q.dtype
    q_rows = q.reshape(rows, width).to(dtype)
    most = min(_MAX_KEYS, max(_MIN_KEYS, _MAX_SCORES // rows))
    block = -(-seen // -(-seen // most))  # equal blocks, not a full one and a tail
    state = None
    for start in range(0, seen, block):
        stop = min(start + block, seen)
        keys = _tokens(cache, pages, start, stop).to(dtype)  # [block, width]
        scores = torch.mm(q_rows, keys.t()).float().mul_(scale)  # [rows, block]
        if limits is not None and stop > limits[0]:
            hidden = torch.arange(start, stop) >= torch.tensor(limits).unsqueeze(1)  # [queries, block]
            scores.view(queries, heads, -1).masked_fill_(hidden.unsqueeze(1), float("-inf"))
        largest = scores.amax(-1, keepdim=True).clamp_min_(_LOWEST)  # finite: where nothing is seen, exp(-inf) = 0
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        acc = torch.mm(weights.to(dtype), keys[:, :latent_dim]).float()  # [rows, latent_dim]
        state = (acc, total, largest) if state is None else _join(*state, acc, total, largest)
    acc, total, largest = state
    lse = (total.log() + largest).view(queries, heads)
    return acc.div_(total.clamp_min(1.0)).view(queries, heads, latent_dim), lse  # total is 0, or at least exp(0)


def _join(acc, total, largest, other_acc, other_total, other_largest):
    """Two running softmax states as one."""
    top = torch.maximum(largest, other_largest)
    keep, enter = (largest - top).exp_(), (other_largest - top).exp_()
    return acc.mul_(keep).add_(other_acc.mul_(enter)), total * keep + other_total * enter, top


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


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """outs [parts, ..., d], lses [parts, ...]: one pass over the parts, weighted by exp(lse - merged lse)."""
    lse = torch.logsumexp(lses, 0)
    weights = (lses - lse.clamp_min(_LOWEST)).exp_().unsqueeze(-1)  # [parts, ..., 1]; 0 where all parts are empty
    empty = torch.isneginf(lses)
    if empty.any():  # an empty part may hold anything
        outs = outs.masked_fill(empty.unsqueeze(-1), 0.0)
    acc = outs[0] * weights[0]  # fp32
    for part in range(1, outs.shape[0]):
        acc.addcmul_(outs[part], weights[part])
    return acc.to(outs.dtype), lse
