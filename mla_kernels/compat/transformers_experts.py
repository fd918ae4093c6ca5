"""The experts functions that :mod:`mla_kernels.compat.transformers` gives to mixture-of-experts blocks."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from mla_kernels.checks import FLOATS
from mla_kernels.compat.transformers_packed import PLACE
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.experts.fused import fused_moe

_NUMBERS = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")
"""What the gates of transformers read of their module, besides ``act_fn``."""

_SILU = (nn.SiLU, type(ACT2FN["silu"]), F.silu)
"""Classes and functions that are known to be silu, so that a module's gate needs no other one to be tried."""


def experts(self, hidden_states, top_k_index, top_k_weights):
    """transformers' experts function: hidden [tokens, hidden], ids and weights [tokens, top_k].

    Honours the module's gate (SwiGLU, with any of the clamps that :class:`mla_kernels.Activation` has), biases,
    transposed weights and interleaved rows. Ids outside the module's experts (expert-parallel sentinels) are skipped.
    Differentiable, and traced by ``torch.compile(fullgraph=True)``. Experts of another kind raise NotImplementedError
    with the reason.
    """
    activation = activation_of(self)
    gate_up, down = self.gate_up_proj, self.down_proj
    if getattr(self, "is_transposed", False):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    has_bias = getattr(self, "has_bias", False)
    return _run(
        self, hidden_states, gate_up, down, top_k_weights.float(), top_k_index.to(torch.int32),
        gate_up_bias=self.gate_up_proj_bias if has_bias else None,
        down_bias=self.down_proj_bias if has_bias else None,
        activation=activation,
    )  # fmt: skip


def experts_with_identity(self, hidden_states, top_k_index, top_k_weights):
    """LongcatFlash's experts: ids of ``num_routed_experts`` and more give the token back as it is, weighted.

    Stands in for the module's ``forward``; ``fused_moe`` skips those ids. The identity is the module's own, which
    tensor parallelism divides by the number of ranks, since it sums theirs.
    """
    weights = top_k_weights.float()
    routed = _run(
        self,
        hidden_states,
        self.gate_up_proj[: self.num_routed_experts],
        self.down_proj,
        weights,
        top_k_index.to(torch.int32),
        activation=activation_of(self),
    )
    identity = weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(-1, keepdim=True)  # [tokens, 1]
    return routed + (self.identity_expert(hidden_states) * identity).to(routed.dtype)


def _run(module, hidden, gate_up, down, weights, ids, *, gate_up_bias=None, down_bias=None, activation):
    """`fused_moe`, by the packed weights where ``enable`` moved the parameters' into those."""
    options = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, "activation": activation}
    packed = vars(module).get(PLACE)
    if packed is not None:
        return packed.fused_moe(hidden, weights, ids, **options)
    return fused_moe(hidden, gate_up, down, weights, ids, **options)


def activation_of(module: nn.Module) -> Activation:
    """What these experts compute between their two products; NotImplementedError where ``fused_moe`` does not."""
    found = _arguments_or_reason(module)
    if isinstance(found, str):
        raise NotImplementedError(f"fused_moe cannot run {type(module).__name__}: {found}")
    return Activation(*found)


def why_not_fused(module: nn.Module) -> str | None:
    """Why ``fused_moe`` does not compute these experts; None if it does."""
    found = _arguments_or_reason(module)
    return found if isinstance(found, str) else None


def _arguments_or_reason(module: nn.Module) -> tuple | str:
    """The arguments of these experts' :class:`Activation`, or why they cannot be fused."""
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
    if "_apply_gate" in vars(module):
        return "its _apply_gate was replaced by other code"
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and (act_fn._forward_hooks or act_fn._forward_pre_hooks):
        return "forward hooks on act_fn, which runs inside a kernel"
    return _recognised(*_gate(module)) or "its gate is not SwiGLU with one of the clamps of mla_kernels.Activation"


