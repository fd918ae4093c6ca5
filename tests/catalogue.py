"""Every public op as a function of tensors alone, with an example of any number of tokens.

What holds for all ops (they are exported, compiled, checkpointed) is tested over this one list.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import mla_kernels as mk

EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 32, 16
LATENT, ROPE, HEADS, PAGE = 32, 16, 3, 4
TABLE = 8  # pages of a sequence


@dataclass
class Call:
    """One public function.

    ``run(**tensors)`` calls it, makes caches inside and returns what it computes and what it writes. ``example(n)``
    gives the tensors, ``sizes`` which of their axes grow with n: name -> {axis: the name of the size}.
    """

    run: Callable
    example: Callable[[int], dict[str, torch.Tensor]]
    sizes: dict[str, dict[int, str]]
    leaves: tuple[str, ...] = field(default=())  # those with a gradient


CALLS: dict[str, Call] = {}


def enter(name, sizes, run, example, leaves=()):
    """``sizes`` as a string names the tensors whose axis 0 is the number of tokens."""
    axes = {key: {0: "tokens"} for key in sizes.split()} if isinstance(sizes, str) else sizes
    CALLS[name] = Call(run, example, axes, leaves)


def call(name, sizes, leaves=()):
    """:func:`enter` what the function below gives, (run, example)."""
    return lambda pair: enter(name, sizes, *pair(), leaves)


def ids_of(tokens, experts=EXPERTS, top_k=TOP_K):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int().contiguous()
    ids[0, 0] = -1
    return ids


def rope_tables(width=ROPE):
    angles = torch.rand(128, width // 2) * 6
    return {"cos": angles.cos(), "sin": angles.sin()}


def bounds(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@call("mla_prefill", "q k v k_rope", ("q", "k", "v", "k_rope"))
def _():
    def run(q, k, v, k_rope, cu_seqlens):
        longest = q.shape[0]
        sizes = {"max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": 0.2}
        return mk.mla_prefill(q, k, v, cu_seqlens, cu_seqlens, k_rope=k_rope, **sizes)

    def example(n):
        q, k = torch.randn(n, HEADS, 48), torch.randn(n, HEADS, 32)
        v, k_rope = torch.randn(n, HEADS, 16), torch.randn(n, 16)
        return {"q": q, "k": k, "v": v, "k_rope": k_rope, "cu_seqlens": bounds(n // 2, n - n // 2)}

    return run, example


@call("mla_prefill without causal and k_rope", "q", ("q", "k", "v"))
def _():
    def run(q, k, v, cu_seqlens_q, cu_seqlens_k):
        sizes = {"max_seqlen_q": q.shape[0], "max_seqlen_k": k.shape[0], "softmax_scale": 0.2}
        return mk.mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, **sizes)

    def example(n):
        q, k, v = torch.randn(n, HEADS, 48), torch.randn(7, HEADS, 48), torch.randn(7, HEADS, 16)
        return {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds(1, n - 1), "cu_seqlens_k": bounds(0, 7)}

    return run, example


@call("sparse_mla_prefill", "q kv indices topk_length", ("q", "kv", "sink"))
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


@call("merge_states", {"outs": {1: "tokens"}, "lses": {1: "tokens"}}, ("outs", "lses"))
def _():
    return mk.merge_states, lambda n: {"outs": torch.randn(3, n, 8), "lses": torch.randn(3, n)}


def _cache(pages, layout):
    cache = mk.LatentCache.allocate(
        pages, PAGE, latent_dim=128 if layout else LATENT, rope_dim=ROPE, dtype=torch.bfloat16, layout=layout
    )
    values = torch.randn(pages * PAGE, cache.width).bfloat16()
    slots = torch.arange(pages * PAGE)
    mk.scatter_tokens(values[:, : cache.latent_dim], values[:, cache.latent_dim :], slots, cache)
    return cache.data


def _decode(layout):
    def run(q, data, block_table, seq_lens, sink):
        cache = mk.LatentCache(data, q.shape[3] - ROPE, layout)
        return mk.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.2, window=9, sink=sink)

    def example(n):
        data = _cache(n * TABLE, layout)
        q = torch.randn(n, 2, HEADS, (128 if layout else LATENT) + ROPE).bfloat16()
        table = torch.randperm(n * TABLE, dtype=torch.int32).view(n, TABLE)
        lengths = torch.randint(1, TABLE * PAGE + 1, (n,), dtype=torch.int32)
        lengths[-1] = 0
        return {"q": q, "data": data, "block_table": table, "seq_lens": lengths, "sink": torch.randn(HEADS)}

    return run, example


_BATCH = {"q": {0: "tokens"}, "data": {0: "pages"}, "block_table": {0: "tokens"}, "seq_lens": {0: "tokens"}}
enter("mla_decode", _BATCH, *_decode(None))
enter("mla_decode of fp8_v32", _BATCH, *_decode("fp8_v32"))
enter("mla_decode of int8", _BATCH, *_decode("int8"))


@call("sparse_mla_decode", {"q": {0: "tokens"}, "data": {0: "pages"}, "indices": {0: "tokens"}})
def _():
    def run(q, data, indices, extra):
        cache, more = mk.LatentCache(data, 128, "fp8_v32"), mk.LatentCache(extra, 128, "fp8_v32")
        return mk.sparse_mla_decode(
            q, cache, indices, softmax_scale=0.2, extra_cache=more, extra_indices=indices[:, :, :3].contiguous()
        )

    def example(n):
        q = torch.randn(n, 2, HEADS, 128 + ROPE).bfloat16()
        indices = torch.randint(-1, n * PAGE, (n, 2, 6), dtype=torch.int32)
        return {"q": q, "data": _cache(n, "fp8_v32"), "indices": indices, "extra": _cache(2, "fp8_v32")}

    return run, example


def _index_range(n):
    return {"starts": torch.zeros(n, dtype=torch.int32), "ends": torch.arange(1, n + 1, dtype=torch.int32)}


@call("indexer_logits", "q k weights starts ends")
def _():
    def example(n):
        return {"q": torch.randn(n, 4, 32), "k": torch.randn(n, 32), "weights": torch.randn(n, 4), **_index_range(n)}

    return mk.indexer_logits, example


@call("select_keys", "q k weights starts ends k_scale")
def _():
    def run(q, k, weights, starts, ends, k_scale):
        return mk.select_keys(q, k, weights, starts, ends, 3, k_scale=k_scale)

    def example(n):
        k = torch.randint(0, 120, (n, 32), dtype=torch.uint8)
        q, weights = torch.randn(n, 4, 32).bfloat16(), torch.randn(n, 4)
        return {"q": q, "k": k, "weights": weights, **_index_range(n), "k_scale": torch.rand(n)}

    return run, example


@call("indexer_topk", "logits starts ends")
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
    enter(f"paged_indexer_logits of {_layout}", _axes, *_paged_index(mk.paged_indexer_logits, _layout))
    enter(f"select_slots of {_layout}", _axes, *_paged_index(lambda *args: mk.select_slots(*args, 3), _layout))


# ---------------------------------------------------------------------------------------------------------------------
# Caches


def _slots(n):
    slots = torch.randperm(2 * n * PAGE)[:n].clone()
    slots[0] = -1
    return {"slot_mapping": slots, "positions": torch.randint(0, 128, (n,))}


_WRITTEN = {"positions": {0: "tokens"}, "slot_mapping": {0: "tokens"}, "data": {0: "pages"}}


@call("write_latent", {"kv_a": {0: "tokens"}, **_WRITTEN})
def _():
    def run(kv_a, norm_weight, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, 128, "int8")
        mk.write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, rope="half")
        return data

    def example(n):
        kv_a = torch.randn(n, 128 + ROPE).bfloat16()
        return {"kv_a": kv_a, "norm_weight": torch.rand(128).bfloat16(), **rope_tables(), **_slots(n),
                "data": _cache(2 * n, "int8")}  # fmt: skip

    return run, example


@call("compress_latent", {"hidden": {0: "tokens"}, **_WRITTEN})
def _():
    def run(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, LATENT)
        mk.compress_latent(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, rope="half")
        return data

    def example(n):
        hidden, weight = torch.randn(n, HIDDEN).bfloat16(), torch.randn(LATENT + ROPE, HIDDEN).bfloat16()
        return {"hidden": hidden, "weight": weight, "norm_weight": torch.rand(LATENT).bfloat16(), **rope_tables(),
                **_slots(n), "data": _cache(2 * n, None)}  # fmt: skip

    return run, example


@call("norm_and_write", {"q_a": {0: "tokens"}, "kv_a": {0: "tokens"}, **_WRITTEN})
def _():
    def run(q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, data):
        data = data.clone()
        cache = mk.LatentCache(data, LATENT)
        q = mk.norm_and_write(q_a, q_norm, kv_a, kv_norm, cos, sin, positions, slot_mapping, cache, rope="half")
        return q, data

    def example(n):
        q_a, kv_a = torch.randn(n, 24).bfloat16(), torch.randn(n, LATENT + ROPE).bfloat16()
        return {"q_a": q_a, "q_norm": torch.rand(24).bfloat16(), "kv_a": kv_a, **rope_tables(), **_slots(n),
                "kv_norm": torch.rand(LATENT).bfloat16(), "data": _cache(2 * n, None)}  # fmt: skip

    return run, example


@call("mla_prolog", {"hidden": {0: "tokens"}, **_WRITTEN})
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
            "data": _cache(2 * n, None),
        }

    return run, example


@call("absorb_query", "q positions")
def _():
    def run(q, w_uk, cos, sin, positions):
        return mk.absorb_query(q, w_uk, cos, sin, positions, rope="interleaved")

    def example(n):
        q, w_uk = torch.randn(n, HEADS, 20 + ROPE), torch.randn(HEADS, 20, LATENT)
        return {"q": q, "w_uk": w_uk, **rope_tables(), "positions": torch.randint(0, 128, (n,))}

    return run, example


@call("expand_output", "out")
def _():
    return mk.expand_output, lambda n: {"out": torch.randn(n, HEADS, LATENT), "w_uv": torch.randn(HEADS, 20, LATENT)}


@call("write_indexer_key", {"k": {0: "tokens"}, **_WRITTEN})
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


@call("rotate_indexer_query", "q positions")
def _():
    def run(q, cos, sin, positions):
        return mk.rotate_indexer_query(q, cos, sin, positions, rope_dim=ROPE, rope="half", hadamard=True)

    return run, lambda n: {"q": torch.randn(n, 4, 32), **rope_tables(), "positions": torch.randint(0, 128, (n,))}


@call("copy_pages", {"data": {0: "pages"}, "source": {0: "tokens"}, "target": {0: "tokens"}})
def _():
    def run(data, source, target):
        data = data.clone()
        mk.copy_pages(mk.LatentCache(data, LATENT), source, target)
        return data

    def example(n):
        pages = torch.randperm(2 * n)
        return {"data": _cache(2 * n, None), "source": pages[:n], "target": pages[n:]}

    return run, example


@call("gather_tokens", {"data": {0: "pages"}, "slots": {0: "tokens"}})
def _():
    def run(data, slots):
        return mk.gather_tokens(mk.LatentCache(data, 128, "fp8_v32"), slots, dtype=torch.float32)

    return run, lambda n: {"data": _cache(2 * n, "fp8_v32"), "slots": torch.randint(-1, 2 * n, (n,))}


@call("scatter_tokens", {"data": {0: "pages"}, **{key: {0: "tokens"} for key in ("latent", "rope", "slots")}})
def _():
    def run(latent, rope, slots, data):
        data = data.clone()
        mk.scatter_tokens(latent, rope, slots, mk.LatentCache(data, 128, "fp8_v32"))
        return data

    def example(n):
        latent, rope = torch.randn(n, 128).bfloat16(), torch.randn(n, ROPE).bfloat16()
        return {"latent": latent, "rope": rope, "slots": _slots(n)["slot_mapping"], "data": _cache(2 * n, "fp8_v32")}

    return run, example


# ---------------------------------------------------------------------------------------------------------------------
# Mixture of experts


def _experts(dtype=torch.float32, hidden=HIDDEN, inner=INNER):
    gate_up = torch.randn(EXPERTS, 2 * inner, hidden) * hidden**-0.5
    return {"gate_up": gate_up.to(dtype), "down": (torch.randn(EXPERTS, hidden, inner) * inner**-0.5).to(dtype)}


def _layer(n):
    return {"hidden": torch.randn(n, HIDDEN), **_experts(), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}


_LAYER = "hidden weights ids"


def _fused(**options):
    return lambda **tensors: mk.fused_moe(**tensors, **options), _layer


_LEAVES = ("hidden", "gate_up", "down", "weights")
enter("fused_moe", _LAYER, *_fused(), _LEAVES)
enter("fused_moe that computes again", _LAYER, *_fused(recompute=True), _LEAVES)
enter("fused_moe weighted at the input", _LAYER, *_fused(weight_at="input"), _LEAVES)


@call("fused_moe with biases and a clamp", _LAYER, (*_LEAVES, "gate_up_bias", "down_bias"))
def _():
    activation = mk.Activation("gpt_oss", 0.8, interleaved=True)

    def run(**tensors):
        return mk.fused_moe(**tensors, activation=activation, weight_at="activation")

    def example(n):
        biases = {"gate_up_bias": torch.randn(EXPERTS, 2 * INNER), "down_bias": torch.randn(EXPERTS, HIDDEN)}
        return _layer(n) | biases

    return run, example


def _quantised(form):
    codes = mk.ExpertWeights.quantise(*_experts(torch.bfloat16, 128, 128).values(), form)

    def run(hidden, weights, ids):
        return mk.fused_experts(hidden, codes, weights, ids)

    def example(n):
        return {"hidden": torch.randn(n, 128).bfloat16(), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}

    return run, example


for _form in ("plain", "int8", "int8_w8a8", "int4", "mxfp4", "fp8_block"):
    enter(f"fused_experts of {_form}", _LAYER, *_quantised(_form))


@call("expert_ffn and combine", _LAYER)
def _():
    def run(hidden, gate_up, down, weights, ids):
        dispatched = mk.dispatch(ids, EXPERTS)
        return mk.combine(mk.expert_ffn(hidden, gate_up, down, dispatched), weights, dispatched)

    return run, _layer


@call("dispatch", "ids")
def _():
    return lambda ids: tuple(mk.dispatch(ids, EXPERTS)), lambda n: {"ids": ids_of(n)}


@call("permute", "hidden ids", ("hidden",))
def _():
    def run(hidden, ids):
        return mk.permute(hidden, mk.dispatch(ids, EXPERTS))

    return run, lambda n: {"hidden": torch.randn(n, HIDDEN), "ids": ids_of(n)}


@call("unpermute", "hidden weights ids", ("hidden", "weights"))
def _():
    def run(hidden, weights, ids):
        dispatched = mk.dispatch(ids, EXPERTS)
        rows = mk.permute(hidden, dispatched)
        return mk.unpermute(rows, dispatched, weights), mk.unpermute(rows, dispatched, top_k=TOP_K)

    return run, lambda n: {"hidden": torch.randn(n, HIDDEN), "weights": torch.rand(n, TOP_K), "ids": ids_of(n)}


@call("align_blocks", "ids")
def _():
    return lambda ids: mk.align_blocks(ids, EXPERTS, 4), lambda n: {"ids": ids_of(n)}


@call("expert_load and update_bias", "ids")
def _():
    def run(ids, bias):
        bias, load = bias.clone(), mk.expert_load(ids, EXPERTS)
        mk.update_bias(bias, load, 0.1)
        return bias, load

    return run, lambda n: {"ids": ids_of(n), "bias": torch.randn(EXPERTS)}


@call("route", "logits", ("logits",))
def _():
    def run(logits, bias):
        return mk.route(logits, 3, bias=bias, num_groups=4, top_k_groups=2, routed_scale=2.5, num_shared=1)

    return run, lambda n: {"logits": torch.randn(n, 16), "bias": torch.randn(16)}


@call("hash_route", "logits token_ids", ("logits",))
def _():
    def example(n):
        table = torch.rand(13, 16).argsort(1)[:, :3].contiguous()
        return {"logits": torch.randn(n, 16), "table": table, "token_ids": torch.randint(0, 13, (n,))}

    return mk.hash_route, example


@call("balance_loss", "logits ids", ("logits",))
def _():
    def run(logits, ids, cu_seqlens):
        return mk.balance_loss(logits, ids), mk.balance_loss(logits, ids, cu_seqlens=cu_seqlens, scoring="softmax")

    def example(n):
        return {"logits": torch.randn(n, EXPERTS), "ids": ids_of(n), "cu_seqlens": bounds(1, n - 2)}

    return run, example
