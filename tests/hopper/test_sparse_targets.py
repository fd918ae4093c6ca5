"""What the compilers make of the Hopper kernels of sparse attention: registers, spills, products, shared memory."""

import pytest

from mla_kernels.hopper.sparse import HOPPER_SPARSE_MLA, HOPPER_SPARSE_MLA_FEW_ROWS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

KERNELS = pytest.mark.parametrize(
    "kernel", [HOPPER_SPARSE_MLA, HOPPER_SPARSE_MLA_FEW_ROWS], ids=lambda kernel: kernel.name
)
SM_90 = CHIPS["sm_90"]
OFTEN = {"v32", "v32_fp8", "v32_tp8", "v32_tp8_fp8"}


def check(kernel, names=None, every_dtype=True):
    """By wgmma, each score and each output once, and no product waits for another that it does not read."""
    tile = kernel.rule(SM_90, "bf16", {}, {})
    cases = [case for case in kernel.cases if names is None or case.name in names]
    found = [
        Request(kernel, SM_90, dtype, case.statics, tile, case.name)
        for case in cases
        for dtype in (case.dtypes if every_dtype else case.dtypes[:1])
    ]
    for request, report in zip(found, compile_many(found)):
        latent, rows = request.statics["LATENT"], request.statics.get("ROWS", 64)
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.spills == 0 and report.detail["serialised"] == [], report.label
        assert report.detail["tma"] and report.detail["async_copy"]
        assert report.detail["warps"] == 4 + kernel.worker_warps and report.registers == tile["REGISTERS"]
        assert 32 * report.detail["warps"] * report.registers <= 65536  # of a multiprocessor
        shapes = report.detail["loop_tensor_shapes"]
        assert shapes and all(shape.startswith("HGMMA.") for shape in shapes)
        average = sum(count * 64 * int(shape.split("x")[1]) * 16 for shape, count in shapes.items())
        average /= sum(shapes.values())
        blocks = 2 if rows == 64 else 1  # that the code of all partitions works on
        asked = rows * 64 * (2 * latent + (64 if request.statics["ROPE"] else 0))
        assert report.tensor_instructions * average == blocks * asked
        assert report.memory["shared"] <= kernel.memory(SM_90, request.dtype, request.statics, tile)["shared"]


@KERNELS
def test_cases_compile_without_spills_and_multiply_once(kernel):
    check(kernel, OFTEN, every_dtype=False)


@pytest.mark.slow
@KERNELS
def test_every_case_compiles_without_spills_and_multiplies_once(kernel):
    check(kernel)


@KERNELS
def test_declarations_name_the_parameters_in_order(kernel):
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}


@KERNELS
def test_other_targets_have_no_such_kernel(kernel):
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}
