"""Caches: what is written into them, and what moves tokens about."""

import torch

import mla_kernels as mk
from mla_kernels.catalogue.calls import (
    HEADS,
    HIDDEN,
    LATENT,
    PAGE,
    ROPE,
    TABLE,
    bounds,
    cache_parts,
    call,
    enter,
    indexer_parts,
    latent_data,
    latent_widths,
    rope_tables,
)


def _slots(n):
    slots = torch.randperm(2 * n * PAGE)[:n].clone()
    slots[0] = -1
    return {"slot_mapping": slots, "positions": torch.randint(0, 128, (n,))}


_WRITTEN = {"positions": {0: "tokens"}, "slot_mapping": {0: "tokens"}, "data": {0: "pages"}}


@call("write_latent", {"kv_a": {0: "tokens"}, **_WRITTEN}, results=cache_parts(128, "int8"))
def _():
    def run(kv_a, norm_weight, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, 128, "int8")
        mk.write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, rope="half")
        return data

    def example(n):
        kv_a = torch.randn(n, 128 + ROPE).bfloat16()
        return {"kv_a": kv_a, "norm_weight": torch.rand(128).bfloat16(), **rope_tables(), **_slots(n),
                "data": latent_data(2 * n, "int8")}  # fmt: skip

    return run, example


@call(
    "compress_latent", {"hidden": {0: "tokens"}, **_WRITTEN},
    elements="hidden weight norm_weight data", results="cache",
)  # fmt: skip
def _():
    def run(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, LATENT)
        mk.compress_latent(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, rope="half")
        return data

    def example(n):
        hidden, weight = torch.randn(n, HIDDEN).bfloat16(), torch.randn(LATENT + ROPE, HIDDEN).bfloat16()
        return {"hidden": hidden, "weight": weight, "norm_weight": torch.rand(LATENT).bfloat16(), **rope_tables(),
                **_slots(n), "data": latent_data(2 * n, None)}  # fmt: skip

    return run, example


@call(
    "norm_and_write", {"q_a": {0: "tokens"}, "kv_a": {0: "tokens"}, **_WRITTEN},
    elements="q_a q_norm kv_a kv_norm data", results="q cache",
)  # fmt: skip
def _():
    def run(q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, LATENT)
        q = mk.norm_and_write(q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, rope="half")
        return q, data

    def example(n):
        q_a, kv_a = torch.randn(n, 24).bfloat16(), torch.randn(n, LATENT + ROPE).bfloat16()
        return {"q_a": q_a, "q_norm": torch.rand(24).bfloat16(), "kv_a": kv_a, **rope_tables(), **_slots(n),
                "kv_norm": torch.rand(LATENT).bfloat16(), "data": latent_data(2 * n, None)}  # fmt: skip

    return run, example


