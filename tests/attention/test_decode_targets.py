"""What mla_decode asks of a device: on-chip memory, spills, tensor instructions, traffic."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.decode import forward as decode
from mla_kernels.attention.decode.forward import MLA_DECODE
from mla_kernels.attention.merge import MERGE_SPLITS, MERGE_STATES
from mla_kernels.attention.splits import split_count
from mla_kernels.language import TRITON_VERSION
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
    assert cost.workspace == 32 * 8 * 128 * 513 * 4


HOPPER = {  # case -> core and serial bound at most, in clocks of an SM for 64 rows x 64 tokens, and x 32 tokens
    "v3": ((3400, 5700), (2450, 3600)),
    "v3_two_tokens": ((3400, 5700), (2450, 3600)),
    "small_pages": ((3500, 5800), (2500, 3650)),
    "v3_fp8": ((4000, 6350), (2950, 4100)),
    "v3_int8": ((4050, 6310), (2750, 3900)),
}
NARROW = {"v3_fp8", "small_pages"} if TRITON_VERSION < (3, 7) else set(HOPPER) if TRITON_VERSION >= (3, 9) else set()
"""Cases in which the installed Triton keeps 32 tokens in registers and no 64."""


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_keeps_64_rows_on_chip_and_multiplies_them_once(name):
    """Latents go to shared memory once and asynchronously and are multiplied there, as keys and as values."""
    case = next(case for case in MLA_DECODE.cases if case.name == name)
    chip = CHIPS["sm_90"]
    tile = MLA_DECODE.rule(chip, "bf16", case.statics, case.sizes)
    tokens = 32 if name in NARROW else 64
    assert (tile["BLOCK_H"], tile["BLOCK_N"], tile["num_warps"]) == (64, tokens, 8)
    report = compile_kernel(MLA_DECODE, chip, "bf16", case.statics, tile)
    assert report.ok, report.problem
    assert report.loop_spills == 0
    assert report.detail["async_copy"]
    assert all("HGMMA" in shape for shape in report.detail["loop_tensor_shapes"])
    bounds, (core, serial) = report.detail["loop_bounds"], HOPPER[name][name in NARROW]
    assert bounds["core"] <= core and bounds["serial"] <= serial, bounds
    asked = 64 * tokens * (576 + 512)
    # 1.06: the rotated part once more in a branch that is never taken
    assert bounds["multiply_adds"] <= 1.06 * asked, bounds


def test_hopper_without_a_rope_part_computes_scores_twice():
    """A branch needs a second, cheap product, which a key without a rotated part has not."""
    case = next(case for case in MLA_DECODE.cases if case.name == "no_rope")
    tile = MLA_DECODE.rule(CHIPS["sm_90"], "bf16", case.statics, case.sizes)
    report = compile_kernel(MLA_DECODE, CHIPS["sm_90"], "bf16", case.statics, tile)
    bounds = report.detail["loop_bounds"]
    rows, serial = (32, 5800) if TRITON_VERSION >= (3, 9) else (64, 7300)  # 64 rows spill there
    assert report.ok and bounds["core"] <= 4200 and bounds["serial"] <= serial, bounds
    assert bounds["multiply_adds"] <= (1.51 if rows == 64 else 2.01) * rows * 64 * (512 + 512), bounds


def test_masked_float32_stays_in_registers_on_sm_80():
    """Triton 3.9 spilled three of them in the loop, without a branch around the scores."""
    case = next(case for case in MLA_DECODE.cases if case.name == "v3_two_tokens")
    tile = MLA_DECODE.rule(CHIPS["sm_80"], "fp32", case.statics, case.sizes)
    report = compile_kernel(MLA_DECODE, CHIPS["sm_80"], "fp32", case.statics, tile)
    assert report.ok, report.problem


@pytest.mark.slow
def test_every_default_tile_compiles_within_limits():
    problems = [
        f"{report.target} {report.label}: {report.problem}" for report in compile_many(DEFAULTS) if not report.ok
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "heads, lengths, layout, bound",
    [
        (128, [2048], "latent_16bit", 2.0),
        pytest.param(128, [1000, 777], "latent_16bit", 2.0, marks=pytest.mark.slow),
        (16, [1500], "latent_16bit", 1.1),
        (16, [1100, 700], "latent_16bit", 1.1),
        (16, [1100], "fp8_v32", 1.3),
        (16, [1100], "int8", 1.3),
        # Two row tiles of 64 heads read every latent, hence 2.0.
        pytest.param(128, [4096], "latent_16bit", 2.0, marks=pytest.mark.slow),
    ],
)
def test_traffic(heads, lengths, layout, bound):
    """Bytes that all launches of the op request over those of each input and output once; and what splits cost: each
    part's result is stored once and loaded once, and each part reads its queries."""
    from mla_kernels.targets.traffic import Traffic

    problem = make(lengths, heads=heads, dtype=torch.bfloat16, latent_dim=512, rope_dim=64, layout=layout)
    rows = len(lengths) * heads
    minimum = rows * (1152 + 1024 + 4) + sum(lengths) * problem.cache.bytes_per_token
    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    problem.check(result)
    splits = split_count(64 * problem.block_table.shape[1], len(lengths) * -(-heads // 64), CHIPS["sm_90"].dot_cores)
    parts = sum(min(splits, -(-length // (-(-length // (splits * 128)) * 128))) for length in lengths)
    of_parts = parts * heads * (2 * 513 * 4 + 1152)
    assert splits > 8
    assert traffic.requested <= bound * minimum + of_parts, f"{traffic.requested} over {minimum} and {of_parts}"


def test_traffic_without_splits(monkeypatch):
    from mla_kernels.targets.traffic import Traffic

    monkeypatch.setattr(decode, "split_count", lambda keys, programs, cores: 1)
    problem = make([1100], heads=16, dtype=torch.bfloat16, latent_dim=512, rope_dim=64)
    minimum = 16 * (1152 + 1024 + 4) + 1100 * problem.cache.bytes_per_token
    with launch.on_cpu("interpret"), Traffic() as traffic:
        problem.check(problem.run())
    assert traffic.requested <= 1.05 * minimum, f"{traffic.requested / minimum:.2f} times the minimum"


def test_tokens_before_a_window_are_not_requested():
    from mla_kernels.targets.traffic import Traffic

    problem = make([1000], heads=16, dtype=torch.bfloat16, window=100)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        problem.check(problem.run())
    minimum = 16 * (160 + 128 + 4) + 100 * 160
    assert traffic.requested <= 1.1 * minimum + 2 * 16 * (2 * 65 * 4 + 160)  # two parts
