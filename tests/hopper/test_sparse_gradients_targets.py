"""What the compilers make of the Hopper kernels of sparse_mla_prefill's gradients: registers, spills, products."""

from dataclasses import replace

import pytest

from mla_kernels.hopper.sparse_gradients import (
    HOPPER_SPARSE_MLA_PICK_GRADIENT,
    HOPPER_SPARSE_MLA_QUERY_GRADIENT,
    HOPPER_SPARSE_MLA_WEIGHTS,
    KERNELS,
)
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

SM_90 = CHIPS["sm_90"]


def products(kernel, statics) -> tuple[dict[str, int], int]:
    """(products of the main loop by shape, how often it stands in the code with what follows it, in products)."""
    latent, rope = statics["LATENT"], statics["ROPE"]
    pieces = latent // 64 + (rope > 0)
    if kernel is HOPPER_SPARSE_MLA_WEIGHTS:  # 64 heads and 128 picks: q k over all columns, dO v over the latent ones
        return {"HGMMA.64x128x16": 4 * (pieces + latent // 64)}, 0
    if kernel is HOPPER_SPARSE_MLA_QUERY_GRADIENT:
        return {"HGMMA.64x128x16": 4, "HGMMA.64x64x16": 4}, 0
    return {f"HGMMA.64x{min(256, latent)}x16": 4}, 4 if rope else 0


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
        assert report.detail["tma"]
        assert report.detail["async_copy"] or request.kernel is HOPPER_SPARSE_MLA_PICK_GRADIENT
        assert report.detail["warps"] == 4 + request.kernel.worker_warps and report.registers == 168
        assert 32 * report.detail["warps"] * report.registers <= 65536  # of a multiprocessor
        shapes, after = products(request.kernel, request.statics)
        assert report.detail["loop_tensor_shapes"] == shapes, report.label
        assert report.tensor_instructions == 2 * (sum(shapes.values()) + after), report.label
        memory = request.kernel.memory(SM_90, request.dtype, request.statics, request.tile)["shared"]
        assert report.memory["shared"] <= memory <= SM_90.memory["shared"]


def test_the_first_case_compiles_without_spills_and_multiplies_once():
    check(lambda kernel: [replace(kernel.cases[0], dtypes=("bf16",))])


@pytest.mark.slow
def test_every_case_compiles_without_spills_and_multiplies_once():
    check(lambda kernel: kernel.cases)


def clocks_of_products(kernel, heads: int, top_k: int) -> float:
    """Of the tensor cores of one multiprocessor, for a token: 2,048 multiplications of 16 bits a clock."""
    case = kernel.cases[0]
    latent, width = case.statics["LATENT"], case.statics["LATENT"] + case.statics["ROPE"]
    columns = {
        HOPPER_SPARSE_MLA_WEIGHTS: width + latent,
        HOPPER_SPARSE_MLA_QUERY_GRADIENT: width,
        HOPPER_SPARSE_MLA_PICK_GRADIENT: width + latent,
    }[kernel]
    return heads * top_k * columns / 2048


def test_products_are_at_most_three_times_those_of_the_forward():
    """Asked for, and issued: the shapes above times their turns leave nothing over at 512 + 64."""
    asked = sum(clocks_of_products(kernel, 128, 2048) for kernel in KERNELS)
    forward = 128 * 2048 * (576 + 512) / 2048
    assert 2.5 < asked / forward < 2.6
    weights = 2 * 16 * 68 * 64 * 128 * 16  # head tiles, blocks, products of a block
    queries = 3 * 32 * 2 * 4 * 64 * (128 + 64) * 16  # parts, blocks, groups, products
    picks = (
        16 * 2 * (2 * 4 * 4 * 64 * 256 * 16 + 2 * 4 * 64 * 64 * 16)
    )  # tiles, groups, parts x steps, the rotated ones
    assert (weights + queries + picks) / 2048 == asked


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_declaration_names_the_parameters_in_order(kernel):
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}
