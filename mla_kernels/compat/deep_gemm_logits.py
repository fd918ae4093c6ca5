"""DeepGEMM's scores of the lightning indexer; :mod:`mla_kernels.compat.deep_gemm` gives them out.

Symbols: T tokens, H index heads, D head_dim, S keys, B sequences, N (next_n) query tokens of each, P pages of a row.
"""

import torch

from mla_kernels.attention.indexer.forward import MAX_HEADS
from mla_kernels.attention.indexer.mqa import mqa_logits, paged_mqa_logits
from mla_kernels.attention.indexer.topk import MAX_KEYS
from mla_kernels.attention.paging import check_page_size
from mla_kernels.checks import check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.invariance import wanted
from mla_kernels.latent.indexer.cache import HEAD_DIMS, SCALE_BYTES, misplaced
from mla_kernels.quant.fp8_block import decode_e4m3
from mla_kernels.quant.mxfp4 import decode_e2m1, decode_ue8m0, exponents_of

E4M3 = torch.float8_e4m3fn
_BYTES = (torch.int8, torch.uint8)  # two e2m1 codes each
_GROUP = 32  # columns that share an exponent
_LINE = 256  # elements: a row of results begins at a multiple of 1,024 bytes


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> torch.Tensor:
    """Scores of fp8 queries [T, H, D] against fp8 keys in rows: :func:`fp8_fp4_mqa_logits` with ``q`` alone.

    ``clean_logits`` is True here, as in DeepGEMM's repository (``sgl-deep-gemm``: False): what a token does not see is
    -inf. ``max_seqlen_k`` as there, also together with ``clean_logits``, which DeepGEMM refuses.

    Args:
        q: float8_e4m3fn [T, H, D], their scales in ``weights``.
        kv: (float8_e4m3fn [S, D], float32 [S]).
        weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k: as there.
    """
    return fp8_fp4_mqa_logits(
        (q, None), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k, clean_logits=clean_logits
    )  # fmt: skip


def fp8_fp4_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    max_seqlen_k: int,
    schedule_meta: torch.Tensor | None = None,
    *,
    clean_logits: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``logits[t, s] = sum_h weights[t, h] relu(q[t, h] . k[s])`` for the keys from a token's start to its end.

    Args:
        q: (codes, scales). float8_e4m3fn [T, H, D] and None, the scales being in ``weights``; float8_e4m3fn and int32
            [T, H], four exponents (ue8m0) of 32 columns each; or int8 [T, H, D / 2], two e2m1 codes a byte (the even
            column in the low nibble), and int32 [T, H]. H 1 to 256; D 32, 64, 128 or 256, with int32
            at most 128, with e2m1 64 or 128.
        kv: (codes, scales) of the keys: [S, D] of q's dtype (int8: [S, D / 2]), and float32 [S], or int32 [S] where q's
            are int32.
        weights: [T, H] float32, or bfloat16 with int32 scales.
        cu_seq_len_k_start, cu_seq_len_k_end: int32 [T].
        max_seqlen_k: 0: column s of the result is key s, as in older releases. Above: the result has so many columns,
            and column 0 of a row is its token's first key; 2.8.1 knows this alone.
        schedule_meta: None, or whatever; not needed.
        clean_logits: whether what a token does not see becomes -inf; else it may hold anything.
        logits_dtype: float32 or bfloat16; None: bfloat16 where ``weights`` are.

    Returns:
        [T, S] or [T, max_seqlen_k]; rows begin at multiples of 1,024 bytes.

    Raises:
        TypeError: another dtype; a bool for ``max_seqlen_k``, which older releases have in another place.
        ValueError: shapes and devices that do not fit.
    """
    check_int("max_seqlen_k", max_seqlen_k, 0)
    _flag("clean_logits", clean_logits)
    form, q, q_scale = _queries(q, 3)
    tokens, heads = q.shape[:2]
    k, k_scale = _pair("kv", kv)
    check_tensor("kv[0]", k, shape=(None, q.shape[2]), like=q)
    scale_dtype = torch.float32 if form == "fp8" else torch.int32
    check_tensor("kv[1]", k_scale, shape=(k.shape[0],), dtypes=(scale_dtype,), device=q.device)
    if k.shape[0] >= MAX_KEYS:
        raise ValueError(f"kv[0]: got {k.shape[0]:,} keys, less than {MAX_KEYS:,} are accepted")
    dtype = _result_dtype(weights, logits_dtype, (tokens, heads), form, q.device)
    for name, value in (("cu_seq_len_k_start", cu_seq_len_k_start), ("cu_seq_len_k_end", cu_seq_len_k_end)):
        check_tensor(name, value, shape=(tokens,), dtypes=(torch.int32,), device=q.device)
    check_no_grad("fp8_mqa_logits", **{"kv[1]": k_scale, "weights": weights})
    out = _rows(tokens, max_seqlen_k or k.shape[0], q.device)
    q, weights = _values(q, q_scale, form), weights.float().contiguous()
    starts, ends, compact = cu_seq_len_k_start.contiguous(), cu_seq_len_k_end.contiguous(), max_seqlen_k > 0
    mqa_logits(q, k, k_scale.contiguous(), form, weights, starts, ends, out, compact, clean_logits, wanted(None))
    return out if dtype == torch.float32 else out.to(dtype)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of fp8 queries [B, N, H, D] against cached fp8 keys: :func:`fp8_fp4_paged_mqa_logits` with ``q`` alone.

    Args:
        q: float8_e4m3fn [B, N, H, D], their scales in ``weights``.
        kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits, indices: as there.
    """
    return fp8_fp4_paged_mqa_logits(
        (q, None), kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, indices,
        clean_logits=clean_logits,
    )  # fmt: skip


