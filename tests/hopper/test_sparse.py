"""sparse_mla_decode's Hopper kernels against the reference: emulated here, and on a Hopper GPU with ``--backend cuda``.

The cases of tests/attention/test_sparse.py, in the widths, dtypes and layouts that the kernels carry.
"""

import random

import pytest
import torch

from mla_kernels.attention import splits as splits_module
from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.sparse import forward as sparse_forward
from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import Decode, cache_of, make_decode, pick
from tests.attention.test_sparse import HEADS, PAGE_SIZES, TOP_K, unchecked
from tests.hopper.problems import ON_HOPPER

pytestmark = ON_HOPPER

BF16, FP16 = torch.bfloat16, torch.float16
WIDTHS = ((128, 16), (256, 32), (512, 64), (128, 0), (512, 0))
FEW, MANY = dict(heads=5), dict(heads=40)  # the kernel for few heads, and that for many
BOTH = pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
LAYOUTS = pytest.mark.parametrize("layout", [None, "fp8_v32"], ids=["plain", "fp8_v32"])


def split_into(splits: int, monkeypatch) -> None:
    """Splits are so many, whatever the sizes, or fewer of 128 picks."""
    monkeypatch.setattr(splits_module, "split_count", lambda keys, programs, cores: splits)


@pytest.fixture(autouse=True)
def one_split(monkeypatch):
    """Programs see all picks of a token, where a test says nothing else."""
    split_into(1, monkeypatch)


def small(top_k: int, **options) -> Decode:
    return make_decode(top_k, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


def forms(count: int) -> list[tuple]:
    """Random (heads, top_k, page size, queries, dtype, layout, widths), each value at least once."""
    rng = random.Random(7)
    columns = []
    kinds = ((BF16, None), (FP16, None), (BF16, "fp8_v32"))
    for values in (HEADS, (*TOP_K, 129, 200), PAGE_SIZES, (1, 2, 3), kinds, WIDTHS):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns))


@pytest.mark.parametrize("heads, top_k, page_size, queries, kind, widths", forms(12))
def test_parity(backend, device, heads, top_k, page_size, queries, kind, widths):
    problem = make_decode(
        top_k, heads=heads, page_size=page_size, queries=queries, dtype=kind[0], layout=kind[1], latent_dim=widths[0],
        rope_dim=widths[1], lengths=heads % 2 == 0, sink=heads > 12, device=device,
    )  # fmt: skip
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        split_into(rng.choice((1, 2, 3)), monkeypatch)
        layout = rng.choice((None, "fp8_v32"))
        latent_dim, rope_dim = rng.choice(WIDTHS)
        problem = make_decode(
            rng.choice((*TOP_K, 65, 127, 128, 129, 300, 700)), heads=rng.choice((*HEADS, 32, 33, 64, 65)),
            queries=rng.choice((1, 2, 3)), page_size=rng.choice((*PAGE_SIZES, 128)), slots=rng.choice((70, 500)),
            dtype=BF16 if layout else rng.choice((BF16, FP16)), layout=layout, latent_dim=latent_dim,
            rope_dim=rope_dim, lengths=rng.random() < 0.5, sink=rng.random() < 0.5,
            extra_top_k=rng.choice((0, 0, 5, 70)), device=device,
        )  # fmt: skip
        problem.check(problem.run())


@BOTH
@LAYOUTS
def test_splits(backend, device, rows, layout, monkeypatch):
    problem = small(600, sequences=3, slots=2000, lengths=True, sink=True, layout=layout, device=device, **rows)
    problem.topk_length[:] = torch.tensor([0, 3, 600])
    for splits in (1, 2, 5):
        split_into(splits, monkeypatch)
        problem.check(problem.run())
    monkeypatch.setattr(sparse_forward, "sequences_at_once", lambda split_bytes, splits: 2)
    problem.check(problem.run(batch_invariant=True))


