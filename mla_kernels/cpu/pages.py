"""empty: memory in huge pages, which is faster to fill and to read than memory in pages of 4 KB."""

import ctypes

import torch

_HUGE_PAGES = 14  # MADV_HUGEPAGE
_HUGE_BYTES = 64 << 20
_PAGE = 4096


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An empty tensor; if large, in huge pages where the system has them: page by page, its first use costs as much
    as filling it with a product."""
    tensor = like.new_empty(shape)
    if type(tensor) is torch.Tensor and tensor.nbytes >= _HUGE_BYTES:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // _PAGE * _PAGE
        advise = _madvise()
        if advise is not None:
            advise(start, size, _HUGE_PAGES)  # a hint: systems without huge pages refuse it
    return tensor


def _madvise():
    """Linux's madvise, or None."""
    try:
        advise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
