"""compat.flash_mla: FlashMLA's conventions and formulas, written out in plain torch beside it."""

import math

import pytest
import torch

from mla_kernels.compat import flash_mla
from mla_kernels.latent.cache import LatentCache
from mla_kernels.reference import latent as latent_reference
from mla_kernels.reference import sparse as sparse_reference
from tests.support import assert_close, poisoned

INF = float("inf")


def attend(q, keys, seen, d_v, scale, sink=None):
    """FlashMLA's formula for one query: q [heads, d], keys [n, d], seen bool [n] -> out, max_logits, lse."""
    scores = (q @ keys.T * scale).masked_fill(~seen, -INF)  # [heads, n]
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -INF, 0.0)[:, None]).exp()
    out = weights @ keys[:, :d_v].masked_fill(~seen[:, None], 0.0)
    if sink is not None:
        out = out * torch.sigmoid(lse - sink).nan_to_num(0.0)[:, None]
    return out, scores.amax(-1), lse.masked_fill(lse == -INF, INF)


def paged(lengths, page_size=64, width=576, dtype=torch.float32):
    pages = [-(-length // page_size) for length in lengths]
    cache = torch.randn(sum(pages) + 1, page_size, 1, width).to(dtype)
    order, table = (torch.randperm(sum(pages)) + 1).tolist(), torch.full((len(lengths), max([1, *pages])), -1)
    for row, count in enumerate(pages):
        for column in range(count):
            table[row, column] = order.pop()
    return cache, table.int(), torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_decode(backend, device, causal):
    lengths, s_q, heads = [70, 0, 5], 2, 3
    cache, table, seqlens = paged(lengths)
    q = torch.randn(3, s_q, heads, 576)
    given = [value.to(device) for value in (q, cache, table, seqlens)]
    metadata, splits = flash_mla.get_mla_metadata(given[3], s_q * heads, 1)
    out, lse = flash_mla.flash_mla_with_kvcache(*given, 512, metadata, splits, causal=causal)
    assert lse.is_contiguous()
    into = poisoned(3, s_q, 2 * heads, 512).to(device)[:, :, ::2]
    written, again = flash_mla.flash_mla_with_kvcache(
        *given, 512, metadata, splits, causal=causal, enable_batch_invariant=True, out=into, use_legacy=True
    )
    assert written is into and torch.equal(into, out) and torch.equal(again, lse)
    out, lse = out.cpu(), lse.cpu()
    assert out.shape == (3, s_q, heads, 512) and lse.shape == (3, heads, s_q) and lse.dtype == torch.float32
    exact_out, exact_lse = torch.zeros(out.shape).double(), torch.full(lse.shape, INF).double()
    for b, length in enumerate(lengths):
        keys = cache[table[b].clamp(min=0).long()].reshape(-1, 576)[:length].double()
        for i in range(s_q):
            seen = torch.arange(length) < (length - s_q + i + 1 if causal else length)
            if length:
                exact_out[b, i], _, exact_lse[b, :, i] = attend(q[b, i].double(), keys, seen, 512, 576**-0.5)
    assert_close(out, exact_out)
    assert_close(lse, exact_lse)


def test_metadata_of_both_forms():
    metadata, splits = flash_mla.get_mla_metadata()
    assert metadata == flash_mla.FlashMLASchedMeta(False, None, None, None) and splits is None
    lengths = torch.tensor([3, 100], dtype=torch.int32)
    metadata, splits = flash_mla.get_mla_metadata(lengths, 128, 1, 128, False, None)
    assert metadata.shape == (1, 8) and splits.tolist() == [0, 1, 2]
    assert {metadata.dtype, splits.dtype} == {torch.int32}


@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_decode_with_sink_extra_cache_and_lengths(backend, device, fp8):
    batch, s_q, heads, top_k = 2, 2, 3, 40
    q = torch.randn(batch, s_q, heads, 576).to(torch.bfloat16)
    caches, floats = [], []
    for pages, page_size in ((3, 32), (2, 16)):
        if fp8:
            data = torch.zeros(pages, page_size, 656, dtype=torch.uint8)
            cache = LatentCache(data, 512, "fp8_v32")
            codes, scales = latent_reference.quantise_latent(torch.randn(pages, page_size, 512), "fp8_v32")
            cache.latents.copy_(codes.view(torch.uint8))
            cache.scales.copy_(scales)
            cache.rope.copy_(torch.randn(pages, page_size, 64))
            floats.append(latent_reference.dequantise_cache(data, 512, "fp8_v32").double().reshape(-1, 576))
            caches.append(data.view(torch.float8_e4m3fn)[:, :, None])
        else:
            data = torch.randn(pages, page_size, 1, 576).to(torch.bfloat16)
            floats.append(data.double().reshape(-1, 576))
            caches.append(data)
    indices = torch.randint(-3, 96, (batch, s_q, top_k), dtype=torch.int32)
    indices[0, 0, :3] = torch.tensor([2**31 - 1, -(2**31), 96])
    extra = torch.randint(-3, 34, (batch, s_q, 20), dtype=torch.int32)
    sink = torch.tensor([-INF, 0.3, 2.0])
    topk_length, extra_length = torch.tensor([40, 0]).int(), torch.tensor([7, 0]).int()
    metadata, _ = flash_mla.get_mla_metadata()
    given = {
        "indices": indices, "attn_sink": sink, "extra_k_cache": caches[1], "extra_indices_in_kvcache": extra,
        "topk_length": topk_length, "extra_topk_length": extra_length,
    }  # fmt: skip
    given = {name: value.to(device) for name, value in given.items()}
    caches[0], queries = caches[0].to(device), q.to(device)
    out, lse = flash_mla.flash_mla_with_kvcache(queries, caches[0], None, None, 512, metadata, **given)
    named = flash_mla.flash_mla_with_kvcache(
        queries, caches[0], None, None, 512, None, None, None, False, fp8, *given.values(), True
    )
    assert torch.equal(out, named[0]) and torch.equal(lse, named[1]) and lse.is_contiguous()
    out, lse = out.cpu(), lse.cpu()
    assert bool((lse[1] == INF).all()) and not out[1].any()

    def formula(dtype):
        outs, lses = [], []
        for i in range(s_q):
            picked = torch.cat((indices[0, i, :40], extra[0, i, :7]))
            limit = torch.cat((torch.full((40,), 96), torch.full((7,), 32)))
            seen = (picked >= 0) & (picked < limit)
            rows = torch.where(seen, picked, 0).long()
            keys = torch.cat((floats[0][rows[:40]], floats[1][rows[40:]])).to(dtype)
            one, _, one_lse = attend(q[0, i].to(dtype), keys, seen, 512, 576**-0.5, sink.to(dtype))
            outs.append(one)
            lses.append(one_lse)
        return torch.stack(outs), torch.stack(lses, -1)

    exact, exact_lse = formula(torch.float64)
    own, own_lse = formula(torch.bfloat16)
    assert_close(out[0], exact, own)
    assert_close(lse[0], exact_lse, own_lse)


def sparse_prefill():
    s_q, s_kv, heads, top_k = 4, 30, 3, 24
    q, kv = torch.randn(s_q, heads, 576), torch.randn(s_kv, 1, 576)
    indices = torch.randint(-2, s_kv + 2, (s_q, 1, top_k), dtype=torch.int32)
    return q, kv, indices, torch.tensor([0.0, 1.0, INF]), torch.tensor([24, 0, 3, 11]).int()


def test_sparse_prefill(backend, device):
    q, kv, indices, sink, lengths = sparse_prefill()
    given = [value.to(device) for value in (q, kv, indices)]
    options = {"attn_sink": sink.to(device), "topk_length": lengths.to(device)}
    into = poisoned(4, 3, 512).to(device)
    for more in ({}, {"out": into}):
        results = flash_mla.flash_mla_sparse_fwd(*given, 0.05, **options, **more)
        for t in range(len(q)):
            picked = indices[t, 0]
            seen = (picked >= 0) & (picked < len(kv)) & (torch.arange(24) < lengths[t])
            keys = kv[torch.where(seen, picked, 0).long(), 0].double()
            for result, exact in zip(results, attend(q[t].double(), keys, seen, 512, 0.05, sink.double())):
                assert_close(result[t].cpu(), exact)
    assert results[0] is into


@pytest.mark.parametrize("with_lengths", [False, True])
def test_sparse_prefill_gives_the_lse_of_the_indexers_part(backend, device, with_lengths):
    """The first indexer_topk indices alone, of those that topk_length leaves; what else is returned stays."""
    q, kv, indices, sink, lengths = sparse_prefill()
    given = [value.to(device) for value in (q, kv, indices)]
    options = {"attn_sink": sink.to(device), "topk_length": lengths.to(device) if with_lengths else None}
    plain = flash_mla.flash_mla_sparse_fwd(*given, 0.05, **options)
    *rest, indexer = flash_mla.flash_mla_sparse_fwd(*given, 0.05, **options, indexer_topk=8)
    assert len(rest) == 3 and all(torch.equal(one, other) for one, other in zip(rest, plain))
    for t in range(len(q)):
        picked = indices[t, 0, :8]
        seen = (picked >= 0) & (picked < len(kv))
        if with_lengths:
            seen &= torch.arange(8) < lengths[t]
        keys = kv[torch.where(seen, picked, 0).long(), 0].double()
        assert_close(indexer[t].cpu(), attend(q[t].double(), keys, seen, 512, 0.05)[2])


def test_sparse_prefill_in_base_two_or_without_statistics(backend, device):
    given = [value.to(device) for value in sparse_prefill()[:3]]
    given[2][1] = -1
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*given, 0.05)
    binary = flash_mla.flash_mla_sparse_fwd(*given, 0.05, return_log2_lse=True, indexer_topk=24)
    assert torch.equal(binary[0], out) and (binary[2][1] == INF).all() and (binary[1][1] == -INF).all()
    for value, natural in zip(binary[1:], (max_logits, lse, lse)):
        torch.testing.assert_close(value * math.log(2), natural, rtol=1e-6, atol=1e-6)
    without = flash_mla.flash_mla_sparse_fwd(*given, 0.05, return_log2_lse=False)
    assert torch.equal(without[0], out) and without[1:] == (None, None)


def test_varlen_prefill_and_packed_forms(backend, device):
    lengths = [5, 0, 9]
    cu = torch.tensor([0, 5, 5, 14], dtype=torch.int32, device=device)
    qkv = torch.randn(14, 2, 2 * 192 + 128).to(device)
    q, k, v = qkv.split((192, 192, 128), -1)
    out, lse = flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, causal=True)
    assert lse.shape == (14, 2) and lse.T.is_contiguous(), "FlashMLA's lse has its tokens side by side"
    for start, length in zip([0, 5, 5], lengths):
        rows = slice(start, start + length)
        for head in range(2):
            query, key, value = (one[rows, head].cpu().double() for one in (q, k, v))
            scores = query @ key.T * 192**-0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -INF)
            assert_close(out[rows, head].cpu(), scores.softmax(-1) @ value)
            assert_close(lse[rows, head].cpu(), scores.logsumexp(-1))
    packed = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu, 9, 192, causal=True)
    half_packed = flash_mla.flash_attn_varlen_kvpacked_func(q, qkv[..., 192:], cu, cu, 9, 9, 192, causal=True)
    for results in (packed, half_packed):
        assert all(torch.equal(a, b) for a, b in zip(results, (out, lse)))


