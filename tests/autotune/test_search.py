"""The tile search, on a declaration of its own."""

from dataclasses import replace

import pytest

from mla_kernels.autotune import model, search
from mla_kernels.launch import KERNELS, Work
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel
from tests.autotune.declared import Compiler, declare, problem, report

CHIP = CHIPS["sm_90"]


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr(search, "compile_many", compiler)
    monkeypatch.setattr(search, "RANKED", ("scale_kernel",))
    return compiler


def test_candidates_fit_by_closed_form():
    tiles = list(search.candidates(declare(), CHIP, "fp32", {}))
    assert {tile["BLOCK"] for tile in tiles} == {64, 1024}  # 65536 x 4 bytes is more than 227 KiB
    assert len(tiles) == 4
    assert list(search.candidates(declare(), CHIPS["ascend910b"], "fp32", {})) == [{"BLOCK": 64}, {"BLOCK": 1024}]


@pytest.mark.parametrize("chip", ["sm_90", "gfx942", "ascend910b"])
def test_every_kernel_has_candidates_that_the_model_can_rank(chip):
    """Or one tile, its rule's."""
    for kernel in KERNELS.values():
        case = kernel.cases[0]
        if chip in kernel.unsupported:
            continue
        rule = kernel.rule(CHIPS[chip], case.dtypes[0], case.statics, case.sizes)
        some = [next(search.candidates(kernel, CHIPS[chip], case.dtypes[0], case.statics), rule)]
        (found,) = model.all_seconds(kernel, CHIPS[chip], case.dtypes[0], case.statics, case.sizes, some)
        assert found > 0
        (tile,) = some
        single = model.seconds(kernel, CHIPS[chip], case.dtypes[0], case.statics, case.sizes, tile)
        assert single == pytest.approx(found)


def test_the_best_tile_stands_first_and_the_rule_s_second(compiler):
    found = search.shortlist(problem(declare()), CHIP)
    assert found.tiles[0]["BLOCK"] == 1024 and found.provenance == "modelled"
    assert found.tiles[1] == {"BLOCK": 64, "num_warps": 4} and found.considered == 4
    assert found.ranked[0].seconds < found.ranked[1].seconds
    assert sorted(map(str, compiler.tiles)) == sorted(map(str, found.tiles))  # each once


def test_tiles_that_compile_badly_are_dropped(compiler):
    bad = {"loop_spills": 1}, {"traps": 1}, {"memory": {"shared": CHIP.memory["shared"] + 1}}
    for changes in bad:
        compiler.changes = lambda tile: changes if tile["BLOCK"] == 1024 else {}  # noqa: B023
        found = search.shortlist(problem(declare()), CHIP)
        assert found.provenance == "rule" and {tile["BLOCK"] for tile in found.tiles} == {64}


def test_machine_code_ranks_again(compiler):
    busy = {"detail": {"loop_bounds": {"tensor": 10.0, "core": 80.0}}}
    compiler.changes = lambda tile: busy if tile["num_warps"] == 4 and tile["BLOCK"] == 1024 else {}
    assert search.shortlist(problem(declare()), CHIP).tiles[0] == {"BLOCK": 1024, "num_warps": 8}
    clean = report(declare(), CHIP, "fp32", {})
    assert search.refined(1.0, clean) == 1.0
    assert search.refined(1.0, replace(clean, spills=10)) == pytest.approx(1.1)
    assert search.refined(1.0, replace(clean, detail=busy["detail"])) == pytest.approx(4.5)
    assert search.refined(1.0, replace(clean, detail=busy["detail"], spills=100), 2.0) == pytest.approx(3.0)


def test_what_the_model_cannot_tell_apart_stays_as_the_rule_has_it(compiler):
    rule = lambda chip, dtype, statics, sizes: {"BLOCK": 64, "num_warps": 8}  # noqa: E731
    assert search.shortlist(problem(declare(rule=rule)), CHIP).tiles[0] == {"BLOCK": 1024, "num_warps": 8}


def test_a_flag_that_the_model_cannot_see_stays_as_the_rule_has_it():
    kernel, chip = KERNELS["mla_decode_kernel"], CHIPS["sm_80"]
    case = kernel.cases[0]
    one = search.Problem(kernel, "bf16", case.statics, case.sizes)
    rule = kernel.rule(chip, "bf16", case.statics, case.sizes)
    tiles = [rule | {"BRANCH": value} for value in (1 - rule["BRANCH"], rule["BRANCH"])]
    assert search.best(one, chip, tiles, 1) == [rule]


def test_the_best_tiles_of_a_grouped_product_differ_in_more_than_the_order_of_programs():
    kernel, chip = KERNELS["moe_down_kernel"], CHIPS["sm_90"]
    case = kernel.cases[0]
    one = search.Problem(kernel, "bf16", case.statics, case.sizes)
    found = search.best(one, chip, search.candidates(kernel, chip, "bf16", case.statics), 16)
    group = kernel.rule(chip, "bf16", case.statics, case.sizes)["GROUP_M"]
    assert len(found) == 16 and {tile["GROUP_M"] for tile in found} == {group}


def test_a_rule_that_does_not_compile_is_an_error(compiler):
    compiler.fails = lambda tile: True
    with pytest.raises(search.NoTile, match=r"scale_kernel on sm_90, fp32, {}: it overflows"):
        search.shortlist(problem(declare()), CHIP)


def test_the_rule_stays_where_the_model_sees_no_clear_gain_or_sees_no_layouts(compiler, monkeypatch):
    even = declare(work=lambda dtype, statics, sizes, tile: Work(132, 1e6, 1e3))
    found = search.shortlist(problem(even), CHIP)
    assert found.tiles[0] == {"BLOCK": 64, "num_warps": 4} and found.provenance == "rule"
    assert len(found.tiles) == 4  # the others are kept for timing
    monkeypatch.setattr(search, "RANKED", ())
    assert search.shortlist(problem(declare()), CHIP).tiles[0] == {"BLOCK": 64, "num_warps": 4}


def test_a_tile_is_compiled_once_for_all_sizes_and_counts_are_told(compiler):
    kernel, told, seen = declare(), [], []
    found = search.shortlists(
        [problem(kernel, rows=1 << 20), problem(kernel, rows=1 << 16)], CHIP, 2, seen.append, told.append
    )
    assert len(found) == 2 and sum(told) == len(seen) == len(compiler.tiles)
    none = search.shortlists([problem(kernel)], CHIP, 0)
    assert [one.tiles for one in none] == [({"BLOCK": 64, "num_warps": 4},)]


def test_a_real_shortlist_holds_what_the_compiler_says():
    kernel = KERNELS["merge_states_kernel"]
    case = kernel.cases[0]
    found = search.shortlist(search.Problem(kernel, "bf16", case.statics, case.sizes), CHIP, 2)
    for one in found.ranked:
        assert one.report.ok and one.report.tile == one.tile and one.report.memory["shared"] >= 0
        assert one.report == compile_kernel(kernel, CHIP, "bf16", case.statics, one.tile)
