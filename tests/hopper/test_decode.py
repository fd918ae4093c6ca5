"""mla_decode's Hopper kernels against the reference: emulated here, and on a Hopper GPU with ``--backend cuda``."""

import random
from dataclasses import replace

import pytest
import torch

from mla_kernels.attention.decode import forward as decode
from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.latent.cache import LatentCache
from mla_kernels.tiles import Kept
from tests.attention.problems import Problem, make
from tests.attention.test_decode import HEADS, QUERIES, unchecked
from tests.hopper.problems import ON_HOPPER

pytestmark = ON_HOPPER

BF16, FP16 = torch.bfloat16, torch.float16
PAGE_SIZES = (64, 128, 192)
WIDTHS = ((128, 16), (256, 32), (512, 64), (128, 0), (512, 0))
WINDOWS = (None, None, 1, 3, 64, 100, 300)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300)
MOST_ROWS = 256  # heads x queries; the emulator takes seconds for more
FEW, MANY = dict(heads=5), dict(heads=40)  # rows: the kernel for few, and that for many


def small(lengths, **options) -> Problem:
    return make(lengths, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


def split_into(splits: int, monkeypatch) -> None:
    """Equal splits are so many, whatever the sizes, and plans are made anew."""
    monkeypatch.setattr(decode, "split_count", lambda keys, programs, cores: splits)
    monkeypatch.setattr(decode.MLA_DECODE, "kept", Kept())


def forms(count: int) -> list[tuple]:
    """Random (heads, page size, queries, dtype, widths, window, sink, lengths), each value at least once.

    The queries of many heads are cut to MOST_ROWS rows.
    """
    rng = random.Random(5)
    columns = []
    for values in (HEADS, PAGE_SIZES, QUERIES, (BF16, FP16), WIDTHS, WINDOWS, (False, True)):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    columns[2] = [min(queries, max(1, MOST_ROWS // heads)) for heads, queries in zip(columns[0], columns[2])]
    return list(zip(*columns, [tuple(rng.sample(LENGTHS, 3)) for _ in range(count)]))


@pytest.mark.parametrize("heads, page_size, queries, dtype, widths, window, sink, lengths", forms(14))
def test_parity(backend, device, heads, page_size, queries, dtype, widths, window, sink, lengths):
    problem = make(
        lengths, heads=heads, page_size=page_size, queries=queries, dtype=dtype, latent_dim=widths[0],
        rope_dim=widths[1], window=window, sink=sink, device=device,
    )  # fmt: skip
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        split_into(rng.choice((1, 2, 3, 5)), monkeypatch)
        causal = rng.random() < 0.85
        latent_dim, rope_dim = rng.choice(WIDTHS)
        lengths = [rng.choice((*LENGTHS, 511, 700, 1100)) for _ in range(rng.choice((1, 2, 3)))]
        problem = make(
            lengths, heads=rng.choice((*HEADS, 32, 33, 64, 65)), queries=rng.choice(QUERIES),
            page_size=rng.choice(PAGE_SIZES), dtype=rng.choice((BF16, FP16)), latent_dim=latent_dim, rope_dim=rope_dim,
            causal=causal, window=rng.choice(WINDOWS) if causal else None, sink=rng.random() < 0.4,
            batch_invariant=rng.random() < 0.4, device=device,
        )  # fmt: skip
        problem.check(problem.run())


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("queries", [1, 3])
def test_splits(backend, device, rows, queries, monkeypatch):
    problem = small([1, 129, 700, 128, 0], queries=queries, device=device, **rows)
    for splits in (1, 2, 3, 6):
        split_into(splits, monkeypatch)
        problem.check(problem.run())
    split_into(1, monkeypatch)
    monkeypatch.setattr(decode, "sequences_at_once", lambda split_bytes, splits: 2)
    problem.check(problem.run(batch_invariant=True))


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_not_causal(backend, device, rows):
    problem = small([5, 130], queries=3, causal=False, device=device, **rows)
    problem.check(problem.run())


@pytest.mark.parametrize("heads", [2, 20])
def test_empty_rows_are_zero_and_minus_infinity(backend, device, heads):
    out, lse = small([0, 1, 2], heads=heads, queries=3, device=device).run()
    seen = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(lse.cpu() == float("-inf"), ~seen[..., None].expand(-1, -1, heads))
    assert (out.cpu()[~seen] == 0).all() and (out.cpu()[seen] != 0).any(-1).all()


@pytest.mark.no_launch("no queries")
def test_empty_batch(backend, device):
    problem, none = small([5], device=device), slice(0, 0)
    problem = replace(
        problem, q=problem.q[none], block_table=problem.block_table[none], seq_lens=problem.seq_lens[none]
    )
    out, lse = problem.run()
    assert out.shape == (0, 1, 3, 128) and lse.shape == (0, 1, 3)


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_table_without_columns(backend, device, rows):
    problem = small([0], device=device, **rows)
    out, lse = problem.run(block_table=problem.block_table[:, :0])
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("page_size", [64, 128])
def test_garbage_in_device_tensors_is_absent_tokens(backend, device, rows, page_size):
    problem = small([130, 200, 70, 66], queries=2, page_size=page_size, device=device, **rows)
    problem.cache.data[1:].nan_to_num_()  # page 0, where a careless clamp would look, stays NaN
    problem.block_table[0, 0] = -1
    problem.block_table[1, -1] = problem.cache.num_pages
    problem.block_table[2, -1] = 2**31 - 1
    problem.block_table[3] = -(2**31)
    problem.seq_lens[2:] = torch.tensor([2**31 - 1, -5], device=device)
    problem.check(unchecked(problem))


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("part", ["latents", "rope"])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_nan_reaches_what_sees_it_and_nothing_else(backend, device, rows, part, splits, monkeypatch):
    split_into(splits, monkeypatch)
    problem = small([70, 170], device=device, **rows)
    before, lse_before = problem.run()
    getattr(problem.cache, part)[problem.block_table[0, 1].long(), 3, 0] = float("nan")
    out, lse = problem.run()
    assert out[0].isnan().any(-1).all() and lse[0].isnan().all()
    assert torch.equal(out[1], before[1]) and torch.equal(lse[1], lse_before[1])


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_a_sink_of_minus_infinity_is_none_and_of_infinity_all(backend, device, rows, monkeypatch):
    problem = small([700, 3, 0], queries=2, device=device, **rows)
    heads = rows["heads"]
    for splits in (1, 2):
        split_into(splits, monkeypatch)
        out, lse = problem.run()
        none = problem.run(sink=torch.full((heads,), float("-inf"), device=device))
        assert torch.equal(none[0], out) and torch.equal(none[1], lse)
        everything = problem.run(sink=torch.full((heads,), float("inf"), device=device))
        assert (everything[0] == 0).all() and torch.equal(everything[1], lse)


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_one_split_gives_the_same_bits_with_and_without_the_merge(backend, device, rows, monkeypatch):
    problem = small([130, 1, 0], queries=2, device=device, **rows)
    split_into(1, monkeypatch)
    without = problem.run()
    problem.check(without)
    split_into(1, monkeypatch)
    for merged, direct in zip(problem.run(batch_invariant=True), without):  # one fixed split, through the workspace
        assert torch.equal(merged, direct)


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
def test_bits_do_not_follow_the_order_of_events(backend, device, rows, monkeypatch):
    """The same in any order (emulated) and on a repeat (on a device)."""
    problem = small([700, 65, 0, 129], device=device, window=300, sink=True, **rows)
    together = problem.run()
    for seed in range(1, 4):
        monkeypatch.setattr(GluonKernel, "emulated_seed", seed)
        for got, want in zip(problem.run(), together):
            assert torch.equal(got, want)


@pytest.mark.parametrize("window", [None, 150, 300])
@pytest.mark.parametrize("heads", [5, 16, 40])
def test_invariant_bits_follow_a_query_and_the_keys_that_it_sees_alone(backend, device, heads, window):
    """Neither the batch, nor the table's width, nor the queries beside it: one alone or among three."""
    problem = small(
        [700, 65, 3, 129], heads=heads, queries=3, window=window, sink=True, batch_invariant=True, device=device
    )
    together = problem.run()
    for index in (0, 3):
        alone = problem.sequence(index)
        alone.block_table = alone.block_table[:, : max(1, -(-int(alone.seq_lens) // 64))]
        for got, joint in zip(alone.run(), together):
            assert torch.equal(got[0], joint[index])
    for query in range(3):
        single = replace(problem, q=problem.q[:, query : query + 1], seq_lens=problem.seq_lens - 2 + query)
        for got, joint in zip(single.run(), together):
            assert torch.equal(got[:, 0], joint[:, query])


@pytest.mark.parametrize("layout", ["heads_first", "query_slice", "head_slice", "one_head", "odd_place"])
def test_queries_of_any_stride(layout, backend, device):
    problem = small([70, 3], heads=4, queries=2, device=device)
    exact = problem.q
    if layout == "heads_first":
        problem.q = exact.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "query_slice":
        problem.q = torch.cat([exact, exact], 1)[:, :2]
    elif layout == "head_slice":
        problem.q = torch.cat([exact, exact], 2)[:, :, :4]
    elif layout == "one_head":
        problem.q = exact[:, :, :1]
    else:  # not on a multiple of 16 bytes
        problem.q = torch.cat([exact.flatten()[:1], exact.flatten()])[1:].view(exact.shape)
    problem.check(problem.run())


def test_cache_and_table_of_any_stride(backend, device):
    problem = small([70, 3], device=device)
    data = problem.cache.data
    wide = torch.full((data.shape[0], 2, *data.shape[1:]), float("nan"), dtype=BF16, device=device)
    wide[:, 1] = data
    table = torch.stack([problem.block_table, torch.full_like(problem.block_table, -1)], 1)
    strided = replace(problem, cache=LatentCache(wide[:, 1], 128), block_table=table[:, 0])
    assert not strided.cache.data.is_contiguous() and not strided.block_table.is_contiguous()
    for got, want in zip(strided.run(), problem.run()):
        assert torch.equal(got, want)


def test_offsets_past_two_to_the_31(backend, device):
    pages = 2**31 // (64 * 144) + 20
    data = torch.empty(pages, 64, 144, dtype=BF16, device=device)  # only the pages in use become real
    problem = small([70], device=device)
    for column, page in enumerate((pages - 1, pages - 10)):
        data[page] = problem.cache.data[problem.block_table[0, column]]
    table = torch.tensor([[pages - 1, pages - 10]], dtype=torch.int32, device=device)
    for got, want in zip(replace(problem, cache=LatentCache(data, 128), block_table=table).run(), problem.run()):
        assert torch.equal(got, want)