def test_caches_of_deepseek_v4(backend, device):
    """584 bytes a token, in pages padded to 576; the second cache has other pages and another number of indices."""
    heads, top_k, extra_top_k = 5, 24, 40
    q = torch.randn(2, 1, heads, 512).to(device, torch.bfloat16)
    caches, given, rows = [], [], []
    for pages, page_size in ((3, 32), (30, 2)):
        stride = -(-page_size * 584 // 576) * 576
        data = torch.full((pages, stride), 0xFF, dtype=torch.uint8)[:, : page_size * 584].unflatten(1, (page_size, 584))
        data.copy_(torch.stack([latent_reference.pack_page(torch.randn(page_size, 512)) for _ in range(pages)]))
        rows.append(latent_reference.dequantise_cache(data, 512, "fp8_v4"))
        whole = data.as_strided((pages, stride), (stride, 1)).to(device)
        caches.append(LatentCache(whole[:, : page_size * 584].unflatten(1, (page_size, 584)), 512, "fp8_v4"))
        given.append(caches[-1].data.view(torch.float8_e4m3fn)[:, :, None])
    indices = torch.randint(-1, 96, (2, 1, top_k), dtype=torch.int32, device=device)
    extra = torch.randint(-1, 60, (2, 1, extra_top_k), dtype=torch.int32, device=device)
    sink, lengths = torch.randn(heads).to(device), torch.tensor([top_k, 7], dtype=torch.int32, device=device)
    more = torch.tensor([extra_top_k, 3], dtype=torch.int32, device=device)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, given[0], None, None, 512, flash_mla.get_mla_metadata()[0], is_fp8_kvcache=True, indices=indices,
        attn_sink=sink, extra_k_cache=given[1], extra_indices_in_kvcache=extra, topk_length=lengths,
        extra_topk_length=more,
    )  # fmt: skip
    own = {"topk_length": lengths, "sink": sink, "extra_indices": extra, "extra_topk_length": more}

    def by_reference(dtype):
        here = {name: value.cpu() for name, value in own.items()}
        return sparse_reference.sparse_mla_decode(
            q.cpu().to(dtype), rows[0].to(dtype), indices.cpu(), softmax_scale=512**-0.5, latent_dim=512,
            extra_cache=rows[1].to(dtype), **here,
        )  # fmt: skip

    (exact, exact_lse), (rounded, rounded_lse) = by_reference(torch.float64), by_reference(torch.bfloat16)
    assert_close(out.cpu(), exact, rounded)
    assert_close(lse.cpu(), exact_lse.transpose(1, 2), rounded_lse.transpose(1, 2))


