"""sparse_mla_decode and sparse_mla_prefill against the reference on every backend: shapes, layouts, picks, bits."""

import random

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention import splits as splits_module
from mla_kernels.attention.decode.op import mla_decode
from mla_kernels.attention.sparse import forward as sparse
from mla_kernels.attention.sparse.op import sparse_mla_prefill
from mla_kernels.latent.cache import LatentCache
from tests.attention.sparse_problems import Decode, cache_of, make_decode, make_prefill, pick
from tests.support import not_on, repeats

HEADS = (1, 3, 5, 12, 16, 20, 63, 96, 127, 128)
TOP_K = (1, 7, 31, 32, 33, 64, 100)
PAGE_SIZES = (1, 16, 61, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shapes(count: int) -> list[tuple]:
    """Random (heads, top_k, page size, queries, dtype) in which every value of each stands about equally often."""
    rng = random.Random(3)
    columns = []
    for values in (HEADS, TOP_K, PAGE_SIZES, (1, 2, 3), DTYPES):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    return list(zip(*columns))


@pytest.mark.quick("sparse_mla_decode", when=lambda heads: heads < 16)
@pytest.mark.parametrize("heads, top_k, page_size, queries, dtype", shapes(7))
def test_decode_parity(backend, device, heads, top_k, page_size, queries, dtype):
    options = dict(heads=heads, page_size=page_size, queries=queries, dtype=dtype, device=device)
    problem = make_decode(top_k, lengths=heads % 2 == 0, sink=heads > 12, **options)
    problem.check(problem.run())


@pytest.mark.quick("sparse_mla_prefill", when=lambda heads: heads < 16)
@pytest.mark.parametrize("heads, top_k, page_size, queries, dtype", shapes(6))
def test_prefill_parity(backend, device, heads, top_k, page_size, queries, dtype):
    options = dict(heads=heads, dtype=dtype, lengths=heads % 2 == 1, sink=heads < 63, device=device)
    problem = make_prefill(2 * queries + 1, top_k, **options)
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_parity_of_every_shape(backend, device, heads, dtype):
    for top_k in TOP_K:
        for page_size in PAGE_SIZES:
            problem = make_decode(top_k, heads=heads, page_size=page_size, queries=2, dtype=dtype, device=device)
            problem.check(problem.run())
        problem = make_prefill(5, top_k, heads=heads, dtype=dtype, lengths=True, sink=True, device=device)
        problem.check(problem.run())


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantised_caches(backend, device, layout, page_size):
    options = dict(heads=5, page_size=page_size, dtype=torch.bfloat16, latent_dim=256, layout=layout, device=device)
    problem = make_decode(33, queries=2, lengths=True, sink=True, **options)
    problem.check(problem.run())


@pytest.mark.parametrize("rope_dim, latent_dim", [(0, 64), (32, 256)])
def test_other_widths(backend, device, rope_dim, latent_dim):
    problem = make_decode(40, rope_dim=rope_dim, latent_dim=latent_dim, dtype=torch.bfloat16, device=device)
    problem.check(problem.run())
    problem = make_prefill(4, 40, rope_dim=rope_dim, latent_dim=latent_dim, dtype=torch.bfloat16, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize(
    "heads, dtype, layout",
    [
        (128, torch.bfloat16, None),  # DeepSeek-V3.2
        (128, torch.bfloat16, "fp8_v32"),
        (16, torch.float32, None),  # V3.2 on 8 devices
        (127, torch.float16, None),
    ],
)
@not_on("takes the interpreter minutes; the emulator runs these sizes", "interpret")
def test_real_sizes(heads, dtype, layout, backend, device):
    options = dict(latent_dim=512, rope_dim=64, dtype=dtype, layout=layout, page_size=64, device=device)
    problem = make_decode(2048, sequences=1, heads=heads, slots=5000, sink=True, **options)
    problem.check(problem.run())


@not_on("takes the interpreter minutes; the emulator runs these sizes", "interpret")
def test_real_prefill(backend, device):
    options = dict(heads=128, rows=5000, latent_dim=512, rope_dim=64, dtype=torch.bfloat16, device=device)
    problem = make_prefill(3, 2048, lengths=True, **options)
    problem.check(problem.run())


@pytest.mark.parametrize("top_k, extra_top_k", [(40, 21), (300, 270), (0, 5), (5, 0)])
def test_extra_cache(backend, device, top_k, extra_top_k):
    problem = make_decode(top_k, extra_top_k=extra_top_k or 1, queries=2, lengths=True, sink=True, device=device)
    if not extra_top_k:
        problem.extra_indices, problem.extra_topk_length = problem.extra_indices[..., :0], None
    problem.check(problem.run())


@pytest.mark.parametrize("top_k", [256, 257, 600])
def test_splits(backend, device, top_k, monkeypatch):
    problem = make_decode(top_k, sequences=3, heads=5, slots=2000, lengths=True, sink=True, device=device)
    problem.topk_length[:] = torch.tensor([0, 3, top_k])
    problem.check(problem.run())
    monkeypatch.setattr(sparse, "sequences_at_once", lambda split_bytes, splits: 2)
    problem.check(problem.run(batch_invariant=True))
    for splits in (1, 2):
        monkeypatch.setattr(splits_module, "split_count", lambda keys, programs, cores, splits=splits: splits)
        problem.check(problem.run())


def test_tokens_without_picks(backend, device):
    problem = make_decode(40, sequences=3, heads=2, sink=True, device=device)
    problem.indices[1] = torch.tensor([-1, -(2**31)], device=device).repeat(20)
    problem.topk_length = torch.tensor([40, 40, 0], dtype=torch.int32, device=device)
    out, lse = problem.run()
    assert (out[1:] == 0).all() and (lse[1:] == float("-inf")).all() and (out[0] != 0).any()
    problem = make_prefill(3, 20, sink=True, device=device)
    problem.indices[1] = 2**31 - 1
    out, lse, largest = problem.run()
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all() and (largest[1] == float("-inf")).all()
    problem.check((out, lse, largest))


def test_sinks_at_infinity(backend, device):
    problem = make_decode(20, heads=3, device=device)
    plain, plain_lse = problem.run()
    problem.sink = torch.tensor([float("-inf"), float("inf"), 0.0], device=device)
    out, lse = problem.run()
    assert torch.equal(out[:, :, 0], plain[:, :, 0]) and torch.equal(lse, plain_lse)
    assert (out[:, :, 1] == 0).all() and (out[:, :, 2] != 0).any()


def test_empty_inputs(backend, device):
    problem = make_decode(5, device=device)
    out, lse = problem.rows(slice(0, 0)).run()
    assert out.shape == (0, 1, 3, 64) and lse.shape == (0, 1, 3)
    out, lse = problem.run(indices=problem.indices[..., :0])
    assert (out == 0).all() and (lse == float("-inf")).all()
    problem = make_prefill(4, 5, device=device)
    out, lse, largest = problem.run(q=problem.q[:0], indices=problem.indices[:0])
    assert out.shape == (0, 3, 64) and lse.shape == largest.shape == (0, 3)
    out, lse, largest = problem.run(indices=problem.indices[:, :0])
    assert (out == 0).all() and (lse == float("-inf")).all() and (largest == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_over_all_tokens_is_dense(backend, device, dtype):
    cache = cache_of(96, 16, dtype, None, 64, 16, device)
    table = torch.stack([torch.randperm(6), torch.randperm(6)]).int()
    lengths = torch.tensor([96, 37], dtype=torch.int32)
    q = torch.randn(2, 1, 5, 80).to(dtype)
    slots = (table[..., None] * 16 + torch.arange(16, dtype=torch.int32)).flatten(1)[:, None]
    problem = Decode(q.to(device), cache, slots.to(device), 0.1, topk_length=lengths.to(device))
    dense = mla_decode(q.to(device), cache, table.to(device), lengths.to(device), softmax_scale=0.1)
    problem.check(problem.run())
    problem.check(dense)


def test_order_of_picks_changes_rounding_only(backend, device):
    problem = make_decode(60, heads=5, dtype=torch.bfloat16, device=device)
    problem.indices = problem.indices[..., torch.randperm(60).to(device)]
    problem.check(problem.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(backend, device, dtype):
    problem = make_decode(300, sequences=3, heads=17, queries=2, lengths=True, dtype=dtype, device=device)
    problem.batch_invariant = True
    together = problem.run()
    for index in (0, 2):
        for alone, joint in zip(problem.rows(slice(index, index + 1)).run(), together):
            assert torch.equal(alone[0], joint[index])
    problem = make_prefill(9, 40, heads=17, dtype=dtype, device=device)
    problem.batch_invariant = True
    together = problem.run()
    for first, last in ((0, 1), (1, 6), (8, 9)):
        part = problem.run(q=problem.q[first:last], indices=problem.indices[first:last])
        for alone, joint in zip(part, together):
            assert torch.equal(alone, joint[first:last])


def test_repeats_give_the_same_bits(backend, device):
    problem = make_decode(300, heads=5, dtype=torch.bfloat16, device=device)
    first = problem.run()
    for _ in repeats(device):
        for got, want in zip(problem.run(), first):
            assert torch.equal(got, want)


def unchecked(problem: Decode) -> tuple[torch.Tensor, torch.Tensor]:
    """The launcher, without the value checks that CPU tensors go through."""
    return sparse.launch_decode(*problem.arguments())


@not_on("values of CPU tensors are checked", "cpu")
def test_lengths_out_of_range_are_clamped_on_a_device(backend, device):
    problem = make_decode(40, sequences=3, device=device)
    problem.topk_length = torch.tensor([2**31 - 1, -5, 41], dtype=torch.int32, device=device)
    problem.check(unchecked(problem))


@pytest.mark.parametrize("page_size", [16, 61])
def test_no_access_leaves_a_tensor(page_size):
    from mla_kernels.targets import emulator

    problem = make_decode(70, queries=2, page_size=page_size, slots=200)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        problem.check(unchecked(problem))


@pytest.mark.parametrize("page_size", [1, 16, 61])
@pytest.mark.parametrize("layout", [None, "fp8_v32"])
def test_caches_of_any_stride(backend, device, page_size, layout):
    options = dict(layout=layout, latent_dim=128, dtype=torch.bfloat16, device=device)
    problem = make_decode(40, page_size=page_size, **options)
    data = problem.cache.data
    between = torch.full((data.shape[0], 2, *data.shape[1:]), 0xFF if layout else float("nan"), dtype=data.dtype)
    between = between.to(device)
    between[:, 1] = data
    strided = LatentCache(between[:, 1], 128, layout)
    assert page_size == 1 or not strided.data.is_contiguous()
    for got, want in zip(problem.run(cache=strided), problem.run()):
        assert torch.equal(got, want)


def test_queries_rows_and_indices_of_any_stride(backend, device):
    problem = make_decode(40, heads=4, queries=2, device=device)
    plain = problem.run()
    for q in (
        problem.q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([problem.q, problem.q], 1)[:, :2],
        torch.cat([problem.q, problem.q], 2)[:, :, :4],
    ):
        for got, want in zip(problem.run(q=q), plain):
            assert torch.equal(got, want)
    wide = torch.cat([problem.indices, problem.indices], 2)[..., :40]
    for got, want in zip(problem.run(indices=wide), plain):
        assert torch.equal(got, want)
    problem = make_prefill(4, 20, device=device)
    plain = problem.run()
    kv = torch.cat([problem.kv, problem.kv], 1)[:, : problem.kv.shape[1]]
    q = problem.q.transpose(0, 1).contiguous().transpose(0, 1)
    indices = torch.cat([problem.indices, problem.indices], 1)[:, :20]
    for got, want in zip(problem.run(q=q, kv=kv, indices=indices), plain):
        assert torch.equal(got, want)


@pytest.mark.parametrize("page_size", [1, 64])
@not_on("the interpreter copies whole storages", "interpret")
def test_offsets_past_two_to_the_31(backend, device, page_size):
    pages = 2**31 // (page_size * 80) + 20
    data = torch.empty(pages, page_size, 80, dtype=torch.bfloat16, device=device)  # only the pages in use become real
    small = make_decode(33, slots=10 * page_size, page_size=page_size, dtype=torch.bfloat16, device=device)
    data[-10:] = small.cache.data[:10]
    shift = (pages - 10) * page_size
    valid = (small.indices >= 0) & (small.indices < small.cache.num_slots)
    indices = torch.where(valid, small.indices + shift, -1)
    for got, want in zip(small.run(cache=LatentCache(data, 64), indices=indices), small.run()):
        assert torch.equal(got, want)


def test_max_logits_are_given_on_request(backend, device):
    problem = make_prefill(3, 9, device=device)
    assert len(problem.run()) == 3 and len(problem.run(return_max_logits=False)) == 2
    q, kv = torch.randn(2, 1, 80).to(device), torch.randn(4, 80).to(device)
    _, _, largest = sparse_mla_prefill(
        q, kv, pick(2, 4, 4, invalid=0.0).to(device), softmax_scale=0.1, latent_dim=64, return_max_logits=True
    )
    assert largest.dtype == torch.float32 and largest.isfinite().all()
