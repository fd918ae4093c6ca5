"""vLLM's MLA cache write, state merge and fused experts over this library's ops: same names, arguments and layouts.

Import from ``mla_kernels.compat.vllm`` what was imported from

- ``vllm._custom_ops``: ``concat_and_cache_mla``;
- ``vllm.v1.attention.ops.merge_attn_states``: ``merge_attn_states``;
- ``vllm.model_executor.layers.fused_moe``: ``fused_experts``, and from its modules ``router.grouped_topk_router`` and
  ``moe_align_block_size``: ``grouped_topk``, ``moe_align_block_size``.

The first two write their results in place, as there. Signatures are those of vLLM 0.33.0; where older releases have
arguments in another order (their ``fused_experts`` took ``inplace`` before ``activation``), that of 0.33.0 counts. What
is not accepted raises with the reason.
"""

import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.checks import FLOATS, INDICES, check_int, check_no_grad, check_tensor
from mla_kernels.compat.vllm_moe import fused_experts, grouped_topk, moe_align_block_size
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.tools.scatter import scatter_tokens

__all__ = ["concat_and_cache_mla", "fused_experts", "grouped_topk", "merge_attn_states", "moe_align_block_size"]

_PLAIN = ("auto", "bfloat16", "float16")
_ACCEPTED = ", ".join(map(repr, (*_PLAIN, "fp8_ds_mla")))
_REFUSED = {
    "fp8": "stores latent and key alike as e4m3 under one scale a tensor, a layout that no kernel here reads",
    "fp8_e4m3": "stores latent and key alike as e4m3 under one scale a tensor, a layout that no kernel here reads",
    "fp8_e5m2": "stores e5m2, which no kernel here reads",
    "nvfp4_ds_mla": "stores e2m1 in 352 bytes a token, a layout that no kernel here reads",
}
_FP8 = torch.float8_e4m3fn


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
    skip_scale: bool = False,
) -> None:
    """Write normalised latents and rotated keys to their slots of ``kv_cache``, in place.

    ``"fp8_ds_mla"`` is ``fp8_v32``: 512 e4m3 codes, 4 fp32 scales, 64 bfloat16 keys, 656 bytes. A block of 128 values
    has the scale ``2 ** ceil(log2(max(amax / 448, 1e-4)))``, so that one of zeros has ``2 ** -13``: bit for bit what
    vLLM's own writers store since pull request 49435 (July 2026). Before it they stored ``amax / 448``; such a cache is
    read rightly, too, since the scales are stored.

    Args:
        kv_c: ``[n, latent_dim]``, bfloat16, float16 or float32: the dtype of ``kv_cache`` unless that is quantised.
        k_pe: ``[n, rope_dim]``, in the dtype of ``kv_c``.
        kv_cache: ``[num_blocks, block_size, latent_dim + rope_dim]``, or with ``"fp8_ds_mla"`` uint8
            ``[num_blocks, block_size, 656]``.
        slot_mapping: ``[tokens]`` int64 or int32, ``block * block_size + offset``; -1 writes nothing. ``n`` may exceed
            ``tokens``, as vLLM pads its batches; rows behind that are not read.
        kv_cache_dtype: ``"auto"``, ``"bfloat16"`` or ``"float16"``, a cache in the dtype of ``kv_c``; or
            ``"fp8_ds_mla"``.
        scale: fp32 tensor of one element. There it is the scale of a whole tensor, which ``"fp8"`` alone has; the
            layouts that are accepted here have none, so that neither library reads its value with them.
        skip_scale: there True says that ``scale`` is 1 and need not be read, which changes ``"fp8"`` alone; either
            value is accepted.

    Raises:
        NotImplementedError: vLLM's other MLA cache dtypes, or an input that requires grad.
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device or unknown ``kv_cache_dtype``; on CPU tensors also a slot past the cache.

    Source: vLLM ``csrc/libtorch_stable/cache_kernels.cu``, ``vllm/_custom_ops.py``.
    """
    if kv_cache_dtype in _REFUSED:
        raise NotImplementedError(
            f"kv_cache_dtype: got {kv_cache_dtype!r}, which {_REFUSED[kv_cache_dtype]}; accepted: {_ACCEPTED}"
        )
    if kv_cache_dtype not in (*_PLAIN, "fp8_ds_mla"):
        raise ValueError(f"kv_cache_dtype: got {kv_cache_dtype!r}, accepted: {_ACCEPTED}")
    named = FLOATS if kv_cache_dtype in ("auto", "fp8_ds_mla") else (getattr(torch, kv_cache_dtype),)
    check_tensor("kv_c", kv_c, rank=2, dtypes=named)
    check_tensor("k_pe", k_pe, rank=2, like=kv_c)
    check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES, device=kv_c.device)
    _check_one("scale", scale)
    if not isinstance(skip_scale, bool):
        raise TypeError(f"skip_scale: got {type(skip_scale).__name__}, a bool is accepted")
    tokens, latent_dim, rope_dim = slot_mapping.shape[0], kv_c.shape[1], k_pe.shape[1]
    for name, value in (("kv_c", kv_c), ("k_pe", k_pe)):
        if value.shape[0] < tokens:
            raise ValueError(f"{name}: got {value.shape[0]} rows for {tokens} slots, at least as many are accepted")
    if kv_cache_dtype in _PLAIN:
        check_tensor("kv_cache", kv_cache, shape=(None, None, latent_dim + rope_dim), like=kv_c)
        cache = latent_cache("kv_cache", kv_cache, latent_dim)
    else:
        if (latent_dim, rope_dim) != (512, 64):
            raise ValueError(f"kv_c, k_pe: got widths {latent_dim} and {rope_dim}, fp8_ds_mla has 512 and 64")
        check_tensor("kv_cache", kv_cache, shape=(None, None, 656), dtypes=(torch.uint8,), device=kv_c.device)
        cache = latent_cache("kv_cache", kv_cache, latent_dim, CacheLayout.FP8_V32)
    check_no_grad("concat_and_cache_mla", kv_c=kv_c, k_pe=k_pe)
    scatter_tokens(kv_c[:tokens], k_pe[:tokens], slot_mapping, cache)


