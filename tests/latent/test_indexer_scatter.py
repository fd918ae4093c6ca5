"""scatter_indexer_keys: bytes of the cache against the reference and vLLM's formula, refusals."""

import pytest
import torch

from mla_kernels import IndexerCache, scatter_indexer_keys
from mla_kernels.reference import indexer as reference
from tests.support import repeats

SLOTS = torch.tensor([7, -1, 0, 14, 3, 9])


def keys(head_dim, dtype):
    """Random keys in strided rows, beside zeros, one of a tiny magnitude, one with magnitudes at a scale's edge."""
    k = (torch.randn(len(SLOTS), 2 * head_dim) * 3).to(dtype)[:, :head_dim]
    k[2] = 0.0
    k[3] *= 2.0**-12
    k[4] = torch.linspace(-1.0, 1.0, head_dim)
    k[4, 0] = 1.75 * 2.0**3
    return k


def run(k, slots, data, head_dim):
    cache = IndexerCache(data, head_dim)
    scatter_indexer_keys(k, slots, cache)
    return cache.data


@pytest.mark.quick("scatter_indexer_keys")
@pytest.mark.parametrize("head_dim, page_size, dtype", [(128, 3, torch.bfloat16), (32, 5, torch.float32)])
def test_bytes_of_an_fp8_cache(backend, device, head_dim, page_size, dtype):
    k, before = keys(head_dim, dtype), torch.randint(0, 256, (15 // page_size, page_size * (head_dim + 4))).byte()
    want = before.clone()
    reference.scatter_indexer_keys(k, SLOTS, want)
    got = run(k.to(device), SLOTS.to(device), before.to(device, copy=True), head_dim)
    assert torch.equal(got.cpu(), want)
    for _ in repeats(device):
        assert torch.equal(run(k.to(device), SLOTS.to(device).int(), before.to(device, copy=True), head_dim), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_that_is_not_quantised_holds_the_keys(backend, device, dtype):
    k, before = keys(64, dtype), torch.randn(5, 3, 64).to(dtype)
    want = before.clone()
    reference.scatter_indexer_keys(k, SLOTS, want)
    assert torch.equal(run(k.to(device), SLOTS.to(device), before.to(device, copy=True), 64).cpu(), want)


def test_the_example(cpu_code):
    k = torch.zeros(2, 128)
    k[0, :2] = torch.tensor([896.0, 3.5])
    cache = IndexerCache.allocate(1, 2, layout="fp8")
    scatter_indexer_keys(k, torch.tensor([0, 1]), cache)
    assert cache.keys[0, 0, :3].view(torch.float8_e4m3fn).tolist() == [448.0, 1.75, 0.0]
    assert cache.scales.tolist() == [[2.0, 2.0**-22]]


def test_a_key_that_is_not_finite_is_nan(backend, device):
    k = torch.randn(2, 32)
    k[0, 3], k[1, 4] = float("nan"), float("inf")
    data = run(k.to(device), torch.tensor([0, 1]).to(device), torch.zeros(1, 72).byte().to(device), 32)
    cache = IndexerCache(data, 32)
    assert cache.scales.isnan().all() and (cache.keys == 0x7F).all()


def test_opcheck(cpu_code):
    cache = IndexerCache.allocate(3, 4, head_dim=32, layout="fp8")
    k = torch.randn(2, 32).to(torch.bfloat16)
    torch.library.opcheck(
        torch.ops.mla_kernels.scatter_indexer_keys.default, (k, torch.tensor([1, -1]), cache.data),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_refusals(cpu_code):
    cache, k = IndexerCache.allocate(3, 4, head_dim=32, layout="fp8"), torch.randn(2, 32)
    slots = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="cache: got Tensor, an IndexerCache is accepted"):
        scatter_indexer_keys(k, slots, cache.data)
    with pytest.raises(ValueError, match="k: got shape"):
        scatter_indexer_keys(k[:, :16], slots, cache)
    with pytest.raises(ValueError, match="slot_mapping"):
        scatter_indexer_keys(k, slots[:1], cache)
    with pytest.raises(ValueError, match="the cache has 12 slots, -1 writes nothing"):
        scatter_indexer_keys(k, torch.tensor([0, 12]), cache)
    with pytest.raises(NotImplementedError, match="grad"):
        scatter_indexer_keys(k.requires_grad_(), slots, cache)
    assert not cache.data.any()
