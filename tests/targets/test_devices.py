"""Parts that are sold: their figures, how a driver's name finds them, and what stands for an unknown one."""

from types import SimpleNamespace

import pytest
import torch

from mla_kernels import launch, placement
from mla_kernels.targets import devices
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.devices import DEVICES, find, relatives


def test_every_target_s_part_is_a_device_and_figures_are_its_own():
    assert all(DEVICES[chip.device] is chip for chip in CHIPS.values())
    for name, chip in DEVICES.items():
        target = CHIPS[chip.name]
        assert chip.device == name and devices.names(name)
        assert (chip.memory, chip.architecture, chip.vendor) == (target.memory, target.architecture, target.vendor)
        assert chip.capacity > 0 and chip.flops["bf16"] == chip.flops["fp16"]
    assert DEVICES["h200"].bandwidth == 4.8e12 and DEVICES["h200"].dot_cores == 132
    assert (DEVICES["rtx-4090"].name, DEVICES["rtx-4090"].dot_cores) == ("sm_89", 128)
    assert DEVICES["rtx-4090"].bandwidth == 1.008e12
    assert len({name for device in DEVICES for name in devices.names(device)}) == sum(
        len(devices.names(device)) for device in DEVICES
    )


def test_names():
    assert devices.device("h200") is DEVICES["h200"]
    assert devices.device("sm_90") is CHIPS["sm_90"]
    assert devices.device("NVIDIA H200") is devices.device("NVIDIA_H200") is DEVICES["h200"]
    assert devices.device("NVIDIA_H100_80GB_HBM3") is DEVICES["h100"]
    with pytest.raises(ValueError, match=r"device 'h300' is unknown; known are a100, .*h200.* and the targets sm_80"):
        devices.device("h300")


@pytest.mark.parametrize(
    "name, target, cores, memory, like",
    [
        ("NVIDIA H200", "sm_90", 132, 150 << 30, "h200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", 132, 85028896768, "h100"),
        ("NVIDIA A800-SXM4-80GB", "sm_80", 108, 80 << 30, "a100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", 188, 96 << 30, "rtx-pro-6000"),
        ("NVIDIA GB10", "sm_121", 48, 120 << 30, "gb10"),
        ("NVIDIA B300 SXM6 AC", "sm_103", 148, 275 << 30, "b300"),
        ("NVIDIA Thor", "sm_110", 20, 122 << 30, "thor"),
        ("NVIDIA A800 80GB PCIe", "sm_80", 108, 80 << 30, "a100-pcie"),
        ("NVIDIA L20", "sm_89", 92, 48 << 30, "l20"),
        ("NVIDIA H20", "sm_90", 78, 96 << 30, "h20"),
        ("NVIDIA GeForce RTX 4090", "sm_89", 128, 24 << 30, "rtx-4090"),
        ("AMD Instinct MI300X", "gfx942", 304, 206 << 30, "mi300x"),
        ("Ascend910B3", "ascend910b", 0, 0, "910b"),
    ],
)
def test_a_known_name_is_that_device(name, target, cores, memory, like):
    assert find(name, target, cores, memory) is DEVICES[like]


def test_an_unknown_name_takes_figures_by_cores_and_memory():
    chip = find("NVIDIA H900", "sm_90", 132, int(139.8 * 2**30))
    assert (chip.device, chip.part, chip.bandwidth) == ("nvidia-h900", "NVIDIA H900", 4.8e12)
    assert relatives(chip)[0] == ("h200", "h200-nvl")


def test_an_unknown_part_has_its_own_cores():
    chip = find("NVIDIA L30", "sm_89", 80, 24 << 30)
    assert (chip.dot_cores, chip.vector_cores, chip.capacity) == (80, 80, 24)
    assert chip.flops["bf16"] == pytest.approx(CHIPS["sm_89"].flops["bf16"] * 80 / 142)
    assert relatives(chip)[0] == () and relatives(chip)[1][0] in ("l4", "l20", "rtx-4090", "l40s", "l40")
    assert find("h200", "sm_80", 100, 1 << 34).device == "h200-sm_80"  # never the name of another part


def test_relatives_are_of_one_architecture_and_nearest_first():
    alike, family = relatives(DEVICES["h200"])
    assert alike == ("h200-nvl",) and family[-1] == "h100-pcie" and "h20" in family
    assert all(DEVICES[name].name == "sm_90" for name in (*alike, *family))


def test_a_target_without_tables_takes_its_generation_s():
    """Behind the parts of its own architecture."""
    assert relatives(DEVICES["b300"]) == ((), ("b200", "thor"))
    targets = [DEVICES[name].name for name in relatives(DEVICES["a10"])[1]]
    assert targets == sorted(targets) and set(targets) == {"sm_86", "sm_89"}


def _cuda(monkeypatch, name, capability, cores, memory, hip=None, architecture=""):
    part = SimpleNamespace(
        name=name, multi_processor_count=cores, total_memory=memory, gcnArchName=architecture + ":sramecc+"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: part)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    placement._device_chip.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    placement._device_chip.cache_clear()


def test_a_tensor_s_chip_has_its_device_s_figures(monkeypatch):
    _cuda(monkeypatch, "NVIDIA H200", (9, 0), 132, 150 << 30)
    chip = launch.chip_of(torch.device("cuda", 0))
    assert chip.name == "sm_90" and chip.bandwidth == 4.8e12 and chip.device == "h200"
    _cuda(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9), 128, 24 << 30)
    assert launch.chip_of(torch.device("cuda", 0)) is DEVICES["rtx-4090"]
    _cuda(monkeypatch, "NVIDIA A16", (8, 6), 10, 16 << 30)
    assert launch.chip_of(torch.device("cuda", 0)).name == "sm_86"
    _cuda(monkeypatch, "Orin", (8, 7), 16, 64 << 30)
    assert launch.chip_of(torch.device("cuda", 0)).name == "sm_86"  # the target whose limits hold
    _cuda(monkeypatch, "AMD Instinct MI325X", (9, 4), 304, 256 << 30, "6.4", "gfx942")
    assert launch.chip_of(torch.device("cuda", 0)) is DEVICES["mi325x"]
    _cuda(monkeypatch, "AMD Instinct MI210", (9, 0), 104, 64 << 30, "6.4", "gfx90a")
    with pytest.raises(NotImplementedError, match="gfx90a"):
        launch.chip_of(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "name, device", [("Ascend910B4", "910b4"), ("Ascend910_9392", "910c"), ("Ascend950PR_957b", "950pr")]
)
def test_an_npu_s_chip(monkeypatch, name, device):
    monkeypatch.setattr(torch, "npu", SimpleNamespace(get_device_name=lambda index: name), raising=False)
    placement._device_chip.cache_clear()
    assert launch.chip_of(SimpleNamespace(type="npu", index=0)) is DEVICES[device]
