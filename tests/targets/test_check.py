"""The command line: the compile matrix, single compilations, exit codes."""

import json
import logging
import subprocess
import sys

import pytest

from mla_kernels import __main__ as command
from mla_kernels import check, launch, tiles
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work
from mla_kernels.targets import compile as compile_module
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compiler_version
from mla_kernels.targets.report import Report
from mla_kernels.targets.service import ToolchainMissing


@triton.jit
def check_for_test_kernel(x_ptr, size, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size, other=0.0) + OFFSET, mask=offsets < size)


@pytest.fixture(autouse=True)
def registry(monkeypatch, tmp_path_factory):
    """Only the kernel of this file is declared."""
    kernels = {}
    for module in (launch, check):
        monkeypatch.setattr(module, "KERNELS", kernels)
    monkeypatch.setenv("MLA_KERNELS_CACHE", str(tmp_path_factory.getbasetemp() / "check"))
    Kernel(
        check_for_test_kernel,
        arguments={"x_ptr": "*T", "size": "i32"},
        statics=("OFFSET",),
        tiles={"BLOCK": (64, 128), "num_warps": (4,)},
        rule=lambda chip, dtype, statics, sizes: {"BLOCK": 128, "num_warps": 4},
        memory=lambda chip, dtype, statics, tile: {},
        cost=lambda dtype, statics, sizes: Cost(1.0, 1.0),
        work=lambda dtype, statics, sizes, tile: Work(1, 1.0, 1.0),
        cases=(
            Case("one", {"OFFSET": 1}, {"size": 100}),
            Case("case two", {"OFFSET": 2}, {"size": 100}, dtypes=("fp32",)),
        ),
        uses_dot=False,
        unsupported={"gfx950": "a made-up gap"},
    )
    return kernels


def report(target="sm_90", kernel="k", dtype="bf16", case="one", **fields):
    fields = {"compiled": True, "memory": {"shared": 50}, "limits": {"shared": 100}} | fields
    return Report(target, kernel, dtype, case, {"BLOCK": 64}, **fields)


def test_requests_of_the_whole_matrix_and_of_parts():
    assert len(check.requests()) == len(CHIPS) * (3 + 1) == 56
    assert len(check.requests(targets=["sm_90", "ascend950"], dtypes=["bf16", "fp16"])) == 4
    assert [request.case for request in check.requests(targets=["sm_80"], cases=["case two"])] == ["case two"]
    assert check.requests(kernels=["other"]) == []


