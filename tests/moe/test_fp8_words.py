"""fp8_block where codes are taken four at a time: the bits of codes taken one by one, on weights of every code."""

from dataclasses import replace

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.quantised import eight_bit
from mla_kernels.quant.fp8 import AS_BYTES, product_form
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many
from tests.moe.quantised_problems import quantised_layer
from tests.moe.test_quantised_targets import requests

CHIPS_IN_WORDS = "sm_80", "gfx942"
EVERY_CODE = torch.arange(256, dtype=torch.uint8)


@pytest.fixture
def forms(monkeypatch):
    """The FP8 of every tile that was launched."""
    seen = set()
    for kernel in (eight_bit.GATE_UP, eight_bit.DOWN):
        run = kernel.launch

        def spy(chip, work, args, statics, tile, run=run):
            seen.add(tile["FP8"])
            return run(chip, work, args, statics, tile)

        monkeypatch.setattr(kernel, "launch", spy)
    return seen


def at_odd_addresses(experts):
    """The same weights one byte further on."""
    moved = {}
    for name in ("gate_up", "down"):
        codes = getattr(experts, name)
        longer = torch.empty(codes.numel() + 1, dtype=codes.dtype)
        moved[name] = longer[1:].view(codes.shape).copy_(codes)
    return replace(experts, **moved)


@pytest.mark.parametrize("target", CHIPS_IN_WORDS)
@pytest.mark.parametrize("bias", [False, True])
def test_words_give_the_bits_of_bytes(target, bias, forms):
    problem = quantised_layer("fp8_block", 5, 3, 2, 256, 128, torch.bfloat16, bias=bias)
    for codes in (problem.experts.gate_up, problem.experts.down):
        rows = codes.view(torch.uint8).flatten(1)
        rows[0, :256], rows[1, 1:257], rows[2, :256] = EVERY_CODE, EVERY_CODE.flip(0), 0x80
    with launch.on_cpu("interpret", target):
        actual = problem.run()
        assert forms == {product_form(CHIPS[target])}
        forms.clear()
        apart = problem.but(experts=at_odd_addresses(problem.experts)).run()
    assert forms == {AS_BYTES.value} and torch.equal(actual, apart)


@pytest.mark.parametrize("target", CHIPS_IN_WORDS)
def test_parity_and_poison(target):
    """A token of NaN stays alone, and a NaN scale of weights reaches what it multiplies."""
    problem = quantised_layer("fp8_block", 6, 4, 2, 384, 128)
    problem.hidden[2] = float("nan")
    with launch.on_cpu("interpret", target):
        actual = problem.run()
    assert actual[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    problem.but(hidden=problem.hidden[rest], weights=problem.weights[rest], ids=problem.ids[rest]).check(actual[rest])


def in_a_loop(chip, rows):
    """Instructions of gate_up's and down's loops for each code that a thread holds, and their reports."""
    for request in requests(eight_bit, "fp8_block", rows, chip=chip):
        (report,) = compile_many([request])
        assert report.ok and report.spills == 0, report.problem
        tile, products = report.tile, 2 if request[0] is eight_bit.GATE_UP else 1
        threads = tile["num_warps"] * CHIPS[chip].warp_size
        yield report, report.detail["loop_instructions"] * threads / (128 * (128 * products + tile["BLOCK_M"]))


@pytest.mark.parametrize(
    "chip, rows, most", [("sm_80", 16, 3.9), ("sm_80", 64, 7.2), ("gfx942", 16, 3.0), ("gfx942", 64, 3.5)]
)
@pytest.mark.slow(when=lambda rows: rows == 64)
def test_instructions_of_a_code(chip, most, rows):
    """All of the loop's, with products and loads, where several warps decode the same: byte by byte 8.1 to 18."""
    for report, each in in_a_loop(chip, rows):
        assert report.detail["loop_mix"].get("convert", 0) == 0
        assert each <= most, each
        if chip == "gfx942":
            assert all("fp8_fp8" in shape for shape in report.detail["loop_tensor_shapes"])
        else:
            assert report.detail["loop_bounds"]["core"] <= 2.2 * report.detail["loop_bounds"]["tensor"]
