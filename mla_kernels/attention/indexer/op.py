"""Scores of the lightning indexer: indexer_logits (keys in rows) and paged_indexer_logits (keys in a paged cache)."""

import torch

from mla_kernels.attention.indexer.forward import (
    E4M3,
    MAX_HEADS,
    empty_logits,
    empty_paged_logits,
    launch_logits,
    launch_paged_logits,
)
from mla_kernels.attention.indexer.topk import MAX_KEYS
from mla_kernels.attention.paging import check_page_size
from mla_kernels.checks import FLOATS, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import indexer as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import wanted
from mla_kernels.latent.indexer.cache import (
    HEAD_DIMS,
    IndexerCache,
    check_head_dim,
    check_indexer_cache,
    page_size_of,
)
from mla_kernels.shim import define_op


def check_scale(k_scale) -> None:
    """Refuse negative scales. Reads the values."""
    if k_scale is not None and bool((k_scale < 0).any()):
        raise ValueError(f"k_scale: got {float(k_scale.nan_to_num(0.0).min())}, scales of at least 0 are accepted")


_WEIGHT_DTYPES = {dtype: (torch.float32, dtype) for dtype in FLOATS} | {E4M3: (torch.float32,)}
"""Of queries -> of the heads' weights, which hold the scales of codes."""


def _check_scale_values(q, k, weights, starts, ends, k_scale, *_):
    check_scale(k_scale)


_indexer_logits = define_op(
    "indexer_logits",
    "(Tensor q, Tensor k, Tensor weights, Tensor starts, Tensor ends, Tensor? k_scale=None, "
    "bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.indexer_logits, 0, 2, 3, 4),
    device=launch_logits,
    fake=empty_logits,
    check_values=_check_scale_values,
)


def check_pages(block_table, seq_lens, num_pages, page_size) -> None:
    """Refuse lengths beyond the table, and pages outside the cache that a length reaches. Reads the values."""
    pages = block_table.shape[1]
    check_range("seq_lens", seq_lens, 0, pages * page_size + 1, f"block_table holds {pages} pages of {page_size} a row")
    used = torch.arange(pages, device=seq_lens.device) * page_size < seq_lens[:, None]
    check_range("block_table", block_table[used], 0, num_pages, "pages of the cache")


def check_limits(limits) -> None:
    """Refuse negative limits. Reads the values."""
    if limits is not None:
        check_range("limits", limits, 0, 1 << 31, "how many keys a query sees")


def _check_paged_values(q, cache, head_dim, weights, block_table, seq_lens, limits, *_):
    check_pages(block_table, seq_lens, cache.shape[0], page_size_of(cache, head_dim))
    check_limits(limits)


_paged_indexer_logits = define_op(
    "paged_indexer_logits",
    "(Tensor q, Tensor cache, int head_dim, Tensor weights, Tensor block_table, Tensor seq_lens, "
    "Tensor? limits=None, bool batch_invariant=False) -> Tensor",
    cpu=cpu.by_query(cpu.paged_indexer_logits),
    device=launch_paged_logits,
    fake=empty_paged_logits,
    check_values=_check_paged_values,
)


def check_logits_arguments(op, q, k, weights, starts, ends, k_scale) -> torch.Tensor:
    """Checks that indexer_logits and select_keys share. Returns the keys, codes as uint8."""
    check_tensor("q", q, rank=3, dtypes=(*FLOATS, E4M3))
    tokens, heads, width = q.shape
    _check_heads(q)
    if k_scale is None:
        if q.dtype == E4M3:
            raise ValueError("k_scale: got None, queries of float8_e4m3fn go with codes and their scales")
        check_tensor("k", k, shape=(None, width), like=q)
    else:
        codes = (torch.uint8, E4M3)
        check_tensor("k", k, shape=(None, width), dtypes=codes, device=q.device)
        k = k.view(torch.uint8)
        check_tensor("k_scale", k_scale, shape=(k.shape[0],), dtypes=(torch.float32,), device=q.device)
    if k.shape[0] >= MAX_KEYS:
        raise ValueError(f"k: got {k.shape[0]:,} keys, less than {MAX_KEYS:,} are accepted")
    check_tensor("weights", weights, shape=(tokens, heads), dtypes=_WEIGHT_DTYPES[q.dtype], device=q.device)
    check_tensor("starts", starts, shape=(tokens,), dtypes=(torch.int32,), device=q.device)
    check_tensor("ends", ends, shape=(tokens,), dtypes=(torch.int32,), device=q.device)
    if torch.is_grad_enabled():
        check_no_grad(op, q=q, k=k, weights=weights)
    return k


def _check_heads(q) -> None:
    if not 1 <= q.shape[-2] <= MAX_HEADS:
        raise ValueError(f"q: got {q.shape[-2]} index heads, 1 to {MAX_HEADS} are accepted")
    if q.shape[-1] not in HEAD_DIMS:
        check_head_dim(q.shape[-1])


