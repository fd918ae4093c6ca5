"""Experts of transformers whose weights :func:`mla_kernels.compat.transformers.enable` moved into the layout that the
CPU multiplies fastest, while their parameters are empty."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mla_kernels.checks import check_no_grad, check_tensor
from mla_kernels.cpu import amx, moe, packed
from mla_kernels.cpu.pages import empty
from mla_kernels.moe.experts.activation import Activation

PLACE = "_mla_kernels_packed"
"""Where a module of experts keeps its :class:`PackedExperts`."""

_NAMES = ("gate_up_proj", "down_proj")
_DTYPES = (torch.bfloat16, torch.float32)


@dataclass
class _Moved:
    """A parameter [E, out, in] and its weights: one tensor an expert, of ``whole`` where that is plain memory."""

    parameter: nn.Parameter
    shape: torch.Size
    experts: Sequence[torch.Tensor]
    whole: torch.Tensor | None = None

    @classmethod
    def of(cls, parameter: nn.Parameter, plain: bool) -> "_Moved":
        """Move: ``plain`` into huge pages, else into oneDNN's layout. The parameter is left [0, out, in]."""
        weight = parameter.detach()
        if plain:
            whole = empty(weight, *weight.shape).copy_(weight)
            moved = cls(parameter, weight.shape, whole.unbind(0), whole)
        else:
            moved = cls(parameter, weight.shape, packed.reorder(weight))
        parameter.data = weight.new_empty(0, *weight.shape[1:])
        return moved

    def restore(self) -> None:
        weight = self.whole
        if weight is None:
            weight = torch.empty(self.shape, dtype=self.experts[0].dtype, device="cpu")
            for target, expert in zip(weight, self.experts):
                target.copy_(expert.to_dense())
        self.parameter.data = weight


class PackedExperts:
    """The weights of a module of experts, which stand in for its parameters until :meth:`restore`."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.product: Callable = amx.product if amx.available() else packed.multiply
        self.moved: list[_Moved] = []
        try:
            for name in _NAMES:
                self.moved.append(_Moved.of(getattr(module, name), plain=amx.available()))
        except BaseException:  # memory ran out
            self._give_back()
            raise
        self.hook = module.register_state_dict_pre_hook(_refuse_state_dict)
        vars(module)[PLACE] = self

    def fused_moe(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: Activation,
    ) -> torch.Tensor:
        """:func:`mla_kernels.fused_moe` over the packed weights.

        Raises:
            NotImplementedError: an input or parameter that requires grad, outside torch.no_grad().
            TypeError, ValueError: hidden of another dtype or device than the weights.
        """
        gate_up, down = self.moved
        parameters = dict(zip(_NAMES, (gate_up.parameter, down.parameter)))
        biases = {"gate_up_proj_bias": gate_up_bias, "down_proj_bias": down_bias}
        check_no_grad(
            "prepacked experts (mla_kernels.compat.transformers.enable)",
            hidden_states=hidden, top_k_weights=weights, **parameters, **biases,
        )  # fmt: skip
        first = gate_up.experts[0]
        check_tensor("hidden_states", hidden, shape=(None, first.shape[1]), dtypes=(first.dtype,), device=first.device)
        experts = moe.Experts(
            gate_up.experts, down.experts, gate_up_bias, down_bias, activation.arguments, self.product
        )
        return _run(hidden, experts, weights, ids)

    def restore(self) -> None:
        """Give the parameters their weights back, bit for bit."""
        self._give_back()
        self.hook.remove()
        del vars(self.module)[PLACE]

    def _give_back(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for moved in self.moved:
                moved.restore()

    def __reduce__(self):
        raise RuntimeError(f"{type(self.module).__name__}: got a copy or pickle of prepacked experts, {_DISABLE}")


@torch.compiler.disable(reason="prepacked experts are not traced by torch.compile")
def _run(hidden, experts, weights, ids):
    with torch.autocast("cpu", enabled=False):
        return moe.run(hidden, experts, weights, ids)


_DISABLE = "none is accepted: their parameters are empty; call mla_kernels.compat.transformers.disable(model) first"


def _refuse_state_dict(module, prefix, keep_vars) -> None:
    raise RuntimeError(f"{prefix}{_NAMES[0]}: got state_dict() of prepacked experts, {_DISABLE}")


def check_packable(base: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse experts of the model ``base`` that cannot be packed.

    Raises:
        ValueError: a model in training mode, parameters not on the CPU, not contiguous, shared or inference tensors.
        TypeError: weights of another kind or dtype. NotImplementedError: torch without oneDNN's linear.
    """
    if base.training:
        raise ValueError(
            "enable: got prepack=True and a model in training mode, one in eval mode is accepted (model.eval()): "
            "prepacked experts have no gradients"
        )
    packed.check_available()
    seen = set()
    for module in modules:
        for name in _NAMES:
            parameter = vars(module)["_parameters"].get(name)
            where = f"enable: {name} of {type(module).__name__} with prepack=True"
            if type(parameter) is not nn.Parameter or parameter.dtype not in _DTYPES:
                got = parameter.dtype if type(parameter) is nn.Parameter else type(parameter).__name__
                raise TypeError(f"{where}: got {got}, a torch.nn.Parameter of bfloat16 or float32 is accepted")
            if parameter.device.type != "cpu":
                raise ValueError(f"{where}: got a tensor on {parameter.device}, tensors on cpu are accepted")
            if not parameter.is_contiguous() or parameter.is_inference() or parameter.numel() == 0:
                kind = "an inference tensor" if parameter.is_inference() else f"{tuple(parameter.shape)}"
                raise ValueError(
                    f"{where}: got {kind} with strides {parameter.stride()}, a contiguous tensor [experts, out, in] "
                    "made outside torch.inference_mode is accepted"
                )
            if id(parameter) in seen:
                raise ValueError(f"{where}: got a parameter that another module has, too; one for each is accepted")
            seen.add(id(parameter))


def pack(modules: Iterable[nn.Module]) -> None:
    """Pack these experts, one module after another; none stays packed if one fails."""
    done: list[PackedExperts] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for module in modules:
                done.append(PackedExperts(module))
    except BaseException:
        for experts in done:
            experts.restore()
        raise
