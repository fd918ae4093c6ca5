"""vLLM's MLA cache write, state merge and fused experts over this library's ops: same names, arguments and layouts.

Import from ``mla_kernels.compat.vllm`` what was imported from ``vllm._custom_ops`` (``concat_and_cache_mla``),
``vllm.attention.ops.merge_attn_states`` (both write their results in place, as there) and
``vllm.model_executor.layers.fused_moe`` (``fused_experts``, ``grouped_topk``, ``moe_align_block_size``). What is not
accepted raises with the reason. Signatures follow vLLM 0.11, that of ``fused_experts`` later versions.
"""

import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.checks import FLOATS, INDICES, check_no_grad, check_tensor
from mla_kernels.compat.vllm_moe import fused_experts, grouped_topk, moe_align_block_size
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.scatter import scatter_tokens

__all__ = ["concat_and_cache_mla", "fused_experts", "grouped_topk", "merge_attn_states", "moe_align_block_size"]

_REFUSED = {
    "fp8": "stores latent and key alike as e4m3 under one scale a tensor, a layout that no kernel here reads",
    "fp8_e4m3": "stores latent and key alike as e4m3 under one scale a tensor, a layout that no kernel here reads",
    "fp8_e5m2": "stores e5m2, which no kernel here reads",
}


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """Write normalised latents and rotated keys to their slots of ``kv_cache``, in place.

    ``"fp8_ds_mla"`` is ``fp8_v32``: 512 e4m3 codes, 4 fp32 scales, 64 bfloat16 keys, 656 bytes. The quantiser is this
    library's, scales that are powers of two as in DeepSeek's own code; vLLM's kernel takes amax / 448 as it is. Either
    reads the other's cache, since the scales are stored.

    Args:
        kv_c: ``[n, latent_dim]``, bfloat16, float16 or float32: the dtype of ``kv_cache`` unless that is quantised.
        k_pe: ``[n, rope_dim]``, in the dtype of ``kv_c``.
        kv_cache: ``[num_blocks, block_size, latent_dim + rope_dim]`` with ``"auto"``; uint8
            ``[num_blocks, block_size, 656]`` with ``"fp8_ds_mla"``.
        slot_mapping: ``[tokens]`` int64 or int32, ``block * block_size + offset``; -1 writes nothing. ``n`` may exceed
            ``tokens``, as vLLM pads its batches; rows behind that are not read.
        kv_cache_dtype: ``"auto"`` or ``"fp8_ds_mla"``.
        scale: fp32 tensor of one element, a tensor-wide scale that neither layout has; vLLM always passes one and reads
            it only for ``"fp8"``. Its value is not read here.

    Raises:
        NotImplementedError: vLLM's other cache dtypes, or an input that requires grad.
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device or unknown ``kv_cache_dtype``; on CPU tensors also a slot past the cache.

    Source: vLLM ``csrc/cache_kernels.cu``, ``vllm/_custom_ops.py``.
    """
    if kv_cache_dtype in _REFUSED:
        raise NotImplementedError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, which {_REFUSED[kv_cache_dtype]}; accepted: 'auto', 'fp8_ds_mla'"
        )
    if kv_cache_dtype not in ("auto", "fp8_ds_mla"):
        raise ValueError(f"kv_cache_dtype: got {kv_cache_dtype!r}, accepted: 'auto', 'fp8_ds_mla'")
    check_tensor("kv_c", kv_c, rank=2)
    check_tensor("k_pe", k_pe, rank=2, like=kv_c)
    check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES, device=kv_c.device)
    check_tensor("scale", scale, dtypes=(torch.float32,))
    if scale.numel() != 1:
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, a tensor of one element is accepted")
    tokens, latent_dim, rope_dim = slot_mapping.shape[0], kv_c.shape[1], k_pe.shape[1]
    for name, value in (("kv_c", kv_c), ("k_pe", k_pe)):
        if value.shape[0] < tokens:
            raise ValueError(f"{name}: got {value.shape[0]} rows for {tokens} slots, at least as many are accepted")
    if kv_cache_dtype == "auto":
        check_tensor("kv_cache", kv_cache, shape=(None, None, latent_dim + rope_dim), like=kv_c)
        cache = LatentCache(kv_cache, latent_dim)
    else:
        if (latent_dim, rope_dim) != (512, 64):
            raise ValueError(f"kv_c, k_pe: got widths {latent_dim} and {rope_dim}, fp8_ds_mla has 512 and 64")
        check_tensor("kv_cache", kv_cache, shape=(None, None, 656), dtypes=(torch.uint8,), device=kv_c.device)
        cache = LatentCache(kv_cache, latent_dim, CacheLayout.FP8_V32)
    scatter_tokens(kv_c[:tokens], k_pe[:tokens], slot_mapping, cache)


def merge_attn_states(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
) -> None:
    """Merge attention over a prefix and over a suffix of the keys into ``output``, in place.

    lse are [heads, tokens], natural logarithms. An lse of +inf (FlashAttention's for a row without keys) or -inf means
    no key, and that side's output is not used; where both have none, ``output`` is 0 and ``output_lse`` -inf. Both
    sides are copied next to each other first. ``output`` may be one of them.

    Args:
        output: ``[tokens, heads, d]``, written; bfloat16, float16 or float32.
        prefix_output, suffix_output: ``[tokens, heads, d]``, in the dtype of ``output``.
        prefix_lse, suffix_lse: ``[heads, tokens]`` float32.
        output_lse: ``[heads, tokens]`` float32, written if given.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: shapes or devices that differ. Nothing was written then.
        NotImplementedError: an input requires grad: the result is written in place.

    Source: vLLM ``vllm/attention/ops/merge_attn_states.py``; section 2.2 of https://arxiv.org/abs/2501.01005.
    """
    check_tensor("output", output, rank=3, dtypes=FLOATS)
    tokens, heads, _ = output.shape
    lse = {"shape": (heads, tokens), "dtypes": (torch.float32,), "device": output.device}
    check_tensor("prefix_output", prefix_output, shape=tuple(output.shape), like=output)
    check_tensor("prefix_lse", prefix_lse, **lse)
    check_tensor("suffix_output", suffix_output, shape=tuple(output.shape), like=output)
    check_tensor("suffix_lse", suffix_lse, **lse)
    if output_lse is not None:
        check_tensor("output_lse", output_lse, **lse)
    parts = {"prefix_output": prefix_output, "prefix_lse": prefix_lse}
    check_no_grad("merge_attn_states", **parts, suffix_output=suffix_output, suffix_lse=suffix_lse)
    outs = torch.stack((prefix_output, suffix_output))
    lses = torch.stack((prefix_lse, suffix_lse)).transpose(1, 2)  # [2, tokens, heads]
    merged, merged_lse = merge_states(outs, lses.masked_fill(lses == float("inf"), float("-inf")).contiguous())
    output.copy_(merged)
    if output_lse is not None:
        output_lse.copy_(merged_lse.T)