def test_a_query_without_keys_has_lse_plus_infinity(backend, device):
    q, k, v = (torch.randn(tokens, 1, 64).to(device) for tokens in (3, 1, 1))
    cu_q, cu_k = (torch.tensor([0, last], dtype=torch.int32, device=device) for last in (3, 1))
    out, lse = flash_mla.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 1, causal=True)
    assert (lse[:, 0] == INF).tolist() == [True, True, False]
    assert not out[:2].any() and torch.equal(out[2], v[0])


def test_refused():
    cache, table, seqlens = paged([5])
    q, metadata = torch.randn(1, 1, 2, 576), flash_mla.get_mla_metadata()[0]
    indices = torch.zeros(1, 1, 4, dtype=torch.int32)

    def call(q=q, cache=cache, table=table, seqlens=seqlens, **keywords):
        return flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, metadata, **keywords)

    with pytest.raises(NotImplementedError, match="k_cache: got 2 key heads, 1 is accepted"):
        call(cache=cache.expand(-1, -1, 2, -1))
    with pytest.raises(NotImplementedError, match="causal: got True with indices"):
        call(indices=indices, causal=True)
    with pytest.raises(ValueError, match="topk_length: got a Tensor without indices"):
        call(topk_length=seqlens)
    with pytest.raises(ValueError, match="block_table: got None without indices"):
        call(table=None)
    with pytest.raises(NotImplementedError, match="descale_k: got a Tensor"):
        call(descale_k=torch.ones(1))
    with pytest.raises(NotImplementedError, match=r"got 600 bytes a token .* 656 and 584 with 512 are accepted"):
        call(cache=torch.zeros(2, 64, 1, 600, dtype=torch.uint8), is_fp8_kvcache=True)
    with pytest.raises(NotImplementedError, match="mla_decode: got a cache in layout fp8_v4"):
        call(cache=torch.zeros(2, 64, 1, 584, dtype=torch.uint8), is_fp8_kvcache=True)
    v4 = {"cache": torch.zeros(2, 64, 1, 584, dtype=torch.uint8), "indices": indices}
    with pytest.raises(TypeError, match="q: got dtype float32, accepted: bfloat16"):
        call(q=q[..., :512], **v4)
    with pytest.raises(ValueError, match=r"q: got shape \(1, 1, 2, 576\), \(any, any, any, 512\) is accepted"):
        call(q=q.bfloat16(), **v4)
    with pytest.raises(TypeError, match="k_cache: got dtype uint8"):
        call(cache=torch.zeros(2, 64, 1, 656, dtype=torch.uint8), is_fp8_kvcache=False)
    with pytest.raises(TypeError, match="k_cache: got dtype float32, accepted: uint8, int8, float8_e4m3fn"):
        call(is_fp8_kvcache=True)
    with pytest.raises(TypeError, match="is_fp8_kvcache: got Tensor, a bool"):  # SGLang's wrapper has descale_q there
        flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, metadata, None, 0.1, False, torch.ones(1))
    with pytest.raises(TypeError, match="enable_batch_invariant: got Tensor, a bool"):  # vLLM's copy has out there
        flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, metadata, *[None] * 2, False, *[None] * 7, q)
    with pytest.raises(NotImplementedError, match="kv_format: got 'V32_NO_ROPE'"):
        call(kv_format="V32_NO_ROPE")
    into = torch.zeros(1, 1, 2, 256)
    with pytest.raises(ValueError, match=r"out: got shape \(1, 1, 2, 256\), \(1, 1, 2, 512\)"):
        call(out=into)
    with pytest.raises(TypeError, match="out: got dtype float64"):
        call(out=torch.zeros(1, 1, 2, 512).double())
    with pytest.raises(ValueError, match="both or neither"):
        call(indices=indices, extra_k_cache=cache)
    assert not into.any()
    sparse = torch.randn(2, 3, 576), torch.randn(5, 1, 576), torch.zeros(2, 1, 4, dtype=torch.int32), 0.05
    for words, error, more in (
        ("use_legacy: got True, False is accepted", NotImplementedError, {"use_legacy": True}),
        ("indexer_topk: got 5, an integer from 0 to 4", ValueError, {"indexer_topk": 5}),
        ("indexer_topk: got 2 with return_log2_lse False", ValueError, {"indexer_topk": 2, "return_log2_lse": False}),
        ("return_log2_lse: got 2", ValueError, {"return_log2_lse": 2}),
        ("out: got shape", ValueError, {"out": torch.zeros(2, 3, 256)}),
    ):
        with pytest.raises(error, match=words):
            flash_mla.flash_mla_sparse_fwd(*sparse, **more)
    sparse[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="flash_mla_sparse_fwd into out has no backward and q requires grad"):
        flash_mla.flash_mla_sparse_fwd(*sparse, out=torch.zeros(2, 3, 512))
    cu = torch.tensor([0, 3]).int()
    qkv = [torch.randn(3, heads, 64) for heads in (4, 2, 2)]
    with pytest.raises(NotImplementedError, match="got 2 and 2 heads for 4 query heads"):
        flash_mla.flash_attn_varlen_func(*qkv, cu, cu, 3, 3)
    with pytest.raises(NotImplementedError, match=r"dropout_p: got 0\.1"):
        flash_mla.flash_attn_varlen_func(qkv[0], qkv[0], qkv[0], cu, cu, 3, 3, 0.1)
