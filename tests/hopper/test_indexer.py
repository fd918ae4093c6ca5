"""The indexer's Hopper kernel against the reference: emulated here, on a Hopper GPU with ``--backend cuda``."""

import random

import pytest
import torch

from mla_kernels.attention.indexer.forward import launch_paged_logits
from mla_kernels.compat import deep_gemm
from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.hopper import indexer as variant
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.reference import indexer as reference
from tests.attention.indexer_problems import E4M3, Paged, Ragged, make_paged, make_ragged
from tests.hopper.problems import ON_HOPPER, unwritten_is_nan

pytestmark = ON_HOPPER

LENGTHS = (65, 0, 1, 500)


def ragged(tokens: int = 5, keys: int = 300, **options) -> Ragged:
    return make_ragged(tokens, keys, **dict(heads=16, head_dim=128, dtype=E4M3, fp8=True) | options)


def paged(lengths=LENGTHS, **options) -> Paged:
    return make_paged(lengths, **dict(heads=16, head_dim=128, dtype=E4M3, layout="fp8") | options)


@pytest.mark.parametrize("heads, tokens, keys", [(64, 6, 700), (32, 3, 65), (5, 9, 64), (128, 2, 130), (1, 1, 1)])
def test_logits(backend, device, heads, tokens, keys):
    problem = ragged(tokens, max(keys, 5), heads=heads, device=device)
    if keys == 1:
        problem.starts[:], problem.ends[:] = 3, 4
    problem.check(problem.run())


