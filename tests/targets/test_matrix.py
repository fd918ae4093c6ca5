"""Every kernel on every target: the real compilers take the tile that a launch would take.

Each kernel runs on a GPU and on an Ascend chip, two of its cases where it has so many; chips and dtypes take turns.
``--slow`` runs all of the matrix and holds the table of docs/targets.md against it.
"""

import functools
from pathlib import Path

import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels import check
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import buildable, compile_many

TARGETS = [name for name, chip in CHIPS.items() if buildable(chip)]
"""All, but with an old Triton those that its tools do not know."""
FAMILIES = [[name for name in TARGETS if CHIPS[name].is_gpu == gpu] for gpu in (True, False)]
LONG = {("sparse_mla_pair_kernel", "ascend950")}
"""Left to ``--slow``: 20 s of a processor; another chip of the family takes the turn."""
PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def problems(reports):
    return [f"{report.target} {report.label}: {report.problem}" for report in check.failures(reports)]


@functools.cache
def cells():
    """What runs: chip -> requests."""
    found = {chip: [] for chip in TARGETS}
    for number, kernel in enumerate(KERNELS.values()):
        for place, family in enumerate(FAMILIES):
            chips = [chip for chip in family if chip not in kernel.unsupported and (kernel.name, chip) not in LONG]
            if chips:
                case = kernel.cases[place % len(kernel.cases)]
                dtype = case.dtypes[number % len(case.dtypes)]
                chip = min(chips, key=lambda name: len(found[name]))
                found[chip] += check.requests([chip], [kernel.name], [dtype], [case.name])
    return found


def test_each_kernel_is_compiled_for_a_gpu_and_for_an_ascend_chip():
    for family in FAMILIES:
        compiled = {request.kernel.name for chip in family for request in cells()[chip]}
        assert compiled == {name for name, kernel in KERNELS.items() if set(family) - set(kernel.unsupported)}
        assert all(cells()[chip] for chip in family)


@pytest.mark.parametrize("chip", TARGETS)
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
