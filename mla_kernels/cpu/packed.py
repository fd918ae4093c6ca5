"""prepack: a second copy of weights, in the layout that oneDNN multiplies fastest, for CPU tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Copy:
    state: tuple[int, int]  # of the weight when it was copied
    experts: list[torch.Tensor]


_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepack(**weights: torch.Tensor) -> int:
    """Copy weights into oneDNN's layout; CPU ops and :mod:`mla_kernels.nn` use the copies from then on.

    ``prepack(gate_up=gate_up, down=down)`` serves `fused_moe` and `expert_ffn`, which need both;
    :meth:`mla_kernels.nn.LatentAttention.prepack` its projections. The copies belong to the tensors passed: they are
    found by those very tensors, freed with them, and no longer used once a tensor is changed in place (pack again
    then). They take as much memory as the weights, which are kept.

    Args:
        weights: [out, in] or [E, out, in], bfloat16 or float32 on the CPU; the names stand in error messages only.

    Returns:
        Bytes that the copies take.

    Raises:
        TypeError: another dtype or no tensor. ValueError: another rank or device, or tensors made under
        torch.inference_mode, in which torch does not count changes. NotImplementedError: torch without oneDNN's linear.
    """
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or weight.dtype not in _DTYPES:
            got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"{name}: got {got}, a tensor of bfloat16 or float32 is accepted")
        if weight.dim() not in (2, 3) or weight.device.type != "cpu":
            raise ValueError(
                f"{name}: got {tuple(weight.shape)} on {weight.device}, [out, in] or [E, out, in] on cpu is accepted"
            )
        if weight.is_inference():
            raise ValueError(f"{name}: got an inference tensor, accepted are those made outside torch.inference_mode")
    total = 0
    with torch.no_grad():
        for weight in weights.values():
            _copies[weight] = _Copy(_state(weight), reorder(weight))
            total += weight.nbytes
    return total


def reorder(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight [out, in] or [E, out, in] as one oneDNN weight an expert; ``to_dense()`` gives the same bits back."""
    plain = weight.detach().contiguous()
    return [_reorder()(matrix, None) for matrix in plain.view(-1, *plain.shape[-2:])]


def packed(weight: torch.Tensor) -> list[torch.Tensor] | None:
    """One oneDNN weight an expert (one for [out, in]), if `prepack` made them and ``weight`` has not changed since."""
    copy = _copies.get(weight)
    if copy is None:
        return None
    if copy.state != _state(weight):
        del _copies[weight]
        return None
    return copy.experts


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] times a packed weight [out, in] transposed."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def _state(weight: torch.Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def check_available() -> None:
    """Raise NotImplementedError where torch has no oneDNN."""
    _reorder()


def _reorder() -> Callable:
    try:
        return torch.ops.mkldnn._reorder_linear_weight.default
    except AttributeError as error:
        raise NotImplementedError("prepack: this build of torch has no oneDNN linear") from error
