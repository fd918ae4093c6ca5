"""SGLang's mixture-of-experts functions and its merge of attention states over this library's ops: same names,
arguments and layouts, on every chip.

Import from ``mla_kernels.compat.sglang`` what was imported from

- ``sglang.srt.layers.moe.fused_moe_triton``: ``fused_experts``, ``moe_align_block_size``;
- ``sglang.srt.layers.moe.topk``: ``grouped_topk``, ``biased_grouped_topk``, and both with ``_gpu``;
- ``sglang.srt.layers.attention.merge_state``: ``merge_state``; ``sgl_kernel``: ``merge_state_v2``.

Signatures are those of SGLang 0.5.23. Older releases had ``num_token_non_padded`` and ``expert_location_dispatch_info``
among the routers' arguments, before ``apply_routed_scaling_factor_on_output``; the order of 0.5.23 counts, and calls
with these two arguments more are refused. What is not accepted raises with the reason.
"""

import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.checks import check_no_grad, check_tensor
from mla_kernels.compat.sglang_moe import (
    biased_grouped_topk,
    biased_grouped_topk_gpu,
    fused_experts,
    grouped_topk,
    grouped_topk_gpu,
    moe_align_block_size,
)

__all__ = [
    "biased_grouped_topk",
    "biased_grouped_topk_gpu",
    "fused_experts",
    "grouped_topk",
    "grouped_topk_gpu",
    "merge_state",
    "merge_state_v2",
    "moe_align_block_size",
]


def merge_state(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output: torch.Tensor | None = None,
    output_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over a prefix and over a suffix of the keys: :func:`mla_kernels.merge_states` of the two.

    lse are [tokens, heads], in any layout, and natural logarithms. One in base 2, as FlashInfer's prefill and SGLang's
    own ``flash_mla_sparse_fwd`` give out by default, is to be multiplied by ln 2 before. A side that saw no key is
    known by an lse of -inf, or by one of +inf beside zeros; +inf beside other values is an overflow and gives NaN.
    Where both sides saw nothing the results are 0 and -inf (NaN in SGLang's Triton kernel). Both sides are copied next
    to each other first. Differentiable unless ``output`` or ``output_lse`` is given.

    Args:
        prefix_output, suffix_output: ``[tokens, heads, d]`` bfloat16, float16 or float32, both alike.
        prefix_lse, suffix_lse: ``[tokens, heads]`` float32, or what is made float32, bfloat16 and float16.
        output: None, or ``[tokens, heads, d]`` in the dtype of ``prefix_output``, written and returned; may be one of
            the sides.
        output_lse: None, or ``[tokens, heads]`` float32, written and returned.

    Returns:
        (output, output_lse).

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: shapes or devices that differ. Nothing was written then.
        NotImplementedError: an input requires grad and a result is to be written in place.

    Source: SGLang ``python/sglang/srt/layers/attention/merge_state.py``; section 2.2 of
    https://arxiv.org/abs/2501.01005.
    """
    names = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output", "output_lse")
    return _merge(names, (prefix_output, prefix_lse, suffix_output, suffix_lse), (output, output_lse))


def merge_state_v2(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`merge_state` under ``sgl_kernel``'s names: v are outputs and s their lse."""
    names = ("v_a", "s_a", "v_b", "s_b", "v_merged", "s_merged")
    return _merge(names, (v_a, s_a, v_b, s_b), (v_merged, s_merged))


def _merge(names, sides, results):
    """``sides``: output and lse of one, then of the other; ``results``: tensors to write to, or None."""
    outs, lses = sides[::2], sides[1::2]
    check_tensor(names[0], outs[0], rank=3)
    shape, device = tuple(outs[0].shape), outs[0].device
    check_tensor(names[1], lses[0], shape=shape[:2], device=device, dense=False)
    check_tensor(names[2], outs[1], shape=shape, like=outs[0])
    check_tensor(names[3], lses[1], shape=shape[:2], device=device, dense=False)
    if results[0] is not None:
        check_tensor(names[4], results[0], shape=shape, like=outs[0])
    if results[1] is not None:
        check_tensor(names[5], results[1], shape=shape[:2], dtypes=(torch.float32,), device=device, dense=False)
    if any(result is not None for result in results):
        check_no_grad("merge_state into a tensor", **dict(zip(names, sides)))
    merged = merge_states(torch.stack(outs), torch.stack([lse.float() for lse in lses]))
    return tuple(new if given is None else given.copy_(new) for new, given in zip(merged, results))