@call(
    "mla_prolog", {"hidden": {0: "tokens"}, **_WRITTEN},
    elements="hidden down kv_norm q_up w_uk q_norm data", results="q q_latent cache",
)  # fmt: skip
def _():
    def run(hidden, down, kv_norm, q_up, w_uk, q_norm, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache, weights = mk.LatentCache(data, LATENT), mk.PrologWeights(down, kv_norm, q_up, w_uk, q_norm)
        return *mk.mla_prolog(hidden, weights, cos, sin, positions, slot_mapping, cache, rope="half"), data

    def example(n):
        return {
            "hidden": torch.randn(n, HIDDEN).bfloat16(),
            "down": torch.randn(24 + LATENT + ROPE, HIDDEN).bfloat16(),
            "kv_norm": torch.rand(LATENT).bfloat16(),
            "q_up": torch.randn(HEADS * (20 + ROPE), 24).bfloat16(),
            "w_uk": torch.randn(HEADS, 20, LATENT).bfloat16(),
            "q_norm": torch.rand(24).bfloat16(),
            **rope_tables(),
            **_slots(n),
            "data": latent_data(2 * n, None),
        }

    return run, example


@call("absorb_query", "q positions", elements="q w_uk", results="q")
def _():
    def run(q, w_uk, cos, sin, positions):
        return mk.absorb_query(q, w_uk, cos, sin, positions, rope="interleaved")

    def example(n):
        q, w_uk = torch.randn(n, HEADS, 20 + ROPE), torch.randn(HEADS, 20, LATENT)
        return {"q": q, "w_uk": w_uk, **rope_tables(), "positions": torch.randint(0, 128, (n,))}

    return run, example


@call("expand_output", "out", elements="out w_uv", results="out")
def _():
    return mk.expand_output, lambda n: {"out": torch.randn(n, HEADS, LATENT), "w_uv": torch.randn(HEADS, 20, LATENT)}


@call("write_indexer_key", {"k": {0: "tokens"}, **_WRITTEN}, elements="k", results=indexer_parts(32))
def _():
    def run(k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.IndexerCache(data, 32)
        options = {"rope_dim": ROPE, "rope": "half"}
        mk.write_indexer_key(k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, **options)
        return data

    def example(n):
        data = mk.IndexerCache.allocate(2 * n, PAGE, head_dim=32, layout="fp8").data
        return {"k": torch.randn(n, 32), "norm_weight": torch.rand(32), "norm_bias": torch.rand(32), **rope_tables(),
                **_slots(n), "data": data}  # fmt: skip

    return run, example


_KEYS = {"k": {0: "tokens"}, "slot_mapping": {0: "tokens"}, "data": {0: "pages"}}


@call("scatter_indexer_keys", _KEYS, elements="k", results=indexer_parts(32), exact="codes scales")
def _():
    def run(k, slot_mapping, data):
        data = data.clone()
        mk.scatter_indexer_keys(k, slot_mapping, mk.IndexerCache(data, 32))
        return data

    def example(n):
        data = mk.IndexerCache.allocate(2 * n, PAGE, head_dim=32, layout="fp8").data
        return {"k": torch.randn(n, 32), "slot_mapping": _slots(n)["slot_mapping"], "data": data}

    return run, example


def _write_kv(layout, width):
    def run(kv, norm_weight, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        mk.write_kv(kv, norm_weight, cos, sin, positions, slot_mapping, mk.LatentCache(data, width, layout))
        return data

    def example(n):
        data = mk.LatentCache.allocate(2 * n, PAGE, latent_dim=width, rope_dim=0, layout=layout).data
        return {"kv": torch.randn(n, width).bfloat16(), "norm_weight": torch.rand(width), **rope_tables(), **_slots(n),
                "data": data}  # fmt: skip

    return run, example


_KV = {"kv": {0: "tokens"}, **_WRITTEN}
enter("write_kv", _KV, *_write_kv(None, 64), elements="kv data", results="cache")
enter("write_kv of fp8_v4", _KV, *_write_kv("fp8_v4", 256), results=cache_parts(256, "fp8_v4"))


@call(
    "write_kv with q_a", {"kv": {0: "tokens"}, "q_a": {0: "tokens"}, **_WRITTEN},
    elements="kv q_a data", results="q_latent cache",
)  # fmt: skip
def _():
    def run(kv, norm_weight, cos, sin, positions, slot_mapping, q_a, q_norm, data):
        data = data.clone()
        cache = mk.LatentCache(data, 64)
        latent = mk.write_kv(kv, norm_weight, cos, sin, positions, slot_mapping, cache, q_a=q_a, q_norm=q_norm)
        return latent, data

    def example(n):
        data = mk.LatentCache.allocate(2 * n, PAGE, latent_dim=64, rope_dim=0).data
        rows, latents = torch.randn(n, 64).bfloat16(), torch.randn(n, 24).bfloat16()
        return {"kv": rows, "norm_weight": torch.rand(64), **rope_tables(), **_slots(n), "q_a": latents,
                "q_norm": torch.rand(24), "data": data}  # fmt: skip

    return run, example


@call("write_windows", "kv gate", elements="kv gate state", results=indexer_parts(32, "state"))
def _():
    def run(
        kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, data
    ):
        data, state = data.clone(), state.clone()
        mk.write_windows(
            kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table,
            mk.IndexerCache(data, 32), ratio=4, overlap=True, max_tokens=64,
        )  # fmt: skip
        return state, data

    def example(n):
        return {
            **_windows(n),
            "state": torch.randn(3, 9, 2, 64),
            "state_slots": torch.tensor([2, 0], dtype=torch.int32),
            "cu_seqlens": bounds(n // 2, n - n // 2),
            "seq_lens": torch.tensor([n // 2 + 5, n - n // 2], dtype=torch.int32),
            "block_table": torch.randperm(10, dtype=torch.int32).view(2, 5),
            "data": mk.IndexerCache.allocate(10, PAGE, head_dim=32, layout="fp8").data,
        }

    return run, example


_PAGED = {key: {0: "tokens"} for key in ("positions", "slot_mapping", "sequences")} | {"data": {0: "pages"}}


def _write_paged_windows(cache, data, width, ratio, overlap):
    """Every token is the last of a window; ``cache(data)`` holds entries of this width, ``data(pages)`` makes room."""

    def run(states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, data):
        data = data.clone()
        mk.write_paged_windows(
            states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache(data), ratio=ratio,
            overlap=overlap,
        )  # fmt: skip
        return data

    def example(n):
        return {
            "states": torch.randn(20, PAGE, 2, width * (1 + overlap)),
            "positions": torch.randint(0, TABLE * PAGE // ratio, (n,)) * ratio + ratio - 1,
            "slot_mapping": _slots(n)["slot_mapping"],
            "sequences": torch.randint(0, 2, (n,), dtype=torch.int32),
            "block_table": torch.randperm(20, dtype=torch.int32)[: 2 * TABLE].view(2, TABLE),
            "norm_weight": torch.rand(width),
            **rope_tables(),
            "data": data(2 * n),
        }

    return run, example


enter(
    "write_paged_windows", _PAGED,
    *_write_paged_windows(
        lambda data: mk.IndexerCache(data, 32),
        lambda pages: mk.IndexerCache.allocate(pages, PAGE, head_dim=32, layout="fp8").data, 32, 4, True,
    ),
    results=indexer_parts(32),
)  # fmt: skip
enter(
    "write_paged_windows of fp8_v4", _PAGED,
    *_write_paged_windows(
        lambda data: mk.LatentCache(data, 256, "fp8_v4"), lambda pages: latent_data(pages, "fp8_v4"), 256, 8, False
    ),
    results=cache_parts(256, "fp8_v4"),
)  # fmt: skip


@call(
    "compress_windows", {"kv": {0: "rows"}, "gate": {0: "rows"}}, ("kv", "gate", "position_bias", "norm_weight"),
    elements="kv gate", results="entries cu_seqlens", exact="cu_seqlens",
)  # fmt: skip
def _():
    def run(kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens):
        return mk.compress_windows(
            kv, gate, position_bias, norm_weight, cos, sin, cu_seqlens, ratio=4, overlap=True
        )  # fmt: skip

    return run, lambda n: {**_windows(n + 8), "cu_seqlens": bounds(n // 2, n - n // 2)}


def _windows(tokens):
    """Rows of a compressor with overlap, 32 wide, and its weights."""
    kv, gate = torch.randn(2, tokens, 64)
    return {"kv": kv, "gate": gate, "position_bias": torch.randn(4, 64), "norm_weight": torch.rand(32), **rope_tables()}


@call("rotate_indexer_query", "q positions", elements="q", results="q")
def _():
    def run(q, cos, sin, positions):
        return mk.rotate_indexer_query(q, cos, sin, positions, rope_dim=ROPE, rope="half", hadamard=True)

    return run, lambda n: {"q": torch.randn(n, 4, 32), **rope_tables(), "positions": torch.randint(0, 128, (n,))}


@call("quantise_indexer_query", "q weights", elements="q", results="codes weights", exact="codes weights")
def _():
    return mk.quantise_indexer_query, lambda n: {"q": torch.randn(n, 4, 32), "weights": torch.randn(n, 4)}


@call("rotate_heads", "x positions", leaves=("x",), elements="x", results="x")
def _():
    def run(x, cos, sin, positions):
        return mk.rotate_heads(x, cos, sin, positions, rope_dim=ROPE, norm_eps=1e-6)

    return run, lambda n: {"x": torch.randn(n, 4, 32), **rope_tables(), "positions": torch.randint(0, 128, (n,))}


@call(
    "copy_pages", {"data": {0: "pages"}, "source": {0: "tokens"}, "target": {0: "tokens"}},
    elements="data", results="cache", exact="cache",
)  # fmt: skip
def _():
    def run(data, source, target):
        data = data.clone()
        mk.copy_pages(mk.LatentCache(data, LATENT), source, target)
        return data

    def example(n):
        pages = torch.randperm(2 * n)
        return {"data": latent_data(2 * n, None), "source": pages[:n], "target": pages[n:]}

    return run, example


def _gather(layout):
    def run(data, slots):
        return mk.gather_tokens(mk.LatentCache(data, latent_widths(layout)[0], layout), slots, dtype=torch.float32)

    return run, lambda n: {"data": latent_data(2 * n, layout), "slots": torch.randint(-1, 2 * n, (n,))}


def _scatter(layout):
    latent_dim, rope_dim = latent_widths(layout)

    def run(latent, rope, slots, data):
        data = data.clone()
        mk.scatter_tokens(latent, rope, slots, mk.LatentCache(data, latent_dim, layout))
        return data

    def example(n):
        latent, rope = torch.randn(n, latent_dim).bfloat16(), torch.randn(n, rope_dim).bfloat16()
        data = latent_data(2 * n, layout)
        return {"latent": latent, "rope": rope, "slots": _slots(n)["slot_mapping"], "data": data}

    return run, example


_GATHERED = {"data": {0: "pages"}, "slots": {0: "tokens"}}
_SCATTERED = {"data": {0: "pages"}, **{key: {0: "tokens"} for key in ("latent", "rope", "slots")}}
enter("gather_tokens", _GATHERED, *_gather("fp8_v32"), results="tokens", exact="tokens")
enter("gather_tokens of fp8_v4", _GATHERED, *_gather("fp8_v4"), results="tokens", exact="tokens")
_STORED = "codes scales rope"
enter("scatter_tokens", _SCATTERED, *_scatter("fp8_v32"), results=cache_parts(128, "fp8_v32"), exact=_STORED)
enter("scatter_tokens of fp8_v4", _SCATTERED, *_scatter("fp8_v4"), results=cache_parts(256, "fp8_v4"), exact=_STORED)