def fp8_fp4_paged_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    indices: torch.Tensor | None = None,
    *,
    clean_logits: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scores of N query tokens of each sequence against its cached keys.

    Args:
        q: (codes, scales) as in :func:`fp8_fp4_mqa_logits`, with [B, N] for its [T].
        kv_cache: uint8 [pages, page_size, 1, D + 4] (e2m1: D / 2 + 4): of each page first the codes of its keys, THEN
            their scales, fp32 or int32 of four exponents. Pages may have any stride that 4 divides, and any size.
        weights: [B * N, H] float32, or bfloat16 with int32 scales.
        context_lens: int32 [B, N], how many keys each query sees; or [B], lengths that count the N tokens: query i sees
            keys up to length - N + i.
        block_table: int32 [B, P].
        schedule_meta: what :func:`get_paged_mqa_logits_metadata` gave, or None; not needed.
        max_context_len: columns of the result.
        indices: None, or int32 [B] with N 1: which request a row belongs to. Rows have block tables of their own.
        clean_logits: whether columns from a query's length on become -inf; else they may hold anything.
        logits_dtype: as in :func:`fp8_fp4_mqa_logits`.

    Returns:
        [B * N, max_context_len]; rows begin at multiples of 1,024 bytes.

    Raises:
        TypeError: another dtype.
        ValueError: shapes, strides and devices that do not fit; on CPU tensors (and on every device under
            MLA_KERNELS_CHECK_VALUES=1) also a length beyond the table or below 0, or a page outside the cache that a
            length reaches. A device takes keys beyond the table or in such a page as absent.
    """
    check_int("max_context_len", max_context_len, 0)
    _flag("clean_logits", clean_logits)
    form, q, q_scale = _queries(q, 4)
    sequences, queries, heads, key_bytes = q.shape
    device = q.device
    check_tensor(
        "kv_cache", kv_cache, shape=(None, None, None, key_bytes + SCALE_BYTES), dtypes=(torch.uint8,), device=device
    )
    cache = _pages(kv_cache)
    dtype = _result_dtype(weights, logits_dtype, (sequences * queries, heads), form, device)
    check_tensor("block_table", block_table, shape=(sequences, None), dtypes=(torch.int32,), device=device)
    if block_table.shape[1] * kv_cache.shape[1] >= MAX_KEYS:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {kv_cache.shape[1]} keys a row, less than {MAX_KEYS:,} "
            "keys are accepted"
        )
    limits = _limits(context_lens, sequences, queries, device)
    if indices is not None:
        if queries != 1:
            raise ValueError(f"indices: got a tensor with {queries} queries a sequence, 1 is accepted then")
        check_tensor("indices", indices, shape=(sequences,), dtypes=(torch.int32,), device=device)
    check_no_grad("fp8_paged_mqa_logits", weights=weights)
    out = _rows(sequences * queries, max_context_len, device)
    q, weights = _values(q, q_scale, form), weights.float().contiguous()
    paged_mqa_logits(q, cache, form, weights, block_table, limits, out, clean_logits, wanted(None))
    return out if dtype == torch.float32 else out.to(dtype)


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """A schedule for :func:`fp8_fp4_paged_mqa_logits`, which needs none: int32 zeros of DeepGEMM's shape, [num_sms + 1,
    2], for callers that keep and copy it.

    Args:
        context_lens: int32 [B, N] or [B]. block_kv: keys of a page. num_sms: programs. indices: as there.

    Raises:
        TypeError, ValueError: another rank or dtype, or numbers below 1.
    """
    check_tensor("context_lens", context_lens, dtypes=(torch.int32,))
    if context_lens.dim() not in (1, 2):
        raise ValueError(f"context_lens: got shape {tuple(context_lens.shape)}, [B, N] and [B] are accepted")
    check_int("block_kv", block_kv, 1)
    check_int("num_sms", num_sms, 1)
    if indices is not None:
        check_tensor(
            "indices", indices, shape=context_lens.shape[:1], dtypes=(torch.int32,), device=context_lens.device
        )
    return context_lens.new_zeros(num_sms + 1, 2)


def _flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, a bool is accepted")


def _pair(name, value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {type(value).__name__}, a pair of codes and scales is accepted")
    return value


def _queries(q, rank):
    """(form, codes, scales or None) of a pair."""
    codes, scales = _pair("q", q)
    check_tensor("q[0]", codes, rank=rank, dtypes=(E4M3, *_BYTES))
    if codes.dtype == E4M3:
        form = "fp8" if scales is None else "mxfp8"
    elif scales is None:
        raise ValueError("q[1]: got None with e2m1 codes, int32 scales are accepted with them")
    else:
        form = "mxfp4"
    width = codes.shape[-1] * (2 if form == "mxfp4" else 1)
    widths = HEAD_DIMS if form == "fp8" else HEAD_DIMS[form == "mxfp4" : 3]
    if width not in widths:
        raise ValueError(f"q[0]: got {width} columns a head, accepted: {', '.join(map(str, widths))}")
    if not 1 <= codes.shape[-2] <= MAX_HEADS:
        raise ValueError(f"q[0]: got {codes.shape[-2]} index heads, 1 to {MAX_HEADS} are accepted")
    if scales is not None:
        check_tensor("q[1]", scales, shape=tuple(codes.shape[:-1]), dtypes=(torch.int32,), device=codes.device)
    return form, codes, scales


def _values(q, scales, form):
    """Queries as the kernels take them: codes, or bf16 values, of e2m1 the even columns in front of the odd ones."""
    if form == "fp8":
        return q.contiguous()
    powers = decode_ue8m0(exponents_of(scales))  # [..., H, 4]
    if form == "mxfp8":
        values = decode_e4m3(q.contiguous().view(torch.uint8)).float().unflatten(-1, (-1, _GROUP))
        return (values * powers[..., : values.shape[-2], None]).flatten(-2).bfloat16()
    codes = q.contiguous().view(torch.uint8)
    values = torch.stack((decode_e2m1(codes << 4), decode_e2m1(codes & 0xF0)), -2).float()  # [..., H, 2, D / 2]
    values = values.unflatten(-1, (-1, _GROUP // 2))
    return (values * powers[..., None, : values.shape[-2], None]).flatten(-3).bfloat16()


def _result_dtype(weights, logits_dtype, shape, form, device):
    dtypes = (torch.float32,) if form == "fp8" else (torch.float32, torch.bfloat16)
    check_tensor("weights", weights, shape=shape, dtypes=dtypes, device=device)
    check_choice("logits_dtype", logits_dtype, (None, torch.float32, torch.bfloat16))
    return logits_dtype or weights.dtype


def _pages(kv_cache):
    """[pages, bytes of a page] of [pages, page_size, 1, bytes of a key], a view."""
    pages, page_size, key_heads, key = kv_cache.shape
    if key_heads != 1:
        raise NotImplementedError(f"kv_cache: got {key_heads} key heads, 1 is accepted (all heads share the key)")
    if pages == 0 or page_size == 0:
        raise ValueError(f"kv_cache: got shape {tuple(kv_cache.shape)}, at least one page of one key is accepted")
    if page_size > 1 and kv_cache.stride(1) != key:
        raise ValueError(f"kv_cache: got strides {kv_cache.stride()}, pages that are dense are accepted")
    place = kv_cache.stride(0), 0 if torch.compiler.is_compiling() else kv_cache.storage_offset()
    if any(value % SCALE_BYTES for value in place):
        raise misplaced(*place, name="kv_cache")
    check_page_size(page_size)
    return kv_cache.flatten(1)


def _limits(context_lens, sequences, queries, device):
    """int32 [B, N]: how many keys each query sees."""
    if isinstance(context_lens, torch.Tensor) and context_lens.dim() == 1:
        check_tensor("context_lens", context_lens, shape=(sequences,), dtypes=(torch.int32,), device=device)
        before = torch.arange(1 - queries, 1, dtype=torch.int32, device=device)
        return (context_lens.unsqueeze(1) + before).clamp_min_(0)
    check_tensor("context_lens", context_lens, shape=(sequences, queries), dtypes=(torch.int32,), device=device)
    return context_lens.contiguous()


def _rows(rows, columns, device):
    wide = torch.empty(rows, -(-columns // _LINE) * _LINE, dtype=torch.float32, device=device)
    return wide[:, :columns]
