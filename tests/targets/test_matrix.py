"""Every kernel on every target: the real compilers take the tile that a launch would take.

Each kernel's first case always runs on an NVIDIA and on an Ascend chip; every second of its other cases on one chip in
one dtype, all of these by turns. ``--slow`` runs all of the matrix and holds the table of docs/targets.md against it.
"""

import functools
from pathlib import Path

import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels import check
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_many

ALWAYS = ("sm_90", "ascend910b")
PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def problems(reports):
    return [f"{report.target} {report.label}: {report.problem}" for report in check.failures(reports)]


@functools.cache
def cells():
    """What runs: chip -> requests."""
    found = {chip: [] for chip in CHIPS}
    for kernel in KERNELS.values():
        for turn, case in enumerate((*kernel.cases[:1], *kernel.cases[1::2])):
            dtype = case.dtypes[turn % len(case.dtypes)]
            chips = ALWAYS if turn == 0 else [min(CHIPS, key=lambda name: len(found[name]))]
            for chip in chips:
                found[chip] += check.requests([chip], [kernel.name], [dtype], [case.name])
    assert all({request.kernel.name for request in found[chip]} == set(KERNELS) for chip in ALWAYS)
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_default_tiles_compile_without_spills_inside_every_limit(chip):
    assert problems(compile_many(cells()[chip])) == []


@pytest.mark.slow
def test_the_whole_matrix_and_the_table_on_the_page_of_targets():
    reports = check.run()
    assert problems(reports) == []
    text = PAGE.read_text()
    assert check.replace_matrix(text, check.support_markdown(reports)) == text, "run check --markdown docs/targets.md"


def test_the_page_of_targets_has_a_row_for_each_kernel_and_a_column_for_each_target():
    text = PAGE.read_text()
    table = text[text.index(check.MATRIX_START) : text.index(check.MATRIX_END)]
    assert all(f"`{name}`" in table for name in KERNELS)
    assert all(f" {name} " in table.splitlines()[1] for name in CHIPS)
