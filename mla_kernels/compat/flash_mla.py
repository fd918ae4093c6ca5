"""FlashMLA's functions over this library's ops: same names, arguments, order and results, on every chip.

Import from ``mla_kernels.compat.flash_mla`` what was imported from ``flash_mla``. FlashMLA's
conventions hold: ``causal`` is False by default, the scale is ``d ** -0.5`` by default, lse of
:func:`flash_mla_with_kvcache` is [batch, heads, queries], and a query that sees no key has lse +inf (natively -inf).

More is accepted than FlashMLA accepts (every head count, page size and chip; the 656-byte cache and sinks in dense
decoding, too; 16-bit caches in sparse decoding); what is not accepted raises with the reason. Arguments by position are
those of FlashMLA's ``flash_mla_interface.py`` of 2026.09.30, which agree with older ones. What its branches and copies
add in other orders is keyword-only here: ``out`` (the copy in vLLM 0.33.0), ``indexer_topk`` (commit 02fe0d0),
``use_legacy``, ``kv_format``, ``descale_q``, ``descale_k`` and ``return_log2_lse`` (``sgl-flash-mla`` 1.0.0; SGLang
0.5.23).
"""

import dataclasses
import math

import torch

from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.prefill.op import mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.checks import check_choice, check_int, check_no_grad, check_tensor
from mla_kernels.latent.cache import CacheLayout, LatentCache

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_LAYOUTS = {656: CacheLayout.FP8_V32, 584: CacheLayout.FP8_V4}  # by the bytes of a token
_BYTE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What :func:`get_mla_metadata` returns, with FlashMLA's fields. Nothing is read from them or kept in them: splits
    follow from each sequence's own length."""

    have_initialized: bool = False
    config: object = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple:
    """Scheduling data for :func:`flash_mla_with_kvcache`, which needs none.

    Without arguments, as in current FlashMLA: ``(FlashMLASchedMeta(), None)``. With the older form's arguments:
    ``(tile_scheduler_metadata, num_splits)``, int32 tensors of the older shapes ([1, 8] and [batch + 1]; for two
    sequences num_splits is [0, 1, 2]), for callers that keep and copy them.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    check_tensor("cache_seqlens", cache_seqlens, rank=1, dtypes=(torch.int32,))
    device = cache_seqlens.device
    splits = torch.arange(cache_seqlens.shape[0] + 1, dtype=torch.int32, device=device)
    return torch.zeros(1, 8, dtype=torch.int32, device=device), splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    enable_batch_invariant: bool = False,
    *,
    out: torch.Tensor | None = None,
    use_legacy: bool = False,
    kv_format: str | None = None,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decoding over a paged cache, dense (``block_table``, ``cache_seqlens``) or sparse (``indices``).

    Args:
        q: [batch, s_q, heads, d], d 576, 512 (DeepSeek-V4) or another ``head_dim_v`` + rope width.
        k_cache: [num_pages, page_size, 1, d] in q's dtype; or bytes (float8_e4m3fn, int8 or uint8)
            [num_pages, page_size, 1, 656], the layout ``fp8_v32`` of :class:`mla_kernels.CacheLayout`; or, with
            ``indices``, 584 bytes a token, DeepSeek-V4's ``fp8_v4``, whose pages are dense and stand at multiples of
            16 bytes (FlashMLA: of 576).
        block_table: int32 [batch, pages]; cache_seqlens: int32 [batch]. Not read when ``indices`` are given.
        head_dim_v: width of the value, the first part of the key.
        tile_scheduler_metadata, num_splits: whatever :func:`get_mla_metadata` gave; not needed here.
        softmax_scale: d ** -0.5 by default.
        causal: query i of s_q sees keys up to length - s_q + i. Not with ``indices``.
        is_fp8_kvcache: whether the caches hold bytes; None, the default, means as k_cache's dtype says.
        indices: int32 [batch, s_q, top_k] cache slots (page * page_size + offset); others than slots are skipped.
        attn_sink: fp32 [heads]; out is multiplied by sigmoid(lse - sink), lse stays as it is.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: a second cache attended in the same softmax, of the
            same layout; its page size and its number of indices may be others.
        topk_length: int32 [batch]; only so many indices from the left count.
        enable_batch_invariant: True asks for results that do not depend on the rest of the batch, which they never do.
        out: None, or [batch, s_q, heads, head_dim_v] in q's dtype, which the result is copied to.
        use_legacy: chooses between kernels of the same result there; either is accepted.
        kv_format, descale_q, descale_k: None. Caches of DeepSeek-V4.1 and scales of whole tensors are refused.

    Returns:
        (out [batch, s_q, heads, head_dim_v], lse fp32 [batch, heads, s_q], contiguous, natural log, +inf for a query
        without keys).

    Raises:
        NotImplementedError: several key heads, byte layouts but those of 656 and 584 bytes, the latter without
            ``indices``, per-tensor scales, causal with ``indices``, or an input that requires grad.
        TypeError, ValueError: as :func:`mla_kernels.mla_decode` and :func:`mla_kernels.sparse_mla_decode`.
    """
    if kv_format is not None:
        raise NotImplementedError(f"kv_format: got {kv_format!r}, None is accepted (656 or 584 bytes a token)")
    for name, value in (("descale_q", descale_q), ("descale_k", descale_k)):
        if value is not None:
            raise NotImplementedError(f"{name}: got {_kind(value)}, None is accepted (no per-tensor fp8 cache)")
    flags = {"causal": causal, "enable_batch_invariant": enable_batch_invariant, "use_legacy": use_legacy}
    for name, value in (flags | ({} if is_fp8_kvcache is None else {"is_fp8_kvcache": is_fp8_kvcache})).items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, a bool is accepted")
    check_tensor("q", q, rank=4)
    if is_fp8_kvcache is None:
        is_fp8_kvcache = getattr(k_cache, "dtype", None) in _BYTE_DTYPES
    cache = _cache("k_cache", k_cache, q, head_dim_v, is_fp8_kvcache)
    _check_out(out, (*q.shape[:3], head_dim_v), q, "flash_mla_with_kvcache")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if indices is None:
        sparse_only = {
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        }
        for name, value in sparse_only.items():
            if value is not None:
                raise ValueError(f"{name}: got {_kind(value)} without indices, None is accepted then")
        for name, value in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
            if value is None:
                raise ValueError(f"{name}: got None without indices, a tensor is accepted then")
        result, lse = mla_decode(
            q, cache, block_table, cache_seqlens, softmax_scale=scale, causal=causal, sink=attn_sink
        )  # fmt: skip
    else:
        if causal:
            raise NotImplementedError("causal: got True with indices, False is accepted (the indices say what is seen)")
        if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
            raise ValueError("extra_k_cache, extra_indices_in_kvcache: got one of them, both or neither are accepted")
        extra = None
        if extra_k_cache is not None:
            extra = _cache("extra_k_cache", extra_k_cache, q, head_dim_v, is_fp8_kvcache)
        result, lse = sparse_mla_decode(
            q, cache, indices, softmax_scale=scale, topk_length=topk_length, sink=attn_sink, extra_cache=extra,
            extra_indices=extra_indices_in_kvcache, extra_topk_length=extra_topk_length,
        )  # fmt: skip
    return result if out is None else out.copy_(result), _plus_inf(lse.transpose(1, 2).contiguous())


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    *,
    indexer_topk: int = 0,
    out: torch.Tensor | None = None,
    use_legacy: bool = False,
    return_log2_lse: bool | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Sparse prefill: each query attends to the kv rows that its indices name.

    Args:
        q: [s_q, heads, d]; kv: [s_kv, 1, d]; indices: int32 [s_q, 1, top_k], rows of kv, others are skipped.
        sm_scale: factor of the scores. d_v: width of the value. attn_sink: fp32 [heads]. topk_length: int32 [s_q].
        indexer_topk: above 0 a fourth result, the lse over the first so many indices alone (of those that
            ``topk_length`` leaves), which is computed by a second pass over them.
        out: None, or [s_q, heads, d_v] in q's dtype, which the result is copied to.
        use_legacy: False. SGLang's wrapper gives out logarithms in base 2 with True and ``sgl-flash-mla`` natural ones:
            say ``return_log2_lse``.
        return_log2_lse: True: max_logits and lse in base 2, that is divided by ln 2; False: None in their place.

    Returns:
        (out [s_q, heads, d_v], max_logits fp32 [s_q, heads], lse fp32 [s_q, heads]), natural log unless
        ``return_log2_lse``: a query without keys has out 0, max_logits -inf and lse +inf. With ``indexer_topk`` also
        lse_indexer, like lse. Differentiable in q, kv and attn_sink, unless ``out`` is given.

    Raises:
        NotImplementedError: several key heads, ``use_legacy``, or ``out`` with an input that requires grad.
        TypeError, ValueError: as :func:`mla_kernels.sparse_mla_prefill`; ``indexer_topk`` above top_k or with
            ``return_log2_lse=False``.
    """
    for name, value, rank in (("q", q, 3), ("kv", kv, 3)):
        check_tensor(name, value, rank=rank)
    check_tensor("indices", indices, rank=3, dtypes=(torch.int32,))
    for name, value in (("kv", kv), ("indices", indices)):
        _one_key_head(name, value.shape[1])
    if use_legacy is not False:
        raise NotImplementedError(
            f"use_legacy: got {_kind(use_legacy)}, False is accepted; say return_log2_lse instead"
        )
    check_choice("return_log2_lse", return_log2_lse, (None, True, False))
    check_int("indexer_topk", indexer_topk, 0, indices.shape[2])
    if indexer_topk and return_log2_lse is False:
        raise ValueError(f"indexer_topk: got {indexer_topk} with return_log2_lse False, which returns no lse")
    _check_out(out, (*q.shape[:2], d_v), q, "flash_mla_sparse_fwd", q=q, kv=kv, attn_sink=attn_sink)

    def attend(slots, lengths):
        return sparse_mla_prefill(
            q, kv[:, 0], slots, softmax_scale=sm_scale, latent_dim=d_v, topk_length=lengths, sink=attn_sink,
            return_max_logits=True,
        )  # fmt: skip

    result, lse, max_logits = attend(indices[:, 0], topk_length)
    statistics = [max_logits, _plus_inf(lse)]
    if indexer_topk:
        lengths = None if topk_length is None else topk_length.clamp(max=indexer_topk)
        statistics.append(_plus_inf(attend(indices[:, 0, :indexer_topk], lengths)[1]))
    if return_log2_lse is not None:
        statistics = [value / math.log(2) if return_log2_lse else None for value in statistics]
    return result if out is None else out.copy_(result), *statistics


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense prefill of packed sequences, as :func:`mla_kernels.mla_prefill`; differentiable in q, k and v.

    q [tokens, heads, d_qk], k [tokens, heads, d_qk], v [tokens, heads, d_v]; a causal mask ends at the last key of each
    sequence. Results are the same on every call, so ``deterministic`` may be either. So may ``is_varlen``: sequences of
    one length, which False promises there, are those that ``cu_seqlens`` say, too.

    Returns:
        (out [tokens, heads, d_v], lse fp32 [tokens, heads], natural log, +inf for a query without keys). As there, lse
        is the transpose of a contiguous [heads, tokens], which ``compat.vllm.merge_attn_states`` takes as ``lse.T``.

    Raises:
        NotImplementedError: dropout, or fewer key heads than query heads.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p: got {dropout_p}, 0.0 is accepted (there is no dropout)")
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, rank=3)
    if k.shape[1] != q.shape[1] or v.shape[1] != q.shape[1]:
        raise NotImplementedError(
            f"k, v: got {k.shape[1]} and {v.shape[1]} heads for {q.shape[1]} query heads, as many are accepted"
        )
    out, lse = mla_prefill(
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_q=max_seqlen_qo, max_seqlen_k=max_seqlen_kv,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, causal=causal,
    )  # fmt: skip
    return out, _plus_inf(lse.T.contiguous()).T


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`flash_attn_varlen_func` of qkv [tokens, heads, 2 head_dim_qk + d_v], read in place."""
    check_tensor("qkv", qkv, rank=3)
    check_int("head_dim_qk", head_dim_qk, 1, (qkv.shape[2] - 1) // 2)
    q, k, v = qkv.split((head_dim_qk, head_dim_qk, qkv.shape[2] - 2 * head_dim_qk), -1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, deterministic,
        is_varlen,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`flash_attn_varlen_func` of kv [tokens, heads, head_dim_qk + d_v], read in place."""
    check_tensor("kv", kv, rank=3)
    check_int("head_dim_qk", head_dim_qk, 1, kv.shape[2] - 1)
    k, v = kv.split((head_dim_qk, kv.shape[2] - head_dim_qk), -1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, dropout_p, softmax_scale, causal,
        deterministic, is_varlen,
    )  # fmt: skip


def _cache(name: str, data: torch.Tensor, q: torch.Tensor, head_dim_v: int, is_fp8: bool) -> LatentCache:
    """FlashMLA's [num_pages, page_size, 1, d or bytes] as a LatentCache over the same memory."""
    check_int("head_dim_v", head_dim_v, 1)
    check_tensor(name, data, rank=4, dtypes=_BYTE_DTYPES if is_fp8 else (q.dtype,), device=q.device)
    _one_key_head(name, data.shape[2])
    if not is_fp8:
        return LatentCache(data[:, :, 0], head_dim_v)
    layout = _LAYOUTS.get(data.shape[3])
    if layout is None or head_dim_v != 512:
        raise NotImplementedError(
            f"{name}: got {data.shape[3]} bytes a token with head_dim_v {head_dim_v}, 656 and 584 with 512 are accepted"
        )
    return LatentCache(data.view(torch.uint8)[:, :, 0], head_dim_v, layout)


def _check_out(out, shape: tuple[int, ...], like: torch.Tensor, function: str, **inputs) -> None:
    if out is not None:
        check_tensor("out", out, shape=shape, like=like)
        check_no_grad(f"{function} into out", **inputs)


def _one_key_head(name: str, heads: int) -> None:
    if heads != 1:
        raise NotImplementedError(f"{name}: got {heads} key heads, 1 is accepted (all query heads share the latent)")


def _plus_inf(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == float("-inf"), float("inf"))


def _kind(value) -> str:
    return f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
