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
