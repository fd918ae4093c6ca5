"""What the compilers make of the indexer's Hopper kernel: registers, spills, products, instructions, shared memory."""

import pytest

from mla_kernels.hopper.indexer import HOPPER_INDEXER_LOGITS
from mla_kernels.targets import loops, sass
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import Request, compile_many, write_artefacts

KERNEL = HOPPER_INDEXER_LOGITS
SM_90 = CHIPS["sm_90"]
OFTEN = {"v32_prefill", "v32_decode"}


def requests(names=None):
    return [
        Request(KERNEL, SM_90, "bf16", case.statics, KERNEL.rule(SM_90, "bf16", case.statics, {}), case.name)
        for case in KERNEL.cases
        if names is None or case.name in names
    ]


def check(names=None):
    """By wgmma on codes, each product once, a stage under way; one instruction a product and one a relu."""
    found = requests(names)
    for request, report in zip(found, compile_many(found)):
        tokens, rows = request.statics["TOKENS"], request.statics["ROWS"]
        together = request.statics["TOGETHER"]
        assert report.ok, f"{report.label}: {report.problem}"
        assert report.spills == 0 and report.detail["serialised"] == [], report.label
        assert report.detail["tma"] and report.detail["async_copy"]
        assert report.detail["warps"] == 4 + KERNEL.worker_warps
        assert report.registers == request.tile["REGISTERS"]
        assert report.detail["loop_tensor_shapes"] == {f"QGMMA.64x{together * rows}x32": 4 * tokens // together}
        chains = 2 * tokens  # rows of a thread
        sums = report.detail["loop_mix"]["float"]
        assert sums <= chains * (rows // 4 + 5), f"{report.label}: {sums} additions and multiplications"
        shared = report.memory["shared"]
        assert shared <= KERNEL.memory(SM_90, "bf16", request.statics, request.tile)["shared"]
        programs = 65536 // (32 * report.detail["warps"] * report.registers)
        assert programs >= 2 and programs * (shared + 1024) <= 228 << 10, f"{report.label}: {programs} at a time"


def test_cases_compile_without_spills_and_multiply_once():
    check(OFTEN)


@pytest.mark.slow
def test_every_case_compiles_without_spills_and_multiplies_once():
    check()


def check_whole_blocks(folder, names=None):
    """Blocks that all tokens see whole have a loop of their own: two instructions a product, few for each token, and
    less than the loop of the others has."""
    for request in requests(names):
        write_artefacts(request, folder / request.case)
        code = sass.parse((folder / f"{request.case}.sass").read_text())
        kinds = [sass.kind(instruction) for instruction in code]
        products = [loop for loop in sass.loops(code) if "tensor" in loops.mix(kinds, loop)]
        whole, masked = sorted(len(loop) for loop in products if not any(set(o) < set(loop) for o in products))
        tokens, rows = request.statics["TOKENS"], request.statics["ROWS"]
        assert whole <= tokens * rows + 22 * tokens + 64, f"{request.case}: {whole} instructions"
        assert whole <= 0.95 * masked, f"{request.case}: {whole} instructions where masks take {masked}"


def test_blocks_that_are_seen_whole_cost_no_masks(tmp_path):
    check_whole_blocks(tmp_path, {"v32_prefill"})


@pytest.mark.slow
def test_blocks_that_are_seen_whole_cost_no_masks_in_any_case(tmp_path):
    check_whole_blocks(tmp_path)


def test_declarations_name_the_parameters_in_order():
    parameters = [parameter.name for parameter in KERNEL.fn.params]
    assert parameters == [*KERNEL.arguments, *KERNEL.statics, *KERNEL.tile_constants]
    plain = {parameter.name for parameter in KERNEL.fn.params if parameter.do_not_specialize}
    assert plain == {name for name, kind in KERNEL.arguments.items() if kind == "i32"}


def test_other_targets_have_no_such_kernel():
    assert set(KERNEL.unsupported) == set(CHIPS) - {"sm_90"}
