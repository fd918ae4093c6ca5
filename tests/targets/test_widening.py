"""Kernels load and store 16-bit numbers and compute in float32: nothing else is done to bfloat16 and float16.

Triton's interpreter has no arithmetic on bfloat16, and float16 overflows where a sum or a product does not. So the TTIR
of every declared case is read, as Triton makes it from the source, for arithmetic on either type.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mla_kernels import check
from mla_kernels.language import tl, triton
from mla_kernels.launch import KERNELS, Case, Cost, Kernel, Work
from mla_kernels.targets import compile as compile_module
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request
from tests.children import child_environment

EXACT = ("decode_e4m3", "scaled_halves", "int8_pairs", "int4_pairs", "e2m1_pairs", "scaled_pairs")
"""The functions that compute in 16 bits: decoding by powers of two, which is exact, and codes times a scale, which one
rounding brings to the bits that float32 would (``test_pairs.py`` and ``test_e4m3.py`` of ``tests/quant``)."""

MOVES = ("bitcast", "constant", "extf", "fptosi", "fptoui", "select", "sitofp", "truncf", "uitofp")
OPERATION = re.compile(r"((?:arith|math)\.\w+|tt\.(?:atomic_rmw|clampf|extern_elementwise|precise_\w+))\b")


def narrow(ttir: str) -> set[str]:
    """Operations that compute on bf16 or fp16, each with the function that it stands in."""
    found, function = set(), ""
    for line in ttir.splitlines():
        if started := re.search(r"tt\.func.* @\"?([\w.]+)", line):
            function = started.group(1)
        operation = OPERATION.search(line)
        types = line.rpartition(" : ")[2]
        if operation and re.search(r"b?f16\b", types) and operation.group(1).partition(".")[2] not in MOVES:
            found.add(f"{operation.group(1)} in {function}")
    return found


def ttir(requests) -> list[str]:
    """By a process of its own: here Triton interprets."""
    script = Path(__file__).with_name("ttir.py")
    jobs = [compile_module._job(request)[1] for request in requests]
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(jobs), capture_output=True, text=True, env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compute_in_float32():
    requests = check.requests(["sm_90"], dtypes=["bf16"])
    computing = {}
    for request, text in zip(requests, ttir(requests), strict=True):
        for operation in narrow(text):
            if not any(f".{name}__" in operation for name in EXACT):
                computing.setdefault(request.kernel.name, set()).add(f"{request.case}: {operation}")
    assert computing == {}
    assert {request.kernel.name for request in requests} >= {"mla_decode_kernel", "moe_gate_up_kernel"}


@triton.jit
def square(x):
    return x * x


@triton.jit
def narrow_for_test_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n)
    y = tl.where(square(x) < x, x, 0.0)
    tl.store(y_ptr + n, y.to(tl.float32) + 1.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_arithmetic_on_16_bits_is_found(dtype, monkeypatch):
    kernel = Kernel(
        narrow_for_test_kernel,
        arguments={"x_ptr": "*T", "y_ptr": "*fp32"},
        statics=(),
        tiles={"BLOCK": (64,)},
        rule=lambda chip, dtype, statics, sizes: {"BLOCK": 64},
        memory=lambda chip, dtype, statics, tile: {},
        cost=lambda dtype, statics, sizes: Cost(1.0, 1.0),
        work=lambda dtype, statics, sizes, tile: Work(1, 1.0, 1.0),
        cases=(Case("only", {}, {}),),
        uses_dot=False,
    )
    del KERNELS[kernel.name]
    (text,) = ttir([Request(kernel, CHIPS["sm_90"], dtype, {}, {"BLOCK": 64})])
    operations = {found.partition(" in ")[0] for found in narrow(text)}
    assert operations == (set() if dtype == "fp32" else {"arith.mulf", "arith.cmpf"})
