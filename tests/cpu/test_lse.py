"""log-sum-exp on CPUs is as exact as float32 scores make it, whatever the dtype and the layout, at large scores too."""

import pytest
import torch

from mla_kernels import LatentCache, convert_cache, launch, mla_decode, mla_prefill
from mla_kernels.attention.sparse.op import sparse_mla_decode, sparse_mla_prefill
from mla_kernels.cpu import attention, prefill, sparse
from mla_kernels.reference import attention as reference
from mla_kernels.reference import prefill as prefill_reference
from mla_kernels.reference import sparse as sparse_reference
from mla_kernels.reference.latent import dequantise_cache

LATENT, ROPE, PAGE, SCALE = 128, 64, 16, 0.4
LIMIT = 1e-3
HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "fp8_v32"), (torch.bfloat16, "int8")]


@pytest.fixture(params=[True, False], ids=["fused", "without"], autouse=True)
def _fused(request, monkeypatch):
    """With torch's fused attention and without it, as torch may come."""
    if not request.param:
        for module in (attention, prefill, sparse):
            monkeypatch.setattr(module, "fused_attention", lambda: None)
    with launch.on_cpu("torch"):
        yield


def cache_of(pages, dtype, layout):
    """(cache, the values that it holds [pages, PAGE, width] in float64)."""
    cache = LatentCache.allocate(pages, PAGE, latent_dim=LATENT, rope_dim=ROPE, dtype=dtype)
    cache.data.normal_()
    if layout is None:
        return cache, cache.data.double()
    cache = convert_cache(cache, layout)
    return cache, dequantise_cache(cache.data, LATENT, layout, dtype=torch.float64)


def check(lse, exact):
    """At scores of such a size bfloat16 ones would be off by far more than the limit."""
    assert exact.isneginf().equal(lse.isneginf())
    seen = exact.isfinite()
    assert exact[seen].max() > 12
    assert (lse - exact)[seen].abs().max() < LIMIT


@pytest.mark.parametrize("dtype, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("queries, window", [(1, None), (3, None), (3, 700), (20, 9)])
def test_decode(dtype, layout, heads, queries, window):
    lengths = [1300, 0, 40, 16 * 64]
    cache, values = cache_of(4 * 82, dtype, layout)
    table = torch.randperm(4 * 82, dtype=torch.int32).view(4, 82)
    q, lengths = torch.randn(4, queries, heads, LATENT + ROPE).to(dtype), torch.tensor(lengths, dtype=torch.int32)
    options = {"softmax_scale": SCALE, "window": window}
    _, lse = mla_decode(q, cache, table, lengths, **options)
    check(lse, reference.mla_decode(q.double(), values, table, lengths, latent_dim=LATENT, **options)[1])


@pytest.mark.parametrize("dtype, layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("top_k", [7, 1100])
def test_sparse_decode(dtype, layout, heads, top_k):
    (cache, values), (extra, extra_values) = cache_of(90, dtype, layout), cache_of(3, dtype, layout)
    q = torch.randn(2, 2, heads, LATENT + ROPE).to(dtype)
    indices = torch.randint(-9, 90 * PAGE, (2, 2, top_k), dtype=torch.int32)
    more = torch.randint(-9, 3 * PAGE, (2, 2, 5), dtype=torch.int32)
    indices[1, 1], more[1, 1] = -1, -1
    _, lse = sparse_mla_decode(q, cache, indices, softmax_scale=SCALE, extra_cache=extra, extra_indices=more)
    options = {"softmax_scale": SCALE, "latent_dim": LATENT, "extra_indices": more}
    exact = sparse_reference.sparse_mla_decode(q.double(), values, indices, extra_cache=extra_values, **options)
    check(lse, exact[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [3, 16, 40])
@pytest.mark.parametrize("tokens, rows, top_k", [(9, 900, 600), (40, 90, 50)], ids=["gathered", "all rows"])
@pytest.mark.parametrize("max_logits", [True, False])
def test_sparse_prefill(dtype, heads, tokens, rows, top_k, max_logits):
    q, kv = torch.randn(tokens, heads, LATENT + ROPE).to(dtype), torch.randn(rows, LATENT + ROPE).to(dtype)
    indices = torch.randint(-9, rows, (tokens, top_k), dtype=torch.int32)
    indices[3] = -1
    options = {"softmax_scale": SCALE, "latent_dim": LATENT, "return_max_logits": max_logits}
    results = sparse_mla_prefill(q, kv, indices, **options)
    exact = sparse_reference.sparse_mla_prefill(q.double(), kv.double(), indices, **options)
    for lse, wanted in zip(results[1:], exact[1:], strict=True):
        check(lse, wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [True, False])
def test_prefill(dtype, causal):
    q, k, v = torch.randn(90, 3, 192).to(dtype), torch.randn(200, 3, 128).to(dtype), torch.randn(200, 3, 64).to(dtype)
    k_rope = torch.randn(200, 64).to(dtype)
    bounds = torch.tensor([0, 70, 90], dtype=torch.int32), torch.tensor([0, 150, 200], dtype=torch.int32)
    options = {"max_seqlen_q": 70, "max_seqlen_k": 150, "softmax_scale": SCALE, "causal": causal}
    _, lse = mla_prefill(q, k, v, *bounds, k_rope=k_rope, **options)
    wide = (tensor.double() for tensor in (q, k, v))
    check(lse, prefill_reference.mla_prefill(*wide, *bounds, k_rope=k_rope.double(), **options)[1])
