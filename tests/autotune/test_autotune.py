"""The tile search on a declaration of its own, the store, and the tables that ship."""

import json
from dataclasses import replace

import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels import autotune, launch
from mla_kernels.autotune import __main__ as cli
from mla_kernels.autotune import model, search
from mla_kernels.launch import KERNELS, Case, Cost, Kernel, Work
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.report import Report
from tests.test_launch import scale_kernel

CHIP = CHIPS["sm_90"]
CASE = Case("small", {}, {"size": 1 << 20})


def declare(**changes):
    declaration = dict(
        arguments={"x_ptr": "*T", "y_ptr": "*T", "size": "i32", "factor": "fp32"},
        statics=(),
        tiles={"BLOCK": (64, 1024, 65536, 1 << 20), "num_warps": (4, 8)},
        rule=lambda chip, dtype, statics, sizes: {"BLOCK": 64, "num_warps": 4},
        memory=lambda chip, dtype, statics, tile: {"shared" if chip.is_gpu else "UB": 4 * tile["BLOCK"]},
        cost=lambda dtype, statics, sizes: Cost(sizes["size"], 8 * sizes["size"]),
        work=lambda dtype, statics, sizes, tile: Work(
            -(-sizes["size"] // tile["BLOCK"]), tile["BLOCK"], 8 * tile["BLOCK"]
        ),
        cases=(CASE,),
        uses_dot=False,
    )
    try:
        return Kernel(scale_kernel, **(declaration | changes))
    finally:
        launch.KERNELS.pop("scale_kernel", None)


def report(kernel, chip, dtype, tile, **changes):
    fields = dict(target=chip.name, kernel=kernel.name, dtype=dtype, case="", tile=dict(tile), compiled=True, reason="")
    counts = dict(registers=32, spills=0, loop_spills=0, memory={}, limits=chip.memory, traps=0, tensor_instructions=0)
    return Report(**(fields | counts | {"detail": {}} | changes))


@pytest.fixture
def compiled(monkeypatch):
    """Tiles that were compiled; ``fails`` says which of them do not compile."""
    tiles = []

    def compile_kernel(kernel, chip, dtype, statics, tile):
        tiles.append(dict(tile))
        bad = compile_kernel.fails(tile)
        return report(kernel, chip, dtype, tile, compiled=not bad, reason="it overflows" if bad else "")

    compile_kernel.fails = lambda tile: False
    monkeypatch.setattr(search, "compile_kernel", compile_kernel)
    return tiles, compile_kernel


def test_candidates_fit_by_closed_form():
    tiles = list(autotune.candidates(declare(), CHIP, "fp32", {}))
    assert {tile["BLOCK"] for tile in tiles} == {64, 1024}  # 65536 x 4 bytes is more than 227 KiB
    assert len(tiles) == 4
    assert list(autotune.candidates(declare(), CHIPS["ascend910b"], "fp32", {})) == [{"BLOCK": 64}, {"BLOCK": 1024}]


@pytest.mark.parametrize("chip", ["sm_90", "gfx942", "ascend910b"])
def test_every_kernel_has_candidates_that_the_model_can_rank(chip):
    for kernel in KERNELS.values():
        case = kernel.cases[0]
        tile = next(search.candidates(kernel, CHIPS[chip], case.dtypes[0], case.statics))
        assert model.seconds(kernel, CHIPS[chip], case.dtypes[0], case.statics, case.sizes, tile) > 0


def test_choose_takes_the_best_ranked_tile_that_compiles(compiled):
    _, compiler = compiled
    choice = autotune.choose(declare(), CHIP, "fp32", CASE)
    assert choice.tile["BLOCK"] == 1024 and choice.rank == 0 and choice.seconds < choice.rule_seconds
    compiler.fails = lambda tile: tile["BLOCK"] == 1024
    assert autotune.choose(declare(), CHIP, "fp32", CASE).tile == {"BLOCK": 64, "num_warps": 4}


def test_what_the_model_cannot_tell_apart_stays_as_the_rule_has_it(compiled):
    rule = lambda chip, dtype, statics, sizes: {"BLOCK": 64, "num_warps": 8}  # noqa: E731
    assert autotune.choose(declare(rule=rule), CHIP, "fp32", CASE).tile == {"BLOCK": 1024, "num_warps": 8}


def test_a_rule_that_does_not_compile_is_an_error(compiled):
    compiled[1].fails = lambda tile: True
    with pytest.raises(RuntimeError, match=r"scale_kernel on sm_90, fp32, small: the rule's tile .* it overflows"):
        autotune.choose(declare(), CHIP, "fp32", CASE)


def test_the_rule_stays_where_the_model_sees_no_clear_gain(compiled):
    even = declare(work=lambda dtype, statics, sizes, tile: Work(132, 1e6, 1e3))
    assert autotune.choose(even, CHIP, "fp32", CASE).tile == {"BLOCK": 64, "num_warps": 4}


def test_store_round_trip_and_refusals(tmp_path):
    entry = dict.fromkeys(("kernel", "dtype", "case", "provenance", "source"), "x") | dict(
        statics={}, sizes={}, tile={}
    )
    path = tmp_path / "sm_90.json"
    autotune.write_table(path, "sm_90", [entry | {"versions": {}}])
    assert autotune.load_table(path, "sm_90") == [entry | {"versions": {}}]
    assert [p.name for p in tmp_path.iterdir()] == ["sm_90.json"]  # no temporary file is left
    with pytest.raises(ValueError, match="a table for 'sm_90', expected 'sm_80'"):
        autotune.load_table(path, "sm_80")
    autotune.write_table(path, "sm_90", [entry])
    with pytest.raises(ValueError, match="entry 0 lacks versions"):
        autotune.load_table(path, "sm_90")
    for text, message in (("nonsense", "not a JSON table"), (json.dumps({"format": 7}), "another format")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            autotune.load_table(path, "sm_90")


def test_cli_names_what_it_accepts(capsys, tmp_path):
    for option, value in (("--target", "sm_42"), ("--kernel", "conv2d")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["tune", option, value])
        assert exit_.value.code == 2
        assert "choose from" in capsys.readouterr().err


def test_cli_tunes_and_shows(compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "KERNELS", {"scale_kernel": declare()})
    arguments = ["--target", "sm_90", "--tables", str(tmp_path)]
    assert cli.main(["tune", *arguments]) == 0
    *_, fp32 = autotune.load_table(tmp_path / "sm_90.json", "sm_90")
    assert (
        fp32["provenance"] == "modelled" and fp32["source"] == declare().source_hash and fp32["tile"]["BLOCK"] == 1024
    )
    assert cli.main(["show", *arguments]) == 0
    assert "scale_kernel" in capsys.readouterr().out


SHIPPED = sorted(CHIPS)


@pytest.mark.parametrize("chip", SHIPPED)
def test_the_shipped_table_covers_every_problem_and_names_this_source(chip):
    entries = autotune.load_table(autotune.TABLES / f"{chip}.json", chip)
    covered = {(entry["kernel"], entry["case"], entry["dtype"]) for entry in entries}
    declared = {
        (name, case.name, dtype)
        for name, kernel in KERNELS.items()
        for case in kernel.cases
        for dtype in case.dtypes
        if chip not in kernel.unsupported
    }
    assert covered == declared
    for entry in entries:
        kernel = KERNELS[entry["kernel"]]
        assert entry["source"] == kernel.source_hash, f"{entry['kernel']} changed: run make tables"
        options = () if CHIPS[chip].is_gpu else launch.GPU_OPTIONS
        assert set(entry["tile"]) >= set(kernel.tiles) - set(options), entry
        assert kernel.tile_for(CHIPS[chip], entry["dtype"], entry["statics"], entry["sizes"]) == entry["tile"]


def test_reports_compare_against_limits():
    good = report(declare(), CHIP, "fp32", {"BLOCK": 64})
    assert good.ok
    assert not replace(good, loop_spills=1).ok
    assert not replace(good, memory={"shared": CHIP.memory["shared"] + 1}).ok
