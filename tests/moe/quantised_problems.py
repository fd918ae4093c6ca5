"""Seeded problems for experts with quantised weights, and the exact answer to each."""

from dataclasses import dataclass, field

import torch

from reference import quant
from reference.moe import SWIGLU, Activation
from reference.quantised_moe import fused_experts
from tests.moe.problems import distinct_ids

FORMATS = ("int8", "int4", "mxfp4", "fp8_block", "int8_w8a8")


def quantise(form: str, weight: torch.Tensor, group: int, symmetric: bool):
    """Codes, scales and zeros (or None) of one weight."""
    if form == "int4":
        return quant.quantise_int4(weight, group, symmetric=symmetric)
    if form == "mxfp4":
        return *quant.quantise_mxfp4(weight), None
    if form == "fp8_block":
        return *quant.quantise_fp8_block(weight), None
    return *quant.quantise_int8(weight), None


def dequantise(form: str, codes, scales, zeros, columns: int, dtype) -> torch.Tensor:
    if form == "int4":
        return quant.dequantise_int4(codes, scales, zeros, columns, dtype=dtype)
    if form == "mxfp4":
        return quant.dequantise_mxfp4(codes, scales, columns, dtype=dtype)
    if form == "fp8_block":
        return quant.dequantise_fp8_block(codes, scales, dtype=dtype)
    return quant.dequantise_int8(codes, scales, dtype=dtype)


@dataclass
class QuantisedLayer:
    """Inputs of fused_experts; ``gate_up`` and ``down`` are codes, scales and zeros."""

    format: str
    hidden: torch.Tensor
    gate_up: tuple
    down: tuple
    weights: torch.Tensor
    ids: torch.Tensor
    group: int
    options: dict = field(default_factory=dict)  # of reference.quantised_moe.fused_experts

    def dequantised(self, dtype):
        inner = self.gate_up[0].shape[1] // 2
        return (
            dequantise(self.format, *self.gate_up, self.hidden.shape[1], dtype),
            dequantise(self.format, *self.down, inner, dtype),
        )

    def answer(self, dtype):
        wide = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        return fused_experts(
            self.hidden.to(dtype), self.format, *self.dequantised(dtype), self.weights.to(dtype), self.ids, **wide
        )

    def exact(self):
        return self.answer(torch.float64)

    def baseline(self):
        return None if self.hidden.dtype == torch.float32 else self.answer(self.hidden.dtype)


def quantised_layer(
    form, tokens, experts, top_k, hidden, intermediate, dtype=torch.float32, *,
    group=128, symmetric=True, bias=False, activation=SWIGLU, weight_at="output", ids=None,
) -> QuantisedLayer:  # fmt: skip
    gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    options = {"activation": Activation(*activation), "weight_at": weight_at}
    if bias:
        options["gate_up_bias"] = (torch.randn(experts, 2 * intermediate) * 0.3).to(dtype)
        options["down_bias"] = (torch.randn(experts, hidden) * 0.3).to(dtype)
    return QuantisedLayer(
        form,
        torch.randn(tokens, hidden).to(dtype),
        quantise(form, gate_up.to(dtype), group, symmetric),
        quantise(form, down.to(dtype), group, symmetric),
        torch.rand(tokens, top_k),
        distinct_ids(tokens, experts, top_k) if ids is None else ids,
        {"int4": group, "mxfp4": 32}.get(form, 0),
        options,
    )
