"""The experts functions that :mod:`mla_kernels.compat.transformers` gives to mixture-of-experts blocks."""

import weakref

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mla_kernels.checks import FLOATS
from mla_kernels.moe.fused import fused_moe

_plain_experts: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def experts(self, hidden_states, top_k_index, top_k_weights):
    """transformers' experts function: hidden [tokens, hidden], ids and weights [tokens, top_k].

    Ids outside the module's experts (expert-parallel sentinels) are skipped. Where a gradient is wanted, transformers'
    own ``grouped_mm`` runs: ``fused_moe`` has no backward.
    """
    check_plain(self)
    if _wants_gradient(self, hidden_states, top_k_weights):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    return fused_moe(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_weights.float(), top_k_index.to(torch.int32)
    )


def experts_with_identity(self, hidden_states, top_k_index, top_k_weights):
    """LongcatFlash's experts: ids of ``num_routed_experts`` and more give the token back as it is, weighted.

    Stands in for the module's ``forward``; ``fused_moe`` skips those ids. Where a gradient is wanted, the module's own
    forward runs.
    """
    if _wants_gradient(self, hidden_states, top_k_weights):
        return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
    weights = top_k_weights.float()
    routed = fused_moe(
        hidden_states,
        self.gate_up_proj[: self.num_routed_experts],
        self.down_proj,
        weights,
        top_k_index.to(torch.int32),
    )
    identity = weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(-1, keepdim=True)  # [tokens, 1]
    return routed + (hidden_states * identity).to(routed.dtype)


def _wants_gradient(module: nn.Module, *inputs: torch.Tensor) -> bool:
    weights = (module.gate_up_proj, module.down_proj)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights))


def check_plain(module: nn.Module) -> None:
    """NotImplementedError where these experts are not what ``fused_moe`` computes."""
    if module in _plain_experts:
        return
    if reason := why_not_plain(module):
        raise NotImplementedError(f"fused_moe cannot run {type(module).__name__}: {reason}")
    _plain_experts.add(module)


def why_not_plain(module: nn.Module) -> str | None:
    """Why these experts are not ``down(silu(gate) * up)`` over [E, 2I, H] and [E, H, I] weights; None if they are."""
    wanted = {
        "has_gate": (True, "experts without a gate"),
        "has_bias": (False, "expert biases"),
        "is_transposed": (False, "weights stored as [experts, in, out]"),
        "is_concatenated": (True, "gate and up rows interleaved"),
        "has_post_expert_norm": (False, "a norm after each expert"),
    }
    for name, (value, meaning) in wanted.items():
        if getattr(module, name, value) != value:
            return f"{meaning} ({name}={getattr(module, name)})"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or weight.dtype not in FLOATS:
            return f"{name} is not one [experts, out, in] tensor of bfloat16, float16 or float32"
    # The gate is code, so it is probed: on values past every clamp in use, and past silu's curve.
    gate = torch.tensor([-1e3, -60.0, -11.0, -7.5, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 11.0, 60.0, 1e3])
    up = torch.tensor([-1e3, -11.0, -7.5, -0.7, 0.0, 0.7, 7.5, 11.0, 1e3])
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(gate, up, indexing="ij"))
    with torch.no_grad():
        if hasattr(module, "_apply_gate"):
            got = module._apply_gate(torch.cat((gate, up), -1).to(module.down_proj.device)).cpu()
        else:  # LongcatFlash, which multiplies in its forward
            got = module.act_fn(gate) * up
    if got.shape != gate.shape or not torch.allclose(got, F.silu(gate) * up, rtol=1e-5, atol=1e-6):
        return "its gate is not silu(gate) * up (a clamp, another activation, or another order)"
    return None
