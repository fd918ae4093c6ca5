"""Modules whose tensors stay in float32 when a model around them is cast to 16 bits."""

import torch
import torch.nn.functional as F
from torch import nn


class KeepsFloat32(nn.Module):
    """Its own floating-point tensors are float32 at least, its integers stay integers.

    ``to(torch.bfloat16)``, ``half()`` and the like, of it or of a module around it, leave them in float32; devices and
    wider dtypes (``double()``) are followed. So do state dicts: narrower tensors are widened, with ``assign=True`` too.
    Subclasses make them in float32, whatever the default dtype.
    """

    def _apply(self, fn, recurse=True):
        def kept(tensor):
            result = fn(tensor)
            if result.dtype != tensor.dtype and not tensor.is_floating_point():
                return tensor.to(result.device)
            return tensor.to(result.device, torch.float32) if _is_narrow(result) else result

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(kept, recurse=False)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        for name in (*self._parameters, *self._buffers):
            value = state_dict.get(prefix + name)
            if isinstance(value, torch.Tensor) and _is_narrow(value):
                state_dict[prefix + name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Float32Linear(KeepsFloat32, nn.Linear):
    """A projection without bias that multiplies in float32 and returns it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class Float32LayerNorm(KeepsFloat32, nn.LayerNorm):
    """A layer norm in float32 that returns ``x``'s dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)


class Float32RMSNorm(KeepsFloat32):
    """``weight * x / sqrt(mean(x^2) + eps)`` in float32, rounded once, to ``x``'s dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
