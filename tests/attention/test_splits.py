"""Plans of splits: how many fill a chip, where fixed ones begin, and the workspace that both declare."""

import csv
from pathlib import Path

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention import splits
from mla_kernels.attention.decode.forward import MLA_DECODE
from mla_kernels.attention.sparse.forward import SPARSE_MLA, picks_of_split
from mla_kernels.attention.splits import fixed_count, fixed_index, most_splits, sequences_at_once, split_count
from mla_kernels.targets.chips import CHIPS
from tests.attention.problems import make

MEASURED: dict[int, dict[int, float]] = {}
"""Sequences -> keys of a split -> us: one H200, mla_decode, 128 heads (2 programs a sequence), 4,096 keys, bf16."""
with (Path(__file__).parents[2] / "docs/data/splits_h200_2026-11-28.csv").open() as lines:
    for row in csv.DictReader(lines):
        MEASURED.setdefault(int(row["sequences"]), {})[int(row["keys of a split"])] = float(row["us"])


@pytest.mark.parametrize("batch", MEASURED)
def test_the_fastest_measured_number_of_splits_is_chosen(batch):
    length = 4096 // split_count(4096, 2 * batch, 132)
    assert length == min(MEASURED[batch], key=MEASURED[batch].get)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_splits_fill_a_chip_and_stay_bounded(chip):
    for keys in (0, 1, 127, 128, 129, 4096, 131_072, 1 << 29):
        for programs in (1, 2, 7, 67, 132, 133, 1000):
            count = split_count(keys, programs, chip.dot_cores)
            assert 1 <= count <= most_splits(keys, programs, chip.dot_cores) <= splits.MOST_SPLITS
            assert count == 1 or programs * count <= splits.MOST_WAVES * chip.dot_cores
            assert count == 1 or -(-keys // count) > splits.SPLIT_STEP - splits.SPLIT_STEP / 2
    assert split_count(4096, 1, chip.dot_cores) * 4 >= min(chip.dot_cores, 64)


def test_a_declared_workspace_holds_every_launch():
    """On every chip, at its own number of splits."""
    for case in MLA_DECODE.cases:
        for chip in CHIPS.values():
            if case.statics["FIXED"]:
                continue
            tile = MLA_DECODE.rule(chip, "bf16", case.statics, case.sizes)
            rows = case.sizes["queries"] * case.sizes["heads"]
            programs = case.sizes["batch"] * tile["VALUE_TILES"] * -(-rows // tile["BLOCK_H"])
            keys = min(case.sizes["tokens"], case.sizes.get("window", case.sizes["tokens"]) + case.sizes["queries"] - 1)
            count = split_count(keys, programs, chip.dot_cores)
            used = count * case.sizes["batch"] * rows * (case.statics["LATENT"] + 1) * 4 if count > 1 else 0
            assert used <= MLA_DECODE.cost("bf16", case.statics, case.sizes).workspace
    for case in SPARSE_MLA.cases:
        if not case.statics["SPLIT"]:
            continue
        heads, tokens, top_k = (case.sizes[name] for name in ("heads", "tokens", "top_k"))
        for chip in CHIPS.values():
            tile = SPARSE_MLA.rule(chip, "bf16", case.statics, case.sizes)
            share = picks_of_split(top_k, tokens * -(-heads // tile["BLOCK_H"]), chip.dot_cores)
            used = -(-top_k // share) * tokens * heads * (case.statics["LATENT"] + 1) * 4
            assert used <= SPARSE_MLA.cost("bf16", case.statics, case.sizes).workspace


def test_fixed_splits_stand_at_the_same_positions_for_every_length():
    starts = [512 * i for i in range(32)]
    for level in range(1, 17):
        starts += [(8192 << level) + (512 << level) * i for i in range(16)]
    assert [fixed_index(start) for start in starts] == list(range(len(starts)))
    assert [fixed_index(start - 1) for start in starts[1:]] == list(range(len(starts) - 1))
    assert fixed_count(0, 1 << 30) == fixed_count(1, 1 << 30) == fixed_count(512, 1 << 30) == 1
    assert fixed_count(513, 1 << 30) == 2 and fixed_count(1 << 30, 1 << 30) == 32 + 16 * 16
    assert fixed_count(1 << 30, 2) == 2 and fixed_count(1 << 30, 514) == 3 and fixed_count(600, 10_000) == 2


def test_a_launch_with_fixed_splits_is_cut_where_its_workspace_ends():
    assert sequences_at_once(128 * 513 * 4, 8) * 128 * 513 * 4 * 8 <= splits.WORKSPACE
    assert sequences_at_once(1 << 40, 8) == 1


@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_long_sequences_with_fixed_splits(mode, window):
    """Beyond the splits of the first length, where positions are found by doubling."""
    problem = make([17_500, 1500], heads=2, latent_dim=16, rope_dim=16, window=window, batch_invariant=True, queries=2)
    with launch.on_cpu(mode):
        result = problem.run()
        problem.check(result)
        for alone, joint in zip(problem.sequence(0).run(), result):
            assert torch.equal(alone[0], joint[0])
