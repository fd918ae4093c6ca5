"""Experts with quantised weights against our own bfloat16 experts on the same values, at DeepSeek-V2-Lite's sizes.

All experts hold the same weights, each in memory of its own: rounding 5e8 random numbers takes minutes.
"""

import functools

import pytest
import torch

from mla_kernels import ExpertWeights, fused_experts, fused_moe, route
from mla_kernels.cpu import quantised as cpu
from mla_kernels.reference import quant as reference

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 6, 2048, 1408
FORMATS = ("int8", "int4", "mxfp4")
"""Those whose result bfloat16 experts give, too; fp8_block and int8_w8a8 round activations as well."""

SAMPLE = 4


@functools.lru_cache(maxsize=1)
def layer(format):
    """One expert; EXPERTS of it, in the format; and as plain bfloat16 weights."""
    torch.manual_seed(0)
    gate_up = (torch.randn(1, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5).bfloat16()
    down = (torch.randn(1, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5).bfloat16()
    one = ExpertWeights.quantise(gate_up, down, format)
    tensors = {name: tensor.repeat(EXPERTS, *[1] * (tensor.dim() - 1)) for name, tensor in one.tensors().items()}
    plain = [weight.repeat(EXPERTS, 1, 1) for weight in one.dequantise(torch.bfloat16)]
    return one, ExpertWeights(format, **tensors, group_size=one.group_size), plain


CASES = [(format, False) for format in FORMATS] + [("int4", True), ("mxfp4", True)]


@pytest.mark.parametrize("tokens", [1, 16, 256, 1024])
@pytest.mark.parametrize(
    ("format", "prepacked"), CASES, ids=lambda value: {True: "prepacked", False: ""}.get(value, value)
)
def test_fused_experts(race, format, prepacked, tokens):
    one, experts, plain = layer(format)
    if prepacked:
        experts = ExpertWeights.from_tensors(experts.tensors(), experts.metadata())
        experts.prepack()
    hidden = torch.randn(tokens, HIDDEN).bfloat16()
    weights, ids = route(torch.randn(tokens, EXPERTS), TOP_K)
    sample = slice(0, SAMPLE)
    total = weights[sample].double().sum(1, keepdim=True)
    first = torch.zeros(total.shape, dtype=torch.int32)
    exact = reference.fused_experts(hidden[sample].double(), one, total, first)
    bytes_of_weights = ids.unique().numel() * 3 * INTERMEDIATE * HIDDEN * experts.bytes_per_parameter
    race(
        lambda: fused_experts(hidden, experts, weights, ids),
        {"our bf16": lambda: fused_moe(hidden, *plain, weights, ids)},
        exact,
        pick=lambda result: result[sample],
        nbytes=bytes_of_weights + 2 * hidden.nbytes,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_codes_as_float16(race, monkeypatch, format):
    """One token, against converting the chosen experts' weights. bfloat16 experts give another result than fp8_block,
    which rounds activations, too: they are timed, not compared."""
    one, experts, plain = layer(format)
    hidden = torch.randn(1, HIDDEN).bfloat16()
    weights, ids = route(torch.randn(1, EXPERTS), TOP_K)
    exact = reference.fused_experts(hidden.double(), one, weights.double().sum(1, keepdim=True), ids[:, :1] * 0)
    result = fused_experts(hidden, experts, weights, ids)

    def converting():
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_ONE_ROW", {})
            return fused_experts(hidden, experts, weights, ids)

    def bf16():
        fused_moe(hidden, *plain, weights, ids)
        return result

    race(
        lambda: fused_experts(hidden, experts, weights, ids),
        {"converting": converting, "our bf16": bf16},
        exact,
        nbytes=TOP_K * 3 * INTERMEDIATE * HIDDEN * experts.bytes_per_parameter,
        flops=6 * INTERMEDIATE * HIDDEN * TOP_K,
    )


@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_prepacked_fp8(race, tokens):
    """Against bfloat16 experts, whose other result is not compared: see :func:`test_codes_as_float16`."""
    one, experts, plain = layer("fp8_block")
    experts = ExpertWeights.from_tensors(experts.tensors(), experts.metadata())
    experts.prepack()
    hidden = torch.randn(tokens, HIDDEN).bfloat16()
    weights, ids = route(torch.randn(tokens, EXPERTS), TOP_K)
    sample = slice(0, SAMPLE)
    total = weights[sample].double().sum(1, keepdim=True)
    exact = reference.fused_experts(hidden[sample].double(), one, total, torch.zeros(total.shape, dtype=torch.int32))
    result = fused_experts(hidden, experts, weights, ids)

    def bf16():
        fused_moe(hidden, *plain, weights, ids)
        return result

    race(
        lambda: fused_experts(hidden, experts, weights, ids),
        {"our bf16": bf16},
        exact,
        pick=lambda result: result[sample],
        nbytes=ids.unique().numel() * 3 * INTERMEDIATE * HIDDEN * experts.bytes_per_parameter,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )
