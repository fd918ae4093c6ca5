"""vLLM's ops that rotate queries and keys and write the keys; :mod:`mla_kernels.compat.vllm_ops` gives them out."""

import torch

from mla_kernels.checks import FLOATS, INDICES, check_int, check_no_grad, check_range, check_tensor, readable
from mla_kernels.compat.vllm import concat_and_cache_mla, latent_cache
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.heads import rotate_heads
from mla_kernels.latent.tools.scatter import scatter_tokens

_WIDTH, _ROPE, _TOKEN = 512, 64, 584  # V4's key, its rotated values, bytes of a token in fp8_v4
_PER_TENSOR = (
    "stores e4m3 under one scale a tensor, a layout that no kernel here reads; bfloat16 and uint8 are accepted"
)
_MXFP8 = "kv_mxfp8: got True, 528 bytes a token with one scale for 32 values, a layout that no kernel here reads"


def concat_and_cache_mla_rope_fused(
    positions: torch.Tensor,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    kv_c: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_cache_dtype: str,
    kv_cache_scale: torch.Tensor,
) -> None:
    """Rotate queries and keys in place, then write latents and keys as ``concat_and_cache_mla`` does.

    Rotated in float32 and rounded once.

    Args:
        positions: ``[n]`` int64 or int32, each token's row of ``cos_sin_cache``.
        q_pe: ``[n, heads, rope_dim]``, rotated in place.
        k_pe: ``[n, rope_dim]`` or ``[n, 1, rope_dim]``, rotated in place.
        kv_c: ``[n, latent_dim]``, normalised latents.
        cos_sin_cache: ``[positions, rope_dim]``, cosines then sines, in any float type.
        is_neox: whether pairs are halves apart (GPT-NeoX), or neighbours (GPT-J).
        slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale: those of ``concat_and_cache_mla``.

    Raises:
        NotImplementedError, TypeError, ValueError: as ``concat_and_cache_mla``; a dtype or shape that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels_fused.cu``.
    """
    check_tensor("q_pe", q_pe, rank=3)
    tokens, _, rope_dim = q_pe.shape
    key = k_pe[:, 0] if isinstance(k_pe, torch.Tensor) and k_pe.dim() == 3 and k_pe.shape[1] == 1 else k_pe
    check_tensor("k_pe", key, shape=(tokens, rope_dim), like=q_pe)
    if not isinstance(is_neox, bool):
        raise TypeError(f"is_neox: got {type(is_neox).__name__}, a bool is accepted")
    check_no_grad("concat_and_cache_mla_rope_fused", q_pe=q_pe, k_pe=k_pe, kv_c=kv_c)
    angles = _angles(cos_sin_cache, rope_dim, "positions", positions, tokens, q_pe.device)
    options = {"rope_dim": rope_dim, "rope": "half" if is_neox else "interleaved"}
    turned = rotate_heads(key[:, None], *angles, **options)[:, 0]
    concat_and_cache_mla(kv_c, turned, kv_cache, slot_mapping, kv_cache_dtype, kv_cache_scale)  # its checks come first
    key.copy_(turned)
    q_pe.copy_(rotate_heads(q_pe, *angles, **options))


def concat_mla_q(ql_nope: torch.Tensor, q_pe: torch.Tensor, q_out: torch.Tensor) -> None:
    """Put absorbed queries and their rotated parts next to each other, in place.

    Args:
        ql_nope: ``[tokens, heads, nope_dim]``.
        q_pe: ``[tokens, heads, rope_dim]``.
        q_out: ``[tokens, heads, nope_dim + rope_dim]``, written.

    Raises:
        TypeError, ValueError: a dtype, shape or device that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/concat_mla_q.cuh``.
    """
    check_tensor("ql_nope", ql_nope, rank=3, dense=False)
    tokens, heads, nope = ql_nope.shape
    check_tensor("q_pe", q_pe, shape=(tokens, heads, None), like=ql_nope, dense=False)
    check_tensor("q_out", q_out, shape=(tokens, heads, nope + q_pe.shape[2]), like=ql_nope, dense=False)
    q_out[..., :nope].copy_(ql_nope)
    q_out[..., nope:].copy_(q_pe)


def fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
    q_in: torch.Tensor,
    kv: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
    kv_mxfp8: bool = False,
    apply_q_rope: bool = True,
    is_q_interleaved: bool = False,
) -> torch.Tensor:
    """DeepSeek-V4's queries normed by head and rotated, and its rotated keys into their ``fp8_v4`` cache, in place.

    The last 64 values are rotated, in float32, neighbours being pairs. A key is rounded to bfloat16 and then quantised,
    64 values a scale, with the layout of vLLM's cache: ``fp8_v4`` (:class:`mla_kernels.CacheLayout`). Its bytes are
    vLLM's but where a block's largest magnitude is below 0.055: the scale is 2^-13 there, FlashMLA's least, and vLLM's
    falls on with the magnitude. Scales are stored, so that readers take either.

    Args:
        q_in: ``[n, heads, 512]`` bfloat16 or float16.
        kv: ``[n, 512]`` in the same dtype, normalised.
        k_cache: uint8 ``[num_blocks, bytes]``: of each block its tokens' 448 codes and 64 bfloat16 values, then 8 bytes
            of scales for each, then what pads it.
        slot_mapping: ``[tokens]`` int64 or int32; -1 writes nothing; ``n`` may exceed ``tokens``.
        position_ids: ``[n]`` int64 or int32, rows of ``cos_sin_cache``.
        cos_sin_cache: ``[positions, 64]``, 32 cosines and 32 sines, in any float type.
        q_head_padded: heads of the result, at least those of ``q_in``; the others are zeros.
        eps: added to the mean squares of the queries.
        cache_block_size: tokens of a block.
        apply_q_norm: whether queries are normed.
        kv_mxfp8: False.
        apply_q_rope: True.
        is_q_interleaved: False.

    Returns:
        ``[n, q_head_padded, 512]``, the queries.

    Raises:
        NotImplementedError: the forms that the last three arguments stand for.
        TypeError, ValueError: a dtype, shape or device that is not accepted. Nothing was written then.

    Source: vLLM ``csrc/libtorch_stable/fused_deepseek_v4_qnorm_rope_kv_insert_kernel.cu``.
    """
    if kv_mxfp8:
        raise NotImplementedError(_MXFP8)
    if not apply_q_rope or is_q_interleaved:
        raise NotImplementedError(
            f"apply_q_rope, is_q_interleaved: got {apply_q_rope!r} and {is_q_interleaved!r}: queries in the order of "
            "another attention kernel, which no kernel here takes; True and False are accepted"
        )
    check_tensor("q_in", q_in, shape=(None, None, _WIDTH), dtypes=FLOATS[:2])
    tokens, heads, _ = q_in.shape
    check_int("q_head_padded", q_head_padded, heads)
    cache = _split_cache(k_cache, cache_block_size)
    angles, keys = _rotated_keys(kv, cache, slot_mapping, position_ids, cos_sin_cache, q_in)
    queries = _rotated(q_in, angles, eps if apply_q_norm else None)
    scatter_tokens(keys, keys[:, :0], slot_mapping, cache)
    if q_head_padded == heads:
        return queries
    padded = q_in.new_zeros(tokens, q_head_padded, _WIDTH)
    padded[:, :heads] = queries
    return padded


def fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
) -> None:
    """As :func:`fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert`, with queries in place and a bfloat16 cache.

    Args:
        q: ``[n, heads, 512]`` bfloat16, normed and rotated in place.
        kv: ``[n, 512]`` bfloat16, normalised.
        k_cache: ``[num_blocks, cache_block_size, 512]`` bfloat16, written.
        slot_mapping, position_ids, cos_sin_cache, eps, cache_block_size, apply_q_norm: as there.

    Raises:
        TypeError, ValueError: a dtype, shape or device that is not accepted. Nothing was written then.

    Source: vLLM ``csrc/libtorch_stable/fused_deepseek_v4_qnorm_rope_kv_insert_kernel.cu``.
    """
    check_tensor("q", q, shape=(None, None, _WIDTH), dtypes=(torch.bfloat16,))
    check_no_grad("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert", q=q)
    cache = _plain_cache(k_cache, cache_block_size)
    angles, keys = _rotated_keys(kv, cache, slot_mapping, position_ids, cos_sin_cache, q)
    queries = _rotated(q, angles, eps if apply_q_norm else None)
    scatter_tokens(keys, keys[:, :0], slot_mapping, cache)
    q.copy_(queries)


def fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_fp8: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    fp8_scale: torch.Tensor,
    q_fp8_scale_inv: torch.Tensor,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
) -> None:
    """Not supported.

    Args:
        q, kv, q_fp8, k_cache, slot_mapping, position_ids, cos_sin_cache, fp8_scale, q_fp8_scale_inv, eps,
            cache_block_size, apply_q_norm: there a cache of e4m3 under one scale a tensor.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"k_cache: this op {_PER_TENSOR}")


def fused_deepseek_v4_kv_rope_insert(
    kv: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    cache_block_size: int,
    fp8_scale: torch.Tensor | None = None,
    kv_mxfp8: bool = False,
) -> None:
    """The keys' half of :func:`fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert`, into either cache, in place.

    Args:
        kv: ``[n, 512]``, normalised: bfloat16 or float16 for a uint8 cache, else bfloat16.
        k_cache: uint8 ``[num_blocks, bytes]`` or ``[num_blocks, cache_block_size, bytes of a token]``, or bfloat16
            ``[num_blocks, cache_block_size, 512]``, written.
        slot_mapping, position_ids, cos_sin_cache, cache_block_size: as there.
        fp8_scale: None.
        kv_mxfp8: False.

    Raises:
        NotImplementedError: mxfp8, or e4m3 under one scale a tensor.
        TypeError, ValueError: a dtype, shape or device that is not accepted. Nothing was written then.

    Source: vLLM ``csrc/libtorch_stable/fused_deepseek_v4_qnorm_rope_kv_insert_kernel.cu``.
    """
    if kv_mxfp8:
        raise NotImplementedError(_MXFP8)
    if fp8_scale is not None or (isinstance(k_cache, torch.Tensor) and k_cache.dtype == torch.float8_e4m3fn):
        raise NotImplementedError(f"fp8_scale: this form {_PER_TENSOR}")
    split = isinstance(k_cache, torch.Tensor) and k_cache.dtype == torch.uint8
    cache = (_split_cache if split else _plain_cache)(k_cache, cache_block_size)
    check_tensor("kv", kv, rank=2, dtypes=FLOATS[:2] if split else (torch.bfloat16,))
    _, keys = _rotated_keys(kv, cache, slot_mapping, position_ids, cos_sin_cache, kv)
    scatter_tokens(keys, keys[:, :0], slot_mapping, cache)


def v4_cache(k_cache: torch.Tensor, block_size: int) -> LatentCache:
    """A cache of DeepSeek-V4's keys in vLLM: uint8 blocks in ``fp8_v4``, or bfloat16 rows."""
    return (_split_cache if k_cache.dtype == torch.uint8 else _plain_cache)(k_cache, block_size)


