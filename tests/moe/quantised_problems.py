"""Seeded problems for experts with quantised weights, and the exact answer to each."""

from dataclasses import dataclass, field, replace

import torch

from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.quantised.weights import ExpertWeights
from mla_kernels.reference import quant as reference
from mla_kernels.reference.moe import Activation as ReferenceActivation
from tests.moe.problems import distinct_ids
from tests.support import assert_close, on_cpu

FP8_SUMS = 5e-4
"""Accepted of the scale in float32 where tensor cores add e4m3 products: in about 14 bits on Hopper, 1.2e-4 of a sum of
128 (relative RMS, seen on an H200), and what two layers and an activation make of it."""
FORMATS = ("int8", "int4", "mxfp4", "fp8_block", "int8_w8a8")


@dataclass
class QuantisedLayer:
    """Inputs of fused_experts; ``activation`` is the arguments of Activation."""

    hidden: torch.Tensor
    experts: ExpertWeights
    weights: torch.Tensor
    ids: torch.Tensor
    activation: dict = field(default_factory=dict)
    weight_at: str = "output"

    def run(self):
        options = {"activation": Activation(**self.activation), "weight_at": self.weight_at}
        return fused_experts(self.hidden, self.experts, self.weights, self.ids, **options)

    def answer(self, dtype):
        """By the reference in ``dtype``, on the CPU."""
        options = {"activation": ReferenceActivation(**self.activation), "weight_at": self.weight_at}
        hidden, weights, ids = on_cpu((self.hidden, self.weights, self.ids))
        weights = weights.double() if dtype == torch.float64 else weights
        return reference.fused_experts(hidden.to(dtype), self.experts.to("cpu"), weights, ids, **options)

    def exact(self):
        return self.answer(torch.float64)

    def baseline(self):
        """The same mathematics in the layer's dtype; None for fp32, which has an absolute bound."""
        return None if self.hidden.dtype == torch.float32 else self.answer(self.hidden.dtype)

    def check(self, actual, exact=None):
        """Hold a result against ``exact``, by default the reference's in float64."""
        rounded = self.experts.format == "fp8_block" and self.hidden.is_cuda
        accepted = FP8_SUMS if rounded else 1e-5
        assert_close(actual, self.exact() if exact is None else exact, self.baseline(), accepted=accepted)

    def but(self, **changed):
        return replace(self, **changed)


def quantised_layer(
    form, tokens, experts, top_k, hidden, intermediate, dtype=torch.float32, *,
    bias=False, activation=None, weight_at="output", ids=None, device="cpu", **options,
) -> QuantisedLayer:  # fmt: skip
    """A random layer whose activations keep the size of its inputs. ``options`` are those of ExpertWeights.quantise."""
    gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    if bias:
        options["gate_up_bias"] = (torch.randn(experts, 2 * intermediate) * 0.3).to(dtype)
        options["down_bias"] = (torch.randn(experts, hidden) * 0.3).to(dtype)
    return QuantisedLayer(
        torch.randn(tokens, hidden).to(device, dtype),
        ExpertWeights.quantise(gate_up.to(dtype), down.to(dtype), form, **options).to(device),
        torch.rand(tokens, top_k).to(device),
        (distinct_ids(tokens, experts, top_k) if ids is None else ids).to(device),
        activation or {},
        weight_at,
    )
