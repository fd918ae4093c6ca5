"""The commands: what they accept, what they say, and tables made for a few kernels."""

import argparse
import importlib.metadata
import re
import subprocess
import sys

import pytest

from mla_kernels import tile_files, tiles
from mla_kernels.autotune import __main__ as cli
from mla_kernels.autotune import options, problems, search, session, tables, tune
from mla_kernels.autotune.models import MODELS
from mla_kernels.tile_files import read_store, read_table
from tests.autotune.declared import Clock, Compiler
from tests.autotune.test_problems import SMALL
from tests.children import child_environment


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr(search, "compile_many", compiler)
    monkeypatch.setattr(tables, "compile_many", compiler)
    return compiler


@pytest.fixture(autouse=True)
def _own_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tile_files, "store_path", lambda device: tmp_path / f"{device}.jsonl")
    tiles.reload()
    yield
    monkeypatch.undo()
    tiles.reload()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target", "sm_42"], "device 'sm_42' is unknown; known are a100, "),
        (["--target", "h100", "--kernel", "conv2d"], "choose from"),
        (["--target", "h100", "--dtype", "fp4"], "choose from"),
        (["--target", "h100", "--budget", "soon"], "accepted are seconds, as in 60 or 60s, or 5m, 1h"),
        (["--target", "h100", "--sizes", "rows"], "accepted is NAME=VALUE"),
        (["--target", "h100", "--keep", "0"], "'0': accepted are numbers from 1"),
        (["--target", "h100", "--candidates", "-3"], "'-3': accepted are numbers from 0"),
        (["--target", "h100", "--tp", "0"], "'0': accepted are numbers from 1"),
    ],
)
def test_the_command_line_names_what_it_accepts(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no device here; name one with --target: a100, "),
        (["--target", "h100", "--model", "gpt-2"], "known names: deepseek-v2-lite"),
        (["--target", "h100", "--model", "deepseek-v3", "--tp", "3"], "got 3, which does not divide"),
        (["--target", "h100", "--model", "deepseek-v3", "--sizes", "rows=1"], "--model derives all sizes"),
        (["--target", "h100", "--sizes", "rows=1"], "describe a problem of one --kernel"),
        (["--target", "h100", "--kernel", "merge_states_kernel", "--sizes", "rows=1"], "takes WIDTH, BLOCK_D"),
        (
            ["--target", "h100", "--kernel", "moe_dispatch_kernel", "--sizes", "experts=1"],
            "moe_dispatch_kernel needs pairs, as in",
        ),
        (
            ["--target", "h100", "--kernel", "moe_dispatch_kernel", "--sizes", "pairs=1", "experts=1", "hats=2"],
            "has no hats; it has pairs, experts",
        ),
        (["--target", "h100", "a100", "--store", "x.jsonl"], "one file is for one device"),
        (["--target", "h100", "--launchable"], "--launchable goes with --offline"),
        (["--target", "a100", "--launchable", "--offline"], "got a100, devices of capability 9.0 are accepted"),
    ],
)
def test_bad_combinations_are_explained(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(tune, "local_device", lambda: None)
    if any(argument.startswith("experts=") for argument in arguments):
        names = dict(tune.KERNELS["moe_dispatch_kernel"].cases[0].statics)
        if names:
            arguments = [*arguments, "--statics", *(f"{name}={int(value)}" for name, value in names.items())]
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tune_stores_shortlists_that_launches_find(compiler, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "local_device", lambda: None)
    kernel = tune.KERNELS["merge_states_kernel"]
    case = kernel.cases[0]
    assert tiles.look_up(kernel, tables.DEVICES["h20"], "bf16", case.statics, case.sizes).origin != "store"
    assert cli.main(["tune", "--target", "h20", "--kernel", kernel.name]) == 0
    found = read_store(tmp_path / "h20.jsonl", "h20")
    assert [e.kernel for e in found] == [kernel.name] * len(kernel.cases)
    assert found[0].source == kernel.source_hash and len(found[0].shortlist) == search.KEPT
    assert found[0].detail["compiled"][0].keys() >= {"registers", "spills", "memory", "loop_bounds"}
    assert tiles.look_up(kernel, tables.DEVICES["h20"], "bf16", case.statics, case.sizes).origin == "store"
    compiled = len(compiler.tiles)
    assert cli.main(["tune", "--target", "h20", "--kernel", kernel.name]) == 0
    assert len(compiler.tiles) == compiled
    assert cli.main(["show", "--target", "h20", "--kernel", kernel.name]) == 0
    assert "store of h20" in capsys.readouterr().out
    assert not tiles.LOG.disabled


def test_the_command_that_a_miss_logs_works(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "local_device", lambda: None)
    kernel = tune.KERNELS["mla_decode_kernel"]
    chip, case = tables.DEVICES["h20"], kernel.cases[0]
    sizes = {"heads": 7, "queries": 3}
    command = tiles.command(kernel.name, chip, "bf16", case.statics, sizes)
    assert cli.main(command.split()[3:]) == 0
    found = tiles.look_up(kernel, chip, "bf16", case.statics, sizes)
    assert found.origin == "store" and found.entry.statics == dict(case.statics)


def test_a_problem_without_a_tile_does_not_stop_the_others(compiler, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "local_device", lambda: None)
    compiler.fails = lambda tile: "BLOCK_R" in tile
    assert cli.main(["tune", "--target", "h20", "--kernel", "merge_states_kernel", "slots_kernel"]) == 1
    assert {e.kernel for e in read_store(tmp_path / "h20.jsonl", "h20")} == {"slots_kernel"}
    assert "merge_states_kernel on sm_90" in capsys.readouterr().err


def test_tables_are_made_for_models_and_kept_where_a_run_is_for_some_kernels(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TENSOR_PARALLEL", (1, 2))
    monkeypatch.setitem(MODELS, "small", SMALL)
    arguments = ["tables", "--target", "h200", "--output", str(tmp_path), "--model", "small"]
    assert cli.main(arguments) == 0
    path = tmp_path / "h200.json"
    found = read_table(path, "h200")
    assert len(found) == len(tables.model_problems(tables.DEVICES["h200"], ["small"]))
    assert all(e.source == tune.KERNELS[e.kernel].source_hash for e in found)
    assert {e.provenance for e in found} <= {"modelled", "rule"}
    before = path.read_bytes()
    compiler.tiles.clear()
    assert cli.main([*arguments, "--kernel", "topk_kernel"]) == 0
    assert path.read_bytes() == before and 0 < len(compiler.tiles) <= 10


def test_a_table_leaves_out_what_does_not_compile_and_says_so(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "TENSOR_PARALLEL", (1,))
    monkeypatch.setitem(MODELS, "small", SMALL)
    compiler.fails = lambda tile: "VALUE_TILES" in tile
    assert cli.main(["tables", "--target", "h200", "--output", str(tmp_path), "--model", "small"]) == 1
    found = {e.kernel for e in read_table(tmp_path / "h200.json", "h200")}
    assert "mla_decode_kernel" not in found and "route_kernel" in found
    assert "mla_decode_kernel" in capsys.readouterr().err


def test_a_budget_holds_for_compiling_too_and_goes_to_what_matters_most(compiler, tmp_path, monkeypatch, capsys):
    clock = compiler.clock = Clock()
    monkeypatch.setattr(session, "time", clock)
    monkeypatch.setattr(tune, "time", clock)
    monkeypatch.setattr(tune, "local_device", lambda: None)
    command = ["tune", "--target", "h200", "--model", "deepseek-v3", "--tp", "8", "--budget", "300s"]
    assert cli.main(command) == 0
    assert clock.now <= 301
    assert list(dict.fromkeys(compiler.kernels))[:2] == ["mla_decode_kernel", "merge_splits_kernel"]
    assert "eb_gate_up_kernel" in compiler.kernels and "mla_prefill_kernel" not in compiler.kernels
    told = capsys.readouterr().err
    assert "has ended before " in told and ": run the same command again" in told
    assert "mla_prefill (2 of deepseek-v3 tp 8)" in told and "merge_states (3 of deepseek-v3 tp 8)" in told
    stored = {e.kernel for e in read_store(tmp_path / "h200.jsonl", "h200")}
    assert "mla_decode_kernel" in stored
    clock.now = 0.0
    compiler.kernels.clear()
    assert cli.main([*command[:-1], "1h"]) == 0
    assert "mla_decode_kernel" not in compiler.kernels and "route_kernel" in compiler.kernels
    assert "has ended" not in capsys.readouterr().err


def test_nothing_is_listed_before_it_is_asked_for(monkeypatch):
    seen, listed = [], problems.of_model
    monkeypatch.setattr(problems, "of_model", lambda g, c, d, names: seen.append(names) or listed(g, c, d, names))
    made = tune.tasks(parse("--target", "h200", "--model", "deepseek-v3"), tables.DEVICES["h200"], False)
    assert seen == []
    assert {task.problem.kernel.name for task in next(made)} >= {"mla_decode_kernel"} and seen == [("mla_decode",)]


def test_what_matters_most_of_all_models_comes_first(capsys):
    chip = tables.DEVICES["h200"]
    lists = iter(tune.tasks(parse("--target", "h200", "--model", "all"), chip, True))
    first = next(lists)
    shares = {(task.derived.geometry.name, task.derived.geometry.tp) for task in first}
    assert {task.derived.operation.name for task in first} == {"mla_decode"}
    assert {("deepseek-v2-lite", 1), ("kimi-k2", 8)} <= shares  # V3's problem is V2's
    two = tune.shares(["kimi-k2", "glm-5"], [2, 4])
    assert [(one.name, one.tp) for one in two] == [("kimi-k2", 2), ("kimi-k2", 4), ("glm-5", 2), ("glm-5", 4)]
    assert {one.name: one.tp for one in tune.shares(["all"], None)}["glm-5"] == 8
    assert capsys.readouterr().err == ""


def test_on_a_device_without_a_model_the_usual_one_is_timed_first(capsys):
    chip = tables.DEVICES["h200"]
    made = tune.tasks(parse("--target", "h200"), chip, True)
    first = next(made)
    assert all(task.derived.geometry.name == "deepseek-v3" and task.derived.geometry.tp == 8 for task in first)
    assert "problems of deepseek-v3 are timed" in capsys.readouterr().err
    assert any(task.derived is None for some in made for task in some)  # then what kernels declare
    declared = [some[0].problem.kernel.name for some in tune.tasks(parse("--target", "h200"), chip, False)]
    assert declared[:2] == ["mla_decode_kernel", "merge_splits_kernel"] and len(declared) == len(tune.KERNELS)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", *arguments])


def test_a_source_tree_without_package_metadata_will_do(compiler, tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert cli.main(["tune", "--target", "h20", "--kernel", "slots_kernel"]) == 0
    (entry, *_) = read_store(tmp_path / "h20.jsonl", "h20")
    assert entry.detail["versions"].keys() >= {"mla_kernels", "triton", "torch"}


def test_the_command_ends_with_its_budget(tmp_path):
    """The real command and the real compilers, on a store and a cache of its own."""
    environment = child_environment(MLA_KERNELS_CACHE=str(tmp_path))
    command = [sys.executable, "-m", "mla_kernels.autotune", "tune", "--target", "h200", "--budget", "6s"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "the budget of 6 s has ended before" in done.stderr, done.stderr
    seconds = int(re.search(r"\((\d+) s\)", " ".join(done.stderr.split()))[1])
    assert 6 <= seconds <= 60


def test_options():
    assert [options.seconds(text) for text in ("60", "60s", "5m", "1.5h")] == [60, 60, 300, 5400]
    assert options.assignment("a=3") == ("a", 3) and options.assignment("LAYOUT=plain") == ("LAYOUT", "plain")