def latent_cache(name: str, data: torch.Tensor, latent_dim: int, layout: CacheLayout | None = None) -> LatentCache:
    """The cache of a caller's argument, by whose name its refusals call the data."""
    try:
        return LatentCache(data, latent_dim, layout)
    except ValueError as error:
        raise ValueError(str(error).replace("data: ", f"{name}: ", 1)) from None


def merge_attn_states(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: torch.Tensor | None = None,
) -> None:
    """Merge attention over a prefix and over a suffix of the keys into ``output``, in place.

    lse are [heads, tokens], natural logarithms, in any layout: the transposed view of a backend's [tokens, heads], too.
    A side that saw no key is known as in :func:`mla_kernels.merge_states`: by an lse of -inf, or by one of +inf beside
    zeros (FlashAttention's and FlashMLA's). +inf beside other values is an overflow and gives NaN (vLLM takes it for an
    empty side; NaN in ``output`` is all that shows it there). Where both sides saw nothing, ``output`` is 0 and
    ``output_lse`` -inf. Both sides are copied next to each other first. ``output`` and ``output_lse`` may be those of
    one side.

    Args:
        output: ``[tokens, heads, d]``, written; bfloat16, float16 or float32, or float8_e4m3fn with ``output_scale``.
        prefix_output, suffix_output: ``[tokens, heads, d]``, in the dtype of ``output``; beside an output in
            float8_e4m3fn both in bfloat16, float16 or float32.
        prefix_lse, suffix_lse: ``[heads, tokens]`` float32.
        output_lse: ``[heads, tokens]`` float32, written if given.
        prefill_tokens_with_context: tokens from this one on have no prefix: theirs is the suffix's result, and what
            stands at the prefix's side is not read. None: all have one.
        output_scale: float32 tensor of one element: ``output`` is the merged result, in fp32, times its reciprocal, cut
            off at 448 and rounded to float8_e4m3fn.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: shapes or devices that differ, an ``output_scale`` without an output in fp8 or the other way round.
            Nothing was written then.
        NotImplementedError: an input requires grad: the result is written in place.

    Source: vLLM ``vllm/v1/attention/ops/merge_attn_states.py``; section 2.2 of https://arxiv.org/abs/2501.01005.
    """
    check_tensor("output", output, rank=3, dtypes=(*FLOATS, _FP8))
    fp8 = output.dtype == _FP8
    if fp8 != (output_scale is not None):
        raise ValueError(
            f"output_scale: got {'None' if fp8 else 'a tensor'} with an output in {str(output.dtype)[6:]}, "
            "a tensor is accepted with float8_e4m3fn and None with the others"
        )
    tokens, heads, _ = output.shape
    dtypes = FLOATS if fp8 else (output.dtype,)
    lse = {"shape": (heads, tokens), "dtypes": (torch.float32,), "device": output.device, "dense": False}
    check_tensor("prefix_output", prefix_output, shape=tuple(output.shape), dtypes=dtypes, device=output.device)
    check_tensor("prefix_lse", prefix_lse, **lse)
    check_tensor("suffix_output", suffix_output, shape=tuple(output.shape), like=prefix_output)
    check_tensor("suffix_lse", suffix_lse, **lse)
    if output_lse is not None:
        check_tensor("output_lse", output_lse, **lse)
    with_context = tokens if prefill_tokens_with_context is None else prefill_tokens_with_context
    check_int("prefill_tokens_with_context", with_context, 0, tokens)
    if fp8:
        _check_one("output_scale", output_scale, output.device)
    parts = {"prefix_output": prefix_output, "prefix_lse": prefix_lse}
    check_no_grad("merge_attn_states", **parts, suffix_output=suffix_output, suffix_lse=suffix_lse)
    outs = torch.stack((prefix_output, suffix_output))
    lses = torch.stack((prefix_lse.T, suffix_lse.T))  # [2, tokens, heads]
    lses[0, with_context:] = float("-inf")
    merged, merged_lse = merge_states(outs.float() if fp8 else outs, lses)
    if fp8:
        limit = torch.finfo(_FP8).max
        merged = (merged * output_scale.reshape(()).reciprocal()).clamp_(-limit, limit).to(_FP8)
    output.copy_(merged)
    if output_lse is not None:
        output_lse.copy_(merged_lse.T)


def _check_one(name: str, value, device: torch.device | None = None) -> None:
    check_tensor(name, value, dtypes=(torch.float32,), device=device)
    if value.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, a tensor of one element is accepted")
