"""What the indexer's kernels ask of a device: on-chip memory, spills, tensor instructions, traffic."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer.forward import INDEXER_LOGITS
from mla_kernels.attention.indexer.mqa import MQA_LOGITS
from mla_kernels.attention.indexer.select import SLOTS
from mla_kernels.attention.indexer.stream import INDEXER_STREAM
from mla_kernels.attention.indexer.topk import TOPK, indexer_topk
from mla_kernels.latent.heads import ROTATE_HEADS
from mla_kernels.latent.indexer.key import WRITE_INDEXER_KEY
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.compile import compile_kernel, compile_many
from tests.attention.indexer_problems import make_ragged, rows_of

KERNELS = (INDEXER_LOGITS, INDEXER_STREAM, MQA_LOGITS, TOPK, SLOTS, WRITE_INDEXER_KEY, ROTATE_HEADS)
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
        assert all(tile[name] in values for name, values in kernel.tiles.items()), (kernel.name, case, tile)
        for memory, used in kernel.memory(chip, dtype, statics, tile).items():
            assert used <= chip.memory[memory], f"{kernel.name} {case} {dtype} on {chip.name}: {memory}"


@pytest.mark.slow
def test_every_default_tile_compiles_within_the_closed_form():
    problems = []
    for (kernel, chip, dtype, statics, tile, _), report in zip(DEFAULTS, compile_many(DEFAULTS)):
        if not report.ok:
            problems.append(f"{report.target} {report.label}: {report.problem}")
        for memory, bound in kernel.memory(chip, dtype, statics, tile).items():
            if (report.memory.get(memory) or 0) > bound:
                problems.append(f"{report.target} {report.label}: {memory} {report.memory[memory]} > {bound}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("case", ["v32_prefill", "v32_prefill_fp8"])
def test_hopper_multiplies_keys_by_heads_on_tensor_cores_without_waste(case):
    case = next(one for one in INDEXER_LOGITS.cases if one.name == case)
    chip = CHIPS["sm_90"]
    tile = INDEXER_LOGITS.rule(chip, "bf16", case.statics, case.sizes)
    report = compile_kernel(INDEXER_LOGITS, chip, "bf16", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem
    shapes = report.detail["loop_tensor_shapes"]
    assert shapes and all(shape.startswith("HGMMA") for shape in shapes)
    issued = 0
    for shape, times in shapes.items():
        m, n, k = map(int, shape.removeprefix("HGMMA.").split("x"))
        issued += m * n * k * times * tile["num_warps"] // 4
    assert issued == tile["BLOCK_N"] * tile["BLOCK_H"] * 128


@pytest.mark.parametrize(
    "target", ["sm_120", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_86"))]
)
def test_float32_scores_spill_nothing(target):
    chip, case = CHIPS[target], INDEXER_LOGITS.cases[0]
    tile = INDEXER_LOGITS.rule(chip, "fp32", case.statics, case.sizes)
    report = compile_kernel(INDEXER_LOGITS, chip, "fp32", case.statics, tile)
    assert report.ok and report.spills == 0, report.problem


def test_traffic_of_logits():
    """Keys once per tile of tokens, queries once per tile of keys; nothing for tiles that no token sees."""
    from mla_kernels.targets.traffic import Traffic

    problem = make_ragged(32, 1024, heads=64, head_dim=128, dtype=torch.bfloat16)
    problem.k[:], problem.starts[:], problem.ends[:] = torch.randn(1024, 128), 0, 256
    with launch.on_cpu("interpret"), Traffic() as traffic:
        logits = problem.run()
    problem.check(logits)
    query = 64 * (256 + 4) + 8
    minimum = 256 * 256 + 32 * query + 32 * 1024 * 4
    assert traffic.requested <= minimum + 32 * query + 9 * 32 * 8


def test_traffic_of_topk():
    """A row of a chunk is read twice: to find its least chosen value, and to write what is chosen."""
    from mla_kernels.targets.traffic import Traffic

    logits = rows_of("normal", 1, 4096)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        indexer_topk(logits, 512)
    assert traffic.loaded == 2 * 4096 * 4 and traffic.stored == 512 * 4
