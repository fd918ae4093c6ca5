"""Attention and the indexer."""

import torch

import mla_kernels as mk
from mla_kernels.catalogue.calls import (
    FORMS,
    HEADS,
    LATENT,
    PAGE,
    ROPE,
    TABLE,
    bounds,
    call,
    enter,
    latent_data,
    latent_widths,
)


def _prefill(nope_dim, rope_dim, v_dim):
    def run(q, k, v, k_rope, cu_seqlens):
        longest = q.shape[0]
        sizes = {"max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": 0.2}
        return mk.mla_prefill(q, k, v, cu_seqlens, cu_seqlens, k_rope=k_rope, **sizes)

    def example(n):
        q, k = torch.randn(n, HEADS, nope_dim + rope_dim), torch.randn(n, HEADS, nope_dim)
        v, k_rope = torch.randn(n, HEADS, v_dim), torch.randn(n, rope_dim)
        return {"q": q, "k": k, "v": v, "k_rope": k_rope, "cu_seqlens": bounds(n // 2, n - n // 2)}

    return run, example


@call("mla_prefill", "q k v k_rope", ("q", "k", "v", "k_rope"), elements="q k v k_rope", results="out lse")
def _():
    return _prefill(32, 16, 16)


@call("mla_prefill without causal and k_rope", "q", ("q", "k", "v"), elements="q k v", results="out lse")
def _():
    def run(q, k, v, cu_seqlens_q, cu_seqlens_k):
        sizes = {"max_seqlen_q": q.shape[0], "max_seqlen_k": k.shape[0], "softmax_scale": 0.2}
        return mk.mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, **sizes)

    def example(n):
        q, k, v = torch.randn(n, HEADS, 48), torch.randn(7, HEADS, 48), torch.randn(7, HEADS, 16)
        return {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds(1, n - 1), "cu_seqlens_k": bounds(0, 7)}

    return run, example


@call(
    "sparse_mla_prefill", "q kv indices topk_length", ("q", "kv", "sink"), elements="q kv", results="out lse max_logits"
)
def _():
    def run(q, kv, indices, topk_length, sink):
        options = {"softmax_scale": 0.2, "latent_dim": LATENT, "topk_length": topk_length, "sink": sink}
        return mk.sparse_mla_prefill(q, kv, indices, return_max_logits=True, **options)

    def example(n):
        q, kv = torch.randn(n, HEADS, LATENT + ROPE), torch.randn(n, LATENT + ROPE)
        indices = torch.randint(-1, n, (n, 6), dtype=torch.int32)
        length = torch.randint(1, 7, (n,), dtype=torch.int32)
        return {"q": q, "kv": kv, "indices": indices, "topk_length": length, "sink": torch.randn(HEADS)}

    return run, example


@call(
    "merge_states", {"outs": {1: "tokens"}, "lses": {1: "tokens"}}, ("outs", "lses"), elements="outs", results="out lse"
)
def _():
    return mk.merge_states, lambda n: {"outs": torch.randn(3, n, 8), "lses": torch.randn(3, n)}


def _decode(layout, latent_dim=128, page_size=PAGE):
    def run(q, data, block_table, seq_lens, sink):
        cache = mk.LatentCache(data, latent_dim, layout)
        return mk.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.2, window=9, sink=sink)

    def example(n):
        pages = -(-TABLE * PAGE // page_size)
        data = latent_data(n * pages, layout, page_size, latent_dim)
        q = torch.randn(n, 2, HEADS, latent_dim + ROPE).bfloat16()
        table = torch.randperm(n * pages, dtype=torch.int32).view(n, pages)
        lengths = torch.randint(1, TABLE * PAGE + 1, (n,), dtype=torch.int32)
        lengths[-1] = 0
        return {"q": q, "data": data, "block_table": table, "seq_lens": lengths, "sink": torch.randn(HEADS)}

    return run, example


_BATCH = {"q": {0: "tokens"}, "data": {0: "pages"}, "block_table": {0: "tokens"}, "seq_lens": {0: "tokens"}}
enter("mla_decode", _BATCH, *_decode(None, LATENT), elements="q data", results="out lse")
enter("mla_decode of fp8_v32", _BATCH, *_decode("fp8_v32"), results="out lse")
enter("mla_decode of int8", _BATCH, *_decode("int8"), results="out lse")

# Forms that the kernels for Hopper carry
enter("mla_prefill of 128 + 64", "", *_prefill(128, 64, 128), elements="q k v k_rope", results="out lse", among=FORMS)
enter("mla_decode in pages of 64", "", *_decode(None, 128, 64), elements="q data", results="out lse", among=FORMS)
enter("mla_decode of fp8_v32 in pages of 64", "", *_decode("fp8_v32", 128, 64), results="out lse", among=FORMS)
enter("mla_decode of int8 in pages of 64", "", *_decode("int8", 128, 64), results="out lse", among=FORMS)


def _sparse_decode(layout):
    latent_dim, rope_dim = latent_widths(layout)

    def run(q, data, indices, extra):
        cache, more = mk.LatentCache(data, latent_dim, layout), mk.LatentCache(extra, latent_dim, layout)
        return mk.sparse_mla_decode(
            q, cache, indices, softmax_scale=0.2, extra_cache=more, extra_indices=indices[:, :, :3].contiguous()
        )

    def example(n):
        q = torch.randn(n, 2, HEADS, latent_dim + rope_dim).bfloat16()
        indices = torch.randint(-1, n * PAGE, (n, 2, 6), dtype=torch.int32)
        return {"q": q, "data": latent_data(n, layout), "indices": indices, "extra": latent_data(2, layout)}

    return run, example


_PICKED = {"q": {0: "tokens"}, "data": {0: "pages"}, "indices": {0: "tokens"}}
enter("sparse_mla_decode", _PICKED, *_sparse_decode("fp8_v32"), results="out lse")
enter("sparse_mla_decode of fp8_v4", _PICKED, *_sparse_decode("fp8_v4"), results="out lse")


_LISTS = {"block_table": {0: "tokens"}, "seq_lens": {0: "tokens"}}


def _table(n):
    table = torch.randperm(n * TABLE, dtype=torch.int32).view(n, TABLE)
    return {"block_table": table, "seq_lens": torch.randint(0, TABLE * PAGE + 1, (n,), dtype=torch.int32)}


@call("window_slots", _LISTS, results="slots", exact="slots")
def _():
    return lambda **tensors: mk.window_slots(**tensors, queries=2, window=7, page_size=PAGE), _table


@call("entry_slots", _LISTS, results="slots", exact="slots")
def _():
    sizes = {"queries": 2, "ratio": 2, "page_size": PAGE, "max_entries": TABLE * PAGE // 2}
    return lambda **tensors: mk.entry_slots(**tensors, **sizes), _table


@call("prefill_rows", {"picks": {0: "tokens"}}, results="rows", exact="rows")
def _():
    def run(cu_seqlens, picks):
        return mk.prefill_rows(cu_seqlens, tokens=picks.shape[0], window=3, picks=picks)

    def example(n):
        return {"cu_seqlens": torch.tensor([0, 1, n], dtype=torch.int32), "picks": torch.ones(n, 2, dtype=torch.int32)}

    return run, example


def _index_range(n):
    return {"starts": torch.zeros(n, dtype=torch.int32), "ends": torch.arange(1, n + 1, dtype=torch.int32)}


@call("indexer_logits", "q k weights starts ends", elements="q k", results="logits")
def _():
    def example(n):
        return {"q": torch.randn(n, 4, 32), "k": torch.randn(n, 32), "weights": torch.randn(n, 4), **_index_range(n)}

    return mk.indexer_logits, example


@call("select_keys", "q k weights starts ends k_scale", results="keys")
def _():
    def run(q, k, weights, starts, ends, k_scale):
        return mk.select_keys(q, k, weights, starts, ends, 3, k_scale=k_scale)

    def example(n):
        k = torch.randint(0, 120, (n, 32), dtype=torch.uint8)
        q, weights = torch.randn(n, 4, 32).bfloat16(), torch.randn(n, 4)
        return {"q": q, "k": k, "weights": weights, **_index_range(n), "k_scale": torch.rand(n)}

    return run, example


@call("indexer_topk", "logits starts ends", results="keys", exact="keys")
def _():
    def run(logits, starts, ends):
        return mk.indexer_topk(logits, 3, starts=starts, ends=ends)

    return run, lambda n: {"logits": torch.randn(n, 9), **_index_range(n)}


def _paged_index(function, layout):
    def run(q, data, weights, block_table, seq_lens):
        return function(q, mk.IndexerCache(data, 32, layout), weights, block_table, seq_lens)

    def example(n):
        cache = mk.IndexerCache.allocate(n * TABLE, PAGE, head_dim=32, layout=layout)
        if layout == "bf16":
            cache.data.normal_()
        else:
            cache.keys.random_(0, 120)
            cache.scales.uniform_()
        table = torch.randperm(n * TABLE, dtype=torch.int32).view(n, TABLE)
        lengths = torch.randint(0, TABLE * PAGE + 1, (n,), dtype=torch.int32)
        q, weights = torch.randn(n, 2, 4, 32).bfloat16(), torch.randn(n, 2, 4)
        return {"q": q, "data": cache.data, "weights": weights, "block_table": table, "seq_lens": lengths}

    return run, example


for _layout in ("bf16", "fp8"):
    _axes = {**_BATCH, "weights": {0: "tokens"}}
    enter(
        f"paged_indexer_logits of {_layout}",
        _axes,
        *_paged_index(lambda *args: mk.paged_indexer_logits(*args), _layout),
        results="logits",
    )
    enter(
        f"select_slots of {_layout}",
        _axes,
        *_paged_index(lambda *args: mk.select_slots(*args, 3), _layout),
        results="slots",
    )


@call("select_slots of fp8 by codes", _axes, results="slots")
def _():
    def run(q, **tensors):
        return _paged_index(lambda *args: mk.select_slots(*args, 3), "fp8")[0](q.to(torch.float8_e4m3fn), **tensors)

    return run, _paged_index(None, "fp8")[1]


@call("select_slots with limits", {**_axes, "limits": {0: "tokens"}}, results="slots")
def _():
    def run(limits, **tensors):
        def within(*args):
            return mk.select_slots(*args, 3, limits=limits)

        return _paged_index(within, "fp8")[0](**tensors)

    def example(n):
        return _paged_index(None, "fp8")[1](n) | {"limits": torch.randint(0, 20, (n, 2), dtype=torch.int32)}

    return run, example
