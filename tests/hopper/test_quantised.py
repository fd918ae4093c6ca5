"""mla_decode's Hopper kernels over quantised caches against the reference: emulated here, and on a Hopper GPU."""

import random
from dataclasses import replace

import pytest
import torch

from mla_kernels.gluon_launch import GluonKernel
from mla_kernels.latent.cache import LatentCache
from tests.attention.problems import Problem, make
from tests.attention.test_decode import QUERIES, unchecked
from tests.hopper.problems import ON_HOPPER
from tests.hopper.test_decode import split_into

pytestmark = ON_HOPPER

BF16 = torch.bfloat16
LAYOUTS = ("fp8_v32", "int8")
PAGE_SIZES = (64, 128, 192)
WIDTHS = ((128, 16), (256, 32), (512, 64), (128, 0))
WINDOWS = (None, None, 1, 3, 64, 100, 300)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300)
HEADS = (1, 5, 16, 20, 40)
EACH = pytest.mark.parametrize("layout, heads", [(layout, heads) for layout in LAYOUTS for heads in (5, 40)])
"""Both layouts, in the kernel for few rows and in that for many."""


def quantised(lengths, **options) -> Problem:
    return make(lengths, **dict(dtype=BF16, latent_dim=128, rope_dim=16) | options)


def forms(count: int) -> list[tuple]:
    """Random (layout, heads, page size, queries, widths, window, sink, lengths), each value at least once."""
    rng = random.Random(7)
    columns = []
    for values in (LAYOUTS, HEADS, PAGE_SIZES, QUERIES, WIDTHS, WINDOWS, (False, True)):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns, [tuple(rng.sample(LENGTHS, 3)) for _ in range(count)]))


@pytest.mark.parametrize("layout, heads, page_size, queries, widths, window, sink, lengths", forms(12))
def test_parity(backend, device, layout, heads, page_size, queries, widths, window, sink, lengths):
    problem = make(
        lengths, heads=heads, page_size=page_size, queries=queries, dtype=BF16, layout=layout, latent_dim=widths[0],
        rope_dim=widths[1], window=window, sink=sink, device=device,
    )  # fmt: skip
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        split_into(rng.choice((1, 2, 3, 5)), monkeypatch)
        causal = rng.random() < 0.85
        latent_dim, rope_dim = rng.choice(WIDTHS)
        problem = make(
            [rng.choice((*LENGTHS, 511, 700, 1100)) for _ in range(rng.choice((1, 2, 3)))],
            heads=rng.choice((*HEADS, 32, 33, 64, 65)), queries=rng.choice(QUERIES), page_size=rng.choice(PAGE_SIZES),
            dtype=BF16, layout=rng.choice(LAYOUTS), latent_dim=latent_dim, rope_dim=rope_dim, causal=causal,
            window=rng.choice(WINDOWS) if causal else None, sink=rng.random() < 0.4,
            batch_invariant=rng.random() < 0.4, device=device,
        )  # fmt: skip
        problem.check(problem.run())


@EACH
def test_splits(backend, device, layout, heads, monkeypatch):
    problem = quantised([1, 129, 700, 128, 0], queries=3, heads=heads, layout=layout, device=device)
    for splits in (1, 3):
        split_into(splits, monkeypatch)
        problem.check(problem.run())


@EACH
def test_not_causal(backend, device, layout, heads):
    problem = quantised([5, 130], queries=3, causal=False, heads=heads, layout=layout, device=device)
    problem.check(problem.run())


@EACH
def test_garbage_in_device_tensors_is_absent_tokens(backend, device, layout, heads):
    problem = quantised([130, 200, 70, 66], queries=2, heads=heads, layout=layout, device=device)
    data = problem.cache.data[1:]  # page 0, where a careless clamp would look, stays NaN
    data[(data == 0xFF).all(-1)] = 0
    problem.block_table[0, 0] = -1
    problem.block_table[1, -1] = problem.cache.num_pages
    problem.block_table[2, -1] = 2**31 - 1
    problem.block_table[3] = -(2**31)
    problem.seq_lens[2:] = torch.tensor([2**31 - 1, -5], device=device)
    problem.check(unchecked(problem))


@pytest.mark.parametrize("heads", [5, 40])
@pytest.mark.parametrize("scale", [2.0**-13, 0.3, 2.0**112])
def test_every_code_of_fp8_is_decoded_to_the_nearest_bfloat16(backend, device, heads, scale):
    """A sequence of one token, whose weight is 1, gives the token."""
    problem = quantised([1, 1], heads=heads, rope_dim=0, layout="fp8_v32", device=device)
    problem.q.zero_()
    codes = torch.arange(256, device=device).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN: below
    pages = problem.block_table[:, 0].long()
    problem.cache.latents[pages, 0] = codes.view(2, 128)
    problem.cache.scales[pages, 0] = scale
    out, lse = problem.run()
    values = codes.view(torch.float8_e4m3fn).float() * torch.tensor(scale, device=device)
    assert torch.equal(out, values.to(BF16).view(2, 1, 1, 128).expand_as(out)) and (lse == 0).all()


