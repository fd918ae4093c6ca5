"""What fused_experts asks of a device: matrix instructions, asynchronous loads, spills, traffic."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.quantised import eight_bit, weight_only
from mla_kernels.moe.quantised.tiles import sizes_of
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many
from tests.moe.problems import distinct_ids
from tests.moe.quantised_problems import FORMATS, quantised_layer
from tests.support import assert_close

V3 = 256, 8, 7168, 2048  # experts, top_k, hidden, intermediate
PLAIN = {"CLAMP": "none", "INTERLEAVED": False}


def requests(kernels, form, rows, group=None, chip="sm_90"):
    """gate_up and down for V3's sizes and so many rows an expert, on Hopper or another chip."""
    experts, top_k, hidden, inner = V3
    sizes = sizes_of(rows * experts // top_k, top_k, experts, hidden, inner)
    options = (form,) if group is None else (form, group, False)
    ahead = form == "int8_w8a8" and eight_bit.ahead(CHIPS[chip], form, sizes)
    for kernel, more in ((kernels.GATE_UP, PLAIN | {"ALIGNED": True}), (kernels.DOWN, {"AHEAD": ahead})):
        statics = kernels.statics_of(experts, *options, False, hidden if "CLAMP" in more else inner) | more
        statics = {name: value for name, value in statics.items() if name in kernel.statics}
        yield kernel, CHIPS[chip], "bf16", statics, kernel.rule(CHIPS[chip], "bf16", statics, sizes), f"{rows}"


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.slow(when=lambda rows: rows in (32, 64))
def test_fp8_on_hopper_is_multiplied_as_it_is(rows):
    """Codes go from device memory to shared memory and from there to the tensor cores: no conversions, no registers in
    between, whatever the number of rows."""
    for report in compile_many(requests(eight_bit, "fp8_block", rows)):
        assert report.ok and report.loop_spills == 0 and (report.spills == 0 or rows == 128), report.problem
        assert report.tile["BLOCK_M"] == rows
        assert set(report.detail["loop_tensor_shapes"]) == {f"QGMMA.64x{rows}x32"}
        assert report.detail["async_copy"]
        mix = report.detail["loop_mix"]
        assert mix.get("convert", 0) == 0 and mix.get("shared store", 0) == 0
        if rows == 128:  # 1.21 and 1.36 of the tensor cores' clocks, where 64 rows take 1.8 and 2.0
            assert report.detail["loop_bounds"]["core"] <= 1.4 * report.detail["loop_bounds"]["tensor"]


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.slow(when=lambda rows: rows == 16)
def test_int8_on_hopper_is_multiplied_as_it_is(rows):
    for report in compile_many(requests(eight_bit, "int8_w8a8", rows)):
        assert report.ok and report.loop_spills == 0 and (report.spills == 0 or rows == 128), report.problem
        assert set(report.detail["loop_tensor_shapes"]) == {f"IGMMA.64x{rows}x32"}
        assert report.detail["async_copy"]


@pytest.mark.parametrize(
    "chip, form, group, bias, even",
    [
        ("sm_90", "int8", 0, True, True), ("sm_90", "int8", 0, False, False), ("sm_90", "int8", 0, True, False),
        ("sm_100", "int4", 32, False, True), ("sm_100", "mxfp4", 32, True, False), ("gfx942", "int4", 64, True, False),
        ("ascend910b", "int8", 0, True, False), ("ascend950", "int4", 32, True, True),
    ],
)  # fmt: skip
@pytest.mark.slow(when=lambda chip, form, bias, even: chip in ("gfx942", "ascend950") or bias == even or form == "int4")
def test_options_that_no_case_declares_compile_within_limits(chip, form, group, bias, even):
    """Large tiles with a bias, with rows that no step divides, and with small groups."""
    wanted = []
    for kernel in (weight_only.GATE_UP, weight_only.DOWN):
        case = kernel.cases[-1]
        options = {"FORMAT": form, "GROUP": group, "ZEROS": form == "int4", "HAS_BIAS": bias}
        statics = dict(case.statics) | options | {"EVEN_K": even, "WEIGHT_AT": "activation" if bias else "none"}
        tile = kernel.rule(CHIPS[chip], "bf16", statics, case.sizes)
        wanted.append((kernel, CHIPS[chip], "bf16", statics, tile, case.name))
    assert [report.problem for report in compile_many(wanted)] == ["", ""]


@pytest.mark.parametrize("form, group", [("int8", 0), ("int4", 128), ("mxfp4", 32)])
@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.slow(when=lambda form, rows: (form == "int8") == (rows == 16))
def test_weights_on_hopper_are_decoded_in_registers(form, group, rows):
    """Codes come asynchronously, and the tensor cores take decoded weights from registers: none goes back to shared
    memory."""
    for report in compile_many(requests(weight_only, form, rows, group)):
        assert report.ok, report.problem
        assert set(report.detail["loop_tensor_shapes"]) == {f"HGMMA.64x{rows}x16"}
        assert report.detail["async_copy"]
        mix = report.detail["loop_mix"]
        assert mix.get("shared store", 0) == 0 and mix.get("convert", 0) == 0
        weights = report.detail["loop_bounds"]["multiply_adds"] / rows
        each = report.detail["loop_instructions"] * report.detail["warps"] * 32 / weights
        assert each <= {"int8": 5.2, "int4": 4.8, "mxfp4": 6.2}[form]  # decoded one by one 6.5 to 12.4


@pytest.mark.parametrize("form", FORMATS)
def test_traffic(form):
    """Each expert's codes are read once for a tile of its rows, those of experts without rows not at all; with the
    rows themselves no more than 1.5 times the minimum."""
    from mla_kernels.targets.traffic import Traffic

    tokens, experts, hidden, inner = 12, 6, 256, 256
    ids = distinct_ids(tokens, 3, 2)  # three of six experts get rows
    problem = quantised_layer(form, tokens, experts, 2, hidden, inner, torch.bfloat16, ids=ids)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        actual = problem.run()
    assert_close(actual, problem.exact(), problem.baseline())
    e = problem.experts
    weights = 3 * sum(x[0].nbytes for x in e.tensors().values())
    rows = 2 * tokens * 2 * (2 * hidden + 2 * inner) + 2 * tokens * hidden * 2
    assert traffic.requested <= 1.5 * (weights + rows), f"{traffic.requested / (weights + rows):.2f} times the minimum"
