"""vLLM's own CUDA ops that DeepSeek-V3.2, GLM-5 and V4 call beside DeepGEMM and FlashMLA, over this library's ops.

Import from ``mla_kernels.compat.vllm_ops`` what was imported from

- ``vllm._custom_ops``: the indexer's top-k (``top_k_per_row_prefill``, ``top_k_per_row_decode``) and cache
  (``indexer_k_quant_and_cache``, ``cp_gather_indexer_k_quant_cache``), latents into their cache
  (``concat_and_cache_mla``, ``concat_and_cache_mla_rope_fused``, ``concat_mla_q``) and out of it
  (``gather_and_maybe_dequant_cache``, ``cp_gather_cache``, ``cp_gather_and_upconvert_fp8_kv_cache``,
  ``cp_gather_and_upconvert_nvfp4_kv_cache``);
- ``torch.ops._C``: ``persistent_topk``, ``cooperative_topk`` and V4's ``fused_deepseek_v4_*``.

Signatures are those of vLLM 0.33.0, and as there results are written in place. What is not accepted raises with the
reason, before anything is written. Nothing is read back from a device.
"""

import torch

from mla_kernels.attention.indexer.topk import MAX_TOP_K, indexer_topk
from mla_kernels.checks import FLOATS, INDICES, check_int, check_tensor
from mla_kernels.compat.vllm import concat_and_cache_mla
from mla_kernels.compat.vllm_gather import (
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_and_upconvert_nvfp4_kv_cache,
    cp_gather_cache,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
    indexer_cache,
)
from mla_kernels.compat.vllm_rope import (
    concat_and_cache_mla_rope_fused,
    concat_mla_q,
    fused_deepseek_v4_kv_rope_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert,
)
from mla_kernels.latent.indexer.scatter import scatter_indexer_keys

__all__ = [
    "concat_and_cache_mla",
    "concat_and_cache_mla_rope_fused",
    "concat_mla_q",
    "cooperative_topk",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_and_upconvert_nvfp4_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "fused_deepseek_v4_kv_rope_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
    "gather_and_maybe_dequant_cache",
    "indexer_k_quant_and_cache",
    "persistent_topk",
    "top_k_per_row_decode",
    "top_k_per_row_prefill",
]

_SCALES = {
    "mxfp8": "stores one ue8m0 byte for each 32 values, a layout that no kernel here reads",
    None: "stores the scale max(amax, 1e-4) / 448 as it is, which no kernel here writes",
}


def top_k_per_row_prefill(
    logits: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    raw_topk_indices: torch.Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """Where the largest logits of each row's range stand, counted from its start, -1 behind them.

    Exact, equal values by the lower index, in ascending order and the same on every call (there in no order). A logit
    of -inf or NaN is never chosen; vLLM lists all of a range that is no longer than ``topk_tokens``, such ones, too.

    Args:
        logits: ``[num_rows or more, S]`` float32, S below 2**24.
        cu_seqlen_ks, cu_seqlen_ke: ``[num_rows]`` int32: row t is restricted to columns ks[t] to ke[t] - 1.
        raw_topk_indices: int32 ``[num_rows or more, topk_tokens or more]``, written in place.
        num_rows: rows that are read and written.
        stride0, stride1: those of ``logits``; stride1 is 1.
        topk_tokens: how many, 1 to 65536.

    Raises:
        TypeError, ValueError: a dtype, shape, device, stride or number that is not accepted.

    Source: vLLM ``csrc/libtorch_stable/sampler.cu``.
    """
    rows = _rows(logits, num_rows, stride0, stride1, "raw_topk_indices", raw_topk_indices, topk_tokens)
    for name, bound in (("cu_seqlen_ks", cu_seqlen_ks), ("cu_seqlen_ke", cu_seqlen_ke)):
        check_tensor(name, bound, shape=(num_rows,), dtypes=(torch.int32,), device=logits.device)
    best = indexer_topk(rows, topk_tokens, starts=cu_seqlen_ks, ends=cu_seqlen_ke)
    best = torch.where(best < 0, best, best - cu_seqlen_ks[:, None])
    raw_topk_indices[:num_rows, :topk_tokens].copy_(best)


def top_k_per_row_decode(
    logits: torch.Tensor,
    next_n: int,
    seq_lens: torch.Tensor,
    raw_topk_indices: torch.Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """Where the largest logits of each decoded token stand; as :func:`top_k_per_row_prefill`, from column 0 on.

    With ``next_n`` 2 and ``seq_lens`` [9, 5], rows 0 to 3 see 8, 9, 4 and 5 columns: the newest tokens of a sequence
    see one more each.

    Args:
        logits: ``[num_rows or more, S]`` float32, S below 2**24.
        next_n: rows of a sequence, where ``seq_lens`` has one number for all of them.
        seq_lens: int32, ``num_rows / next_n`` lengths of sequences, or ``num_rows`` of rows, in any shape.
        raw_topk_indices, num_rows, stride0, stride1, topk_tokens: as in :func:`top_k_per_row_prefill`.

    Raises:
        TypeError, ValueError: as :func:`top_k_per_row_prefill`.

    Source: vLLM ``csrc/libtorch_stable/sampler.cu``.
    """
    rows = _rows(logits, num_rows, stride0, stride1, "raw_topk_indices", raw_topk_indices, topk_tokens)
    check_int("next_n", next_n, 1)
    check_tensor("seq_lens", seq_lens, dtypes=(torch.int32,), device=logits.device, dense=False)
    lengths = seq_lens.reshape(-1)
    if lengths.shape[0] != num_rows:
        if lengths.shape[0] * next_n != num_rows:
            raise ValueError(
                f"seq_lens: got {lengths.shape[0]} numbers for {num_rows} rows and next_n {next_n}, accepted are "
                f"{num_rows} or num_rows / next_n"
            )
        newest = torch.arange(1 - next_n, 1, dtype=torch.int32, device=logits.device)
        lengths = (lengths[:, None] + newest).flatten()
    raw_topk_indices[:num_rows, :topk_tokens].copy_(indexer_topk(rows, topk_tokens, ends=lengths.clamp_min(0)))


def persistent_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    k: int,
    max_seq_len: int,
) -> None:
    """``torch.ops._C.persistent_topk``: as :func:`top_k_per_row_decode` with a length for each row.

    Args:
        logits: ``[rows, S]`` float32.
        lengths: int32, ``rows`` of them in any shape.
        output: int32 ``[rows or more, k or more]``, written in place.
        workspace: scratch memory there; not used.
        k: how many; any from 1 to 65536 (there 512, 1024 or 2048).
        max_seq_len: no length counts for more than this.

    Raises:
        TypeError, ValueError: as :func:`top_k_per_row_prefill`.

    Source: vLLM ``csrc/libtorch_stable/topk.cu``.
    """
    check_tensor("logits", logits, rank=2, dtypes=(torch.float32,))
    rows = _rows(logits, logits.shape[0], *logits.stride(), "output", output, k)
    check_tensor("lengths", lengths, dtypes=(torch.int32,), device=logits.device, dense=False)
    check_int("max_seq_len", max_seq_len, 0)
    if lengths.numel() != logits.shape[0]:
        raise ValueError(f"lengths: got {lengths.numel()} numbers for {logits.shape[0]} rows, one a row is accepted")
    ends = lengths.reshape(-1).clamp(0, max_seq_len)
    output[: rows.shape[0], :k].copy_(indexer_topk(rows, k, ends=ends))


def cooperative_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    k: int,
    max_seq_len: int,
) -> None:
    """``torch.ops._C.cooperative_topk``: the same as :func:`persistent_topk`, for any number of rows (there 64)."""
    persistent_topk(logits, lengths, output, workspace, k, max_seq_len)


