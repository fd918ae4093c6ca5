"""sparse_mla_decode as DeepSeek-V4 calls it: a window and entries in one softmax with a sink, the key is the value."""

import pytest
import torch

from mla_kernels import entry_slots, launch, window_slots
from mla_kernels.attention import splits
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import cache_of, make_decode, pick
from tests.support import not_on

BF16 = torch.bfloat16
CACHES = pytest.mark.parametrize("layout", ["fp8_v4", "int8", None])
SMALL = dict(latent_dim=256, rope_dim=0, dtype=BF16)


@CACHES
@pytest.mark.parametrize("heads, page_size, queries", [(5, 3, 2), (64, 1, 1)])
def test_parity(backend, device, layout, heads, page_size, queries):
    options = dict(heads=heads, page_size=page_size, queries=queries, layout=layout, device=device, **SMALL)
    problem = make_decode(33, lengths=True, sink=True, **options)
    problem.check(problem.run())


@CACHES
@pytest.mark.parametrize("top_k, extra_top_k", [(33, 7), (5, 290)])
def test_two_caches_of_other_page_sizes_and_numbers_of_picks(backend, device, layout, top_k, extra_top_k):
    problem = make_decode(
        top_k,
        extra_top_k=extra_top_k,
        heads=12,
        page_size=8,
        layout=layout,
        sink=True,
        lengths=True,
        device=device,
        **SMALL,
    )
    assert problem.extra_cache.page_size == 17
    problem.check(problem.run())


@CACHES
def test_both_caches_split_over_programs(backend, device, layout, monkeypatch):
    """Splits end within either cache's picks, and between them."""
    problem = make_decode(
        200, extra_top_k=190, heads=3, layout=layout, sink=True, lengths=True, slots=300, device=device, **SMALL
    )
    problem.topk_length[:] = torch.tensor([200, 3])
    problem.extra_topk_length[:] = torch.tensor([7, 190])
    for count in (1, 2, 3):
        monkeypatch.setattr(splits, "split_count", lambda keys, programs, cores, count=count: count)
        problem.check(problem.run())
    out, lse = problem.run(batch_invariant=True)
    problem.check((out, lse))


def test_a_cache_of_strided_pages(backend, device):
    problem = make_decode(40, page_size=8, layout="fp8_v4", sink=True, device=device, **SMALL)
    data = problem.cache.data
    layers = torch.full((data.shape[0], 2, data.stride(0) + 32), 0xFF, dtype=torch.uint8)
    here = layers[:, 1, : data.shape[1] * data.shape[2]].unflatten(1, data.shape[1:])
    here.copy_(data)
    at = layers.to(device)[:, 1, : data.shape[1] * data.shape[2]].unflatten(1, data.shape[1:])
    expected = problem.run()
    strided = problem.run(cache=LatentCache(at, 256, "fp8_v4"))
    assert all(map(torch.equal, strided, expected))
    problem.check(strided)


@pytest.mark.parametrize("layout", ["fp8_v4", "int8"])
@not_on("takes the interpreter minutes; the emulator runs these sizes", "interpret")
def test_real_sizes(backend, device, layout):
    """64 heads of 512: a window of 128 in pages of 64, and 512 picked entries in pages of 2."""
    options = dict(latent_dim=512, rope_dim=0, dtype=BF16, layout=layout, sink=True, device=device)
    problem = make_decode(128, sequences=1, heads=64, slots=1300, page_size=64, **options)
    problem.extra_cache = cache_of(1300, 2, BF16, layout, 512, 0, device)
    problem.extra_indices = pick(1, 512, 1300).view(1, 1, 512).to(device)
    problem.check(problem.run())


def test_window_and_entries_of_a_sequence(backend, device):
    """The index lists of V4 over caches that hold no more than they name."""
    lengths = torch.tensor([70, 3], dtype=torch.int32, device=device)
    table = torch.arange(2 * 9, dtype=torch.int32).view(2, 9).flip(1).contiguous().to(device)
    problem = make_decode(
        8, sequences=2, queries=2, heads=4, slots=9 * 16, page_size=8, layout="fp8_v4", device=device, **SMALL
    )
    problem.indices = window_slots(table, lengths, queries=2, window=16, page_size=8)
    problem.extra_cache = cache_of(2 * 9 * 2, 2, BF16, "fp8_v4", 256, 0, device)
    problem.extra_indices = entry_slots(table, lengths, queries=2, ratio=4, page_size=2, max_entries=17)
    problem.check(problem.run())


@pytest.mark.parametrize("kind, extra_top_k", [("HCA", 64), ("CSA", 512)])
def test_traffic(kind, extra_top_k, monkeypatch):
    """At 64 heads every row is asked for once: at most 1.3 times the least bytes where programs share no token."""
    from mla_kernels.targets.traffic import Traffic

    monkeypatch.setattr(splits, "split_count", lambda keys, programs, cores: 1)  # as in a batch that fills the device
    problem = make_decode(
        128,
        sequences=1,
        heads=64,
        slots=1300,
        page_size=64,
        latent_dim=512,
        rope_dim=0,
        dtype=BF16,
        layout="fp8_v4",
        sink=True,
    )
    problem.extra_cache = cache_of(1300, 2, BF16, "fp8_v4", 512, 0, "cpu")
    problem.indices[0, 0] = torch.randperm(1300)[:128].int()
    problem.extra_indices = torch.randperm(1300)[:extra_top_k].int().view(1, 1, -1)
    least = (128 + extra_top_k) * (584 + 4) + 64 * (2 * 1024 + 4 + 4)
    with launch.on_cpu("interpret"), Traffic() as traffic:
        result = problem.run()
    problem.check(result)
    assert traffic.requested <= 1.05 * least, f"{traffic.requested} over {least}"