def _split_cache(k_cache, block_size) -> LatentCache:
    """vLLM's uint8 blocks as an ``fp8_v4`` cache."""
    check_tensor("k_cache", k_cache, dtypes=(torch.uint8,))
    check_int("cache_block_size", block_size, 1)
    if k_cache.dim() not in (2, 3) or (k_cache.dim() == 3 and k_cache.stride(1) != k_cache.shape[2]):
        raise ValueError(f"k_cache: got shape {tuple(k_cache.shape)}, [num_blocks, bytes] in dense blocks is accepted")
    size = k_cache[0].numel() if k_cache.shape[0] else block_size * _TOKEN
    if size < block_size * _TOKEN:
        raise ValueError(
            f"k_cache: got blocks of {size:,} bytes, at least {block_size * _TOKEN:,} are accepted, {block_size} tokens"
        )
    shape, strides = (k_cache.shape[0], block_size, _TOKEN), (k_cache.stride(0), _TOKEN, 1)
    return latent_cache("k_cache", k_cache.as_strided(shape, strides), _WIDTH, CacheLayout.FP8_V4)


def _plain_cache(k_cache, block_size) -> LatentCache:
    check_int("cache_block_size", block_size, 1)
    check_tensor("k_cache", k_cache, shape=(None, block_size, _WIDTH), dtypes=(torch.bfloat16,))
    return latent_cache("k_cache", k_cache, _WIDTH)


def _angles(cos_sin_cache, rope_dim, name, positions, tokens, device, used=None) -> tuple[torch.Tensor, ...]:
    """(cos, sin, positions) of ``rotate_heads``: the table's halves, or this call's rows of them in float32. ``used``:
    positions that are looked at."""
    check_tensor("cos_sin_cache", cos_sin_cache, shape=(None, rope_dim), device=device)
    check_tensor(name, positions, shape=(tokens,), dtypes=INDICES, device=device)
    rows = cos_sin_cache.shape[0]
    if readable(positions):
        check_range(name, positions[:used], 0, rows, "rows of cos_sin_cache")
    if cos_sin_cache.dtype != torch.float32:
        known = (positions >= 0) & (positions < rows)  # of others rotate_heads makes what it makes of them
        cos_sin_cache = cos_sin_cache[positions.clamp(0, max(rows - 1, 0))].float() if rows else cos_sin_cache.float()
        positions = torch.where(known, torch.arange(tokens, device=device), -1)
    return *cos_sin_cache.chunk(2, -1), positions


def _rotated(x, angles, eps=None) -> torch.Tensor:
    return rotate_heads(x, *angles, rope_dim=_ROPE, norm_eps=eps)


def _rotated_keys(kv, cache, slot_mapping, position_ids, cos_sin_cache, like) -> tuple[tuple, torch.Tensor]:
    """(angles of all tokens, rotated keys of those with a slot), after the checks that V4's ops share."""
    device = cache.data.device
    check_tensor("kv", kv, shape=(like.shape[0], _WIDTH), like=like)
    check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES, device=device)
    check_no_grad("writing k_cache", kv=kv)
    tokens = slot_mapping.shape[0]
    if kv.shape[0] < tokens:
        raise ValueError(f"kv: got {kv.shape[0]} rows for {tokens} slots, at least as many are accepted")
    if kv.device != device:
        raise ValueError(f"k_cache: got a tensor on {device}, all arguments must be on {kv.device}")
    used = tokens if like is kv else None  # without queries rows behind the slots are padding
    cos, sin, positions = _angles(cos_sin_cache, _ROPE, "position_ids", position_ids, kv.shape[0], device, used)
    keys = _rotated(kv[:tokens, None], (cos, sin, positions[:tokens]))[:, 0]
    return (cos, sin, positions), keys
