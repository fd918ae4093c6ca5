"""SGLang's experts over this library's: ``--moe-runner-backend mla_kernels``, and fp8 in blocks below capability 8.9.

There SGLang's own choice for them is its Triton runner, whose kernels load e4m3, and Triton compiles that from 8.9 on.

SGLang takes new runners by name, and its methods of unquantised and fp8 experts make none that is not built in. So
:mod:`mla_kernels.compat.sglang_plugin` wraps ``create_moe_runner`` of both: they make their Triton runner, with its
layout of weights, and :func:`run_experts` computes in its place. A layer whose experts any other method holds is
refused when it is built. The module imports SGLang.

Source: SGLang 0.5.23, ``sglang/srt/layers/moe/moe_runner``, ``sglang/srt/layers/quantization/unquant.py``, ``fp8.py``.
"""

import functools

from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.runtime_context import get_flags
from sglang.srt.utils import get_device_capability, is_cuda

from mla_kernels.compat.sglang_moe import fused_experts
from mla_kernels.compat.sglang_plugin import NAME, logger

HAS_E4M3 = (8, 9)
"""Triton compiles products of e4m3 from this capability on."""


def run_experts(dispatch_output, quant_info, runner_config) -> StandardCombineInput:
    """What SGLang's Triton runner computes of tokens that are where their experts are.

    Args:
        dispatch_output: hidden states [tokens, hidden] and (weights, ids, logits) of their experts.
        quant_info: ``TritonMoeQuantInfo``: weights, biases and scales.
        runner_config: ``MoeRunnerConfig``.

    Raises:
        NotImplementedError, TypeError, ValueError: what :func:`mla_kernels.compat.sglang.fused_experts` refuses.
    """
    if quant_info.use_mxfp8:
        raise NotImplementedError(f"quant_info.use_mxfp8: got True, False is accepted by {NAME}")
    flags = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant", "block_shape")
    out = fused_experts(
        dispatch_output.hidden_states,
        quant_info.w13_weight,
        quant_info.w2_weight,
        dispatch_output.topk_output,
        runner_config,
        b1=quant_info.b13,
        b2=quant_info.b2,
        w1_scale=quant_info.w13_scale,
        w2_scale=quant_info.w2_scale,
        w1_zp=quant_info.w13_zp,
        w2_zp=quant_info.w2_zp,
        a1_scale=quant_info.a13_scale,
        a2_scale=quant_info.a2_scale,
        fuse_swiglu_interleaved=quant_info.fuse_swiglu_interleaved,
        **{flag: getattr(quant_info, flag) for flag in flags},
    )
    return StandardCombineInput(hidden_states=out)


def create_runner(original, method, layer, moe_runner_config) -> None:
    """Around ``create_moe_runner`` of a method that holds its weights as SGLang's Triton runner reads them."""
    asked = get_moe_runner_backend().value == NAME
    if not asked and not _left_behind(method):
        return original(method, layer, moe_runner_config)
    if not get_moe_a2a_backend().is_none():
        raise NotImplementedError(f"--moe-a2a-backend: got {get_moe_a2a_backend().value}, none is accepted by {NAME}")
    with get_flags().moe.override(runner_backend=MoeRunnerBackend.TRITON):
        original(method, layer, moe_runner_config)
    method.runner.fused_func = run_experts
    if not asked:
        _say(*get_device_capability())


def _left_behind(method) -> bool:
    """Whether SGLang chooses, and has no kernels for these experts on this chip."""
    in_blocks = getattr(method, "block_quant", False) and not method.use_mxfp8 and not method.is_fp4_expert
    chooses = get_moe_runner_backend().is_auto() and get_moe_a2a_backend().is_none()
    return in_blocks and chooses and is_cuda() and get_device_capability() < HAS_E4M3


@functools.cache
def _say(major: int, minor: int) -> None:
    logger.info(
        "mla_kernels: SGLang's experts in fp8 need capability %d.%d, this is %d.%d: mla_kernels serves them",
        *HAS_E4M3, major, minor,
    )  # fmt: skip


def refuse_others(result, layer, *args, **kwargs) -> None:
    """After the constructor of a layer of experts: they are ours, where ours were asked for."""
    runner = getattr(layer.quant_method, "runner", None)
    if get_moe_runner_backend().value == NAME and getattr(runner, "fused_func", None) is not run_experts:
        raise NotImplementedError(
            f"--moe-runner-backend: got {NAME} for experts of {type(layer.quant_method).__name__}; it accepts those of "
            "UnquantizedFusedMoEMethod and Fp8MoEMethod"
        )
