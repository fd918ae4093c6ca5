"""What torch_npu's functions have in common here: refusals, and tensors that lie side by side."""

from collections.abc import Sequence

import torch

from mla_kernels.checks import check_tensor


def kind(value) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (torch.Tensor, list, tuple)) else repr(value)


def refuse(reason: str, **given) -> None:
    """Refuse what is not None."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name}: got {kind(value)}, None is accepted ({reason})")


def check_only(name: str, value, accepted: Sequence, reason: str) -> None:
    """Refuse an option that torch_npu has and nothing here computes."""
    if not any(value == one and type(value) is type(one) for one in accepted):
        raise NotImplementedError(f"{name}: got {value!r}, accepted: {', '.join(map(repr, accepted))} ({reason})")


def check_flag(**flags) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, a bool is accepted")


def one_key_head(name: str, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """``tensor`` without its axis of key heads, of which there is one."""
    if tensor.shape[axis] != 1:
        raise NotImplementedError(
            f"{name}: got {tensor.shape[axis]} key heads, 1 is accepted (all query heads share the latent)"
        )
    return tensor.select(axis, 0)


def pages_of(name: str, tensor: torch.Tensor, width: int | None = None, like: torch.Tensor | None = None):
    """[blocks, block_size, width] of a cache [blocks, block_size, 1, width], a view."""
    check_tensor(name, tensor, shape=(None, None, None, width), **({} if like is None else {"like": like}))
    return one_key_head(name, tensor, 2)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both name the same values in memory."""
    if first is second:
        return True
    if torch.compiler.is_compiling() or type(first) is not torch.Tensor or type(second) is not torch.Tensor:
        return False
    return (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
        and first.data_ptr() == second.data_ptr()
    )


def side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """The tensor that has first's last axis and then second's, where both are parts of one; else None.

    While tracing, where addresses cannot be compared, None; and where one of them wants a gradient, which would not
    find its way back to second.
    """
    if torch.compiler.is_compiling() or type(first) is not torch.Tensor or type(second) is not torch.Tensor:
        return None
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        return None
    width = first.shape[-1]
    if (
        first.shape[:-1] != second.shape[:-1]
        or first.stride() != second.stride()
        or first.stride(-1) != 1
        or first.dtype != second.dtype
        or first.device != second.device
        or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        or second.storage_offset() != first.storage_offset() + width
    ):
        return None
    return first.as_strided((*first.shape[:-1], width + second.shape[-1]), first.stride(), first.storage_offset())


def joined(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """first and second side by side: as they lie where they do, else copied."""
    if second is None:
        return first
    both = side_by_side(first, second)
    return torch.cat((first, second), -1) if both is None else both
