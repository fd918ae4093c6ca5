"""What the kernels behind compat.deep_gemm ask of a device: tiles that fit, by the closed form and by the compilers."""

import pytest

from mla_kernels.attention.indexer.mqa import MQA_LOGITS
from mla_kernels.moe.quantised.scaled_product import SCALED_PRODUCT
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel, compile_many

DEFAULTS = [
    (kernel, chip, dtype, case.statics, kernel.rule(chip, dtype, case.statics, case.sizes), case.name)
    for kernel in (MQA_LOGITS, SCALED_PRODUCT)
    for case in kernel.cases
    for dtype in case.dtypes
    for chip in CHIPS.values()
]


def test_every_default_tile_fits_by_the_closed_form():
    for kernel, chip, dtype, statics, tile, case in DEFAULTS:
        assert set(tile) == set(kernel.tiles)
        assert all(tile[name] in values for name, values in kernel.tiles.items()), (kernel.name, case, tile)
        for memory, used in kernel.memory(chip, dtype, statics, tile).items():
            assert used <= chip.memory[memory], f"{kernel.name} {case} on {chip.name}: {memory}"


@pytest.mark.slow
def test_every_default_tile_compiles_within_the_closed_form():
    problems = []
    for (kernel, chip, dtype, statics, tile, _), report in zip(DEFAULTS, compile_many(DEFAULTS)):
        if not report.ok:
            problems.append(f"{report.target} {report.label}: {report.problem}")
        for memory, bound in kernel.memory(chip, dtype, statics, tile).items():
            if (report.memory.get(memory) or 0) > bound:
                problems.append(f"{report.target} {report.label}: {memory} {report.memory[memory]} > {bound}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("alignment", [16, 48, 128])
def test_tiles_of_grouped_rows_divide_the_alignment(alignment):
    case = next(one for one in SCALED_PRODUCT.cases if one.name == "v3_contiguous")
    statics = case.statics | {"ALIGNMENT": alignment}
    for chip in CHIPS.values():
        tile = SCALED_PRODUCT.rule(chip, "bf16", statics, case.sizes)
        assert alignment % tile["BLOCK_M"] == 0
        assert SCALED_PRODUCT.memory(chip, "bf16", statics, tile)["shared" if chip.is_gpu else "L1"] < 1 << 20


def test_codes_of_queries_are_decoded_once_not_in_every_tile():
    """What makes as_multiplied worth a launch: by its machine code the loop over heads on sm_80, for bf16 queries and
    for codes, bounded by its busiest unit."""
    clocks = {}
    for name in ("v32_prefill_fp8", "v32_prefill_codes"):
        case = next(one for one in MQA_LOGITS.cases if one.name == name)
        chip = CHIPS["sm_80"]
        tile = MQA_LOGITS.rule(chip, "bf16", case.statics, case.sizes)
        report = compile_kernel(MQA_LOGITS, chip, "bf16", case.statics, tile)
        assert report.ok and not report.loop_spills
        clocks[name] = report.detail["loop_bounds"]["core"]
    assert clocks["v32_prefill_codes"] > 1.5 * clocks["v32_prefill_fp8"]