@pytest.mark.parametrize(
    "heads, queries, page_size", [(64, 1, 64), (64, 2, 64), (32, 5, 128), (12, 1, 192), (128, 3, 64), (1, 1, 64)]
)
def test_paged_logits(backend, device, heads, queries, page_size):
    problem = paged(heads=heads, queries=queries, page_size=page_size, limits=queries == 2, device=device)
    problem.check(problem.run())
    problem.check(problem.run(batch_invariant=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        monkeypatch.setattr(variant, "_FEWEST_BLOCKS", rng.choice((1, 2, 4, 9)))
        heads = rng.choice((1, 3, 12, 16, 17, 32, 33, 63, 64, 127, 128))
        problem = ragged(rng.choice((1, 2, 5, 9)), rng.choice((5, 64, 65, 300, 1000)), heads=heads, device=device)
        problem.check(problem.run())
        lengths = [rng.choice((0, 1, 63, 64, 65, 300, 900)) for _ in range(rng.choice((1, 3)))]
        problem = paged(
            lengths, heads=heads, queries=rng.choice((1, 2, 3, 9)), page_size=rng.choice((64, 128)),
            limits=rng.random() < 0.5, device=device,
        )  # fmt: skip
        problem.check(problem.run())


@pytest.mark.parametrize("fewest", [1, 3, 12])
def test_programs_that_share_a_sequence(backend, device, fewest, monkeypatch):
    """Chunks before, across and behind what tokens see."""
    monkeypatch.setattr(variant, "_FEWEST_BLOCKS", fewest)
    problem = ragged(9, 700, device=device)
    problem.starts[4:], problem.ends[4:] = 190, 460
    problem.check(problem.run())
    problem = paged((65, 300, 0, 700), queries=2, device=device)
    problem.check(problem.run())


def test_the_same_bits_in_any_order_and_beside_others(backend, device, monkeypatch):
    pages, rows = paged(queries=2, heads=20, device=device), ragged(heads=20, device=device)
    logits, slots, scores = pages.run(), pages.select(20), rows.run()
    monkeypatch.setattr(GluonKernel, "emulated_seed", 1)
    monkeypatch.setattr(variant, "_FEWEST_BLOCKS", 1)
    for index in (0, 3):
        alone = pages.sequence(index)
        assert torch.equal(alone.run()[0], logits[index]) and torch.equal(alone.select(20)[0], slots[index])
    assert torch.equal(rows.tokens(slice(4, 5)).run()[0], scores[4])


def test_what_is_selected(backend, device, monkeypatch):
    """Over logits whose unseen tiles are not filled, but where a limit lies beyond a sequence's length."""
    unwritten_is_nan(monkeypatch)
    problem = ragged(5, 700, heads=20, device=device)
    assert torch.equal(problem.select(11).cpu(), reference.indexer_topk(problem.run().cpu(), 11))
    problem = paged(heads=20, queries=2, limits=True, device=device)
    positions = reference.indexer_topk(problem.run().cpu().flatten(0, 1), 40).view(len(LENGTHS), 2, 40).long()
    page = torch.stack([row[(own // 64).clamp_min(0)] for row, own in zip(problem.block_table.cpu(), positions)])
    assert torch.equal(problem.select(40).cpu(), torch.where(positions < 0, -1, page * 64 + positions % 64).int())


def test_nan_is_seen_where_it_is(backend, device):
    problem = ragged(3, 130, device=device)
    problem.k.copy_(torch.randint(1, 100, problem.k.shape))
    problem.k_scale.fill_(1.0)
    problem.starts[:], problem.ends[:] = 0, 130
    problem.k[7, 3] = 0x7F
    problem.k_scale[70] = float("nan")
    problem.q.view(torch.uint8)[1, 2, 5] = 0xFF
    want = torch.zeros(3, 130, dtype=torch.bool)
    want[:, [7, 70]], want[1] = True, True
    assert torch.equal(problem.run().isnan().cpu(), want)


def test_bad_pages_and_lengths_are_absent(backend, device):
    problem = paged([130, 70], device=device)
    problem.block_table[0, 1] = 99
    problem.seq_lens[1] = 1000
    q, data, weights, table, lengths = problem.tensors()
    lengths = lengths.clamp_max(table.shape[1] * 64)
    want = reference.paged_indexer_logits(q, data, weights, table, lengths)
    arguments = (problem.q, problem.cache.data, problem.cache.head_dim, problem.weights, problem.block_table)
    got = launch_paged_logits(*arguments, problem.seq_lens).cpu()
    assert torch.equal(got.isneginf(), want.isneginf()) and torch.equal(got.isnan(), want.isnan())


def test_arguments_of_any_stride(backend, device):
    problem = ragged(3, 100, device=device)
    exact = problem.run()
    k = torch.cat([problem.k, problem.k], 1)[:, 128:]
    q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    odd = torch.cat([problem.q.flatten()[:1], problem.q.flatten()])[1:].view(problem.q.shape)
    weights = torch.cat([problem.weights, problem.weights], 1)[:, :16]
    for changes in (dict(k=k), dict(q=q, weights=weights), dict(q=odd)):
        assert torch.equal(problem.run(**changes), exact)
    problem = paged(queries=2, device=device)
    data = problem.cache.data
    wide = torch.full((data.shape[0], 2, data.shape[1]), 0xFF, dtype=torch.uint8, device=device)
    wide[:, 1] = data
    table = torch.stack([problem.block_table, torch.full_like(problem.block_table, -1)], 1)[:, 0]
    changes = dict(cache=IndexerCache(wide[:, 1], 128), block_table=table)
    assert torch.equal(problem.run(**changes), problem.run())


@pytest.mark.parametrize("columns", [0, 60, 400])
def test_as_deep_gemm_lays_them_out(backend, device, columns):
    """In place, and from each token's first key on; what a token does not see stays where it is not asked to."""
    problem = ragged(7, 300, device=device)
    problem.starts.clamp_(0, 300)
    exact = problem.run()
    given = (problem.q, (problem.k.view(E4M3), problem.k_scale), problem.weights, problem.starts, problem.ends)
    logits = deep_gemm.fp8_mqa_logits(*given, max_seqlen_k=columns)
    for token, (low, high) in enumerate(zip(problem.starts.tolist(), problem.ends.tolist())):
        count = max(0, min(high - low, columns)) if columns else max(0, high - low)
        first = 0 if columns else low
        assert torch.equal(logits[token, first : first + count], exact[token, low : low + count])
        logits[token, first : first + count] = float("-inf")
    assert (logits == float("-inf")).all()


def test_deep_gemms_pages(backend, device):
    problem = paged(queries=2, device=device)
    cache = problem.cache.data.view(problem.cache.num_pages, 64, 1, 132)
    logits = deep_gemm.fp8_paged_mqa_logits(
        problem.q, cache, problem.weights.flatten(0, 1), problem.seq_lens, problem.block_table, None, 576, True
    )
    seen = problem.run().flatten(0, 1)
    assert torch.equal(logits[:, : seen.shape[1]], seen)


@pytest.mark.no_launch("nothing to score")
def test_nothing_to_do(backend, device):
    problem = ragged(3, 100, device=device)
    assert problem.tokens(slice(0, 0)).run().shape == (0, 100)
    assert problem.run(k=problem.k[:0], k_scale=problem.k_scale[:0]).shape == (3, 0)
    problem = paged([0, 0], device=device)
    problem.block_table = problem.block_table[:, :0]
    assert problem.run().shape == (2, 1, 0)


def test_no_key_is_seen(backend, device):
    assert (paged([0, 0], queries=2, device=device).run() == float("-inf")).all()
