"""The model of grouped products: its terms by hand, what it prefers, and what the tuner sees of it."""

import itertools

import numpy as np
import pytest

import mla_kernels  # noqa: F401  (declares the kernels)
from mla_kernels.autotune import model, moe_model, search
from mla_kernels.autotune.moe_model import Product, Tiles, row_tiles, terms
from mla_kernels.launch import KERNELS
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.devices import DEVICES

V3 = dict(top_k=8, experts=256)
GPUS = [name for name, chip in CHIPS.items() if chip.is_gpu]


def expected_tiles(tokens, top_k, experts, block_m):
    """By every set of experts of every token."""
    total, ways = 0, 0
    sets = list(itertools.combinations(range(experts), top_k))
    for chosen in itertools.product(sets, repeat=tokens):
        rows = np.bincount([expert for one in chosen for expert in one], minlength=experts)
        total += (-(-rows // block_m)).sum()
        ways += 1
    return total / ways


@pytest.mark.parametrize("tokens, top_k, experts, block_m", [(1, 1, 3, 16), (4, 1, 3, 2), (3, 2, 4, 2), (5, 2, 2, 4)])
def test_row_tiles_against_every_routing(tokens, top_k, experts, block_m):
    tiles, filled = row_tiles(tokens, top_k, experts, block_m)
    assert tiles == pytest.approx(expected_tiles(tokens, top_k, experts, block_m), rel=1e-12)
    assert filled == pytest.approx(expected_tiles(tokens, top_k, experts, 1 << 30), rel=1e-12)


def test_row_tiles_of_many_tokens_lie_half_a_tile_an_expert_above_the_least():
    tiles, filled = row_tiles(50_000, 8, 256, 64)
    assert filled == pytest.approx(256)
    assert tiles == pytest.approx(256 * (50_000 * 8 / 256 / 64 + 0.5), rel=0.01)


def test_terms_by_hand():
    """64 tokens of one expert, 64 x 128 x 64 tiles: 2 programs of 4 trips on an H100."""
    chip = CHIPS["sm_90"]
    found = terms(chip, Product(64, 1, 1, columns=256, inner=256), Tiles.of([(64, 128, 64, 4, 3)]))
    clock = 66.9e12 / (256 * 132)
    fetched = (64 + 128) * 64 * 2  # bytes a trip
    multiplied = 64 * 128 * 64 / (989e12 / 2 / 132 / clock)
    moved = ((64 * 128 / 64 + 64) * 64 * 2 + fetched) / 128
    assert found.seconds["core"] * clock * 132 == pytest.approx(2 * 4 * max(multiplied, moved))
    assert found.seconds["l2"] * clock * 132 == pytest.approx(2 * 4 * fetched / 32)
    assert found.seconds["latency"] * clock == pytest.approx(4 * (700 / 2 + 60))
    assert found.seconds["start"] * clock == pytest.approx(2000)
    assert found.arithmetic == 2 * 64 * 256 * 256 / 989e12
    assert found.memory == 2 * (256 * 256 + 64 * 256 + 64 * 256) / 3.35e12
    assert found.idle == pytest.approx(np.log(132 / 2))
    assert found.registers == pytest.approx((64 * 128 / 128 + 40) / 255)
    assert found.shared == pytest.approx(3 * fetched / (227 * 1024))


def test_tiles_below_64_rows_use_the_slower_instruction_only_where_there_is_a_faster_one():
    product, tiles = Product(4096, columns=4096, inner=4096, **V3), Tiles.of([(32, 128, 64, 4, 3), (64, 128, 64, 4, 3)])
    for chip, slower in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
        found = terms(CHIPS[chip], product, tiles)
        assert (found.registers[1] == (64 + 40) / 255) == slower  # operands of wgmma need no registers
        assert (found.shared[1] > found.shared[0] * 1.6) == slower  # nor leave shared memory before they are used


def test_weights_name_every_feature_and_costs_count_against_a_tile():
    constants = moe_model.constants()
    assert set(constants["weights"]) == set(moe_model.FEATURES)
    assert all(constants["weights"][name] <= 0 for name in moe_model.COSTS)
    assert constants["seconds"]["slope"] < 0
    fitted = constants["fitted_on"]
    assert 20 <= len(fitted["shapes"]) <= fitted["shapes_left"]


def best(device, tokens, count=1, **problem):
    tiles = list(itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4, 5)))
    arrays = Tiles.of(tiles)
    parts = [terms(DEVICES[device], Product(tokens, **problem), arrays)]
    scores = np.where(moe_model.valid(parts), moe_model.score(arrays, parts), -np.inf)
    return [tiles[i] for i in np.argsort(-scores)[:count]]


@pytest.mark.parametrize("device", ["a100", "h100", "h200", "b200", "l40s", "rtx-4090", "mi300x"])
def test_rows_of_the_best_tile_grow_with_the_rows_of_an_expert(device):
    rows = [best(device, tokens, columns=4096, inner=7168, **V3)[0][0] for tokens in (1, 64, 1024, 4096, 16384)]
    assert rows == sorted(rows)
    assert rows[0] == 16 and rows[1] <= 32 and rows[-1] >= 64