@pytest.mark.parametrize("heads", [5, 40])
def test_every_code_of_int8_is_decoded(backend, device, heads):
    problem = quantised([1, 1], heads=heads, rope_dim=0, layout="int8", device=device)
    problem.q.zero_()
    codes = torch.arange(-128, 128, device=device).to(torch.int8)
    pages = problem.block_table[:, 0].long()
    problem.cache.latents[pages, 0] = codes.view(2, 128)
    problem.cache.scales[pages, 0] = 0.25
    out, _ = problem.run()
    assert torch.equal(out, (codes.float() / 4).to(BF16).view(2, 1, 1, 128).expand_as(out))


@EACH
@pytest.mark.parametrize("poison", ["scale", "code", "rope"])
def test_a_nan_reaches_what_sees_it_and_nothing_else(backend, device, layout, heads, poison):
    if poison == "code" and layout == "int8":
        poison = "scale"  # no code is NaN
    problem = quantised([70, 70], heads=heads, layout=layout, device=device)
    clean = problem.run()
    page = problem.block_table[0, 1].long()
    part = {"scale": problem.cache.scales, "code": problem.cache.latents, "rope": problem.cache.rope}[poison]
    part[page, 3, 0] = 0x7F if poison == "code" else float("nan")
    (out, lse), (before, lse_before) = problem.run(), clean
    assert out[0].isnan().any(-1).all() and lse[0].isnan().all()
    assert torch.equal(out[1], before[1]) and torch.equal(lse[1], lse_before[1])


@EACH
def test_bits_do_not_follow_the_order_of_events(backend, device, layout, heads, monkeypatch):
    """The same in any order (emulated) and on a repeat (on a device)."""
    problem = quantised([400, 65, 0, 129], window=300, sink=True, heads=heads, layout=layout, device=device)
    together = problem.run()
    for seed in (1, 2):
        monkeypatch.setattr(GluonKernel, "emulated_seed", seed)
        for got, want in zip(problem.run(), together):
            assert torch.equal(got, want)


@EACH
def test_invariant_bits_follow_a_query_and_the_keys_that_it_sees_alone(backend, device, layout, heads):
    """Neither the batch, nor the queries beside it: one alone or among three."""
    problem = quantised(
        [300, 65, 3], heads=heads, queries=3, window=150, sink=True, layout=layout, batch_invariant=True, device=device
    )
    together = problem.run()
    problem.check(together)
    for got, joint in zip(problem.sequence(1).run(), together):
        assert torch.equal(got[0], joint[1])
    for query in (0, 2):
        single = replace(problem, q=problem.q[:, query : query + 1], seq_lens=problem.seq_lens - 2 + query)
        for got, joint in zip(single.run(), together):
            assert torch.equal(got[:, 0], joint[:, query])


@EACH
def test_cache_of_any_stride(backend, device, layout, heads):
    problem = quantised([70, 3], heads=heads, layout=layout, device=device)
    data = problem.cache.data
    wide = torch.full((data.shape[0], 2, data.shape[1], data.shape[2] + 32), 0xFF, dtype=torch.uint8, device=device)
    wide[:, 1, :, : data.shape[2]] = data
    strided = replace(problem, cache=LatentCache(wide[:, 1, :, : data.shape[2]], 128, layout))
    assert not strided.cache.data.is_contiguous()
    for got, want in zip(strided.run(), problem.run()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("heads", [5, 40])
def test_offsets_past_two_to_the_31(backend, device, heads):
    token = 144 + 32
    pages = 2**33 // (64 * token) + 20  # in words of codes, past 2 ** 31
    data = torch.empty(pages, 64, token, dtype=torch.uint8, device=device)  # only the pages in use become real
    problem = quantised([70], heads=heads, layout="fp8_v32", device=device)
    for column, page in enumerate((pages - 1, pages - 10)):
        data[page] = problem.cache.data[problem.block_table[0, column]]
    table = torch.tensor([[pages - 1, pages - 10]], dtype=torch.int32, device=device)
    large = replace(problem, cache=LatentCache(data, 128, "fp8_v32"), block_table=table)
    for got, want in zip(large.run(), problem.run()):
        assert torch.equal(got, want)
