"""Every kernel on every target: the real compilers take the tile that a launch would take.

Each kernel's first case in its first dtype always runs, on every chip; its first case in the other dtypes and its other
cases in bfloat16 on one chip of each kind. ``--slow`` runs all of the matrix and holds the README's table against it.
"""

from pathlib import Path

import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels import check
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many

ONE_OF_EACH_KIND = ("sm_90", "gfx942", "ascend910b", "ascend950")
README = Path(__file__).parents[2] / "README.md"


def problems(reports):
    return [f"{report.target} {report.label}: {report.problem}" for report in check.failures(reports)]


@pytest.mark.parametrize("chip", CHIPS)
def test_default_tiles_compile_without_spills_inside_every_limit(chip):
    first = {kernel.name: kernel.cases[0] for kernel in KERNELS.values()}

    def is_wanted(request):
        case = first[request.kernel.name]
        if chip in ONE_OF_EACH_KIND:
            return request.dtype == "bf16" or request.case == case.name
        return request.dtype == case.dtypes[0] and request.case == case.name

    wanted = [request for request in check.requests([chip]) if is_wanted(request)]
    assert {request.kernel.name for request in wanted} == set(KERNELS)
    assert problems(compile_many(wanted)) == []


@pytest.mark.slow
def test_the_whole_matrix_and_the_table_in_the_readme():
    reports = check.run()
    assert problems(reports) == []
    text = README.read_text()
    assert check.replace_matrix(text, check.support_markdown(reports)) == text, "run check --markdown README.md"


def test_the_readme_has_a_row_for_each_kernel_and_a_column_for_each_target():
    text = README.read_text()
    table = text[text.index(check.MATRIX_START) : text.index(check.MATRIX_END)]
    assert all(f"`{name}`" in table for name in KERNELS)
    assert all(f" {name} " in table.splitlines()[1] for name in CHIPS)