def test_check_prints_the_matrix(capsys, tmp_path):
    saved = tmp_path / "reports.json"
    arguments = ["check", "--target", "sm_90", "gfx950", "--target", "ascend910b", "--json", str(saved)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert "check_for_test_kernel" in printed.out and "none" in printed.out
    assert "12 compilations" in printed.err and "8 ok, 0 failed, 4 declared unsupported" in printed.err
    rows = json.loads(saved.read_text())
    assert len(rows) == 12 and sum(row["ok"] for row in rows) == 8
    made_by = compiler_version("gpu"), compiler_version("ascend")
    assert {row["compiler"] for row in rows} == {*made_by, ""}  # "" where nothing was compiled
    assert made_by[0] == f"triton {triton.__version__}" and made_by[1].startswith("triton-ascend ")
    assert f"by {'; '.join(made_by)}" in " ".join(printed.out.split())
    assert f"12 compilations by {'; '.join(made_by)} in" in printed.err


def test_check_fails_if_a_cell_fails(capsys, monkeypatch):
    bad = report(compiled=False, reason="no such thing", target="sm_90")
    monkeypatch.setattr(check, "compile_many", lambda wanted, progress: [report(), bad])
    assert command.main(["check", "--target", "sm_90"]) == 1
    assert tiles.LOG.isEnabledFor(logging.WARNING) and not tiles.LOG.disabled
    printed = capsys.readouterr()
    assert "no such thing" in printed.err and "error" in printed.out


@pytest.mark.parametrize(
    "fields, said, shown",
    [
        ({}, "", "50%"),
        ({"spills": 3}, "", "50%"),
        ({"spills": 3, "loop_spills": 2}, "2 spills in the main loop", "spills"),
        ({"memory": {"shared": 101}}, "shared 101 of 100 bytes", "memory"),
        ({"traps": 1}, "1 traps: the kernel stops instead of computing", "trap"),
        ({"compiled": False, "reason": "because"}, "because", "error"),
        ({"compiled": False, "reason": "gap", "unsupported": True}, "gap", "none"),
    ],
)
def test_what_a_report_says(fields, said, shown):
    made = report(**fields)
    assert made.problem == said and made.ok == (not said)
    assert shown in check.cell([made])


def test_support_markdown():
    reports = [
        report(dtype="bf16"),
        report(dtype="bf16", case="two", loop_spills=1),
        report(dtype="fp32"),
        report(target="gfx942", compiled=False, reason="LDS", dtype="bf16"),
        report(target="gfx950", compiled=False, unsupported=True, reason="a gap", dtype="bf16"),
    ]
    text = check.support_markdown(reports)
    assert text.splitlines() == [
        check.MATRIX_START,
        "| op | kernel | sm_90 | gfx942 | gfx950 |",
        "| --- | --- | --- | --- | --- |",
        "|  | `k` | fp32 | no | no |",
        "",
        f"Compiled by {compiler_version('gpu')}.",
        "- `k` on gfx950: a gap",
        check.MATRIX_END,
    ]


def test_replace_matrix():
    old = f"before\n{check.MATRIX_START}\nold\n{check.MATRIX_END}\nafter\n"
    new = check.support_markdown([report()])
    replaced = check.replace_matrix(old, new)
    assert replaced == f"before\n{new}\nafter\n"
    assert check.replace_matrix(replaced, new) == replaced
    with pytest.raises(ValueError, match="support matrix"):
        check.replace_matrix("nothing here", new)


def test_markdown_to_a_file_needs_the_whole_matrix(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["check", "--target", "sm_90", "--markdown", str(tmp_path / "README.md")])
    assert stopped.value.code == 2
    assert "whole matrix" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, accepted",
    [
        (["check", "--target", "sm_70"], "sm_80"),
        (["check", "--kernel", "nothing"], "check_for_test_kernel"),
        (["check", "--dtype", "int8"], "fp32"),
        (["check", "--case", "three"], "case two"),
        (["check", "--case", "case two", "--dtype", "bf16"], "no declared kernel"),
        (["compile", "--kernel", "check_for_test_kernel", "--target", "sm_90", "--tile", "BLOK=3"], "BLOCK, num_warps"),
        (["compile", "--kernel", "check_for_test_kernel", "--target", "sm_90", "--tile", "BLOCK"], "NAME=VALUE"),
        (["compile", "--kernel", "check_for_test_kernel", "--target", "sm_90", "--tile", "BLOCK=²"], "NAME=VALUE"),
        (["compile", "--kernel", "check_for_test_kernel", "--target", "sm_90", "--output", __file__], "is no folder"),
        (["check", "--json", "nowhere/all.json"], "there is no folder 'nowhere'"),
        (["check", "--markdown", "nowhere/page.md"], "--markdown: [Errno 2] No such file"),
        (["check", "--markdown", __file__], "--markdown: the document has no lines"),
    ],
)
def test_unknown_names_exit_2_and_list_the_accepted(arguments, accepted, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert accepted in capsys.readouterr().err


def test_compile_writes_the_artefacts(tmp_path, capsys):
    arguments = [
        "compile",
        "--kernel",
        "check_for_test_kernel",
        "--target",
        "sm_80",
        "--dtype",
        "fp32",
        "--case",
        "case two",
    ]
    assert command.main([*arguments, "--tile", "BLOCK=64", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "BLOCK=64" in printed and "ok" in printed and "registers" in printed
    assert (tmp_path / "check_for_test_kernel.fp32.case_two.sm_80.sass").read_text().count("EXIT")


def test_a_missing_toolchain_is_an_error(monkeypatch, capsys):
    from mla_kernels.targets.compile import compiler_version

    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", "/nowhere/python")
    compiler_version.cache_clear()
    assert command.main(["check", "--target", "ascend950"]) == 2
    assert "/nowhere/python" in capsys.readouterr().err
    compiler_version.cache_clear()


def test_without_the_ascend_toolchain_the_rest_is_compiled(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", "/nowhere/python")
    compiler_version.cache_clear()
    saved = tmp_path / "reports.json"
    known = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"]  # to every Triton
    targets = [*known, "ascend910b", "ascend910c", "ascend950"]
    assert command.main(["check", "--target", *targets, "--json", str(saved)]) == 2
    printed = capsys.readouterr()
    row = next(line for line in printed.out.splitlines() if line.split()[:1] == ["one"])
    assert row.count("%") == 6 and row.count("none") == 1 and printed.out.count("triton-ascend") == 3 * 2
    assert f"28 compilations by {compiler_version('gpu')} in" in printed.err and "24 ok, 0 failed" in printed.err
    said = (
        "Not checked: ascend910b, ascend910c, ascend950: no Ascend toolchain at /nowhere/python: `make .venv-ascend/.re"
    )
    assert printed.err.count("/nowhere/python") == 1 and said in printed.err
    rows = json.loads(saved.read_text())
    assert {row["target"] for row in rows if row["missing"]} == {"ascend910b", "ascend910c", "ascend950"}
    assert all("no Ascend toolchain" in row["problem"] for row in rows if row["missing"]) and len(rows) == 40

    monkeypatch.setattr(check, "compile_many", lambda wanted, progress: [report(compiled=False) for _ in wanted])
    assert command.main(["check"]) == 1  # a kernel that fails is worse
    page = tmp_path / "page.md"
    page.write_text(f"{check.MATRIX_START}\n{check.MATRIX_END}\n")
    assert command.main(["check", "--markdown", str(page)]) == 2
    assert page.read_text() == f"{check.MATRIX_START}\n{check.MATRIX_END}\n"
    compiler_version.cache_clear()


def test_targets_that_an_old_triton_does_not_know_are_said(monkeypatch, capsys):
    monkeypatch.setattr(compile_module, "TRITON_VERSION", (3, 6))
    said = "no toolchain for sm_110: Triton 3.7 or newer is needed"
    assert command.main(["check", "--target", "sm_110"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert command.main(["check", "--target", "sm_80", "sm_110", "--dtype", "bf16"]) == 2
    printed = capsys.readouterr()
    assert "1 ok, 0 failed" in printed.err and "Not checked: sm_110" in printed.err and "no Triton" in printed.out
    with pytest.raises(ToolchainMissing, match=said):
        check.run(targets=["sm_110"])


def test_declared_cases_warn_of_no_tiles(caplog, tmp_path):
    kernel = ["--kernel", "check_for_test_kernel"]
    with caplog.at_level(logging.INFO, logger=tiles.LOG.name):
        assert command.main(["check", *kernel, "--target", "sm_80"]) == 0
        assert command.main(["compile", *kernel, "--target", "sm_89", "--output", str(tmp_path)]) == 0
        check.run(targets=["sm_90"])
    assert not caplog.records


def test_missing_rich_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert command.main(["check", "--target", "sm_90"]) == 2
    assert "pip install 'mla_kernels[tune]'" in capsys.readouterr().err


def test_info(capsys):
    assert command.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in (*CHIPS, "check_for_test_kernel", "MLA_KERNELS_CACHE", "triton-ascend 3.2.0")
    )


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "mla_kernels", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gpu toolchain: triton" in done.stdout