@BOTH
def test_batch_invariant_bits(backend, device, rows):
    """Alone or beside others, with absent picks behind a token's own or without, and as one of two query tokens."""
    problem = small(300, sequences=3, queries=2, device=device, **rows)
    together = problem.run(batch_invariant=True)
    absent = torch.full((3, 2, 230), -1, dtype=torch.int32, device=device)
    padded = problem.run(indices=torch.cat([problem.indices, absent], 2), batch_invariant=True)
    alone = problem.rows(slice(1, 2))
    one = alone.run(q=alone.q[:, 1:], indices=alone.indices[:, 1:], batch_invariant=True)
    for joint, wide, single in zip(together, padded, one):
        assert torch.equal(joint, wide) and torch.equal(joint[1, 1], single[0, 0])


@BOTH
@pytest.mark.parametrize("top_k, extra_top_k", [(40, 21), (300, 70), (0, 5), (5, 0)])
def test_extra_cache(backend, device, rows, top_k, extra_top_k):
    options = dict(queries=2, lengths=True, sink=True, device=device, **rows)
    problem = small(top_k, extra_top_k=extra_top_k or 1, **options)
    if not extra_top_k:
        problem.extra_indices, problem.extra_topk_length = problem.extra_indices[..., :0], None
    problem.check(problem.run())


@BOTH
def test_tokens_without_picks(backend, device, rows):
    problem = small(40, sequences=3, sink=True, device=device, **rows)
    problem.indices[1] = torch.tensor([-1, -(2**31), 2**31 - 1, problem.cache.num_slots], device=device).repeat(10)
    problem.topk_length = torch.tensor([40, 40, 0], dtype=torch.int32, device=device)
    out, lse = problem.run()
    assert (out[1:] == 0).all() and (lse[1:] == float("-inf")).all() and (out[0] != 0).any()
    problem.check((out, lse))


@BOTH
def test_every_pick_counts_as_often_as_it_stands(backend, device, rows):
    problem = small(130, device=device, **rows)
    problem.indices[:] = 3
    problem.check(problem.run())


@BOTH
def test_sinks_at_infinity(backend, device, rows):
    problem = small(20, device=device, **rows)
    plain, plain_lse = problem.run()
    problem.sink = torch.zeros(rows["heads"], device=device)
    problem.sink[:2] = torch.tensor([float("-inf"), float("inf")])
    out, lse = problem.run()
    assert torch.equal(out[:, :, 0], plain[:, :, 0]) and torch.equal(lse, plain_lse)
    assert (out[:, :, 1] == 0).all() and (out[:, :, 2] != 0).any()


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-38])
@BOTH
def test_any_scale(backend, device, rows, scale):
    problem = small(70, device=device, **rows)
    problem.softmax_scale = scale
    problem.check(problem.run())


@BOTH
def test_no_indices(backend, device, rows):
    problem = small(5, device=device, **rows)
    out, lse = problem.run(indices=problem.indices[..., :0])
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.no_launch("no queries")
def test_empty_batch(backend, device):
    out, lse = small(5, device=device).rows(slice(0, 0)).run()
    assert out.shape == (0, 1, 3, 128) and lse.shape == (0, 1, 3)


@BOTH
def test_sparse_over_all_tokens_is_dense(backend, device, rows):
    cache = cache_of(128, 64, BF16, None, 128, 16, device)
    table = torch.stack([torch.randperm(2), torch.randperm(2)]).int()
    lengths = torch.tensor([128, 37], dtype=torch.int32)
    q = torch.randn(2, 1, rows["heads"], 144).to(device, BF16)
    slots = (table[..., None] * 64 + torch.arange(64, dtype=torch.int32)).flatten(1)[:, None]
    problem = Decode(q, cache, slots.to(device), 0.1, topk_length=lengths.to(device))
    problem.check(problem.run())
    problem.check(mla_decode(q, cache, table.to(device), lengths.to(device), softmax_scale=0.1))


