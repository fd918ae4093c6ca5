"""batch_invariant: whether a row's bits may depend on what is computed beside it.

A public op asks :func:`wanted` when it is called; the answer is an argument of its torch op, so it is fixed in compiled
and exported graphs, in captured CUDA graphs and in backward passes, which run in threads of their own.
"""

import threading
from contextvars import ContextVar

import torch

FIXED_TOKENS = 64
"""Tokens for which a tile is looked up that must not depend on how many there are."""

_inside: ContextVar[bool] = ContextVar("batch_invariant", default=False)
_lock = threading.Lock()


class _Traced:
    """What a trace sees. torch.compile follows no context variable (torch 2.13) and guards no thread's own state, but
    it guards this: ``on`` while any thread is in a block. So a compiled call is invariant wherever it has to be, and
    may be so, too, while another thread is in a block."""

    on = False
    blocks = 0


_traced = _Traced()


class batch_invariant:
    """Context manager: within the block, ops of this library compute each row as if it were alone.

    ``with mla_kernels.batch_invariant():`` holds for the calls of this thread (or asyncio task);
    ``batch_invariant(False)`` inside ends it for a while. The argument ``batch_invariant`` of an op outranks it. Code
    compiled with torch.compile is compiled anew for the other mode.

    Args:
        enabled: whether ops are batch-invariant within the block.

    Raises:
        TypeError: ``enabled`` is no bool.
    """

    def __init__(self, enabled: bool = True):
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled: got {type(enabled).__name__}, a bool is accepted")
        self._enabled = enabled
        self._before: list = []  # a block may be entered again inside itself

    def __enter__(self) -> "batch_invariant":
        if torch.compiler.is_compiling():
            self._before.append(_traced.on)
            _traced.on = self._enabled
            return self
        added = self._enabled - _inside.get()
        self._before.append((_inside.set(self._enabled), added))
        _count(added)
        return self

    def __exit__(self, *error) -> None:
        before = self._before.pop()
        if torch.compiler.is_compiling():
            _traced.on = before
            return
        token, added = before
        _inside.reset(token)
        _count(-added)


def _count(added: int) -> None:
    with _lock:
        _traced.blocks += added
        _traced.on = _traced.blocks > 0


def wanted(batch_invariant: bool | None) -> bool:
    """Whether an op called with this argument is to be batch-invariant: what it says, else what the block says.

    Raises:
        TypeError: the argument is neither None nor a bool.
    """
    if batch_invariant is None:
        if not _traced.on:  # in no thread: a single look for most calls
            return False
        return True if torch.compiler.is_compiling() else _inside.get()
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: got {type(batch_invariant).__name__}, None or a bool is accepted")
    return batch_invariant


def canonical(rows: torch.Tensor) -> torch.Tensor:
    """``rows``, or a copy whose rows lie densely from a multiple of 16 bytes on. How a row lies decides how a kernel
    loads it, over which threads its values spread, and so the order in which they are added."""
    stride, dense = 1, rows.data_ptr() % 16 == 0
    for size, own in zip(reversed(rows.shape), reversed(rows.stride())):
        dense = dense and own == stride  # a dimension of one row may have any stride, which a launch looks at, too
        stride *= size
    return rows if dense else rows.new_empty(rows.shape).copy_(rows)
