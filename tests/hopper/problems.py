"""What the tests of Hopper variants share."""

import pytest
import torch

from tests.support import not_on


def _other_device(backend) -> bool:
    return backend == "npu" or (backend == "cuda" and torch.cuda.get_device_capability() != (9, 0))


ON_HOPPER = [
    pytest.mark.hopper,
    not_on("the variants are for Hopper", "cpu", "interpret", "npu-emulated"),
    pytest.mark.leave_out("the variants are for Hopper", when=_other_device),
]
"""Marks of a parity test of variants."""


def unwritten_is_nan(monkeypatch) -> None:
    """What an op allocates in float32 is NaN until it is written."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.dtype == torch.float32 else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
