"""What SGLang's indexer and cache of DeepSeek-V3.2 and GLM-5 call of its own CUDA and Triton kernels and of DeepGEMM.

Names and arguments are those of SGLang 0.5.23, whose Triton kernels store e4m3 (which Triton has from capability 8.9
on) and whose index scores are DeepGEMM's (capabilities 9, 10 and 12). Here they are this library's ops, on every chip.
:mod:`mla_kernels.compat.sglang_dsa` puts them in their place. Results are SGLang's but for scales: those of the cache
and of index keys are powers of two here, where some of SGLang's kernels store ``amax / 448``; they are stored beside
the codes, so that readers take either.

Symbols: T tokens, H index heads, 128 the width of an index key, P pages of 64 keys.

Source: SGLang 0.5.23, ``sglang/kernels/ops/attention/dsa``, ``sglang/kernels/ops/kvcache``,
``sglang/kernels/ops/quantization``, ``sglang/srt/layers/attention/dsa/utils.py``.
"""

import torch

from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.checks import FLOATS, INDICES, check_tensor
from mla_kernels.compat.deep_gemm import fp8_mqa_logits, fp8_paged_mqa_logits, get_paged_mqa_logits_metadata
from mla_kernels.compat.engine_invariance import invariant
from mla_kernels.compat.engine_rope import rope_tables
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.heads import rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.latent.indexer.scatter import scatter_indexer_keys
from mla_kernels.latent.tools.scatter import scatter_tokens

KEY = 128  # width of an index key, which shares one scale
PAGE = 64
LATENT, ROPE = 512, 64
_CODES = 528  # bytes of a cached token before its rotated key: 512 codes and 4 scales


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of ``x`` [..., 128] and their scales, powers of two, float32 [..., 1].

    Raises:
        NotImplementedError: blocks of another width, or a ``scale_fmt`` other than ``"ue8m0"``.
    """
    if scale_fmt != "ue8m0":
        raise NotImplementedError(f"scale_fmt: got {scale_fmt!r}, 'ue8m0' is accepted (scales are powers of two)")
    check_tensor("x", x, dtypes=FLOATS)
    if block_size != KEY or x.shape[-1] != KEY:
        raise NotImplementedError(
            f"block_size: got {block_size} for rows of {x.shape[-1]}, {KEY} for rows of {KEY} is accepted"
        )
    rows = x.reshape(-1, 1, KEY)
    codes, scales = quantise_indexer_query(rows, rows.new_ones(rows.shape[:2], dtype=torch.float32))
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def fused_q_indexer_rope_first_quant(
    q_input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries [T, H, 128], the first 64 values rotated in neighbouring pairs, as e4m3 codes; and their weights.

    Returns:
        (float8_e4m3fn [T, H, 128], float32 [T, H, 1]: ``weight`` [T, H] times ``weight_scale`` and the codes' scale).
    """
    turned = rotate_indexer_query(
        q_input, *rope_tables(cos_sin_cache), positions, rope_dim=cos_sin_cache.shape[1], rope="interleaved"
    )
    codes, weights = quantise_indexer_query(turned, weight.float() * weight_scale)
    return codes, weights[..., None]


def fused_k_indexer_norm_rope_store(
    k_input: torch.Tensor,
    cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    page_size: int,
) -> None:
    """Index keys [T, 128] normalised, rotated as queries, quantised and written to ``cache`` uint8 [P, 64 * 132]."""
    write_indexer_key(
        k_input,
        weight,
        bias,
        *rope_tables(cos_sin_cache),
        positions,
        out_cache_loc,
        _pages(cache, page_size),
        rope_dim=cos_sin_cache.shape[1],
        rope="interleaved",
        eps=eps,
    )


def can_use_dsa_fused_store(key_dtype: torch.dtype, indices_dtype: torch.dtype, page_size: int) -> bool:
    """Whether :func:`fused_store_index_k_cache` takes such arguments."""
    return key_dtype in FLOATS and indices_dtype in INDICES and page_size == PAGE


