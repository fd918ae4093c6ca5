"""SGLang's mixture-of-experts functions over this library's ops: same names, arguments and layouts, on every chip.

Import from ``mla_kernels.compat.sglang`` what was imported from ``sglang.srt.layers.moe``: ``fused_experts`` (of
``fused_moe_triton.fused_moe``), ``grouped_topk``, ``biased_grouped_topk`` (of ``topk``) and ``moe_align_block_size``.
What is not accepted raises with the reason. Signatures follow SGLang 0.5.
"""

import torch

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.compat.fused_experts import quantised_weights, run
from mla_kernels.moe.activation import Activation
from mla_kernels.moe.align import align_blocks
from mla_kernels.moe.route import route

__all__ = ["biased_grouped_topk", "fused_experts", "grouped_topk", "grouped_topk_gpu", "moe_align_block_size"]


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output,
    moe_runner_config,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    use_fp8_w8a8: bool = False,
    use_int8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    per_channel_quant: bool = False,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(act(gate, up)).

    Args:
        hidden_states: ``[T, H]`` bfloat16, float16 or float32.
        w1: ``[E, 2I, H]``, gate rows before up rows (with ``gemm1_alpha`` alternating, unless ``gate_up_interleaved``
            is False); float8_e4m3fn with ``use_fp8_w8a8``, int8 with ``use_int8_*``.
        w2: ``[E, H, I]`` likewise.
        topk_output: ``(weights, ids)`` or ``(weights, ids, logits)``, weights and ids ``[T, K]``; an id outside
            ``0 .. E - 1`` is skipped.
        moe_runner_config: any object with SGLang's attributes. Read are ``activation`` ("silu"), ``is_gated`` (True),
            ``apply_router_weight_on_input``, ``inplace``, ``no_combine`` (False), ``routed_scaling_factor``,
            ``custom_act_fn`` (None), ``gemm1_beta`` (None), ``gate_up_interleaved``, and of the limits
            ``gemm1_clamp_limit`` (with ``gemm1_alpha`` gpt-oss's activation, without it a limit of silu's result, as
            in Step-3.5) and ``swiglu_limit`` (of silu's argument, as in DeepSeek-V4). One that is missing or None has
            SGLang's default, but ``inplace``, which then is False.
        b1, b2: ``[E, 2I]`` and ``[E, H]`` biases.
        w1_scale, w2_scale: fp32; ``[E, ceil(N / 128), ceil(K / 128)]`` with ``use_fp8_w8a8``, ``[E, N]`` or
            ``[E, N, 1]`` with ``use_int8_*``.
        block_shape: ``[128, 128]`` with ``use_fp8_w8a8``.

    Returns:
        ``[T, H]``; ``hidden_states`` itself, overwritten, where ``moe_runner_config.inplace``.

    Raises:
        NotImplementedError: other activations, ungated experts, ``no_combine``, 4-bit weights in SGLang's packing,
            static activation scales, zero points, ``b1`` with ``apply_router_weight_on_input``.
        ValueError, TypeError: shapes, dtypes, flags that contradict each other.

    Source: SGLang ``python/sglang/srt/layers/moe/fused_moe_triton/fused_moe.py``.
    """

    def configured(name, default):
        value = getattr(moe_runner_config, name, None)
        return default if value is None else value

    if configured("activation", "silu") != "silu" or not configured("is_gated", True):
        raise NotImplementedError(
            f"moe_runner_config: got activation {configured('activation', 'silu')!r}, "
            f"is_gated {configured('is_gated', True)}; accepted: 'silu', True"
        )
    if configured("no_combine", False):
        raise NotImplementedError("moe_runner_config.no_combine: got True, False is accepted (rows are always summed)")
    for name in ("custom_act_fn", "gemm1_beta"):
        if configured(name, None) is not None:
            raise NotImplementedError(f"moe_runner_config.{name}: got {configured(name, None)}, None is accepted")
    weights, ids = topk_output[0], topk_output[1]
    quantised = quantised_weights(
        w1, w2, (b1, b2), (w1_scale, w2_scale),
        fp8_w8a8=use_fp8_w8a8, int8_w8a8=use_int8_w8a8, int8_w8a16=use_int8_w8a16, int4_w4a16=use_int4_w4a16,
        per_channel=per_channel_quant, block_shape=block_shape, static_scales=(a1_scale, a2_scale),
        zeros=(w1_zp, w2_zp),
    )  # fmt: skip
    activation = _activation(
        configured("gemm1_alpha", None), configured("gemm1_clamp_limit", None), configured("swiglu_limit", None),
        configured("gate_up_interleaved", True),
    )  # fmt: skip
    on_input = configured("apply_router_weight_on_input", False)
    scale = configured("routed_scaling_factor", 1.0)
    out = run(
        hidden_states, w1, w2, weights if on_input else weights.float() * scale, ids,
        quantised=quantised, biases=(b1, b2), activation=activation, weight_at="input" if on_input else "output",
    )  # fmt: skip
    if on_input and scale != 1.0:
        out = out * scale
    return hidden_states.copy_(out) if configured("inplace", False) else out


def _activation(alpha, limit, swiglu_limit, interleaved):
    """SwiGLU with the clamp that these attributes of a configuration mean."""
    if limit is not None and swiglu_limit is not None:
        raise ValueError("gemm1_clamp_limit and swiglu_limit: one of them is accepted")
    if alpha is not None:
        if limit is None:
            raise ValueError("gemm1_clamp_limit: got None with gemm1_alpha, a limit is accepted")
        return Activation("gpt_oss", limit=float(limit), alpha=float(alpha), interleaved=bool(interleaved))
    if limit is not None:
        return Activation("post", limit=float(limit))
    return Activation() if swiglu_limit is None else Activation("pre", limit=float(swiglu_limit))


def grouped_topk_gpu(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info=None,
    apply_routed_scaling_factor_on_output: bool | None = False,
    scoring_func: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V2's router: groups ranked by their largest score; a slot for which the kept groups have no expert left
    has weight 0.

    Args:
        hidden_states: ``[T, H]``; only T is read.
        gating_output: ``[T, E]`` logits, bfloat16, float16 or float32.
        topk: slots of a token, the shared expert's included.
        renormalize: divide by the sum of the routed weights.
        num_expert_group, topk_group: groups, and groups kept; None means one.
        num_fused_shared_experts: 0, or 1: the last slot is expert E, with the weight that a later product with
            ``routed_scaling_factor`` makes 1 (the routed ones' sum, divided by that factor).
        routed_scaling_factor: factor of the weights where ``renormalize`` and ``apply_routed_scaling_factor_on_output``
            (with False of the two, SGLang leaves it to the experts). None means 1.
        num_token_non_padded: integer tensor of one element; later tokens get ids -1.
        scoring_func: "softmax" or "sigmoid".

    Returns:
        weights ``[T, topk]`` fp32 and ids ``[T, topk]`` int32.

    Raises:
        NotImplementedError: ``expert_location_dispatch_info``, more than one fused shared expert (SGLang draws one of
        them at random for every token). ValueError, TypeError: shapes, dtypes, numbers out of range.

    Source: SGLang ``python/sglang/srt/layers/moe/topk.py``.
    """
    check_choice("scoring_func", scoring_func, ("softmax", "sigmoid"))
    return _grouped(
        hidden_states, gating_output, None, topk, renormalize, (num_expert_group, topk_group), num_fused_shared_experts,
        routed_scaling_factor, num_token_non_padded, expert_location_dispatch_info,
        apply_routed_scaling_factor_on_output, {"scoring": scoring_func, "group_rank": "max"},
    )  # fmt: skip


grouped_topk = grouped_topk_gpu


def biased_grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float | None = None,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info=None,
    apply_routed_scaling_factor_on_output: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's router: sigmoid scores, the choice with ``correction_bias`` ``[E]``, groups ranked by the sum of
    their two best. The other arguments, results and errors are those of :func:`grouped_topk`.

    Source: SGLang ``python/sglang/srt/layers/moe/topk.py``.
    """
    check_tensor("correction_bias", correction_bias, rank=1)
    return _grouped(
        hidden_states, gating_output, correction_bias.float(), topk, renormalize, (num_expert_group, topk_group),
        num_fused_shared_experts, routed_scaling_factor, num_token_non_padded, expert_location_dispatch_info,
        apply_routed_scaling_factor_on_output,
        {"scoring": "sigmoid", "group_rank": "top2_sum"},
    )  # fmt: skip


def _grouped(
    hidden, logits, bias, topk, renormalize, groups, shared, scale, valid_tokens, location, scale_output, scoring
):
    check_tensor("gating_output", logits, rank=2)
    tokens, experts = logits.shape
    if hidden.shape[0] != tokens:
        raise ValueError(f"hidden_states: got {hidden.shape[0]} tokens, {tokens} are accepted (those of gating_output)")
    if location is not None:
        raise NotImplementedError("expert_location_dispatch_info: got a value, None is accepted")
    if shared not in (0, 1):
        raise NotImplementedError(
            f"num_fused_shared_experts: got {shared}, 0 or 1 is accepted (of several, one would be drawn at random)"
        )
    check_int("topk", topk, 1 + shared, experts + shared)
    factor = 1.0 if scale is None else float(scale)
    weights, ids = route(
        logits, topk - shared, bias=bias, num_groups=groups[0] or 1, top_k_groups=groups[1] or 1,
        renormalize=bool(renormalize), **scoring,
    )  # fmt: skip
    if shared:
        routed = weights.sum(-1, keepdim=True)
        weights = torch.cat((weights, routed / factor), -1)
        ids = torch.cat((ids, ids.new_full((tokens, 1), experts)), -1)
    if renormalize and scale_output:
        weights = weights * factor
    if valid_tokens is not None:
        padded = torch.arange(tokens, device=ids.device)[:, None] >= valid_tokens
        ids = ids.masked_fill(padded, -1)
    return weights, ids


def moe_align_block_size(
    topk_ids: torch.Tensor, block_size: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's padded to whole blocks; see :func:`mla_kernels.align_blocks`.

    Args:
        topk_ids: ``[T, K]`` int32; an id outside ``0 .. num_experts - 1`` belongs to no expert.
        block_size: rows of a block.
        num_experts: experts.

    Returns:
        sorted_token_ids int32 (pair numbers, padded with T * K), expert_ids int32 (expert of each block, -1 for none),
        num_tokens_post_padded int32 ``[1]``.

    Source: SGLang ``moe_align_block_size`` in ``python/sglang/srt/layers/moe/fused_moe_triton``.
    """
    return align_blocks(topk_ids, num_experts, block_size)
