"""What mla_prefill asks of a device: on-chip memory, spills, tensor instructions, clock bounds, traffic."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.prefill.backward import MLA_PREFILL_KEY_GRADIENT, MLA_PREFILL_QUERY_GRADIENT
from mla_kernels.attention.prefill.backward_rows import MLA_PREFILL_DELTA, MLA_PREFILL_ROPE_GRADIENT
from mla_kernels.attention.prefill.forward import MLA_PREFILL
from mla_kernels.language import TRITON_VERSION
from mla_kernels.launch import DTYPE_NAMES
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel, compile_many
from tests.attention.prefill_problems import make

GRADIENTS = (MLA_PREFILL_KEY_GRADIENT, MLA_PREFILL_QUERY_GRADIENT)
KERNELS = (MLA_PREFILL, *GRADIENTS, MLA_PREFILL_DELTA, MLA_PREFILL_ROPE_GRADIENT)
DEFAULTS = [
    (kernel, chip, dtype, case.statics, kernel.rule(chip, dtype, case.statics, case.sizes), case.name)
    for kernel in KERNELS
    for case in kernel.cases
    for dtype in case.dtypes
    for chip in CHIPS.values()
]


def test_every_default_tile_fits_by_the_closed_form():
    for kernel, chip, dtype, statics, tile, case in DEFAULTS:
        assert set(tile) == set(kernel.tiles)
        assert all(tile[name] in values for name, values in kernel.tiles.items())
        for memory, used in kernel.memory(chip, dtype, statics, tile).items():
            assert used <= chip.memory[memory], f"{kernel.name} {case} {dtype} on {chip.name}: {memory}"


def test_the_tile_does_not_depend_on_the_batch():
    for kernel in (MLA_PREFILL, *GRADIENTS):
        for case in kernel.cases:
            for chip in CHIPS.values():
                assert kernel.rule(chip, "bf16", case.statics, {"heads": 1}) == kernel.rule(
                    chip, "bf16", case.statics, case.sizes
                )


def test_cost_counts_what_the_causal_mask_leaves():
    case = next(case for case in MLA_PREFILL.cases if case.name == "v3")
    cost = MLA_PREFILL.cost("bf16", case.statics, case.sizes)
    assert cost.flops == 2 * 128 * (4096 * 4097 / 2) * (192 + 128)
    assert cost.bytes == 4096 * (128 * ((192 + 128) * 2 + 4) + (128 * (128 + 128) + 64) * 2)


@pytest.mark.parametrize("name", ["v3", "v3_context", "expanded_rope"])
def test_bounds_of_the_forward_loop_on_hopper(name):
    """128 x 64 tiles, 8 warps, two stages: per 64 queries and 64 keys at most 979 clocks by the busiest unit, 1480
    without overlap, and no more matrix work than the operation asks.

    The loop reported is the masked one, at the diagonal. The loop over keys that all rows see has the same tensor
    instructions and fewer others, for v3 398 instructions in place of 561: these bounds hold for it all the more.
    """
    case = next(case for case in MLA_PREFILL.cases if case.name == name)
    chip = CHIPS["sm_90"]
    tile = MLA_PREFILL.rule(chip, "bf16", case.statics, case.sizes)
    assert tile == {"BLOCK_M": 128, "BLOCK_N": 64, "PERSISTENT": 0, "num_warps": 8, "num_stages": 2}
    report = compile_kernel(MLA_PREFILL, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert report.spills == 0 and report.detail["async_copy"]
    bounds = report.detail["loop_bounds"]
    assert bounds["core"] / 2 <= 979 and bounds["serial"] / 2 <= 1480
    assert bounds["multiply_adds"] <= 1.10 * 128 * 64 * (192 + 128)
    assert all("HGMMA" in shape for shape in report.detail["loop_tensor_shapes"])


@pytest.mark.parametrize(
    "kernel, products, core, serial",
    [(MLA_PREFILL_KEY_GRADIENT, 2 * 192 + 2 * 128, 900, 1600), (MLA_PREFILL_QUERY_GRADIENT, 2 * 192 + 128, 750, 1300)],
    ids=["keys", "queries"],
)
def test_bounds_of_the_backward_loops_on_hopper(kernel, products, core, serial):
    """128 x 32 tiles, 8 warps, two stages: clocks per 64 x 32 pairs of a query and a key. With Triton 3.9, where 32
    queries spill, keys meet 16 at a time."""
    case = next(case for case in kernel.cases if case.name == "v3")
    chip = CHIPS["sm_90"]
    tile = kernel.rule(chip, "bf16", case.statics, case.sizes)
    streamed = 32
    if TRITON_VERSION >= (3, 9) and kernel is MLA_PREFILL_KEY_GRADIENT:
        streamed, core, serial = 16, 650, 980
    assert {tile["BLOCK_M"], tile["BLOCK_N"]} == {128, streamed} and tile["num_stages"] == 2
    report = compile_kernel(kernel, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    outside_the_loop = 2 if kernel is MLA_PREFILL_KEY_GRADIENT and TRITON_VERSION < (3, 9) else 0
    assert report.spills <= outside_the_loop and report.detail["async_copy"]
    bounds = report.detail["loop_bounds"]
    assert bounds["core"] / 2 <= core and bounds["serial"] / 2 <= serial
    assert bounds["multiply_adds"] <= 1.10 * 128 * streamed * products
    assert all("HGMMA" in shape for shape in report.detail["loop_tensor_shapes"])


@pytest.mark.slow
def test_every_default_tile_compiles_within_limits():
    problems = [
        f"{report.target} {report.label}: {report.problem}" for report in compile_many(DEFAULTS) if not report.ok
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("causal", [True, False])
def test_traffic(causal):
    """Each tile of queries reads its keys once: what the tiles of 128 queries make necessary, and little more."""
    from mla_kernels.targets.traffic import Traffic

    problem = make(
        [(300, 300), (5, 200)], heads=2, key=128, rope=64, value=128, dtype=torch.bfloat16, causal=causal, poison=False
    )
    width, value = 192, 128
    keys = (128 + 256 + 300 + 200) if causal else (3 * 300 + 200)  # by tile
    minimum = 2 * (305 * ((width + value) * 2 + 4) + keys * (width + value) * 2)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    problem.check(result)
    assert traffic.requested <= 1.05 * minimum, f"{traffic.requested / minimum:.2f} times the minimum"
    pairs = 128 * 128 + 128 * 256 + 44 * 300 + 5 * 200 if causal else 305 * 300
    assert traffic.flops <= 2.2 * 2 * 2 * pairs * (width + value)  # rows and columns that pad the last tiles


def test_traffic_of_the_backward():
    """Both gradient kernels read what their tiles make necessary; nothing is read twice beside that."""
    from mla_kernels.targets.traffic import Traffic

    problem = make([(128, 128)], heads=1, key=128, rope=64, value=128, dtype=torch.bfloat16, poison=False)
    name, statics = DTYPE_NAMES[problem.q.dtype], MLA_PREFILL.cases[0].statics
    key_tile, query_tile = (kernel.rule(CHIPS["sm_90"], name, statics, {}) for kernel in GRADIENTS)
    with launch.on_cpu("interpret"):
        problem.run()
        with Traffic() as traffic:
            problem.gradients()
    row = (192 + 128) * 2
    key_reads = sum(128 - start for start in range(0, 128, key_tile["BLOCK_N"])) + 128
    query_reads = sum(start + query_tile["BLOCK_M"] for start in range(0, 128, query_tile["BLOCK_M"])) + 128
    forward = 128 * 3 * row
    minimum = forward + (key_reads + query_reads) * row + 4 * 128 * row + 128 * 64 * 8
    assert traffic.requested <= 1.1 * minimum, f"{traffic.requested / minimum:.2f} times the minimum"
