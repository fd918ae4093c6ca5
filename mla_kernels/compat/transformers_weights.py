"""What an enabled model reads of its modules past their forward, and what parallelism put around that.

Decoding absorbs ``kv_b_proj`` into the query, so that module is not called: whatever else its call would do (an
adapter, a hook, a quantised product) is refused by name here, at ``enable`` and at every decode step, never left out.
"""

import inspect

import torch
from torch import nn

from mla_kernels.checks import FLOATS

_module = torch.nn.modules.module  # where torch keeps the hooks of all modules


def absorbed_weight(attention: nn.Module, heads: int | None = None) -> torch.Tensor:
    """kv_b_proj's weight, [heads * (nope + v), latent]; of this rank's heads where tensor parallelism sharded it.

    Args:
        attention: an attention module of transformers.
        heads: how many heads the query has; None checks all but the shape.

    Raises:
        TypeError: a module or a weight of another kind. NotImplementedError: hooks, another forward.
        ValueError: a weight of other heads than the query.
    """
    layer = attention.kv_b_proj
    where = f"kv_b_proj of layer {attention.layer_idx}"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or layer.bias is not None:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        with_bias = " with a bias" if isinstance(layer, nn.Linear) and layer.bias is not None else ""
        raise TypeError(
            f"{where}: got {kind}{with_bias}, torch.nn.Linear without bias is accepted (merge adapters and dequantise "
            "first: decoding absorbs its weight into the query)"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise NotImplementedError(f"{where}: got forward hooks, {_NOT_CALLED}")
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        raise NotImplementedError(f"{where}: got forward hooks of all modules, {_NOT_CALLED}")
    if "forward" in vars(layer) and not is_parallel(layer) and not _only_moves_inputs(layer):
        raise NotImplementedError(f"{where}: its forward was replaced by other code, {_NOT_CALLED}")
    weight = layer.weight
    if hasattr(weight, "to_local"):  # a DTensor
        weight = weight.to_local()
    if hasattr(weight, "__tensor_flatten__") or weight.dtype not in FLOATS:  # a tensor that wraps others: quantised
        raise TypeError(
            f"{where}: got a weight of {type(weight).__name__} in {weight.dtype}, a tensor of bfloat16, float16 or "
            "float32 is accepted (dequantise first: decoding absorbs it into the query)"
        )
    if heads is not None:
        rows = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        if weight.shape != (rows, attention.kv_lora_rank):
            raise ValueError(
                f"{where}: got a weight of {tuple(weight.shape)} for {heads} heads of the query, "
                f"{(rows, attention.kv_lora_rank)} is accepted (tensor parallelism must shard both by heads)"
            )
    return weight


_NOT_CALLED = (
    "none is accepted: decoding absorbs its weight into the query and does not call it; remove them, merge what they "
    "add into the weight, or call mla_kernels.compat.transformers.disable(model)"
)


def class_of(module: nn.Module, name: str | None) -> type | None:
    """transformers' class of this name, if the module is of it or of one derived from it."""
    for cls in type(module).__mro__:
        if cls.__name__ == name and cls.__module__.startswith("transformers."):
            return cls
    return None


def is_called_plainly(module: nn.Module, forward) -> bool:
    """Whether calling the module is nothing but this forward of its class, so that its weights say all."""
    if getattr(type(module), "forward", None) is not forward:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return False
    return "forward" not in vars(module) or _only_moves_inputs(module)


def is_parallel(module: nn.Module) -> bool:
    """Whether the module's forward is the one that transformers' tensor or expert parallelism put around its own."""
    forward = vars(module).get("forward")
    return (getattr(forward, "__module__", None) or "").startswith("transformers.distributed.")


def _only_moves_inputs(module: nn.Module) -> bool:
    """Whether the module's forward is the one that accelerate put there to bring inputs to the weight's device."""
    hook = getattr(module, "_hf_hook", None)
    return type(hook).__module__.startswith("accelerate.") and getattr(hook, "offload", True) is False


_INNER = "_old_forward"  # where accelerate keeps the forward that its own calls


def forward_name(module: nn.Module) -> str:
    """Under which name :func:`shadow` is to replace this module's forward."""
    return _INNER if _only_moves_inputs(module) else "forward"


def can_shadow(module: nn.Module, name: str) -> bool:
    """Whether :func:`shadow` leaves nothing out: the module has no such method of its own, tensor parallelism's, or
    inside accelerate's that of its class."""
    if name == _INNER:
        return getattr(vars(module)[_INNER], "__func__", None) is type(module).forward
    return name not in vars(module) or (name == "forward" and bool(_around(module)))


def shadow(module: nn.Module, name: str, function) -> None:
    """Give the module a method of its own; a forward goes inside what tensor parallelism put around the former one."""
    around = _around(module) if name == "forward" else None
    setattr(module, name, function)
    if around:
        style, mesh = around
        style.install_forward(module, mesh)


def _around(module: nn.Module) -> tuple | None:
    """The style of tensor parallelism and the mesh of ranks that the module's forward was given, if it was."""
    held = inspect.getclosurevars(vars(module)["forward"]).nonlocals if is_parallel(module) else {}
    return (held["self"], held["mesh"]) if held.keys() >= {"self", "mesh"} else None
