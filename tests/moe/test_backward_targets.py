"""What fused_moe's backward pass and its neighbours ask of a device: on-chip memory, spills, tensor instructions,
traffic, launches."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.language import TRITON_VERSION
from mla_kernels.moe.dispatch.align import ALIGN
from mla_kernels.moe.dispatch.dispatch import DISPATCH, INVERSE, launch_order
from mla_kernels.moe.dispatch.permute import PAIR_DOTS, PERMUTE
from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.experts.grouped import Rows
from mla_kernels.moe.training.activate import ACTIVATE
from mla_kernels.moe.training.activation_gradient import ACTIVATION_GRADIENT, WEIGHT_PARTS
from mla_kernels.moe.training.bias_gradient import BIAS_GRADIENT
from mla_kernels.moe.training.projection import PROJECT, launch_project
from mla_kernels.moe.training.weight_gradient import WEIGHT_GRADIENT, launch_weight_gradient
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel, compile_many
from tests.moe.problems import layer
from tests.support import assert_close

PRODUCTS = (PROJECT, ACTIVATION_GRADIENT, WEIGHT_GRADIENT)
OTHERS = (DISPATCH, INVERSE, ALIGN, PERMUTE, PAIR_DOTS, ACTIVATE, BIAS_GRADIENT, WEIGHT_PARTS)
DEFAULTS = [
    (kernel, chip, dtype, case.statics, kernel.rule(chip, dtype, case.statics, case.sizes), case.name)
    for kernel in (*PRODUCTS, *OTHERS)
    for case in kernel.cases
    for dtype in case.dtypes
    for chip in CHIPS.values()
]


def test_every_default_tile_fits_by_the_closed_form():
    for kernel, chip, dtype, statics, tile, case in DEFAULTS:
        assert set(tile) == set(kernel.tiles)
        assert all(tile[name] in values for name, values in kernel.tiles.items()), f"{kernel.name} {case}: {tile}"
        for memory, used in kernel.memory(chip, dtype, statics, tile).items():
            assert used <= chip.memory[memory], f"{kernel.name} {case} {dtype} on {chip.name}: {memory}"


@pytest.mark.slow
def test_every_default_tile_compiles_within_limits():
    reports = compile_many(DEFAULTS)
    problems = [f"{report.target} {report.label}: {report.problem}" for report in reports if not report.ok]
    assert not problems, "\n".join(problems)
    assert not any(report.loop_spills for report in reports)


def on_hopper(kernel, name):
    case = next(case for case in kernel.cases if case.name == name)
    chip = CHIPS["sm_90"]
    tile = kernel.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(kernel, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert report.loop_spills == 0 and report.detail["async_copy"]
    assert report.detail["loop_tensor_shapes"] and all(
        "HGMMA" in shape for shape in report.detail["loop_tensor_shapes"]
    )
    return tile, report


@pytest.mark.parametrize(
    "kernel, name",
    [(WEIGHT_GRADIENT, "v2_lite_gate_up"), (WEIGHT_GRADIENT, "v2_lite_down"), (PROJECT, "v2_lite_4096")],
    ids=["gate_up", "down", "projection"],
)  # fmt: skip
def test_hopper_multiplies_large_tiles_from_shared_memory(kernel, name):
    """128 x 256 x 64 by wgmma, operands loaded asynchronously, tensor cores the busiest unit or nearly so."""
    tile, report = on_hopper(kernel, name)
    assert (tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]) == (128, 256, 64) and report.spills == 0
    bounds = report.detail["loop_bounds"]
    assert bounds["multiply_adds"] <= 1.05 * 128 * 256 * 64, bounds
    shared = 1.15 if (3, 7) <= TRITON_VERSION < (3, 9) else 1.17  # its memory, with the indices of gathered rows
    assert bounds["core"] <= shared * bounds["tensor"], bounds


def test_hopper_in_the_activations_gradient():
    tile, report = on_hopper(ACTIVATION_GRADIENT, "v2_lite_4096")
    bounds = report.detail["loop_bounds"]
    assert bounds["multiply_adds"] <= 1.05 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"], bounds


def sorted_rows(tokens, experts, top_k):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int()
    return Rows(*launch_order(ids, experts), top_k)


def test_traffic_of_the_weight_gradient():
    """Each tile of a gradient reads its rows' columns once and is written once."""
    from mla_kernels.targets.traffic import Traffic

    tokens, experts, top_k, left, right = 128, 2, 1, 256, 256
    grads, hidden = torch.randn(tokens * top_k, left).bfloat16(), torch.randn(tokens, right).bfloat16()
    with launch.on_cpu("interpret"):
        rows = sorted_rows(tokens, experts, top_k)
        with Traffic() as traffic:
            got = launch_weight_gradient(grads, hidden, rows, gather_left=False)
    bounds, tokens_of = rows.offsets.tolist(), rows.order.long() // top_k
    for expert in range(experts):
        mine = slice(bounds[expert], bounds[expert + 1])
        exact = grads[mine].double().t() @ hidden[tokens_of[mine]].double()
        assert_close(got[expert], exact, exact.bfloat16())
    minimum = 2 * (2 * tokens * right + tokens * left + experts * left * right)  # two tiles of 128 rows read hidden
    assert traffic.requested <= 1.15 * minimum, f"{traffic.requested / minimum:.2f} times the minimum"


def test_traffic_of_a_projection():
    from mla_kernels.targets.traffic import Traffic

    hidden, weight = torch.randn(64, 256).bfloat16(), torch.randn(2, 256, 256).bfloat16()
    with launch.on_cpu("interpret"):
        rows = sorted_rows(64, 2, 1)
        with Traffic() as traffic:
            launch_project(hidden, weight, rows)
    counts = rows.offsets.diff().tolist()
    columns = 256 // 128
    row_tiles = sum(-(-count // 32) for count in counts)
    minimum = 2 * (row_tiles * 32 * 256 * 4 + row_tiles * 256 * 256 + 64 * 256)
    assert columns and traffic.requested <= 1.2 * minimum, f"{traffic.requested / minimum:.2f} times the minimum"


LAUNCHES = {
    False: (5, 7),  # gate_up's results kept: order, projection, activation, down, combine; then without projection
    True: (4, 8),
}


@pytest.mark.parametrize("recompute", LAUNCHES)
def test_launches(monkeypatch, recompute):
    """Forward and backward launch what the documentation says, and no atomics are among them."""
    names = []
    run = launch.Kernel.launch

    def counted(kernel, *arguments):
        names.append(kernel.name)
        assert "atomic" not in kernel.source
        run(kernel, *arguments)

    monkeypatch.setattr(launch.Kernel, "launch", counted)
    problem = layer(5, 4, 2, 32, 24)
    leaves = [x.requires_grad_() for x in problem.inputs()[:4]]
    with launch.on_cpu("npu-emulated"):
        out = fused_moe(*leaves, problem.ids, recompute=recompute)
        forward = len(names)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (forward, len(names) - forward) == LAUNCHES[recompute], names
