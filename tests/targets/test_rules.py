"""Every rule's tile, for every declared case, fits the memories of every chip by its kernel's closed form."""

import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels import tiles
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.devices import DEVICES

SMALL = [name for name, chip in CHIPS.items() if chip.vendor == "nvidia" and chip.memory["shared"] <= 99 << 10]


@pytest.mark.parametrize("target", CHIPS)
def test_rules_fit(target):
    chip, checked = CHIPS[target], 0
    for kernel in KERNELS.values():
        if target in kernel.unsupported:
            continue
        for case in kernel.cases:
            for dtype in case.dtypes:
                tile = kernel.rule(chip, dtype, case.statics, case.sizes)
                assert tiles.misfit(kernel, chip, dtype, case.statics, tile, tile) == "", (kernel.name, case.name)
                checked += 1
    assert checked > 400


def test_99_kib_are_what_a_program_has_on_the_small_chips():
    """Of 100 on a multiprocessor, one is the system's: CUDA C++ Programming Guide."""
    assert SMALL == ["sm_86", "sm_89", "sm_120", "sm_121"]
    small = [name for name, chip in DEVICES.items() if chip.name in SMALL]
    assert {"rtx-3090", "rtx-4090", "l40s", "rtx-5090", "rtx-pro-6000", "gb10"} <= set(small)
    for name in small:
        assert (DEVICES[name].memory["shared"], DEVICES[name].core_shared) == (99 << 10, 100 << 10)
