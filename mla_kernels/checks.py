"""Argument checks of public functions and commands: an error names the argument, what came, and what is accepted."""

import argparse
from pathlib import Path

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)
_FEW = 32  # values that Python compares in less time than torch's operators take to be called


def check_tensor(
    name: str,
    value,
    *,
    rank: int | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
    like: torch.Tensor | None = None,
    dense: bool = True,
) -> None:
    """Refuse ``value`` unless it is a tensor of this rank, shape (None = any), dtype and device, its last axis dense.

    ``like`` stands for "same dtype and device as that tensor"; ``dense=False`` takes any strides.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, a torch.Tensor is accepted")
    got = value.shape
    if rank is not None and len(got) != rank:
        raise ValueError(f"{name}: got {len(got)} dimensions {tuple(got)}, {rank} are accepted")
    if shape is not None and got != shape and not _fits(got, shape):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: got shape {tuple(got)}, ({wanted}) is accepted")
    if like is not None:
        dtypes, device = (like.dtype,), like.device
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, accepted: {names}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, all arguments must be on {device}")
    if dense and got and got[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: got stride {value.stride(-1)} in the last dimension, 1 is accepted (contiguous rows)"
        )


def _fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    for want, got in zip(wanted, shape):  # noqa: SIM110 - any() takes twice as long
        if want is not None and want != got:
            return False
    return True


def any_requires_grad(tensors: tuple) -> bool:
    """Whether one of the tensors, which may be None, requires grad."""
    for tensor in tensors:  # noqa: SIM110 - any() takes twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def check_no_grad(op: str, **tensors: torch.Tensor) -> None:
    """Refuse to lose a gradient silently: ``op`` has no backward."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise NotImplementedError(
                    f"{op} has no backward and {name} requires grad; call it under torch.no_grad() or detach {name}"
                )


def check_choice(name: str, value, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted: {', '.join(map(repr, accepted))}")


def check_int(name: str, value, low: int, high: int | None = None) -> None:
    bounds = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):  # a traced size is a SymInt
        raise TypeError(f"{name}: got {type(value).__name__}, {bounds} is accepted")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value}, {bounds} is accepted")


def check_range(name: str, value: torch.Tensor, low: int, high: int, meaning: str) -> None:
    """Refuse an index tensor with a value outside [low, high)."""
    count = value.numel()
    if count:
        if count <= _FEW:
            values = value.flatten().tolist()
            least, most = min(values), max(values)
        else:
            least, most = int(value.min()), int(value.max())
        if least < low or most >= high:
            raise ValueError(f"{name}: got values from {least} to {most}, accepted: {low} to {high - 1} ({meaning})")


def readable(values: torch.Tensor) -> bool:
    """Whether to look at what a tensor holds: on a CPU, where nothing waits for it, and not while tracing."""
    return values.device.type == "cpu" and type(values) is torch.Tensor and not torch.compiler.is_compiling()


def output_file(text: str) -> Path:
    """A file that a command writes when it is done, for argparse: refused before it begins where that cannot be."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, a file is accepted")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path
