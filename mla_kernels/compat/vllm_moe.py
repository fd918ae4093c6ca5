"""vLLM's mixture-of-experts functions over this library's ops; :mod:`mla_kernels.compat.vllm` gives them out."""

import torch

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.compat.fused_experts import quantised_weights, run
from mla_kernels.compat.routers import check_enough, check_router
from mla_kernels.moe.dispatch.align import align_blocks
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.route.route import route

_ACTIVATIONS = {
    "silu": Activation(),
    "swigluoai": Activation("gpt_oss", limit=7.0, alpha=1.702, interleaved=True),
    "swiglustep": Activation("post", limit=7.0),
}
_NUMBERS = {  # of each activation; vLLM's fused_experts reads no others
    "silu": {},
    "swigluoai": {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0},
    "swiglustep": {"gemm1_clamp_limit": 7.0},
}
_OTHER_FORMATS = (
    "ocp_mx_scheme", "use_fp8_w8a16", "use_mxfp4_w4a16", "use_mxfp4_w4a4", "use_mxfp4_w4a8", "use_nvfp4_w4a16",
    "use_nvfp4_w4a4", "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale",
)  # fmt: skip


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation="silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config=None,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(act(gate, up)).

    Args:
        hidden_states: ``[T, H]`` bfloat16, float16 or float32.
        w1: ``[E, 2I, H]``, gate rows before up rows ("swigluoai": alternating); float8_e4m3fn or int8 with a
            ``quant_config`` that says so.
        w2: ``[E, H, I]`` likewise.
        topk_weights, topk_ids: ``[T, K]``; an id outside ``0 .. E - 1`` is skipped.
        activation: "silu", "swigluoai" (gpt-oss: alpha 1.702, limit 7) or "swiglustep" (Step-3.5: silu's result cut off
            at 7, up within -7 .. 7), as a string or a member of vLLM's ``MoEActivation``, whose ``SILU`` is the default
            there.
        apply_router_weight_on_input: multiply hidden_states by the weights, not the output.
        global_num_experts: experts that ``expert_map`` maps; -1 means E.
        expert_map: ``[global_num_experts]`` integer, number of an expert among w1's, -1 for another rank's.
        quant_config: None, or any object with the attributes of vLLM's ``FusedMoEQuantConfig``; one that is missing is
            off. Read are ``use_fp8_w8a8``, ``use_int8_w8a8``, ``use_int8_w8a16``, ``use_int4_w4a16``,
            ``per_act_token_quant``, ``block_shape``, ``w1_scale``, ``w2_scale``, ``w1_bias``, ``w2_bias``, and those
            that are refused below. Activations are quantised inside, to fp8 by powers of two for each token's 128
            columns (there by amax / 448), so that ``is_scale_swizzled``, ``is_scale_transposed`` and ``mx_alignment``,
            layouts of their scales, mean nothing here.

    Returns:
        ``[T, H]``.

    Raises:
        NotImplementedError: other activations; 4-bit weights in vLLM's packing, its MXFP4, NVFP4 and fp8 weight-only
            formats, static activation scales, global scales, zero points; ``gemm1_alpha``, ``gemm1_beta`` or
            ``gemm1_clamp_limit`` other than the activation's own, since vLLM's ``fused_experts`` reads none of them; a
            ``w1_bias`` with ``apply_router_weight_on_input``.
        ValueError, TypeError: shapes, dtypes, flags that contradict each other.

    Source: vLLM ``vllm/model_executor/layers/fused_moe/fused_moe.py``.
    """
    name = getattr(activation, "value", activation)
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f"activation: got {name!r}, accepted: {', '.join(map(repr, _ACTIVATIONS))}")

    def configured(attribute):
        return getattr(quant_config, attribute, None)

    for attribute in _OTHER_FORMATS:
        if configured(attribute) is not None and configured(attribute) is not False:
            raise NotImplementedError(f"quant_config.{attribute}: got a value, no kernel here reads that format")
    for attribute in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        own, given = _NUMBERS[name].get(attribute), configured(attribute)
        if given is not None and given != own:
            accepted = "None" if own is None else f"None, {own}"
            raise NotImplementedError(
                f"quant_config.{attribute}: got {given} with {name!r}, accepted: {accepted} (vLLM's fused_experts does "
                "not read it); mla_kernels.fused_moe takes an Activation"
            )
    biases = configured("w1_bias"), configured("w2_bias")
    quantised = quantised_weights(
        w1, w2, biases, (configured("w1_scale"), configured("w2_scale")),
        fp8_w8a8=bool(configured("use_fp8_w8a8")), int8_w8a8=bool(configured("use_int8_w8a8")),
        int8_w8a16=bool(configured("use_int8_w8a16")), int4_w4a16=bool(configured("use_int4_w4a16")),
        per_channel=bool(configured("per_act_token_quant")), block_shape=configured("block_shape"),
        static_scales=(configured("a1_scale"), configured("a2_scale")),
        zeros=(configured("w1_zp"), configured("w2_zp")),
    )  # fmt: skip
    return run(
        hidden_states, w1, w2, topk_weights, _local_ids(topk_ids, w1.shape[0], global_num_experts, expert_map),
        quantised=quantised, biases=biases, activation=_ACTIVATIONS[name],
        weight_at="input" if apply_router_weight_on_input else "output",
    )  # fmt: skip


def _local_ids(ids, local, experts, expert_map):
    """Ids among this rank's experts; -1 for another rank's."""
    if expert_map is None:
        if experts not in (-1, local):
            raise ValueError(f"global_num_experts: got {experts} without an expert_map, -1 or {local} is accepted")
        return ids
    check_tensor("expert_map", expert_map, rank=1, dtypes=(torch.int32, torch.int64), device=ids.device)
    if experts not in (-1, expert_map.shape[0]):
        raise ValueError(f"global_num_experts: got {experts}, -1 or {expert_map.shape[0]} is accepted (expert_map's)")
    return _mapped(ids, expert_map)


def _mapped(ids, expert_map):
    known = (ids >= 0) & (ids < expert_map.shape[0])
    return expert_map[ids.masked_fill(~known, 0).long()].masked_fill(~known, -1).to(torch.int32)


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's routers. Groups are ranked by their largest score, with a bias by the sum of their two best.

    Args:
        hidden_states: ``[T, H]``; only T is read.
        gating_output: ``[T, E]`` logits, bfloat16, float16 or float32.
        topk: experts of a token.
        renormalize: divide the weights by their sum.
        num_expert_group, topk_group: groups, and groups kept; 0 means one.
        scoring_func: "softmax" or "sigmoid".
        routed_scaling_factor: factor of the weights, renormalised or not.
        e_score_correction_bias: ``[E]``, steers the choice only.

    Returns:
        weights ``[T, topk]`` fp32, ids ``[T, topk]`` int32, best choice first. Scores are computed in fp32 (in vLLM
        in the dtype of gating_output).

    Raises:
        ValueError, TypeError: shapes, dtypes, numbers out of range, more experts than the kept groups hold.

    Source: vLLM ``vllm/model_executor/layers/fused_moe/router/grouped_topk_router.py``.
    """
    check_choice("scoring_func", scoring_func, ("softmax", "sigmoid"))
    groups, kept = check_router(hidden_states, gating_output, num_expert_group, topk_group)
    check_int("topk", topk, 1, gating_output.shape[1])
    check_enough(topk, gating_output.shape[1], groups, kept)
    bias = e_score_correction_bias
    if bias is not None:
        check_tensor("e_score_correction_bias", bias, rank=1)
    return route(
        gating_output, topk, bias=None if bias is None else bias.float(), scoring=scoring_func,
        num_groups=groups, top_k_groups=kept, group_rank="max" if bias is None else "top2_sum",
        group_fill=float("-inf"), renormalize=bool(renormalize), routed_scale=float(routed_scaling_factor),
    )  # fmt: skip


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Pairs sorted by expert, each expert's padded to whole blocks; see :func:`mla_kernels.align_blocks`.

    Args:
        topk_ids: ``[T, K]`` int32; the pair of an id outside ``0 .. num_experts - 1`` is in no block.
        block_size: rows of a block.
        num_experts: experts, of all ranks.
        expert_map: ``[num_experts]`` integer, the number of an expert on this rank, -1 for another rank's.
        pad_sorted_ids: make the length of sorted_token_ids a multiple of block_size; it always is.
        ignore_invalid_experts: with an ``expert_map``, leave the pairs of other ranks' experts out, and sort the others
            by their number on this rank. Without it such pairs are in blocks of expert -1.
        return_scatter_idx: return a fourth tensor; with an ``expert_map`` only where ``ignore_invalid_experts``.

    Returns:
        sorted_token_ids int32 (pair numbers, padded with T * K), expert_ids int32 (each block's expert, on this rank
        where there is an ``expert_map``; -1 for none, as behind the last block in use), num_tokens_post_padded int32
        ``[1]``; where asked for also scatter_idx ``[T * K, 1]`` int32, each pair's own number, -1 for one in no block.

    Raises:
        ValueError, TypeError: shapes, dtypes, numbers out of range, arguments that exclude each other.

    Source: vLLM ``vllm/model_executor/layers/fused_moe/moe_align_block_size.py``.
    """
    check_tensor("topk_ids", topk_ids, rank=2, dtypes=(torch.int32,))
    check_int("num_experts", num_experts, 1, 1024)
    if expert_map is not None:
        check_tensor(
            "expert_map", expert_map, shape=(num_experts,), dtypes=(torch.int32, torch.int64), device=topk_ids.device
        )
        if return_scatter_idx and not ignore_invalid_experts:
            raise ValueError(
                "return_scatter_idx: got True with an expert_map, accepted there with ignore_invalid_experts"
            )
    ids = topk_ids if expert_map is None or not ignore_invalid_experts else _mapped(topk_ids, expert_map)
    pairs, blocks, total = align_blocks(ids, num_experts, block_size)
    if expert_map is not None and not ignore_invalid_experts:
        blocks = _mapped(blocks, expert_map)
    if not return_scatter_idx:
        return pairs, blocks, total
    own = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device).view(ids.shape)
    return pairs, blocks, total, own.masked_fill((ids < 0) | (ids >= num_experts), -1).view(-1, 1)