def check_paged_arguments(op, q, cache, weights, block_table, seq_lens, limits) -> None:
    """Checks that paged_indexer_logits and select_slots share."""
    check_indexer_cache(cache)
    dtypes = (*FLOATS, E4M3) if cache.quantised else (cache.data.dtype,)
    check_tensor("q", q, shape=(None, None, None, cache.head_dim), dtypes=dtypes, device=cache.data.device)
    sequences, queries, heads, _ = q.shape
    _check_heads(q)
    if queries == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, at least one query token is accepted")
    if cache.num_pages == 0:
        raise ValueError("cache: got 0 pages, at least 1 is accepted")
    check_tensor("weights", weights, shape=(sequences, queries, heads), dtypes=_WEIGHT_DTYPES[q.dtype], device=q.device)
    check_tensor("block_table", block_table, shape=(sequences, None), dtypes=(torch.int32,), device=q.device)
    check_tensor("seq_lens", seq_lens, shape=(sequences,), dtypes=(torch.int32,), device=q.device)
    if limits is not None:
        check_tensor("limits", limits, shape=(sequences, queries), dtypes=(torch.int32,), device=q.device)
    check_page_size(cache.page_size)
    if block_table.shape[1] * cache.page_size >= MAX_KEYS:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {cache.page_size} tokens a sequence, less than "
            f"{MAX_KEYS:,} tokens are accepted"
        )
    if torch.is_grad_enabled():
        check_no_grad(op, q=q, cache=cache.data, weights=weights)


def indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Lightning indexer's scores of every token against the keys of its range, for prefill.

    ``logits[t, s] = sum_h weights[t, h] relu(q[t, h] . k[s])`` in float32 for ``starts[t] <= s < ends[t]``, else -inf.
    The model's factors, ``head_dim ** -0.5`` and ``index_heads ** -0.5``, belong into ``weights``: relu lets positive
    factors through. One launch, no workspace; :func:`mla_kernels.select_keys` chooses without keeping all logits.

    Args:
        q: [T, H, d] bfloat16, float16 or float32, after RoPE (and Hadamard transform, where the keys had one); H 1 to
            256, d a power of two from 32 to 256. Where ``k_scale`` is given also float8_e4m3fn, codes whose scales are
            in ``weights``, as :func:`mla_kernels.quantise_indexer_query` gives them; see below.
        k: [S, d] in q's dtype, or e4m3 codes (float8_e4m3fn, or uint8) where ``k_scale`` is given; rows of any stride.
        weights: [T, H] float32, or q's dtype if q holds no codes.
        starts, ends: [T] int32, the range of keys that a token sees; cut to [0, S).
        k_scale: [S] float32, at least 0: key s is ``e4m3(k[s]) * k_scale[s]``.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says. On devices it is so in any case.

    Queries as codes, ``q[t, h] = e4m3(code) * q_scale[t, h]``, are what DeepSeek's own code multiplies: both operands
    as codes, in float32 sums, the scale of a key after the sum over heads, that of a query within its weight. Codes are
    of e4m3 "fn" (bias 7) on every chip. Where the matrix units take these (sm_89, sm_90, sm_100, sm_120, gfx950) they
    are multiplied as they are, elsewhere (sm_80, gfx942 with its own kind, Ascend) as bfloat16, which holds every code.
    Products are exact either way; Hopper keeps a sum of float8 products in about 14 bits. The codes of NaN, 0x7F and
    0xFF, are for keys and queries whose scale is NaN, too; with a finite one they count as NaN or as +-480.

    Returns:
        [T, S] float32. A NaN in a key makes its own logits NaN. Keys outside a token's range have no influence.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit; on CPU tensors also a negative scale.
        NotImplementedError: an argument requires grad while gradients are recorded.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1, equation 1.
    """
    k = check_logits_arguments("indexer_logits", q, k, weights, starts, ends, k_scale)
    return _indexer_logits(q, k, weights, starts, ends, k_scale, wanted(batch_invariant))


def paged_indexer_logits(
    q: torch.Tensor,
    cache: IndexerCache,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    limits: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Lightning indexer's scores of the newest tokens of each sequence against its cached keys, for decoding.

    Key j of sequence b stands in page ``block_table[b, j // page_size]``, row ``j % page_size``; query i of S_q sees
    keys up to ``seq_lens[b] - S_q + i``, or with ``limits`` the first ``limits[b, i]``. Scores as in
    :func:`indexer_logits`. One launch, no workspace.

    Args:
        q: [B, S_q, H, d], the cache's dtype (a ``"fp8"`` cache: bfloat16, float16 or float32, or float8_e4m3fn with
            the scales in ``weights``, as for :func:`indexer_logits`).
        cache: the paged keys, both layouts.
        weights: [B, S_q, H] float32, or q's dtype if q holds no codes; ``head_dim ** -0.5`` and ``index_heads ** -0.5``
            in them.
        block_table: [B, P] int32, the pages of each sequence in order.
        seq_lens: [B] int32, cached keys of each sequence, its S_q newest included.
        limits: [B, S_q] int32, how many keys each query sees, cut to ``seq_lens``. For keys that are not one a token:
            DeepSeek-V4's stand for 4 tokens each, and a query at position t sees ``(t + 1) // 4``.
        batch_invariant: whether a query's bits must not depend on other queries, sequences and the table's width; None:
            as the block :class:`mla_kernels.batch_invariant` says.

    Returns:
        [B, S_q, P * page_size] float32, -inf where a query sees no key.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length or limit below 0, a length beyond the table, or a page outside
            the cache among those that a length reaches. A device takes keys beyond the table or in such a page as
            absent.
        NotImplementedError: an argument requires grad while gradients are recorded.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1, equation 1.
    """
    check_paged_arguments("paged_indexer_logits", q, cache, weights, block_table, seq_lens, limits)
    table = block_table, seq_lens, limits
    return _paged_indexer_logits(q, cache.data, cache.head_dim, weights, *table, wanted(batch_invariant))
