"""The experts functions that :mod:`mla_kernels.compat.transformers` gives to mixture-of-experts blocks."""

import weakref

import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels.checks import FLOATS
from mla_kernels.moe.activation import Activation
from mla_kernels.moe.fused import fused_moe

_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
_known: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def experts(self, hidden_states, top_k_index, top_k_weights):
    """transformers' experts function: hidden [tokens, hidden], ids and weights [tokens, top_k].

    Honours the module's gate (SwiGLU, with any of the clamps that :class:`mla_kernels.Activation` has), biases,
    transposed weights and interleaved rows. Ids outside the module's experts (expert-parallel sentinels) are skipped.
    Differentiable. Experts of another kind raise NotImplementedError with the reason.
    """
    activation = activation_of(self)
    gate_up, down = self.gate_up_proj, self.down_proj
    if getattr(self, "is_transposed", False):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    has_bias = getattr(self, "has_bias", False)
    return fused_moe(
        hidden_states, gate_up, down, top_k_weights.float(), top_k_index.to(torch.int32),
        gate_up_bias=self.gate_up_proj_bias if has_bias else None,
        down_bias=self.down_proj_bias if has_bias else None,
        activation=activation,
    )  # fmt: skip


def experts_with_identity(self, hidden_states, top_k_index, top_k_weights):
    """LongcatFlash's experts: ids of ``num_routed_experts`` and more give the token back as it is, weighted.

    Stands in for the module's ``forward``; ``fused_moe`` skips those ids.
    """
    weights = top_k_weights.float()
    routed = fused_moe(
        hidden_states,
        self.gate_up_proj[: self.num_routed_experts],
        self.down_proj,
        weights,
        top_k_index.to(torch.int32),
        activation=activation_of(self),
    )
    identity = weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(-1, keepdim=True)  # [tokens, 1]
    return routed + (hidden_states * identity).to(routed.dtype)


def activation_of(module: nn.Module) -> Activation:
    """What these experts compute between their two products; NotImplementedError where ``fused_moe`` does not."""
    numbers = tuple(getattr(module, name, None) for name in (*_LIMITS, *_ALPHAS))
    known = _known.get(module)
    if known is None or known[0] != numbers:
        if reason := why_not_fused(module):
            raise NotImplementedError(f"fused_moe cannot run {type(module).__name__}: {reason}")
        known = _known[module] = numbers, _find_activation(module)
    return known[1]


def why_not_fused(module: nn.Module) -> str | None:
    """Why ``fused_moe`` does not compute these experts; None if it does."""
    if not getattr(module, "has_gate", True):
        return "experts without a gate (has_gate=False)"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after each expert (has_post_expert_norm=True)"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or weight.dtype not in FLOATS:
            return f"{name} is not one three-dimensional tensor of bfloat16, float16 or float32"
    if getattr(module, "has_bias", False):
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            if not isinstance(getattr(module, name, None), torch.Tensor):
                return f"has_bias=True without {name}"
    if _find_activation(module) is None:
        return "its gate is not SwiGLU with one of the clamps of mla_kernels.Activation"
    return None


def _find_activation(module: nn.Module) -> Activation | None:
    """The activation that gives what the module's gate gives. The gate is code, so it is probed: on values past silu's
    curve and on either side of every limit that the module names."""
    holders = (module, getattr(module, "config", None))
    limits = {_number(holder, name) for holder in holders for name in _LIMITS} - {None}
    alphas = {_number(holder, name) for holder in holders for name in _ALPHAS} - {None} | {1.702}
    edges = [sign * limit * factor for limit in limits for sign in (-1, 1) for factor in (0.99, 1.01)]
    gate = torch.tensor([-1e3, -60.0, -11.0, -7.5, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 11.0, 60.0, 1e3, *edges])
    up = torch.tensor([-1e3, -11.0, -7.5, -0.7, 0.0, 0.7, 7.5, 11.0, 1e3, *edges])
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(gate, up, indexing="ij"))
    candidates = [Activation(interleaved=interleaved) for interleaved in (False, True)]
    for limit in limits:
        for interleaved in (False, True):
            candidates += [Activation(clamp, limit=limit, interleaved=interleaved) for clamp in ("pre", "post")]
            candidates += [Activation("gpt_oss", limit=limit, alpha=alpha, interleaved=interleaved) for alpha in alphas]
    for activation in candidates:
        got = _gate_of(module, gate, up, activation.interleaved)
        if got is not None and torch.allclose(got, _gated(gate, up, activation), rtol=1e-5, atol=1e-6):
            return activation
    return None


def _number(holder, name):
    value = getattr(holder, name, None)
    return float(value) if isinstance(value, (int, float)) and 0 < value < float("inf") else None


def _gate_of(module, gate, up, interleaved):
    """What the module makes of gate and up, [1, n] each, in one arrangement of its rows; None if that is no result."""
    joined = torch.stack((gate, up), -1).flatten(1) if interleaved else torch.cat((gate, up), -1)
    with torch.no_grad():
        if hasattr(module, "_apply_gate"):
            got = module._apply_gate(joined.to(module.down_proj.device)).float().cpu()
        elif not interleaved:  # LongcatFlash, which multiplies in its forward
            got = module.act_fn(gate) * up
        else:
            return None
    return got if got.shape == gate.shape else None


def _gated(gate, up, activation):
    """``activation`` of gate and up, in plain torch."""
    clamp, limit = str(activation.clamp.value), activation.limit
    if clamp == "none":
        return F.silu(gate) * up
    if clamp == "post":
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if clamp == "pre":
        return F.silu(gate) * up
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
