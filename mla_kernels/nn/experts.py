"""The experts of nn.MoE: stacked weights as parameters, or in another weight format as buffers."""

import dataclasses

import torch
from torch import nn

from mla_kernels.checks import FLOATS, check_choice, check_tensor
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.quantised.converters import add_zeros, empty_parts
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.moe.quantised.fused_experts import fused_experts
from mla_kernels.moe.quantised.weights import ExpertWeights, as_stored
from mla_kernels.quant.int4 import GROUP_SIZES

OPTIONS = {"group_size": 128, "symmetric": True, "scale_dtype": torch.bfloat16}
"""Of experts in int4, and their defaults."""


class Experts(nn.Module):
    """Experts' stacked weights, gate rows before up rows."""

    def __init__(self, number: int, hidden: int, inner: int, activation: Activation):
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(number, 2 * inner, hidden).normal_(0, 0.02))
        self.down_proj = nn.Parameter(torch.empty(number, hidden, inner).normal_(0, 0.02))

    def compute(self, tokens, weights, ids, gate_up, down):
        return fused_moe(tokens, gate_up, down, weights, ids, activation=self.activation)

    def forward(self, tokens, weights, ids):
        return self.compute(tokens, weights, ids, *self.parameters())


class QuantizedExperts(nn.Module):
    """The same in another weight format, as buffers: codes, scales and zeros keep their dtypes in ``to``.

    A state dict has the names of ExpertWeights' tensors, and must have the dtypes and shapes of these.
    """

    def __init__(self, weights: ExpertWeights, activation: Activation):
        super().__init__()
        self.activation, self._weights = activation, weights
        for name, value in weights.tensors().items():
            self.register_buffer(name, value)
        self.register_load_state_dict_pre_hook(check_codes)
        self.register_load_state_dict_post_hook(QuantizedExperts._follow)

    @classmethod
    def empty(cls, number: int, hidden: int, inner: int, activation: Activation, format: str, **options):
        """Experts whose weights are 0, to be loaded; ``options`` of int4: group_size, symmetric, scale_dtype."""
        format = WeightFormat(format)
        options, group_size = OPTIONS | options, None
        if format is WeightFormat.INT4:
            group_size = options["group_size"]
            check_choice("group_size", group_size, GROUP_SIZES)
            check_choice("scale_dtype", options["scale_dtype"], FLOATS)
        layout = {"scale_dtype": options["scale_dtype"], "group_size": group_size}
        parts = empty_parts(format, number, (hidden, inner), **layout)
        if not options["symmetric"]:
            add_zeros(parts)
        return cls(ExpertWeights(format, **parts, group_size=group_size), activation)

    @property
    def format(self) -> WeightFormat:
        """The weights'."""
        return self._weights.format

    @property
    def weights(self) -> ExpertWeights:
        """The buffers, in their format."""
        buffers, known = dict(self.named_buffers()), self._weights.tensors()
        if all(known[name] is value for name, value in buffers.items()):
            return self._weights
        weights = dataclasses.replace(self._weights, **buffers)  # which torch 2.11 does not trace: see _follow
        if not torch.compiler.is_compiling():
            self._weights = weights
        return weights

    def _follow(self, *_) -> None:
        """Take up buffers that were moved, or assigned by ``load_state_dict``, before anything traces."""
        _ = self.weights

    def compute(self, tokens, weights, ids):
        return fused_experts(tokens, self.weights, weights, ids, activation=self.activation)

    def forward(self, tokens, weights, ids):
        return self.compute(tokens, weights, ids)

    def _apply(self, fn, recurse=True):
        def moved(tensor):
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        self._follow()
        return self


def check_codes(module, state_dict, prefix, *_) -> None:
    """Before ``load_state_dict``: refuse codes and scales of other dtypes, which ``copy_`` would convert."""
    own = module._weights.tensors()
    for name in (*own, "gate_up_zero", "down_zero"):
        value = state_dict.get(prefix + name)
        if value is None:
            continue
        if name not in own:
            raise ValueError(f"{prefix}{name}: got a tensor, these experts of format {module.format.value!r} have none")
        value = as_stored(name, value, module.format)
        check_tensor(prefix + name, value, dtypes=(own[name].dtype,))
        state_dict[prefix + name] = value
