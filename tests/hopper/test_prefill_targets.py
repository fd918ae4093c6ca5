"""What the compilers make of mla_prefill's Hopper kernel: registers, spills, products, and what runs beside them."""

import pytest

from mla_kernels.hopper.prefill import HOPPER_MLA_PREFILL, ROWS, TILE_ROWS, block
from mla_kernels.targets import sass
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many, write_artefacts

SM_90 = CHIPS["sm_90"]
TILE = HOPPER_MLA_PREFILL.rule(SM_90, "bf16", {}, {})


def requests(cases=HOPPER_MLA_PREFILL.cases, dtypes=None):
    return [
        Request(HOPPER_MLA_PREFILL, SM_90, dtype, case.statics, TILE, case.name)
        for case in cases
        for dtype in dtypes or case.dtypes
    ]


def products(statics) -> tuple[int, int]:
    """wgmma instructions of a group and block: for scores, and for the output."""
    return sum(statics[part] for part in ("KEY", "REST", "ROPE")) // 16, block(statics) // 16


def check(found):
    """By wgmma, each score and each output once, and no product waits for another that it does not read."""
    for request, report in zip(found, compile_many(found)):
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.spills == 0 and report.detail["serialised"] == [], report.label
        assert report.detail["tma"] and report.detail["warps"] == 4 + HOPPER_MLA_PREFILL.worker_warps
        assert report.registers == TILE["REGISTERS"]
        assert 32 * report.detail["warps"] * report.registers <= 65536  # of a multiprocessor
        # Of each group: the first block's scores, two loops, the last block's output.
        scores, output = products(request.statics)
        assert report.tensor_instructions == TILE_ROWS // ROWS * (scores + 2 * (scores + output) + output)
        shapes = {f"HGMMA.64x{block(request.statics)}x16": scores}
        wide = f"HGMMA.64x{request.statics['VALUE']}x16"
        assert report.detail["loop_tensor_shapes"] == shapes | {wide: shapes.get(wide, 0) + output}
        memory = HOPPER_MLA_PREFILL.memory(SM_90, request.dtype, request.statics, TILE)["shared"]
        assert report.memory["shared"] <= memory <= SM_90.memory["shared"]


def test_cases_compile_without_spills_and_multiply_once():
    check(requests(HOPPER_MLA_PREFILL.cases[::4], ["bf16"]))  # of two blocks


@pytest.mark.slow
def test_every_case_compiles_without_spills_and_multiplies_once():
    check(requests())


def test_the_exponentials_stand_between_the_scores_and_the_wait_for_the_output(tmp_path):
    """In each loop: all products queued, the scores waited for, weights, and then the output waited for.

    ptxas would rather wait first. Then the weights would overlap no product of their own group.
    """
    write_artefacts(requests(dtypes=["bf16"])[0], tmp_path / "kernel")
    instructions = sass.parse((tmp_path / "kernel.sass").read_text())
    kinds = [sass.kind(instruction) for instruction in instructions]
    once = sum(products(HOPPER_MLA_PREFILL.cases[0].statics))
    loops = [loop for loop in sass.loops(instructions) if sum(kinds[i] == "tensor" for i in loop) == once]
    assert len(loops) == 4  # of two groups: with masks, and without
    for loop in loops:
        queued = [i for i in loop if kinds[i] == "tensor"]
        waits = [i for i in loop if instructions[i].opcode.startswith("WARPGROUP.DEPBAR")]
        exponentials = [i for i in loop if instructions[i].name == "MUFU"]
        assert len(waits) == 2 and len(exponentials) >= ROWS * 128 // 128
        assert max(queued) < waits[0] < min(exponentials) and max(exponentials) < waits[1]


def test_the_declaration_names_the_parameters_in_order():
    kernel = HOPPER_MLA_PREFILL
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}


def test_an_output_in_flight_across_iterations_is_told(monkeypatch):
    """ptxas then serialises all products (C7514) or inserts a wait (C7517), and says so where nobody looks."""
    kernel = HOPPER_MLA_PREFILL
    before = "acc = warpgroup_mma_wait(0, [acc])  # [64, VALUE]\n        mbarrier"
    assert kernel.source.count(before) == 1
    monkeypatch.setitem(kernel.__dict__, "source", kernel.source.replace(before, before.replace("wait(0", "wait(1")))
    (report,) = compile_many(requests(dtypes=["bf16"])[:1])
    assert not report.ok and report.problem.startswith("products one at a time") and "(C75" in report.problem
