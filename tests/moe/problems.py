"""Seeded problems for the mixture-of-experts tests, and the exact answer to each."""

from dataclasses import dataclass, field

import torch

from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.reference import moe as reference
from tests.support import on_cpu


@dataclass
class Layer:
    """Inputs of fused_moe."""

    hidden: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    options: dict = field(default_factory=dict)

    def inputs(self):
        return self.hidden, self.gate_up, self.down, self.weights, self.ids

    def run(self):
        return fused_moe(*self.inputs(), **self.options)

    def on_cpu(self):
        """The same layer with its tensors on the CPU."""
        return Layer(*on_cpu(self.inputs()), on_cpu(self.options))

    def exact(self):
        """The answer in float64, on the CPU."""
        here = self.on_cpu()
        options = {name: double(value) for name, value in here.options.items()}
        return reference.fused_moe(*map(double, here.inputs()), **options)

    def baseline(self):
        """The same mathematics in the layer's dtype; None for fp32, which has an absolute bound."""
        if self.hidden.dtype == torch.float32:
            return None
        here = self.on_cpu()
        return reference.fused_moe(*here.inputs(), **here.options)


def double(value):
    """A tensor of floating-point numbers in float64, anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


OPTIONS = {
    "gpt_oss": {"activation": Activation("gpt_oss", limit=0.8, interleaved=True), "biases": True, "transposed": True},
    "step": {"activation": Activation("post", limit=0.5), "weight_at": "activation", "biases": True},
    "v4": {"activation": Activation("pre", limit=0.7)},
    "llama4": {"weight_at": "input", "transposed": True},
    "interleaved": {"activation": Activation(interleaved=True), "weight_at": "input", "biases": True},
}
"""Named combinations of options that hold each option at least once; see :func:`with_options`."""


def with_options(problem: "Layer", biases=False, transposed=False, **options) -> "Layer":
    """The same layer with random biases, with weights stored as [E, in, out], and with other options of fused_moe."""
    if biases:
        options["gate_up_bias"] = torch.randn(problem.gate_up.shape[:2]).to(problem.hidden)
        options["down_bias"] = torch.randn(problem.down.shape[:2]).to(problem.hidden)
    weights = problem.gate_up, problem.down
    if transposed:
        weights = tuple(weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in weights)
    return Layer(problem.hidden, *weights, problem.weights, problem.ids, options)


def distinct_ids(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """top_k different experts for every token, as a router gives them."""
    return torch.rand(tokens, experts).argsort(1)[:, :top_k].int().contiguous()


def layer(
    tokens, experts, top_k, hidden, intermediate, dtype=torch.float32, ids=None, device: torch.device | str = "cpu"
) -> Layer:
    """A random layer whose activations keep the size of its inputs."""
    return Layer(
        torch.randn(tokens, hidden).to(device, dtype),
        (torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5).to(device, dtype),
        (torch.randn(experts, hidden, intermediate) * intermediate**-0.5).to(device, dtype),
        torch.rand(tokens, top_k).to(device),
        (distinct_ids(tokens, experts, top_k) if ids is None else ids).to(device),
    )


def wide_layer(tokens, experts, top_k, hidden, intermediate, ids, device) -> Layer:
    """A bf16 layer of real size: every expert is the same random matrix, rolled by its own number of rows."""
    gate_up = torch.empty(experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device=device)
    down = torch.empty(experts, hidden, intermediate, dtype=torch.bfloat16, device=device)
    first = (torch.randn(2 * intermediate, hidden) * hidden**-0.5).to(gate_up)
    second = (torch.randn(hidden, intermediate) * intermediate**-0.5).to(down)
    for expert in range(experts):
        gate_up[expert], down[expert] = first.roll(expert, 0), second.roll(-expert, 0)
    rows, weights = torch.randn(tokens, hidden).to(gate_up), torch.rand(tokens, top_k).to(device)
    return Layer(rows, gate_up, down, weights, ids.to(device))


def used_experts(problem: Layer) -> Layer:
    """The same layer without the experts that no token uses, so that its float64 answer is affordable."""
    experts = problem.gate_up.shape[0]
    valid = (problem.ids >= 0) & (problem.ids < experts)
    used = problem.ids[valid].unique()
    number = torch.full((experts,), -1, dtype=torch.int32, device=used.device)
    number[used.long()] = torch.arange(len(used), dtype=torch.int32, device=used.device)
    ids = torch.where(valid, number[problem.ids.clamp(0, experts - 1).long()], -1)
    return Layer(problem.hidden, problem.gate_up[used.long()], problem.down[used.long()], problem.weights, ids)
