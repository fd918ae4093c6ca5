"""indexer_topk digit by digit, many programs a row: the indices of the reference, whatever the chunks."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.indexer import spread, topk
from mla_kernels.attention.indexer.topk import indexer_topk
from mla_kernels.launch import chip_of
from mla_kernels.reference import indexer as reference
from mla_kernels.targets.chips import CHIPS
from tests.attention.indexer_problems import rows_of
from tests.support import not_on, poisoned, repeats

KINDS = ("normal", "zeros", "mixed", "subnormal", "quantised")
SHAPES = ((2, 2000, 300), (1, 900, 1024), (3, 100, 7), (2, 1030, 1))


def choose(logits, top_k, starts=None, ends=None, block=256, together=4):
    """Chunks of ``block`` columns, the counts of ``together`` of them added at a time."""
    chip = chip_of(logits.device)
    _, statics, tile, writing = spread.plan_spread(chip, *logits.shape, top_k, starts, ends)
    blocks = {"BLOCK": block, "BLOCK_C": together}
    plan = -(-logits.shape[1] // block), statics, tile | blocks, writing | blocks | {"BLOCK_W": min(block, 256)}
    return spread.launch_spread(chip, logits, top_k, starts, ends, plan)


@pytest.mark.parametrize("kind", KINDS)
@not_on("plain torch has no programs", "cpu")
def test_the_indices_of_the_reference(backend, device, kind):
    for rows, columns, top_k in SHAPES:
        logits = rows_of(kind, rows, columns)
        starts = torch.randint(-3, columns // 2 + 1, (rows,)).int()
        ends = torch.randint(columns // 2, columns + 5, (rows,)).int()
        if rows == 3:
            starts[0], ends[0], starts[1], ends[1] = 2**31 - 1, 2**31 - 1, -(2**31), -(2**31)
        for bounds in ((None, None), (starts, ends), (None, ends)):
            want = reference.indexer_topk(logits, top_k, starts=bounds[0], ends=bounds[1])
            own = tuple(None if bound is None else bound.to(device) for bound in bounds)
            assert torch.equal(choose(logits.to(device), top_k, *own).cpu(), want), (rows, columns, top_k)


@not_on("plain torch has no programs", "cpu")
def test_any_chunks_any_batch_and_every_call_choose_the_same(backend, device):
    logits = rows_of("quantised", 3, 1500).to(device)
    ends = torch.tensor([1500, 700, 3], device=device).int()
    first = choose(logits, 200, None, ends)
    assert torch.equal(indexer_topk(logits, 200, ends=ends), first)  # in one launch, by another kernel
    for _ in repeats(device):
        assert torch.equal(choose(logits, 200, None, ends), first)
    for block, together in ((512, 4), (1024, 8), (256, 16)):
        assert torch.equal(choose(logits, 200, None, ends, block, together), first)
    for row in range(3):
        assert torch.equal(choose(logits[row : row + 1], 200, None, ends[row : row + 1])[0], first[row])


@not_on("plain torch has no programs", "cpu")
def test_nothing_outside_the_ranges_is_looked_at(backend, device):
    wide = poisoned(2, 1000)
    wide[:, 260:800] = torch.randn(2, 540)
    starts, ends = torch.full((2,), 260).int().to(device), torch.tensor([800, 300]).int().to(device)
    got = choose(wide.to(device)[:, :900], 100, starts, ends).cpu()
    assert torch.equal(got, reference.indexer_topk(wide, 100, starts=starts.cpu(), ends=ends.cpu()))
    wide[:, :260], wide[:, 800:] = float("inf"), float("inf")
    assert torch.equal(choose(wide.to(device)[:, :900], 100, starts, ends).cpu(), got)


@pytest.mark.quick("indexer_topk")
@not_on("plain torch has no programs", "cpu")
def test_few_long_rows_are_spread(backend, device, monkeypatch):
    """As a call finds it: 1,000 columns in chunks of 128, whose candidates would take more launches than two."""
    monkeypatch.setattr(topk, "RESIDENT_BLOCK", 128)
    monkeypatch.setattr(topk, "resident_block", lambda chip: 128)
    monkeypatch.setattr(topk, "launch_spread", lambda *args: called.append(1) or spread.launch_spread(*args))
    called, logits = [], rows_of("quantised", 2, 1000)
    with launch.on_cpu(launch.cpu_mode()):
        topk.TOPK.kept.plans.clear()
        got = indexer_topk(logits.to(device), 32)
        topk.TOPK.kept.plans.clear()
    assert called and torch.equal(got.cpu(), reference.indexer_topk(logits, 32))


@pytest.mark.slow
@not_on("plain torch has no programs", "cpu")
def test_real_sizes(backend, device):
    logits = rows_of("mixed", 1, 131072)
    values = logits.nan_to_num(-float("inf"), float("inf"), -float("inf"))
    order = values[0].sort(descending=True, stable=True).indices[:2048]
    assert torch.equal(indexer_topk(logits.to(device), 2048)[0].cpu().long(), order.sort().values)


@pytest.mark.parametrize("chip", CHIPS)
def test_which_rows_are_spread(chip):
    """By sizes and cores alone: not those that two launches choose from, nor so many that candidates fill the cores."""
    chip = CHIPS[chip]

    def spread_of(rows, columns, top_k=2048):
        return topk._plan_rows(chip, rows, columns, top_k, None, None)

    for columns in (1, 8192, 32768):
        assert spread_of(1, columns) is None
    assert spread_of(1, 32769) and spread_of(1, 131072)
    assert bool(spread_of(1, 1 << 20)) == (chip.vector_cores >= 32)  # its candidates are 32 chunks
    most = chip.vector_cores // 4  # 131,072 keys leave the second launch 4 chunks
    assert spread_of(most, 131072) and spread_of(most + 1, 131072) is None
    assert spread_of(1, 1 << 21) is None
    assert spread_of(chip.vector_cores // 2, 131072, 4096) and spread_of(chip.vector_cores, 131072, 4096) is None
    chunks, _, tile, writing = spread_of(1, 131072)
    assert chunks * tile["BLOCK"] == 131072 and writing["BLOCK"] == tile["BLOCK"]
    assert chunks >= 16 * (2 if chip.is_gpu else 1)  # more programs than candidates begin with


def test_traffic():
    """Values five times at most; each program all counts of its row; workspace 2,052 bytes a chunk and 16 a row."""
    from mla_kernels.targets.traffic import Traffic

    logits = rows_of("normal", 1, 4096)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        choose(logits, 512, block=1024)
    chunks, counts = 4, 4 * 1024
    assert traffic.loaded <= 5 * logits.nbytes + chunks * (4 * counts + 3 * 1024 + counts + 200)
    assert traffic.stored == 4 * counts + 512 * 4 + 3 * (4 * chunks + 8)
