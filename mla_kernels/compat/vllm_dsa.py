"""Functions of vLLM's model of DeepSeek-V3.2, for chips whose Triton has no float8 (capability below 8.9).

Names and arguments are those of vLLM 0.33's ``vllm.models.deepseek_v32.common.kernels`` and
``vllm.v1.attention.ops.common``, whose Triton kernels take e4m3 and so do not compile for an A100 or RTX 3090. Here
e4m3 is made by integer arithmetic, and moved as bytes.
:mod:`mla_kernels.compat.vllm_plugin` puts them in their place.
"""

import functools

import torch

from mla_kernels.compat.engine_rope import rope_tables
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.heads import rotate_heads, rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.latent.write import write_latent

CACHES = ("auto", "bfloat16", "float16", "fp8_ds_mla")


def fused_norm_rope(
    positions, q_c, q_rms_norm_w, q_rms_eps, kv_c, kv_rms_norm_w, kv_rms_eps, k_pe, k_rope_cos_sin_cache, index_k,
    index_k_layer_norm_w, index_k_layer_norm_bias, index_k_layer_norm_eps, index_k_rope_cos_sin_cache,
    topk_indices_buffer, slot_mapping=None, indexer_slot_mapping=None, indexer_k_cache=None,
    indexer_cache_shuffled=False, mla_kv_cache=None, mla_kv_cache_dtype="auto", mla_k_scale=None, has_indexer=True,
    index_rope_interleave=False, q_c_out=None, kv_c_out=None, k_pe_out=None, index_k_out=None, skip_scale=False,
):  # fmt: skip
    """Normalised ``q_c``; latents, rotated keys and index keys are written to their caches, the picks are cleared.

    ``kv_c_out`` and ``k_pe_out`` are left as they are: prefill over expanded keys alone reads them, and this library's
    sparse backend takes those keys from the cache. ``mla_k_scale`` and ``skip_scale`` are of caches that are refused.
    An index key has the scale of ``write_indexer_key``, at least 2^-13 where vLLM's falls on to 2^-22; it is stored, so
    that readers take either.

    Raises:
        NotImplementedError: a shuffled index cache, index keys to be returned (context parallelism), or a cache in
            another dtype than the model's or ``fp8_ds_mla``. Nothing was written then.
    """
    if indexer_cache_shuffled or index_k_out is not None:
        raise NotImplementedError(
            "indexer_cache_shuffled, index_k_out: got a shuffled cache or a buffer for index keys, neither is accepted"
        )
    if mla_kv_cache is not None and mla_kv_cache_dtype not in CACHES:
        accepted = ", ".join(map(repr, CACHES))
        raise NotImplementedError(f"mla_kv_cache_dtype: got {mla_kv_cache_dtype!r}, accepted: {accepted}")
    if has_indexer:
        topk_indices_buffer[: positions.shape[0]] = -1
    if mla_kv_cache is not None:
        layout = CacheLayout.FP8_V32 if mla_kv_cache_dtype == "fp8_ds_mla" else None
        write_latent(
            torch.cat([kv_c, k_pe], -1),
            kv_rms_norm_w,
            *rope_tables(k_rope_cos_sin_cache),
            positions,
            slot_mapping,
            LatentCache(mla_kv_cache, kv_c.shape[1], layout),
            rope="interleaved",
            eps=kv_rms_eps,
        )
    if has_indexer and indexer_k_cache is not None:
        pages = indexer_k_cache.view(torch.uint8)
        write_indexer_key(
            index_k,
            index_k_layer_norm_w,
            index_k_layer_norm_bias,
            *rope_tables(index_k_rope_cos_sin_cache),
            positions,
            slot_mapping if indexer_slot_mapping is None else indexer_slot_mapping,
            IndexerCache(pages.as_strided((pages.shape[0], pages[0].numel()), (pages.stride(0), 1)), index_k.shape[1]),
            rope_dim=index_k_rope_cos_sin_cache.shape[1],
            rope="interleaved" if index_rope_interleave else "half",
            eps=index_k_layer_norm_eps,
        )
    normed = torch.nn.functional.rms_norm(q_c, q_c.shape[1:], q_rms_norm_w, q_rms_eps)
    return normed if q_c_out is None else q_c_out.copy_(normed)


def fused_q(
    positions, q_pe, q_pe_cos_sin_cache, index_q, index_q_cos_sin_cache, ql_nope, q_scale, index_weights,
    index_weights_softmax_scale, index_weights_head_scale, has_indexer=True, index_rope_interleave=False,
    quantize_mqa=True,
):  # fmt: skip
    """(index queries as e4m3 codes, their weights with all scales, rotated ``q_pe``); None, None without an indexer.

    ``ql_nope`` and ``q_scale`` are of queries in float8, and not read.

    Raises:
        NotImplementedError: ``quantize_mqa``.
    """
    if quantize_mqa:
        raise NotImplementedError("quantize_mqa: got True, attention takes queries in the model's dtype alone")
    rope_dim = q_pe.shape[2]
    rotated = rotate_heads(q_pe, *rope_tables(q_pe_cos_sin_cache), positions, rope_dim=rope_dim, rope="interleaved")
    if not has_indexer:
        return None, None, rotated
    turned = rotate_indexer_query(
        index_q,
        *rope_tables(index_q_cos_sin_cache),
        positions,
        rope_dim=index_q_cos_sin_cache.shape[1],
        rope="interleaved" if index_rope_interleave else "half",
    )
    factor = index_weights_softmax_scale * index_weights_head_scale
    codes, weights = quantise_indexer_query(turned, index_weights.float() * factor)
    return codes, weights, rotated


def packing_bytes(pack_seq_triton):
    """vLLM's ``pack_seq_triton``, which pads queries of sequences to one number of tokens, with float8 moved as bytes:
    its Triton kernel does not compile for float8 on these chips. Padding is zeros then; nobody looks at its logits."""

    @functools.wraps(pack_seq_triton)
    def packed(x, lengths, pad_value=-float("inf"), block_t=64, block_d=64):
        if x.dtype != torch.float8_e4m3fn:
            return pack_seq_triton(x, lengths, pad_value, block_t, block_d)
        return pack_seq_triton(x.view(torch.uint8), lengths, 0, block_t, block_d).view(x.dtype)

    return packed


def warming_bytes(get_warmup_keys):
    """What vLLM compiles of that kernel ahead of time, bytes in the place of float8."""

    @functools.wraps(get_warmup_keys)
    def keys(*, dtype, pad_value):
        codes = dtype == torch.float8_e4m3fn
        return get_warmup_keys(dtype=torch.uint8 if codes else dtype, pad_value=0 if codes else pad_value)

    return keys