def _rows(logits, num_rows, stride0, stride1, out_name, out, top_k) -> torch.Tensor:
    """The rows of ``logits`` that are read, after the checks that all of these share."""
    check_tensor("logits", logits, rank=2, dtypes=(torch.float32,))
    check_int("num_rows", num_rows, 0, logits.shape[0])
    for name, value, own in (("stride0", stride0, logits.stride(0)), ("stride1", stride1, logits.stride(1))):
        if value != own:
            raise ValueError(f"{name}: got {value!r}, the stride of logits, {own}, is accepted")
    check_int("topk_tokens" if out_name == "raw_topk_indices" else "k", top_k, 1, MAX_TOP_K)
    check_tensor(out_name, out, rank=2, dtypes=(torch.int32,), device=logits.device)
    if out.shape[0] < num_rows or out.shape[1] < top_k:
        raise ValueError(f"{out_name}: got shape {tuple(out.shape)}, at least ({num_rows}, {top_k}) is accepted")
    return logits[:num_rows]


def indexer_k_quant_and_cache(
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    quant_block_size: int,
    kv_cache_dtype: str,
) -> None:
    """Write the indexer's keys as e4m3 codes, one power-of-two scale a key, in place: the same bytes as vLLM's.

    A key with a NaN or an infinity gets codes 0x7F and scale NaN (there a scale that leaves it out).

    Args:
        k: ``[n, head_dim]`` bfloat16, float16 or float32, after norm and rotation; n may exceed the slots, as vLLM
            pads its batches.
        kv_cache: uint8 ``[num_blocks, block_size, head_dim + 4]``; a block holds the codes of its keys, then their fp32
            scales.
        slot_mapping: ``[tokens]`` int64 or int32, ``block * block_size + offset``; -1 writes nothing.
        quant_block_size: values that share a scale: ``head_dim``.
        kv_cache_dtype: how scales are rounded: ``"ue8m0"``.

    Raises:
        NotImplementedError: scales of parts of a key, or other roundings.
        TypeError, ValueError: a dtype, shape or device that is not accepted; on CPU tensors also a slot past the cache.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``.
    """
    check_tensor("k", k, rank=2, dtypes=FLOATS)
    head_dim = k.shape[1]
    if kv_cache_dtype != "ue8m0":
        raise NotImplementedError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, which {_SCALES.get(kv_cache_dtype, _SCALES[None])}; accepted: "
            "'ue8m0'"
        )
    if quant_block_size != head_dim:
        raise NotImplementedError(
            f"quant_block_size: got {quant_block_size} for keys of {head_dim}, one scale a key is accepted, {head_dim}"
        )
    cache = indexer_cache(kv_cache, head_dim, k.device)
    check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES, device=k.device)
    tokens = slot_mapping.shape[0]
    if k.shape[0] < tokens:
        raise ValueError(f"k: got {k.shape[0]} rows for {tokens} slots, at least as many are accepted")
    scatter_indexer_keys(k[:tokens], slot_mapping, cache)
