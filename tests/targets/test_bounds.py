"""The clock bounds of NVIDIA loops: counted by hand on a few instructions and on whole loops of a listing."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mla_kernels.targets import loops

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


@pytest.mark.parametrize(
    "line, multiply_adds, tensor, shared",
    [
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", 64 * 64 * 32, 64 * 64 * 32 / 4096, 32 * (64 + 64) / 128),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", 64 * 64 * 8, 64 * 64 * 8 / 1024, 4 * 8 * (64 + 64) / 128),
        ("IGMMA.64x64x32.S8.S8 R24, R20, gdesc[UR4], R24", 64 * 64 * 32, 64 * 64 * 32 / 4096, 32 * 64 / 128),
    ],
)
def test_other_types_of_wgmma(modules, line, multiply_adds, tensor, shared):
    sass, bounds = modules
    found = bounds.bounds(loop(sass, line), warps=4)
    assert (found["multiply_adds"], found["tensor"], found["shared"]) == (multiply_adds, tensor, shared)


@pytest.mark.parametrize(
    "architecture, rate", [("80", 1024), ("86", 512), ("89", 512), ("90", 0.629 * 2048), ("121", 512)]
)
def test_rates_of_mma_sync(modules, architecture, rate):
    sass, bounds = modules
    half = bounds.bounds(loop(sass, "HMMA.16816.F32 R4, R8, R10, R4"), 4, architecture)
    assert half["tensor"] == pytest.approx(16 * 8 * 16 * 4 / rate, abs=0.1)
    byte = bounds.bounds(loop(sass, "QMMA.16832.F32.E4M3.E4M3 R4, R8, R10, R4"), 4, architecture)
    assert byte["multiply_adds"] == 2 * half["multiply_adds"] and byte["tensor"] == half["tensor"]
    slow = bounds.bounds(loop(sass, "HMMA.1688.F32.TF32 R4, R8, R10, R4"), 4, architecture)
    assert slow["multiply_adds"] == half["multiply_adds"] / 2 and slow["tensor"] == half["tensor"]


# A product on Ampere: before the loop (0x00..0x10), the loop (0x20..0x90), after it. 4 warps.
PRODUCT = """
\t\tFunction : kernel
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R10], [R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0040*/                   LDSM.16.MT88.2 R12, [R21] ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R8, R12, R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R28, R8, R14, R28 ;
        /*0070*/                   IADD3 R2, R2, 0x80, RZ ;
        /*0080*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*0090*/               @P0 BRA 0x20 ;
        /*00a0*/                   STG.E [R2.64], R24 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""

# A softmax between two products on Hopper, one with its first operand in registers; 8 warps. It starts at 0x10.
SOFTMAX = """
\t\tFunction : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*0030*/                   FMNMX R4, R4, R5, !PT ;
        /*0040*/                   FFMA R6, R6, R7, -R4 ;
        /*0050*/                   MUFU.EX2 R6, R6 ;
        /*0060*/                   MUFU.EX2 R8, R8 ;
        /*0070*/                   FADD R9, R6, R8 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R20, R6, R8 ;
        /*0090*/                   STS.128 [R30], R20 ;
        /*00a0*/                   HGMMA.64x256x16.F32.BF16 R32, R20, gdesc[UR8], R32 ;
        /*00b0*/                   IMAD R2, R2, R3, R4 ;
        /*00c0*/              @!P1 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


def bounds_of(modules, listing, warps, architecture):
    """As the compiler process finds them: parse, take the main loop, bound it."""
    sass, bounds = modules
    instructions = sass.parse(listing)
    kinds = [sass.kind(instruction) for instruction in instructions]
    main = loops.main_loop(kinds, sass.loops(instructions))
    return bounds.bounds([instructions[i] for i in main], warps, architecture)


def test_a_whole_loop_by_hand_on_ampere(modules):
    found = bounds_of(modules, PRODUCT, 4, "80")
    assert found["multiply_adds"] == 2 * 16 * 8 * 16 * 4
    assert found["issue"] == 8 * 4 / 4
    assert found["tensor"] == 2 * 16 * 8 * 16 * 4 / 1024 == 16
    assert found["shared"] == (16 + 16 + 8) * 32 * 4 / 128 == 40  # a copy of 16 bytes, four and two 8 x 8 matrices
    assert found["integer"] == 2 * 4 / 2
    assert found["float"] == found["special"] == found["shuffle"] == found["multiply"] == 0
    assert (found["core"], found["serial"]) == (40, 16 + 40)
    assert bounds_of(modules, PRODUCT, 4, "89")["tensor"] == 32


def test_a_whole_loop_by_hand_on_hopper(modules):
    found = bounds_of(modules, SOFTMAX, 8, "90")
    assert found["multiply_adds"] == 2 * 64 * 16 * (64 + 256)
    assert found["tensor"] == 2 * 64 * 16 * (64 + 256) / 2048 == 320
    assert found["shared"] == (2 * 2 * 16 * (64 + 64) + 2 * 2 * 16 * 256 + 16 * 32 * 8) / 128 == 224
    assert found["issue"] == 12 * 8 / 4
    assert found["special"] == 2 * 8 / 0.5
    assert found["shuffle"] == 8
    assert found["float"] == 2 * 8 / 4  # FFMA, FADD
    assert found["integer"] == 2 * 8 / 2  # FMNMX, F2FP
    assert found["multiply"] == 8 / 2
    assert (found["core"], found["serial"]) == (320, 320 + 224)


def test_fp32_on_ampere_has_half_the_lanes(modules):
    sass, bounds = modules
    lines = loop(sass, "FFMA R1, R2, R3, R1", "FFMA R4, R2, R3, R4")
    clocks = {name: bounds.bounds(lines, 8, name)["float"] for name in bounds.ARCHITECTURES}
    assert clocks.pop("80") == 8 and set(clocks.values()) == {4}
