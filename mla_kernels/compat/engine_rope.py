"""Rotary tables of vLLM and SGLang, which hold cosines beside sines in one tensor, as this library's ops take them."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT = WeakTensorKeyDictionary()  # an engine's tensor -> its two tables


def rope_tables(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``both`` [positions, 2 * angles] as two float32 tables [positions, angles], made once, of a tensor that stays as
    it is."""
    if both not in _KEPT:
        _KEPT[both] = tuple(part.float().contiguous() for part in both.chunk(2, dim=1))
    return _KEPT[both]
