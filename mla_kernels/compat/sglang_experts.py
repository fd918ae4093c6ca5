"""SGLang's experts over this library's, where it is asked for: ``--moe-runner-backend mla_kernels``.

SGLang takes new runners by name, and its methods of unquantised and fp8 experts make none that is not built in. So
:mod:`mla_kernels.compat.sglang_plugin` wraps ``create_moe_runner`` of both: they make their Triton runner, with its
layout of weights, and :func:`run_experts` computes in its place. A layer whose experts any other method holds is
refused when it is built. The module imports SGLang.

Source: SGLang 0.5.23, ``sglang/srt/layers/moe/moe_runner``, ``sglang/srt/layers/quantization/unquant.py``, ``fp8.py``.
"""

from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.runtime_context import get_flags

from mla_kernels.compat.sglang_moe import fused_experts
from mla_kernels.compat.sglang_plugin import NAME


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
    if get_moe_runner_backend().value != NAME:
        return original(method, layer, moe_runner_config)
    if not get_moe_a2a_backend().is_none():
        raise NotImplementedError(f"--moe-a2a-backend: got {get_moe_a2a_backend().value}, none is accepted by {NAME}")
    with get_flags().moe.override(runner_backend=MoeRunnerBackend.TRITON):
        original(method, layer, moe_runner_config)
    method.runner.fused_func = run_experts


def refuse_others(result, layer, *args, **kwargs) -> None:
    """After the constructor of a layer of experts: they are ours, where ours were asked for."""
    runner = getattr(layer.quant_method, "runner", None)
    if get_moe_runner_backend().value == NAME and getattr(runner, "fused_func", None) is not run_experts:
        raise NotImplementedError(
            f"--moe-runner-backend: got {NAME} for experts of {type(layer.quant_method).__name__}; it accepts those of "
            "UnquantizedFusedMoEMethod and Fp8MoEMethod"
        )