@BOTH
@LAYOUTS
def test_bits_follow_neither_order_nor_batch(backend, device, rows, layout, monkeypatch):
    """The same in any order of events (emulated) or on a repeat (on a device), and alone or beside others."""
    problem = small(300, sequences=3, lengths=True, sink=True, layout=layout, device=device, **rows)
    together = problem.run()
    for seed in range(1, 3):
        monkeypatch.setattr(GluonKernel, "emulated_seed", seed)
        for got, want in zip(problem.run(), together):
            assert torch.equal(got, want)
    for alone, joint in zip(problem.rows(slice(1, 2)).run(), together):
        assert torch.equal(alone[0], joint[1])


def test_lengths_out_of_range_are_clamped_on_a_device(backend, device):
    problem = small(40, sequences=3, device=device)
    problem.topk_length = torch.tensor([2**31 - 1, -5, 41], dtype=torch.int32, device=device)
    problem.check(unchecked(problem))


@LAYOUTS
@pytest.mark.parametrize("page_size", [1, 16, 61])
def test_caches_of_any_stride(backend, device, page_size, layout):
    problem = small(40, page_size=page_size, layout=layout, device=device)
    data = problem.cache.data
    between = torch.full((data.shape[0], 2, *data.shape[1:]), 0xFF if layout else float("nan"), dtype=data.dtype)
    between = between.to(device)
    between[:, 1] = data
    strided = LatentCache(between[:, 1], 128, layout)
    assert page_size == 1 or not strided.data.is_contiguous()
    for got, want in zip(problem.run(cache=strided), problem.run()):
        assert torch.equal(got, want)


def test_queries_and_indices_of_any_stride(backend, device):
    problem = small(40, heads=4, queries=2, device=device)
    plain, exact = problem.run(), problem.q
    for q in (
        exact.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([exact, exact], 1)[:, :2],
        torch.cat([exact, exact], 2)[:, :, :4],
        torch.cat([exact.flatten()[:1], exact.flatten()])[1:].view(exact.shape),  # not on a multiple of 16 bytes
    ):
        for got, want in zip(problem.run(q=q), plain):
            assert torch.equal(got, want)
    wide = torch.cat([problem.indices, problem.indices], 2)[..., :40]
    for got, want in zip(problem.run(indices=wide), plain):
        assert torch.equal(got, want)


@LAYOUTS
@pytest.mark.parametrize("page_size", [1, 64])
def test_offsets_past_two_to_the_31(backend, device, page_size, layout):
    problem = small(33, slots=10 * page_size, page_size=page_size, layout=layout, device=device)
    small_data = problem.cache.data
    pages = 2**31 // (page_size * small_data.shape[2]) + 20
    data = torch.empty(pages, *small_data.shape[1:], dtype=small_data.dtype, device=device)  # few become real
    data[-10:] = small_data[:10]
    valid = (problem.indices >= 0) & (problem.indices < problem.cache.num_slots)
    indices = torch.where(valid, problem.indices + (pages - 10) * page_size, -1)
    for got, want in zip(problem.run(cache=LatentCache(data, 128, layout), indices=indices), problem.run()):
        assert torch.equal(got, want)


def test_a_slot_that_is_none_is_not_read(backend, device):
    """Not even by a copy that nobody multiplies: row 0, where a careless clamp would look, is NaN."""
    problem = small(130, slots=70, device=device)
    problem.cache.data.view(-1, 144)[0] = float("nan")
    problem.indices = pick(2, 130, 69, invalid=0.5).view(2, 1, 130).to(device)
    problem.indices[(problem.indices >= 0) & (problem.indices < 70)] += 1
    problem.check(problem.run())


@BOTH
@pytest.mark.parametrize("splits", [1, 2])
def test_nan_stays_with_its_head_and_is_not_lost(backend, device, rows, splits, monkeypatch):
    problem = small(200, **rows, device=device)
    split_into(splits, monkeypatch)
    want = problem.run()
    problem.q[1, 0, 2, 3] = float("nan")
    for got, clean in zip(problem.run(), want):
        assert got[1, 0, 2].isnan().all()
        got[1, 0, 2] = clean[1, 0, 2]
        assert torch.equal(got, clean)
