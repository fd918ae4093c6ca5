"""What the tests of Hopper variants share."""

import re
from collections.abc import Callable

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


def needless(source: str, ordering: tuple[str, ...], goes_wrong: Callable[[str], bool], besides=()) -> list[str]:
    """Statements of a kernel that order something and whose absence ``goes_wrong`` of the changed source does not find.

    A line counts that has a name of ``ordering`` in it; it is left out, or, where it assigns what a wait returns, waits
    for less. Lines that begin with one of ``besides``, definitions and imports are left as they are.
    """
    lines, found = source.splitlines(), []
    for number, line in enumerate(lines):
        statement = line.strip()
        if not any(name in line for name in ordering) or statement.startswith(("def ", "from ", *besides)):
            continue
        indent = line[: len(line) - len(line.lstrip())]
        without = f"{indent}pass" if statement.startswith(ordering) else re.sub(r"_wait\(\d", "_wait(9", line)
        assert without != line, f"left as it is: {statement}"
        if not goes_wrong("\n".join([*lines[:number], without, *lines[number + 1 :]])):
            found.append(statement)
    return sorted(found)