def _gate(module: nn.Module) -> tuple:
    """What the module's gate is made of, as constants of ``torch.compile``: its code, whether silu is its activation
    (None: it has none), and the numbers that it may read (floats as text: a float that differs from one compilation
    to the next becomes a symbol, unless its value is asked for)."""
    act_fn = getattr(module, "act_fn", None)
    act = type(act_fn) if isinstance(act_fn, nn.Module) else act_fn
    is_silu = None if act is None else act in _SILU
    own, cls = vars(module), type(module)  # a module is slow to say that it has no such attribute
    numbers = [own[name] if name in own else getattr(cls, name, None) for name in _NUMBERS]
    numbers = tuple(number.hex() if isinstance(number, float) else number for number in numbers)
    return getattr(cls, "_apply_gate", None), is_silu, numbers


@torch.compiler.assume_constant_result
def _recognised(apply_gate, is_silu: bool | None, numbers: tuple) -> tuple | None:
    """Arguments of the :class:`Activation` that a gate computes; None: it computes another. ``torch.compile`` calls
    this and does not trace it."""
    return _recognise(apply_gate, is_silu, numbers)


@functools.cache
def _recognise(apply_gate, is_silu, numbers):
    """The gate is code, so it is tried, once for each: on a stand-in for its module that has what gates read, in a
    thread of its own, where no mode of the caller (fake tensors, autocast, a default device) acts."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try, apply_gate, is_silu, numbers).result()


def _try(apply_gate, is_silu, numbers):
    """On values past silu's curve and on either side of the limit."""
    numbers = (float.fromhex(number) if isinstance(number, str) else number for number in numbers)
    numbers = {name: number for name, number in zip(_NUMBERS, numbers) if number is not None}
    module = SimpleNamespace(**numbers)
    if is_silu:
        module.act_fn = F.silu
    usable = {name: number for name, number in numbers.items() if _is_above_zero(number)}
    limits = {number for name, number in usable.items() if "limit" in name}
    alphas = {number for name, number in usable.items() if "alpha" in name} | {1.702}
    edges = [sign * limit * factor for limit in limits for sign in (-1, 1) for factor in (0.99, 1.01)]
    gate = (-1e3, -60.0, -11.0, -7.5, -1.0, -0.1, 0.0, 0.3, 2.0, 7.5, 11.0, 60.0, 1e3, *edges)
    up = (-1e3, -11.0, -7.5, -0.7, 0.0, 0.7, 7.5, 11.0, 1e3, *edges)
    gate, up = (torch.tensor(values, dtype=torch.float32) for values in (gate, up))
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(gate, up, indexing="ij"))
    candidates = [("none", None, 1.702)]
    for limit in limits:
        candidates += [(clamp, float(limit), 1.702) for clamp in ("pre", "post")]
        candidates += [("gpt_oss", float(limit), float(alpha)) for alpha in alphas]
    for interleaved in (False, True):
        got = _gate_of(apply_gate, module, gate, up, interleaved)
        for candidate in candidates if got is not None else ():
            if torch.allclose(got, _gated(gate, up, *candidate), rtol=1e-5, atol=1e-6):
                return *candidate, interleaved
    return None


def _is_above_zero(value) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _gate_of(apply_gate, module, gate, up, interleaved):
    """What the code makes of gate and up, [1, n] each, in one arrangement of its rows; None if that is no result."""
    joined = torch.stack((gate, up), -1).flatten(1) if interleaved else torch.cat((gate, up), -1)
    try:
        if apply_gate is not None:
            got = apply_gate(module, joined)
        else:  # LongcatFlash multiplies in its forward
            got = None if interleaved else module.act_fn(gate) * up
    except (AttributeError, TypeError, RuntimeError):  # it reads more, or calls an activation that is not silu
        return None
    return got.float() if isinstance(got, torch.Tensor) and got.shape == gate.shape else None


def _gated(gate, up, clamp, limit, alpha):
    """An activation of gate and up, in plain torch."""
    if clamp == "none":
        return F.silu(gate) * up
    if clamp == "post":
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if clamp == "pre":
        return F.silu(gate) * up
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
