"""What the compilers make of the Hopper kernels of mla_prefill's gradients: registers, spills, products."""

from dataclasses import replace

import pytest

from mla_kernels.hopper.prefill_gradients import (
    HOPPER_MLA_PREFILL_KEY_GRADIENT,
    HOPPER_MLA_PREFILL_QUERY_GRADIENT,
    HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT,
    HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT,
    ROWS,
)
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

SM_90 = CHIPS["sm_90"]
WIDE_KEYS, WIDE_QUERIES = HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT, HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT
KERNELS = HOPPER_MLA_PREFILL_KEY_GRADIENT, HOPPER_MLA_PREFILL_QUERY_GRADIENT, WIDE_KEYS, WIDE_QUERIES


def products(kernel, statics) -> tuple[dict[str, int], int]:
    """wgmma instructions of the first group's loop by their shapes; of all loops, which mask or do not, and groups."""
    key, rope, value = (statics[name] for name in ("KEY", "ROPE", "VALUE"))
    columns, sums, loops = key + rope + value, [key, rope], 4  # scores and dP
    if kernel is HOPPER_MLA_PREFILL_KEY_GRADIENT:
        sums, loops = [key, rope, value], 2
    elif kernel is WIDE_KEYS:  # a group makes scores and dV, the other dP and dK
        columns, sums, loops = key + rope, [value], 1
    elif kernel is WIDE_QUERIES:
        sums = [key + rope]
    shapes = {f"HGMMA.64x{ROWS}x16": columns // 16}
    for width in sums:
        shape = f"HGMMA.64x{width}x16"
        shapes[shape] = shapes.get(shape, 0) + ROWS // 16
    other = (value + ROWS) // 16 if kernel is WIDE_KEYS else 0
    return shapes, loops * sum(shapes.values()) + other


def check(cases_of):
    """By wgmma, each product once, none that waits for another that it does not read, nothing spilled."""
    found = [
        Request(kernel, SM_90, dtype, case.statics, kernel.rule(SM_90, dtype, case.statics, {}), case.name)
        for kernel in KERNELS
        for case in cases_of(kernel)
        for dtype in case.dtypes
    ]
    for request, report in zip(found, compile_many(found)):
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.spills == 0 and report.detail["serialised"] == [], report.label
        assert report.detail["tma"] and report.detail["warps"] == 4 + request.kernel.worker_warps
        assert 32 * report.detail["warps"] * report.registers <= 65536  # of a multiprocessor
        shapes, number = products(request.kernel, request.statics)
        assert report.detail["loop_tensor_shapes"] == shapes and report.tensor_instructions == number
        memory = request.kernel.memory(SM_90, request.dtype, request.statics, request.tile)["shared"]
        assert report.memory["shared"] <= memory <= SM_90.memory["shared"]


def test_the_first_case_compiles_without_spills_and_multiplies_once():
    check(lambda kernel: [replace(kernel.cases[0], dtypes=("bf16",))])


@pytest.mark.slow
def test_every_case_compiles_without_spills_and_multiplies_once():
    check(lambda kernel: kernel.cases)


@pytest.mark.parametrize("kernel", KERNELS, ids=["keys", "queries", "wide keys", "wide queries"])
def test_the_declaration_names_the_parameters_in_order(kernel):
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}
