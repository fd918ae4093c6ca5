"""What SGLang's and vLLM's ``fused_experts`` have in common: their weight flags as this library's formats."""

import torch

from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.quantised.weights import ExpertWeights, WeightFormat

_INT4 = (
    "neighbouring columns share a byte there, while the kernels here read bytes whose halves lie half a block apart; "
    "convert once with ExpertWeights.from_gptq or ExpertWeights.from_awq and call mla_kernels.fused_experts"
)
_PER_CHANNEL = "per_channel_quant (SGLang), per_act_token_quant (vLLM)"


def run(hidden, gate_up, down, weights, ids, *, quantised: ExpertWeights | None, biases, activation, weight_at):
    """The experts' weighted sum: quantised weights if there are some, else the tensors themselves."""
    if weight_at == "input" and biases[0] is not None:
        raise NotImplementedError(
            "apply_router_weight_on_input: got True with a bias of w1, which the weight multiplies too there; "
            "without a bias it is accepted"
        )
    weights, ids = weights.float(), ids.to(torch.int32)
    if quantised is not None:
        return fused_experts(hidden, quantised, weights, ids, activation=activation, weight_at=weight_at)
    return fused_moe(
        hidden, gate_up, down, weights, ids,
        gate_up_bias=biases[0], down_bias=biases[1], activation=activation, weight_at=weight_at,
    )  # fmt: skip


def quantised_weights(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    biases: tuple,
    scales: tuple,
    *,
    fp8_w8a8: bool = False,
    int8_w8a8: bool = False,
    int8_w8a16: bool = False,
    int4_w4a16: bool = False,
    per_channel: bool = False,
    block_shape=None,
    static_scales: tuple = (None, None),
    zeros: tuple = (None, None),
) -> ExpertWeights | None:
    """The tensors that SGLang and vLLM pass with their flags, as they lie; None where no flag is set.

    Raises NotImplementedError with the reason for what no kernel here reads, ValueError where flags contradict.
    """
    flags = {
        "use_fp8_w8a8": fp8_w8a8,
        "use_int8_w8a8": int8_w8a8,
        "use_int8_w8a16": int8_w8a16,
        "use_int4_w4a16": int4_w4a16,
    }
    chosen = [name for name, value in flags.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: one of them is accepted")
    if any(scale is not None for scale in static_scales):
        raise NotImplementedError(
            "a1_scale, a2_scale: got tensors, None is accepted (every token gets scales of its own)"
        )
    if any(zero is not None for zero in zeros):
        raise NotImplementedError(f"w1_zp, w2_zp: {_INT4}")
    if per_channel and not (int8_w8a8 or int8_w8a16):
        raise NotImplementedError(
            f"{_PER_CHANNEL}: got True {'with ' + chosen[0] if chosen else 'without a flag'}, it is accepted with "
            "use_int8_w8a8 and use_int8_w8a16"
        )
    if not chosen:
        if any(scale is not None for scale in scales):
            raise ValueError("w1_scale, w2_scale: got tensors without a flag that says what they scale")
        if block_shape is not None:
            raise ValueError(f"block_shape: got {block_shape} without a flag, None is accepted there")
        return None
    if int4_w4a16:
        raise NotImplementedError(f"use_int4_w4a16: {_INT4}")
    if None in scales:
        raise ValueError(f"w1_scale, w2_scale: got None, tensors are accepted with {chosen[0]}")
    if fp8_w8a8:
        if list(block_shape or ()) != [128, 128]:
            raise NotImplementedError(f"block_shape: got {block_shape}, [128, 128] is accepted with use_fp8_w8a8")
        kind = WeightFormat.FP8_BLOCK
    else:
        if block_shape is not None:
            raise NotImplementedError(f"block_shape: got {block_shape}, None is accepted with {chosen[0]}")
        if int8_w8a8 and not per_channel:
            raise NotImplementedError(f"{_PER_CHANNEL}: got False, True is accepted with use_int8_w8a8")
        kind = WeightFormat.INT8_W8A8 if int8_w8a8 else WeightFormat.INT8
        scales = tuple(scale.flatten(1) for scale in scales)  # [E, N, 1] or [E, N]
    return ExpertWeights(
        format=kind, gate_up=gate_up, down=down, gate_up_scale=scales[0], down_scale=scales[1],
        gate_up_bias=biases[0], down_bias=biases[1],
    )  # fmt: skip