def test_large_products_take_large_tiles_that_the_chip_can_hold():
    """128 x 256 x 64 with 8 warps is what wgmma wants; 99 KiB of shared memory hold two such stages, no more."""
    problem = dict(columns=4096, inner=7168, **V3)
    assert best("h100", 8192, **problem)[0][:4] == (128, 256, 64, 8)
    assert (128, 128, 64, 8) in [tile[:4] for tile in best("a100", 8192, 4, **problem)]
    assert best("rtx-4090", 8192, **problem)[0][:4] == (128, 128, 64, 8)


def test_seconds_order_tiles_as_scores_do():
    tiles = Tiles.of([(16, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 256, 64, 8, 4), (256, 256, 64, 8, 2)])
    parts = [terms(CHIPS["sm_90"], Product(512, columns=4096, inner=7168, **V3), tiles)]
    seconds = moe_model.seconds(tiles, parts)
    assert (np.argsort(seconds) == np.argsort(-moe_model.score(tiles, parts))).all()
    assert (seconds > moe_model.ideal(parts) / 4).all() and (seconds < 100 * moe_model.ideal(parts)).all()


GROUPED = sorted(model.GROUPED.keys() & KERNELS.keys())
PATHS = [(name, chip) for name in GROUPED for chip in CHIPS if chip not in KERNELS[name].unsupported]


@pytest.mark.parametrize("name, chip", PATHS)
def test_the_tuner_can_rank_every_candidate(name, chip):
    kernel, chip = KERNELS[name], CHIPS[chip]
    for case in kernel.cases[:2]:
        tiles = list(search.candidates(kernel, chip, "bf16", case.statics))
        found = [model.seconds(kernel, chip, "bf16", case.statics, case.sizes, tile) for tile in tiles[::11]]
        assert np.isfinite(found).all() and min(found) > 0
        assert max(found) > min(found) or not chip.is_gpu


def test_two_products_that_read_the_rows_twice_are_no_better_than_one():
    kernel, chip = KERNELS["moe_gate_up_kernel"], CHIPS["sm_90"]
    case = next(case for case in kernel.cases if case.sizes["tokens"] == 4096)
    tile = dict(kernel.rule(chip, "bf16", case.statics, case.sizes))
    joined, apart = (
        model.seconds(kernel, chip, "bf16", case.statics, case.sizes, tile | {"JOINED": value}) for value in (1, 0)
    )
    assert joined <= apart


def test_ascend_counts_the_row_tiles_that_uniform_routing_gives():
    """16 rows an expert on average are 1.45 tiles of 16 rows, not 1: programs in proportion."""
    kernel, chip = KERNELS["moe_down_kernel"], CHIPS["ascend910b"]
    sizes = {"tokens": 512, "pairs": 4096, "experts": 256, "hidden": 7168, "intermediate": 2048}
    statics, tile = kernel.cases[0].statics, {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}
    work = kernel.work("bf16", statics, sizes, tile)
    tiles, _ = row_tiles(512, 8, 256, 16)
    assert 1.4 * 256 < tiles < 1.5 * 256 and work.programs == 256 * 7168 // 128
    waves = -(-round(tiles * 7168 // 128) // chip.dot_cores)
    found = model.seconds(kernel, chip, "bf16", statics, sizes, tile)
    assert found > waves * model.PROGRAM_SECONDS + 1.4 * work.programs * work.bytes / (3 * chip.bandwidth)


def test_a_compiled_attention_loop_by_hand():
    """128 heads, 8 sequences of 4096 keys in 8 splits: 128 programs of 64 heads, 8 turns of 64 keys each."""
    kernel, chip = KERNELS["mla_decode_kernel"], CHIPS["sm_90"]
    case = next(case for case in kernel.cases if case.name == "v3")
    tile = dict(kernel.rule(chip, "bf16", case.statics, case.sizes)) | {"BLOCK_H": 64, "BLOCK_N": 64}
    work = kernel.work("bf16", case.statics, case.sizes, tile)
    turns = work.flops / 2 / (64 * 64 * (576 + 512))
    assert work.programs <= chip.dot_cores and turns == int(turns)
    bounds = {"tensor": 20_000.0, "core": 50_000.0, "serial": 70_000.0}
    arguments = kernel, chip, "bf16", case.statics, case.sizes, tile
    found = model.loop_seconds(*arguments, bounds)
    assert found == pytest.approx(turns * 60_000 / moe_model.clock(chip) + model.PROGRAM_SECONDS)
    fast = model.loop_seconds(*arguments, {"tensor": 1.0, "core": 1.0, "serial": 2.0})
    assert kernel.cost("bf16", case.statics, case.sizes).bytes / chip.bandwidth < fast < found  # memory limits
    assert model.loop_seconds(*arguments, {}) is None
    other = KERNELS["merge_states_kernel"]
    assert model.loop_seconds(other, chip, "bf16", {}, {}, {}, bounds) is None
