"""Chip figures, against the compilers' own tables where those can be asked."""

import re
import subprocess
from pathlib import Path

import pytest

from mla_kernels.targets import chips, service
from mla_kernels.targets.chips import CHIPS


def test_fourteen_targets():
    assert list(CHIPS) == [
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121",
        "gfx942", "gfx950", "ascend910b", "ascend910c", "ascend950",
    ]  # fmt: skip
    assert all(chip.source and chip.name == name for name, chip in CHIPS.items())
    assert hash(CHIPS["sm_90"]) != hash(CHIPS["sm_80"])


def test_unknown_chip_lists_the_known():
    with pytest.raises(ValueError, match=r"'sm_70' is unknown; known targets: sm_80, .*, ascend950"):
        chips.chip("sm_70")


@pytest.mark.parametrize(
    "capability, name",
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_103"), ((12, 0), "sm_120"), ((12, 1), "sm_121"),
    ],
)  # fmt: skip
def test_nvidia_chip(capability, name):
    assert chips.nvidia_chip(*capability).name == name


def test_other_nvidia_devices_are_refused():
    with pytest.raises(NotImplementedError, match=r"capability 7\.5: 8\.0 and newer are accepted"):
        chips.nvidia_chip(7, 5)
    with pytest.raises(NotImplementedError, match=r"capability 13\.0: 8\.0 to 12\.1 are known"):
        chips.nvidia_chip(13, 0)


def test_thor_needs_a_triton_that_knows_it(monkeypatch):
    monkeypatch.setattr(chips, "TRITON_VERSION", (3, 7))
    assert chips.nvidia_chip(11, 0).name == "sm_110"
    with pytest.raises(NotImplementedError, match=r"10\.1: Triton compiles for this chip as 11\.0"):
        chips.nvidia_chip(10, 1)
    monkeypatch.setattr(chips, "TRITON_VERSION", (3, 6))
    with pytest.raises(NotImplementedError, match=r"11\.0: Triton 3\.7 or newer is needed"):
        chips.nvidia_chip(11, 0)


def test_generations():
    """A part takes its generation's instructions and its own memory, and sm_86 has no fp8."""
    own = {name: chip for name, chip in CHIPS.items() if chip.generation != chip.architecture}
    assert {name: chip.generation for name, chip in own.items()} == {
        "sm_86": "89", "sm_103": "100", "sm_110": "100", "sm_121": "120"
    }  # fmt: skip
    for name, chip in own.items():
        like = CHIPS[f"sm_{chip.generation}"]
        assert chip.memory == like.memory
        assert (chip.dot_from_shared, chip.tensor_memory) == (like.dot_from_shared, like.tensor_memory)
        assert chip.dot_e4m3 == (name != "sm_86")
    small = {name for name, chip in CHIPS.items() if chip.vendor == "nvidia" and chip.memory["shared"] == 99 << 10}
    assert small == {"sm_86", "sm_89", "sm_120", "sm_121"}


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.vendor == "ascend"])
def test_ascend_figures_are_the_compiler_s(name):
    """The Ascend compiler prints its platform table when asked to annotate an empty module; sizes are in bits."""
    chip = CHIPS[name]
    environment = Path(service.ascend_python()).parent.parent
    suffix = "-a5" if name == "ascend950" else ""
    (tool,) = environment.glob(f"lib/python3*/site-packages/ascendnpuir/bin/bishengir-opt{suffix}")
    command = [tool, f"--hacc-append-device-spec=target={chip.architecture}"]
    printed = subprocess.run(command, input="module {}", capture_output=True, text=True, check=True).stdout
    table = {key: int(value) for key, value in re.findall(r'dl_entry<"(\w+)", (\d+) :', printed)}
    assert chip.memory == {memory: table[f"{memory}_SIZE"] // 8 for memory in ("UB", "L1", "L0A", "L0B", "L0C")}
    assert (chip.dot_cores, chip.vector_cores) == (table["CUBE_CORE_COUNT"], table["VECTOR_CORE_COUNT"])


@pytest.mark.parametrize(
    "name, registers, shared, warps, programs",
    [
        ("sm_90", 128, 0, 4, 4),  # 64 Ki registers / (128 x 128 threads)
        ("sm_90", 255, 0, 8, 1),
        ("sm_90", 32, 100 * 1024, 4, 2),  # 228 KiB / 101 KiB
        ("sm_90", 32, 0, 1, 32),  # the most programs
        ("sm_89", 32, 0, 8, 6),  # 1536 threads / 256
        ("sm_86", 32, 0, 1, 16),  # the most programs
        ("sm_110", 32, 0, 1, 24),
        ("gfx942", 128, 0, 4, 4),  # 4 waves on each of 4 SIMDs
        ("gfx942", 64, 40 * 1024, 4, 1),  # 64 KiB / 40 KiB
    ],
)
def test_resident_programs(name, registers, shared, warps, programs):
    assert CHIPS[name].resident(registers, shared, warps) == programs