def fused_store_index_k_cache(
    key: torch.Tensor, index_k_with_scale: torch.Tensor, out_cache_loc: torch.Tensor, page_size: int = 64
) -> None:
    """Finished index keys [T, 128] quantised and written to ``index_k_with_scale`` uint8 [P, 64 * 132]."""
    scatter_indexer_keys(key.reshape(-1, KEY), out_cache_loc, _pages(index_k_with_scale, page_size))


def quantize_k_cache_separate(
    k_nope: torch.Tensor, k_rope: torch.Tensor, tile_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [T, 512] or [T, 1, 512] and rotated keys as bytes of the 656 byte layout, as SGLang's copy takes them.

    Returns:
        (uint8 [T, 1, 528]: 512 codes and four float32 scales; uint8 [T, 1, 128]: the rotated keys in bfloat16).

    Raises:
        NotImplementedError: another tile, or keys without a rotated part.
        TypeError, ValueError: other dtypes and shapes.
    """
    if tile_size != KEY:
        raise NotImplementedError(f"tile_size: got {tile_size}, {KEY} is accepted")
    if k_rope is None or k_rope.shape[-1] != ROPE or k_nope.shape[-1] != LATENT:
        widths = k_nope.shape[-1], 0 if k_rope is None else k_rope.shape[-1]
        raise NotImplementedError(
            f"k_nope, k_rope: got widths {widths[0]} and {widths[1]}, {LATENT} and {ROPE} are accepted"
        )
    latents, keys = k_nope.reshape(-1, LATENT), k_rope.reshape(-1, ROPE)
    tokens = latents.shape[0]
    packed = torch.empty(tokens, 1, _CODES + 2 * ROPE, dtype=torch.uint8, device=latents.device)
    if tokens:
        slots = torch.arange(tokens, device=latents.device)
        scatter_tokens(latents, keys, slots, LatentCache(packed, LATENT, CacheLayout.FP8_V32))
    return packed[..., :_CODES], packed[..., _CODES:]


def resolve_num_sms() -> int:
    """Multiprocessors of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def resolve_paged_mqa_logits_metadata_fn():
    """:func:`mla_kernels.compat.deep_gemm.get_paged_mqa_logits_metadata`."""
    return get_paged_mqa_logits_metadata


def resolve_fp8_paged_mqa_logits_fn():
    """:func:`mla_kernels.compat.deep_gemm.fp8_paged_mqa_logits`, batch-invariant in SGLang's deterministic mode."""
    return _in_mode(fp8_paged_mqa_logits)


def resolve_fp8_mqa_logits_fn():
    """:func:`mla_kernels.compat.deep_gemm.fp8_mqa_logits`, with what a token does not see left as it is,
    batch-invariant in SGLang's deterministic mode."""
    return _in_mode(_fp8_mqa_logits)


def _in_mode(function):
    from sglang.srt.runtime_context import get_exec

    return invariant(function) if get_exec().deterministic.enable_deterministic_inference else function


def _fp8_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=False, max_seqlen_k=0):
    return fp8_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k)


def best_positions(
    logits: torch.Tensor, lengths: torch.Tensor, topk: int, row_starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Where the ``topk`` largest scores of each token stand in its sequence, int32 [T, topk], -1 behind them.

    With ``row_starts`` [0, 10] and ``lengths`` [3, 2], tokens see columns 0 to 2 and 10 to 11 of ``logits`` [T, S], and
    column 11 is position 1 of the second's sequence.

    Raises:
        TypeError, ValueError: as :func:`mla_kernels.indexer_topk`.
    """
    if row_starts is None:
        return indexer_topk(logits, topk, ends=lengths)
    picks = indexer_topk(logits, topk, starts=row_starts, ends=row_starts + lengths)
    return torch.where(picks < 0, picks, picks - row_starts[:, None])


def _pages(cache: torch.Tensor, page_size: int) -> IndexerCache:
    check_tensor("cache", cache, shape=(None, page_size * (KEY + 4)), dtypes=(torch.uint8,))
    return IndexerCache(cache, KEY)
