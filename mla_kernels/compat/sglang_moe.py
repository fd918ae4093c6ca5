"""SGLang's mixture-of-experts functions over this library's ops; :mod:`mla_kernels.compat.sglang` gives them out."""

import functools
import inspect

import torch

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.compat.fused_experts import quantised_weights, run
from mla_kernels.compat.routers import check_enough, check_router
from mla_kernels.moe.dispatch.align import align_blocks
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.route.route import route


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
    a1_q: torch.Tensor | None = None,
    fuse_swiglu_interleaved: bool = False,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(act(gate, up)).

    Args:
        hidden_states: ``[T, H]`` bfloat16, float16 or float32.
        w1: ``[E, 2I, H]``, gate rows before up rows; alternating with ``fuse_swiglu_interleaved``, and with
            ``gemm1_alpha`` unless ``gate_up_interleaved`` is False; float8_e4m3fn with ``use_fp8_w8a8``, int8 with
            ``use_int8_*``.
        w2: ``[E, H, I]`` likewise.
        topk_output: ``(weights, ids)`` or ``(weights, ids, logits)``, weights and ids ``[T, K]``; an id outside
            ``0 .. E - 1`` is skipped.
        moe_runner_config: any object with SGLang's attributes. Read are ``activation`` ("silu"), ``is_gated`` (True),
            ``apply_router_weight_on_input``, ``inplace``, ``no_combine`` (False), ``routed_scaling_factor`` (a factor
            of the sum), ``gemm1_beta`` (None), ``silu_mul_keep_fp32`` (False), ``gate_up_interleaved`` (True), and of
            the limits ``gemm1_clamp_limit`` (with ``gemm1_alpha`` gpt-oss's activation, without it a limit of silu's
            result, as in Step-3.5) and ``swiglu_limit`` (of silu's argument, as in DeepSeek-V4). One that is missing or
            None has SGLang's default, but ``inplace``, which then is False.
        b1, b2: ``[E, 2I]`` and ``[E, H]`` biases.
        use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16: what the weights are, and whether activations are quantised, too:
            to fp8 by powers of two for each token's 128 columns (there by amax / 448), to int8 by one scale a token.
        per_channel_quant: True with ``use_int8_w8a8``; either with ``use_int8_w8a16``.
        w1_scale, w2_scale: fp32; ``[E, ceil(N / 128), ceil(K / 128)]`` with ``use_fp8_w8a8``, ``[E, N]`` or
            ``[E, N, 1]`` with ``use_int8_*``.
        block_shape: ``[128, 128]`` with ``use_fp8_w8a8``.
        use_int4_w4a16, w1_zp, w2_zp, a1_scale, a2_scale, a1_q: refused, see below.
        fuse_swiglu_interleaved: gate and up rows of w1 alternate; as there with plain silu, without biases, weights on
            the input or quantised weights (there in bfloat16 only).

    Returns:
        ``[T, H]``; ``hidden_states`` itself, overwritten, where ``moe_runner_config.inplace``.

    Raises:
        NotImplementedError: other activations, ungated experts, ``no_combine``, 4-bit weights in SGLang's packing
            (``use_int4_w4a16``), fp8 scales of whole tensors or channels, static activation scales (``a1_scale``,
            ``a2_scale``), zero points (``w1_zp``, ``w2_zp``), activations that are quantised already (``a1_q``),
            ``b1`` with ``apply_router_weight_on_input``.
        ValueError, TypeError: shapes, dtypes, flags that contradict each other.

    Source: SGLang ``python/sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe.py``.
    """

    def configured(name, default):
        value = getattr(moe_runner_config, name, None)
        return default if value is None else value

    if not isinstance(topk_output, (tuple, list)) or len(topk_output) not in (2, 3):
        raise TypeError(f"topk_output: got {type(topk_output).__name__}, (weights, ids, logits) is accepted")
    if configured("activation", "silu") != "silu" or not configured("is_gated", True):
        raise NotImplementedError(
            f"moe_runner_config: got activation {configured('activation', 'silu')!r}, "
            f"is_gated {configured('is_gated', True)}; accepted: 'silu', True"
        )
    if configured("no_combine", False):
        raise NotImplementedError("moe_runner_config.no_combine: got True, False is accepted (rows are always summed)")
    if configured("gemm1_beta", None) is not None:
        raise NotImplementedError(f"moe_runner_config.gemm1_beta: got {moe_runner_config.gemm1_beta}, None is accepted")
    if configured("silu_mul_keep_fp32", False):
        raise NotImplementedError(
            "moe_runner_config.silu_mul_keep_fp32: got True, False is accepted (SGLang has it with DeepGEMM alone)"
        )
    if a1_q is not None:
        raise NotImplementedError("a1_q: got a tensor, None is accepted (activations are quantised inside)")
    weights, ids = topk_output[0], topk_output[1]
    quantised = quantised_weights(
        w1, w2, (b1, b2), (w1_scale, w2_scale),
        fp8_w8a8=use_fp8_w8a8, int8_w8a8=use_int8_w8a8, int8_w8a16=use_int8_w8a16, int4_w4a16=use_int4_w4a16,
        per_channel=per_channel_quant, block_shape=block_shape, static_scales=(a1_scale, a2_scale),
        zeros=(w1_zp, w2_zp),
    )  # fmt: skip
    numbers = [configured(name, None) for name in ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")]
    on_input = configured("apply_router_weight_on_input", False)
    if fuse_swiglu_interleaved:
        if on_input or any(value is not None for value in (*numbers, quantised, b1, b2)):
            raise ValueError(
                "fuse_swiglu_interleaved: got True with a limit, quantised weights, weights on the input or a bias, it "
                "is accepted without them"
            )
        activation = Activation(interleaved=True)
    else:
        activation = _activation(*numbers, configured("gate_up_interleaved", True))
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


def _two_arguments_less(router):
    """``router``, refusing by name what older releases passed in these positions: two arguments more."""
    most = len(inspect.signature(router).parameters)

    @functools.wraps(router)
    def call(*args, **kwargs):
        if len(args) > most:
            raise NotImplementedError(
                f"{router.__name__}: got {len(args)} arguments by position, at most {most} are accepted: "
                "num_token_non_padded and expert_location_dispatch_info of older SGLang are no arguments in 0.5.23"
            )
        return router(*args, **kwargs)

    return call


@_two_arguments_less
def grouped_topk_gpu(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float | None = None,
    apply_routed_scaling_factor_on_output: bool | None = False,
    scoring_func: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V2's router: groups ranked by their largest score; a slot for which the kept groups have no expert left
    has weight 0.

    Args:
        hidden_states: ``[T, H]``; only T is read.
        gating_output: ``[T, E]`` logits, bfloat16, float16 or float32.
        topk: slots of a token, the shared expert's included.
        renormalize: divide the routed weights by their sum + 1e-20.
        num_expert_group, topk_group: groups, and groups kept; None means one.
        num_fused_shared_experts: 0, or 1: the last slot is expert E.
        routed_scaling_factor: factor of the routed experts beside the shared one; None means 1.
        apply_routed_scaling_factor_on_output: True: the routed weights are multiplied by the factor, renormalised or
            not, and the shared expert's is 1. False or None: they are not, since the experts' sum will be
            (``routed_scaling_factor`` of :func:`fused_experts`), and the shared expert's weight is 1 / factor.
        scoring_func: "softmax" or "sigmoid".

    Returns:
        weights ``[T, topk]`` fp32 and ids ``[T, topk]`` int32. Scores are computed in fp32 (in SGLang in the dtype of
        gating_output).

    Raises:
        NotImplementedError: more than one fused shared expert (SGLang draws one of them at random for every token), or
            one without a factor (to which SGLang's router gives the weight of the next routed expert).
        ValueError, TypeError: shapes, dtypes, numbers out of range.

    Source: SGLang ``python/sglang/srt/layers/moe/topk.py``.
    """
    check_choice("scoring_func", scoring_func, ("softmax", "sigmoid"))
    if num_fused_shared_experts and routed_scaling_factor is None:
        raise NotImplementedError(
            "routed_scaling_factor: got None with a fused shared expert, a number is accepted there (SGLang's router "
            "gives the shared expert the next routed one's weight without it)"
        )
    return _grouped(
        hidden_states, gating_output, None, topk, renormalize, (num_expert_group, topk_group), num_fused_shared_experts,
        routed_scaling_factor, apply_routed_scaling_factor_on_output, {"scoring": scoring_func, "group_rank": "max"},
    )  # fmt: skip


grouped_topk = grouped_topk_gpu


@_two_arguments_less
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
    apply_routed_scaling_factor_on_output: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's router: sigmoid scores, the choice with ``correction_bias``, groups ranked by the sum of their two
    best.

    The arguments are those of :func:`grouped_topk` and ``correction_bias`` ``[E]``, of any float dtype (not ``[T, E]``,
    a bias of each token's own). A fused shared expert without a factor has weight 1. More experts than the kept groups
    hold are refused. Results and other errors are those of :func:`grouped_topk`.

    Source: SGLang ``python/sglang/srt/layers/moe/topk.py``.
    """
    check_tensor("correction_bias", correction_bias, rank=1)
    return _grouped(
        hidden_states, gating_output, correction_bias.float(), topk, renormalize, (num_expert_group, topk_group),
        num_fused_shared_experts, routed_scaling_factor, apply_routed_scaling_factor_on_output,
        {"scoring": "sigmoid", "group_rank": "top2_sum"},
    )  # fmt: skip


biased_grouped_topk_gpu = biased_grouped_topk


def _grouped(hidden, logits, bias, topk, renormalize, groups, shared, scale, on_output, scoring):
    groups, kept = check_router(hidden, logits, *groups)
    tokens, experts = logits.shape
    if shared not in (0, 1):
        raise NotImplementedError(
            f"num_fused_shared_experts: got {shared}, 0 or 1 is accepted (of several, one would be drawn at random)"
        )
    check_int("topk", topk, 1 + shared, experts + shared)
    if bias is not None:
        check_enough(topk - shared, experts, groups, kept)
    if on_output is not None and not isinstance(on_output, bool):
        raise TypeError(
            f"apply_routed_scaling_factor_on_output: got {type(on_output).__name__}, a bool or None is accepted (older "
            "SGLang had num_token_non_padded in its position, which is no argument in 0.5.23)"
        )
    factor = 1.0 if scale is None else float(scale)
    if shared and factor == 0.0:
        raise ValueError(f"routed_scaling_factor: got {scale} with a fused shared expert, a number but 0 is accepted")
    weights, ids = route(
        logits, topk - shared, bias=bias, num_groups=groups, top_k_groups=kept, renormalize=bool(renormalize),
        routed_scale=factor if on_output else 1.0, **scoring,
    )  # fmt: skip
    if shared:
        own = weights.new_full((tokens, 1), 1.0 if on_output else 1.0 / factor)
        weights = torch.cat((weights, own), -1)
        ids = torch.cat((ids, ids.new_full((tokens, 1), experts)), -1)
    return weights, ids


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's padded to whole blocks; see :func:`mla_kernels.align_blocks`.

    Args:
        topk_ids: ``[T, K]`` int32; an id of -1 belongs to no expert, and so does here one outside ``0 .. num_experts -
            1`` (in SGLang a wild access).
        block_size: rows of a block.
        num_experts: experts, at most 1023.
        ignore_invalid_expert: leave out the pairs of no expert. Without it they come first, in blocks of expert -1.
        return_inactive_prefix_count: return the number of those blocks, too.
        pad_expert_ids: -1 behind the last block in use; it always is.

    Returns:
        sorted_token_ids int32 (pair numbers, padded with T * K), expert_ids int32 (expert of each block, -1 for none),
        num_tokens_post_padded int32 ``[1]``; with ``return_inactive_prefix_count`` ``[2]``, the second the number of
        blocks of expert -1 in use.

    Raises:
        ValueError: ``return_inactive_prefix_count`` or ``pad_expert_ids`` with ``ignore_invalid_expert``, numbers out
        of range. TypeError: topk_ids is not int32.

    Source: SGLang ``python/sglang/srt/layers/moe/moe_runner/triton_utils/moe_align_block_size.py``.
    """
    check_tensor("topk_ids", topk_ids, rank=2, dtypes=(torch.int32,))
    check_int("num_experts", num_experts, 1, 1023)
    if ignore_invalid_expert:
        options = {"return_inactive_prefix_count": return_inactive_prefix_count, "pad_expert_ids": pad_expert_ids}
        for name, value in options.items():
            if value:
                raise ValueError(f"{name}: got True, accepted without ignore_invalid_expert")
        return align_blocks(topk_ids, num_experts, block_size)
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    pairs, blocks, total = align_blocks((topk_ids + 1).masked_fill(~known, 0), num_experts + 1, block_size)
    if return_inactive_prefix_count:
        inactive = ((~known).sum() + (block_size - 1)) // block_size
        total = torch.cat((total, inactive.to(torch.int32).view(1)))
    return pairs, (blocks - 1).clamp_min(-1), total
