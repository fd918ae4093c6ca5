"""The clock bounds of a Hopper loop: by hand on a few instructions, and on the decode kernel's loop."""

import importlib.util
import sys
from pathlib import Path

import pytest

TARGETS = Path(__file__).parents[2] / "mla_kernels" / "targets"


@pytest.fixture(scope="module")
def modules():
    """sass and bounds as the compiler process loads them: as plain files."""
    loaded = {}
    before = sys.modules.get("sass")
    for name in ("sass", "bounds"):
        spec = importlib.util.spec_from_file_location(name, TARGETS / f"{name}.py")
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded["sass"], loaded["bounds"]
    del sys.modules["bounds"], sys.modules["sass"]
    if before is not None:
        sys.modules["sass"] = before


def loop(sass, *lines):
    return [sass.Instruction(16 * i, "", *line.split(" ", 1)) for i, line in enumerate(lines)]


def test_a_wgmma_from_shared_memory(modules):
    sass, bounds = modules
    found = bounds.bounds(loop(sass, "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24"), warps=8)
    assert found["multiply_adds"] == 2 * 64 * 256 * 16  # two warp groups
    assert found["tensor"] == 2 * 64 * 256 * 16 / 2048 == 256
    assert found["shared"] == 2 * 16 * (256 + 64) * 2 / 128 == 160
    assert (found["core"], found["serial"]) == (256, 256 + 160)


def test_the_first_operand_in_registers_asks_nothing_of_shared_memory(modules):
    sass, bounds = modules
    found = bounds.bounds(loop(sass, "HGMMA.64x256x16.F32.BF16 R24, R20, gdesc[UR4], R24"), warps=4)
    assert found["shared"] == 16 * 256 * 2 / 128


def test_other_units(modules):
    sass, bounds = modules
    lines = ("MUFU.EX2 R1, R1", "FMUL R1, R1, R2", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "SHFL.BFLY PT, R1, R2")
    found = bounds.bounds(loop(sass, *lines), warps=8)
    assert (found["issue"], found["special"], found["float"], found["shuffle"]) == (8, 16, 2, 8)
    assert found["shared"] == 16 * 32 * 8 / 128
    assert found["core"] == found["serial"] == 32


def test_ampere_instructions(modules):
    sass, bounds = modules
    found = bounds.bounds(loop(sass, "HMMA.16816.F32.BF16 R4, R8, R10, R4"), warps=4)
    assert found["multiply_adds"] == 16 * 8 * 16 * 4
    assert found["tensor"] == pytest.approx(16 * 8 * 16 * 4 / (0.629 * 2048), abs=0.1)
