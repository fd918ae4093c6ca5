"""What mla_decode asks of a device: on-chip memory, spills, tensor instructions, traffic."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.decode import MLA_DECODE
from mla_kernels.attention.merge import MERGE_SPLITS, MERGE_STATES
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel, compile_many
from tests.attention.problems import make

KERNELS = (MLA_DECODE, MERGE_SPLITS, MERGE_STATES)
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
    for case in MLA_DECODE.cases:
        for chip in CHIPS.values():
            tiles = [
                MLA_DECODE.rule(chip, "bf16", case.statics, {**case.sizes, "batch": batch, "tokens": tokens})
                for batch, tokens in ((1, 1), (64, 100_000))
            ]
            assert tiles[0] == tiles[1]


def test_cost_counts_the_latent_once():
    case = next(case for case in MLA_DECODE.cases if case.name == "v3")
    cost = MLA_DECODE.cost("bf16", case.statics, case.sizes)
    assert cost.flops == 2 * 8 * 128 * 4096 * (576 + 512)
    assert cost.bytes == 8 * ((128 + 4096) * 1152 + 128 * (1024 + 4))
    assert cost.workspace == 8 * 8 * 128 * 513 * 4


def test_hopper_keeps_64_rows_on_chip():
    case = next(case for case in MLA_DECODE.cases if case.name == "v3")
    chip = CHIPS["sm_90"]
    tile = MLA_DECODE.rule(chip, "bf16", case.statics, case.sizes)
    assert (tile["BLOCK_H"], tile["BLOCK_N"], tile["num_warps"]) == (64, 64, 8)
    report = compile_kernel(MLA_DECODE, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert report.spills == 0
    assert any("HGMMA" in shape for shape in report.detail["loop_tensor_shapes"])


@pytest.mark.slow
def test_every_default_tile_compiles_within_limits():
    problems = [
        f"{report.target} {report.label}: {report.problem}" for report in compile_many(DEFAULTS) if not report.ok
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("heads, lengths, bound", [(128, [512], 2.1), (128, [512, 300], 2.1), (16, [512], 1.2)])
def test_traffic_of_one_split(heads, lengths, bound):
    from mla_kernels.targets.traffic import Traffic

    problem = make(lengths, heads=heads, dtype=torch.bfloat16, latent_dim=512, rope_dim=64)
    rows = len(lengths) * heads
    minimum = (rows + sum(lengths)) * 1152 + rows * (1024 + 4)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    problem.check(result)
    assert traffic.requested <= bound * minimum, f"{traffic.requested / minimum:.2f} times the minimum"
