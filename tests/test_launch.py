"""Kernel declarations, tile lookup, and what CPU tensors run on."""

import pytest
import torch

from mla_kernels import gpu_launch, launch
from mla_kernels.language import tl, triton
from mla_kernels.launch import Case, Cost, Kernel, Work
from mla_kernels.targets.chips import CHIPS, nvidia_chip


@triton.jit
def scale_kernel(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
        tl.store(y_ptr + offsets, x * factor, mask=offsets < size)


def declare(fn=scale_kernel, **changes):
    declaration = dict(
        arguments={"x_ptr": "*T", "y_ptr": "*T", "size": "i32", "factor": "fp32"},
        statics=(),
        tiles={"BLOCK": (128, 256), "num_warps": (4, 8)},
        rule=lambda chip, dtype, statics, sizes: {"BLOCK": 256, "num_warps": 4},
        memory=lambda chip, dtype, statics, tile: {},
        cost=lambda dtype, statics, sizes: Cost(sizes["size"], 8 * sizes["size"]),
        work=lambda dtype, statics, sizes, tile: Work(
            -(-sizes["size"] // tile["BLOCK"]), tile["BLOCK"], 8 * tile["BLOCK"]
        ),
        cases=(Case("small", {}, {"size": 1000}),),
        uses_dot=False,
    )
    try:
        return Kernel(fn, **(declaration | changes))
    finally:
        launch.KERNELS.pop("scale_kernel", None)  # not one of the package's


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_one_declaration_runs_everywhere(mode):
    kernel = declare()
    x, y = torch.randn(1000), torch.zeros(1000)
    with launch.on_cpu(mode):
        chip = launch.chip_of(x.device)
        tile = kernel.tile_for(chip, "fp32", {}, {"size": 1000})
        kernel.launch(chip, 4, (x, y, 1000, 2.0), {}, tile)
    assert torch.equal(y, 2 * x)


def test_grid_is_persistent_on_ascend_and_one_program_an_item_on_gpus():
    kernel = declare()
    assert kernel.programs(CHIPS["sm_90"], 1000) == 1000
    assert kernel.programs(CHIPS["ascend910b"], 1000) == CHIPS["ascend910b"].vector_cores
    assert kernel.programs(CHIPS["ascend910b"], 3) == 3


def test_gpu_options_are_left_out_on_ascend():
    """Products and sums are fused whatever Triton's default is: a launch, its key and a compile all say so."""
    kernel = declare()
    tile = {"BLOCK": 128, "num_warps": 8}
    for chip in ("sm_80", "sm_90", "sm_120", "gfx942"):
        assert kernel.options(CHIPS[chip], tile) == {"num_warps": 8, "enable_fp_fusion": True}
    assert kernel.options(CHIPS["ascend910b"], tile) == {}
    assert kernel.constexprs({}, tile) == {"BLOCK": 128}


def test_a_declaration_that_misnames_an_argument_is_refused():
    with pytest.raises(TypeError, match="scale_kernel"):
        declare(arguments={"y_ptr": "*T", "x_ptr": "*T", "size": "i32", "factor": "fp32"})
    with pytest.raises(TypeError, match="scale_kernel"):
        declare(tiles={"num_warps": (4,)})


def test_an_unsupported_chip_raises_its_reason():
    kernel = declare(unsupported={"sm_80": "no reason but this test"})
    with pytest.raises(NotImplementedError, match="no reason but this test"):
        kernel.tile_for(CHIPS["sm_80"], "fp32", {}, {"size": 1})


def launch_key(*args, experts=2, block=64):
    """The key under which a launch of these arguments is looked for."""
    launch = gpu_launch._written_launch(["*T", "*i32", "i32", "fp32"], {}, None, lambda key, *_: key)
    return launch(CHIPS["sm_90"], 1, args, {"E": experts}, {"BLOCK": block})


def test_the_launch_key_tells_apart_what_triton_specialises(monkeypatch):
    aligned, ids = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int32)
    args = [
        (aligned, ids, 5, 0.5),
        (aligned[1:], ids, 5, 0.5),
        (aligned, ids[1:], 5, 0.5),
        (aligned.view(torch.float16), ids, 5, 0.5),
        *((aligned, ids, number, 0.5) for number in (1, 2, 16, 1 << 32, (1 << 32) + 1)),
    ]
    keys = [launch_key(*values) for values in args]
    keys += [launch_key(*args[0], experts=3), launch_key(*args[0], block=32)]
    assert len(set(keys)) == len(keys)
    assert launch_key(aligned, ids, 5, 2.5) == keys[0]  # a float's value does not matter
    huge = torch.empty((1 << 30) + 64, dtype=torch.bfloat16)[:64]
    assert launch_key(huge, ids, 5, 0.5) == keys[0]
    monkeypatch.setattr(gpu_launch, "_ON_AMD", True)
    assert launch_key(huge, ids, 5, 0.5) != launch_key(*args[0])


def test_the_values_launched_are_the_arguments_with_addresses():
    x, ids = torch.empty(8), torch.empty(8, dtype=torch.int32)
    known, keys, seen = {}, [], []
    written = gpu_launch._written_launch(["i32", "*T", "fp32", "*i32"], known, None, lambda key, *_: keys.append(key))
    problem = CHIPS["sm_90"], 40, (3, x, 0.5, ids), {}, {"BLOCK": 64}
    written(*problem)
    values = 3, x.data_ptr(), 0.5, ids.data_ptr(), 64
    for together, handed in ((True, (values,)), (False, values)):
        known[keys[0]] = lambda *all: seen.append(all), ("rest",), together, (64,)
        written(*problem)
        assert seen.pop() == (40, 1, 1, 0, "rest", *handed) and len(keys) == 1


def test_on_cpu_refuses_unknown_modes_and_targets():
    with pytest.raises(
        ValueError, match="mode 'gpu': accepted are torch, interpret, npu-emulated, hopper-emulated, cuda"
    ):
        launch.on_cpu("gpu").__enter__()
    with pytest.raises(ValueError, match="target 'sm_42' is unknown; known targets: sm_80"):
        launch.on_cpu("interpret", "sm_42").__enter__()


def test_nvidia_devices_between_the_listed_ones_take_limits_that_hold():
    assert nvidia_chip(8, 7).name == "sm_86"  # no fp8 products, as on sm_87
    assert nvidia_chip(8, 0).name == "sm_80"
    assert nvidia_chip(10, 3).name == "sm_103"
    with pytest.raises(NotImplementedError, match=r"7\.5"):
        nvidia_chip(7, 5)
