"""The child that measures, in a process of its own: what it says of cases that break it."""

import json
import subprocess
import sys

from tests.children import child_environment

PROGRAM = """
import sys
import torch
from mla_kernels.device import child
from mla_kernels.device.case import Case, Place, Problem
from mla_kernels.device.peers import Peers


class Clock:
    broken = False

    def synchronise(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def raises(copy):
    raise RuntimeError("a refusal")


def faults(copy):
    clock.broken = True
    raise RuntimeError("CUDA error")


def case(name, build):
    return Case(name, "decode", "decode, bf16", 0, build)


def unbuildable(place, peers):
    raise torch.OutOfMemoryError("too large")


def broken_tensors(place, peers):
    faults(0)


clock = Clock()
known = [
    case("raises", lambda place, peers: Problem(raises, lambda: torch.ones(1))),
    case("faults", lambda place, peers: Problem(faults, lambda: torch.ones(1))),
    case("unbuildable", unbuildable),
    case("broken tensors", broken_tensors),
]
sys.exit(child.serve(known, Place("cpu"), Peers(), clock, False, child.speaker()))
"""
FAULT = {"fault": "RuntimeError: CUDA error: an illegal memory access was encountered"}
TENSORS = {"begin": "", "kind": ""}


def said(*names):
    """(exit status, lines) of a child that is asked for these cases."""
    asked = "".join(json.dumps({"case": name, "skip": []}) + "\n" for name in names)
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=asked, env=child_environment(), capture_output=True, text=True
    )
    return child.returncode, [json.loads(line) for line in child.stdout.splitlines()][1:]


def test_what_raises_is_told_and_a_broken_context_ends_it():
    def contestant(problem):
        return {"contestant": {"name": "mla_kernels", "kind": "ours", "problem": problem}}

    status, lines = said("raises", "unbuildable", "faults", "raises")
    begun = [TENSORS, {"bytes": 0.0, "flops": 0.0}, {"begin": "mla_kernels", "kind": "ours"}]
    assert status == 3
    assert lines == [
        *begun, contestant("RuntimeError: a refusal"), {"end": True, "problem": ""},
        TENSORS, {"end": True, "problem": "OutOfMemoryError: too large"},
        *begun, contestant("RuntimeError: CUDA error"), FAULT,
    ]  # fmt: skip


def test_tensors_that_break_the_context_end_it():
    assert said("broken tensors", "raises") == (3, [TENSORS, FAULT])
