"""What the compilers make of the Hopper kernels: registers, spills, products in flight, shared memory."""

import pytest

from mla_kernels.hopper.decode import (
    HOPPER_MLA_DECODE,
    HOPPER_MLA_DECODE_CODES,
    HOPPER_MLA_DECODE_FEW_ROWS,
    HOPPER_MLA_DECODE_FEW_ROWS_CODES,
)
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

CODES = (HOPPER_MLA_DECODE_CODES, HOPPER_MLA_DECODE_FEW_ROWS_CODES)
KERNELS = (HOPPER_MLA_DECODE, HOPPER_MLA_DECODE_FEW_ROWS, *CODES)
SM_90 = CHIPS["sm_90"]
BLOCK, DEPTH = 64, 16  # keys of a block; of a wgmma, what it sums over


OFTEN = {KERNELS[0]: "window_and_sink", KERNELS[1]: "window_and_sink", CODES[0]: "narrow", CODES[1]: "narrow"}
"""What compiles in the default run beside each kernel's first case, which tests/targets/test_matrix.py shares."""


def requests(kernel, names=None):
    cases = [case for case in kernel.cases if names is None or case.name in names]
    tiles = {case.name: kernel.rule(SM_90, "bf16", case.statics, case.sizes) for case in cases}
    return [
        Request(kernel, SM_90, dtype, case.statics, tiles[case.name], case.name)
        for case in cases
        for dtype in case.dtypes
    ]


def asked(statics, rows: int) -> int:
    """Multiply-adds of a block of 64 keys that the op asks for, padding of the rotated part included."""
    rope = 64 if statics["ROPE"] else 0
    return rows * 64 * (2 * statics["LATENT"] + rope)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_case_compiles_without_spills_and_multiplies_once(kernel):
    check(requests(kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_cases_compile_without_spills_and_multiply_once(kernel):
    check(requests(kernel, {OFTEN[kernel]}) + requests(kernel)[:1])


def check(found):
    """By wgmma, each score and each output once, and no product waits for another that it does not read."""
    for request, report in zip(found, compile_many(found)):
        kernel = request.kernel
        rows = request.statics.get("ROWS", 64)
        blocks = 2 if kernel is HOPPER_MLA_DECODE else 1  # that the code of all partitions works on
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.loop_spills == 0 and report.detail["serialised"] == []
        assert report.spills == 0 or rows == 32, report.label  # a few, before and behind the loop
        assert report.detail["tma"]
        if kernel in CODES:
            assert report.spills == 0 and report.detail["warps"] == 12
            assert report.registers == request.tile["REGISTERS"]
        done = report.tensor_instructions * multiply_adds(report)
        if kernel is HOPPER_MLA_DECODE_CODES:  # the loop looked at is the left group's; the right one has its own
            right = BLOCK // DEPTH
            done = (report.tensor_instructions - right) * multiply_adds(report)
            done += right * rows * request.statics["LATENT"] // 2 * DEPTH
        assert done == blocks * asked(request.statics, rows)
        assert report.memory["shared"] <= kernel.memory(SM_90, request.dtype, request.statics, request.tile)["shared"]
        if kernel is HOPPER_MLA_DECODE:
            assert report.detail["warps"] == 8 and report.registers == 248


def multiply_adds(report) -> float:
    """Of a wgmma of this report, on average: 64 x N x 16, with N as written in the instruction."""
    shapes = report.detail["loop_tensor_shapes"]
    assert shapes and all(shape.startswith("HGMMA.") for shape in shapes)
    total = sum(count * 64 * int(shape.split("x")[1]) * DEPTH for shape, count in shapes.items())
    return total / sum(shapes.values())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_declarations_name_the_parameters_in_order(kernel):
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_other_targets_have_no_such_kernel(kernel):
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}
    assert all(reason.startswith("unsupported because ") for reason in kernel.unsupported.values())


SERIALISES = {
    HOPPER_MLA_DECODE: (
        "acc = warpgroup_mma_wait(0, [acc])\n        odd_row",
        "acc = warpgroup_mma_wait(1, [acc])\n        odd_row",
    ),
    HOPPER_MLA_DECODE_FEW_ROWS: (
        "acc = warpgroup_mma_wait(0, [acc])  # [LATENT, ROWS]",
        "acc = warpgroup_mma_wait(1, [acc])",
    ),
}


@pytest.mark.parametrize(
    "kernel",
    [HOPPER_MLA_DECODE, pytest.param(HOPPER_MLA_DECODE_FEW_ROWS, marks=pytest.mark.slow)],
    ids=lambda kernel: kernel.name,
)
def test_products_in_flight_across_iterations_are_told(kernel, monkeypatch):
    """ptxas then serialises all of them (C7514) or inserts a wait (C7517), and says so where nobody looks."""
    before, after = SERIALISES[kernel]
    assert kernel.source.count(before) == 1
    monkeypatch.setitem(kernel.__dict__, "source", kernel.source.replace(before, after))
    (report,) = compile_many(requests(kernel)[:1])
    assert not report.ok and report.problem.startswith("products one at a time") and "(C75" in report.problem
