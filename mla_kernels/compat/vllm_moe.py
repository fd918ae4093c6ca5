"""vLLM's mixture-of-experts functions over this library's ops; :mod:`mla_kernels.compat.vllm` gives them out."""

import torch

from mla_kernels.checks import check_choice, check_tensor
from mla_kernels.compat.fused_experts import quantised_weights, run
from mla_kernels.moe.activation import Activation
from mla_kernels.moe.align import align_blocks
from mla_kernels.moe.route import route

_ACTIVATIONS = ("silu", "swigluoai")


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
        activation: "silu", or "swigluoai" (gpt-oss: alpha 1.702, limit 7), as a string or an enum of that value.
        apply_router_weight_on_input: multiply hidden_states by the weights, not the output.
        global_num_experts: experts that ``expert_map`` maps; -1 means E.
        expert_map: ``[global_num_experts]`` integer, number of an expert among w1's, -1 for another rank's.
        quant_config: None, or any object with the attributes of vLLM's ``FusedMoEQuantConfig``: ``use_fp8_w8a8``,
            ``use_int8_w8a8``, ``use_int8_w8a16``, ``use_int4_w4a16``, ``per_act_token_quant``, ``block_shape``,
            ``w1_scale``, ``w2_scale``, ``w1_zp``, ``w2_zp``, ``a1_scale``, ``a2_scale``, ``w1_bias``, ``w2_bias``,
            ``gemm1_alpha``, ``gemm1_clamp_limit``; one that is missing is off.

    Returns:
        ``[T, H]``.

    Raises:
        NotImplementedError: other activations, 4-bit weights in vLLM's packing, static activation scales, zero points,
            a ``w1_bias`` with ``apply_router_weight_on_input``.
        ValueError, TypeError: shapes, dtypes, flags that contradict each other.

    Source: vLLM ``vllm/model_executor/layers/fused_moe/fused_moe.py``.
    """
    name = getattr(activation, "value", activation)
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f"activation: got {name!r}, accepted: {', '.join(map(repr, _ACTIVATIONS))}")

    def configured(attribute):
        return getattr(quant_config, attribute, None)

    biases = configured("w1_bias"), configured("w2_bias")
    quantised = quantised_weights(
        w1, w2, biases, (configured("w1_scale"), configured("w2_scale")),
        fp8_w8a8=bool(configured("use_fp8_w8a8")), int8_w8a8=bool(configured("use_int8_w8a8")),
        int8_w8a16=bool(configured("use_int8_w8a16")), int4_w4a16=bool(configured("use_int4_w4a16")),
        per_channel=bool(configured("per_act_token_quant")), block_shape=configured("block_shape"),
        static_scales=(configured("a1_scale"), configured("a2_scale")),
        zeros=(configured("w1_zp"), configured("w2_zp")),
    )  # fmt: skip
    alpha, limit = configured("gemm1_alpha"), configured("gemm1_clamp_limit")
    if name == "swigluoai":
        limit, alpha = 7.0 if limit is None else limit, 1.702 if alpha is None else alpha
        swiglu = Activation("gpt_oss", limit=float(limit), alpha=float(alpha), interleaved=True)
    elif (alpha, limit) != (None, None):
        raise NotImplementedError("gemm1_alpha, gemm1_clamp_limit: got numbers with 'silu', 'swigluoai' takes them")
    else:
        swiglu = Activation()
    return run(
        hidden_states, w1, w2, topk_weights, _local_ids(topk_ids, w1.shape[0], global_num_experts, expert_map),
        quantised=quantised, biases=biases, activation=swiglu,
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
        gating_output: ``[T, E]`` logits.
        topk: experts of a token.
        renormalize: divide the weights by their sum.
        num_expert_group, topk_group: groups, and groups kept; 0 means one.
        scoring_func: "softmax" or "sigmoid".
        routed_scaling_factor: factor of the weights.
        e_score_correction_bias: ``[E]``, steers the choice only.

    Returns:
        weights ``[T, topk]`` fp32, ids ``[T, topk]`` int32, best choice first.

    Raises:
        ValueError, TypeError: shapes, dtypes, numbers out of range.

    Source: vLLM ``vllm/model_executor/layers/fused_moe``, ``grouped_topk``.
    """
    check_choice("scoring_func", scoring_func, ("softmax", "sigmoid"))
    check_tensor("gating_output", gating_output, rank=2)
    if hidden_states.shape[0] != gating_output.shape[0]:
        raise ValueError(
            f"hidden_states: got {hidden_states.shape[0]} tokens, {gating_output.shape[0]} are accepted "
            "(those of gating_output)"
        )
    bias = e_score_correction_bias
    return route(
        gating_output, topk, bias=None if bias is None else bias.float(), scoring=scoring_func,
        num_groups=num_expert_group or 1, top_k_groups=topk_group or 1,
        group_rank="max" if bias is None else "top2_sum", group_fill=float("-inf"),
        renormalize=bool(renormalize), routed_scale=float(routed_scaling_factor),
    )  # fmt: skip


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's padded to whole blocks; see :func:`mla_kernels.align_blocks`.

    Args:
        topk_ids: ``[T, K]`` int32; an id outside ``0 .. num_experts - 1`` belongs to no expert.
        block_size: rows of a block.
        num_experts: experts, of all ranks.
        expert_map: ``[num_experts]`` integer, gives each block its expert's number on this rank, -1 for another rank's.
        pad_sorted_ids: make the length of sorted_token_ids a multiple of block_size; it always is.

    Returns:
        sorted_token_ids int32 (pair numbers, padded with T * K), expert_ids int32 (expert of each block, -1 for none),
        num_tokens_post_padded int32 ``[1]``.

    Source: vLLM ``vllm/model_executor/layers/fused_moe/moe_align_block_size.py``.
    """
    pairs, blocks, total = align_blocks(topk_ids, num_experts, block_size)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, shape=(num_experts,), dtypes=(torch.int32, torch.int64))
        blocks = _mapped(blocks, expert_map)
    return pairs, blocks, total
