"""What the compilers make of the experts' Hopper kernel: registers, spills, products, shared memory."""

import pytest

from mla_kernels.hopper.experts import HOPPER_EXPERTS, MANY, PANEL
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many

SM_90 = CHIPS["sm_90"]
OFTEN = {"fp8_block_v3_4096_gate_up", "fp8_block_v3_4096_down"}  # which have the fewest registers left


def check(names=None, options=({},)):
    """By wgmma, each product once, and none waits for another that it does not read."""
    kernel = HOPPER_EXPERTS
    found = []
    for case in kernel.cases:
        tile = kernel.rule(SM_90, "bf16", case.statics, case.sizes)
        for dtype in case.dtypes if names is None else case.dtypes[:1]:
            if names is None or case.name in names:
                found += [Request(kernel, SM_90, dtype, case.statics | more, tile, case.name) for more in options]
    for request, report in zip(found, compile_many(found)):
        tokens, codes = request.statics["TOKENS"], request.statics["FORMAT"] == "fp8_block"
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.spills == 0 and report.detail["serialised"] == [], report.label
        assert report.detail["tma"]
        assert report.detail["warps"] == 4 + kernel.worker_warps and report.registers == request.tile["REGISTERS"]
        assert 32 * report.detail["warps"] * report.registers <= 65536  # of a multiprocessor
        shape = f"{'QGMMA' if codes else 'HGMMA'}.64x{PANEL if tokens == MANY else tokens}x{32 if codes else 16}"
        assert report.detail["loop_tensor_shapes"] == {shape: 2 * 4}  # of a group: both panels, 128 bytes of depth
        assert report.tensor_instructions == 2 * 2 * 4
        memory = kernel.memory(SM_90, request.dtype, request.statics, request.tile)["shared"]
        assert report.memory["shared"] <= memory <= SM_90.memory["shared"]


def test_cases_compile_without_spills_and_multiply_once():
    check(OFTEN)


@pytest.mark.slow
def test_every_case_compiles_without_spills_and_multiplies_once():
    check()


@pytest.mark.slow
def test_so_do_other_activations_and_places_of_weights():
    some = {
        case.name for case in HOPPER_EXPERTS.cases if case.statics["GATED"] and "fp8_block_v3_4096" not in case.name
    }
    check(some, [{"CLAMP": "pre", "WEIGHT_AT": "input"}, {"CLAMP": "gpt_oss", "WEIGHT_AT": "activation"}])


def test_the_declaration_names_the_parameters_in_order():
    kernel = HOPPER_EXPERTS
    parameters = [parameter.name for parameter in kernel.fn.params]
    assert parameters == [*kernel.arguments, *kernel.statics, *kernel.tile_constants]
    plain = {parameter.name for parameter in kernel.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in kernel.arguments.items() if kind == "i32"}
    assert set(kernel.unsupported) == set(CHIPS) - {"sm_90"}
