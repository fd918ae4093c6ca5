"""The cases that ``python -m bench.op`` times: every op at DeepSeek's sizes, a decoding step and a prompt.

They use the library's public functions alone, so that a case runs on an older revision too. Numbers come from the CPU's
generator: two processes with one seed get the same.
"""

from __future__ import annotations  # an older revision may not have every name

from collections.abc import Callable
from dataclasses import dataclass

import torch

import mla_kernels as mk

HEADS, LATENT, ROPE, NOPE, VALUE, HIDDEN, PAGE = 16, 512, 64, 128, 128, 2048, 64  # DeepSeek-V2-Lite's
EXPERTS, TOP_K, INNER = 16, 6, 1408  # of V2-Lite's 64 experts, for the memory's sake
INDEX_HEADS, INDEX_WIDTH = 64, 128  # DeepSeek-V3.2's indexer
SCALE = (NOPE + ROPE) ** -0.5
ROTATION = "interleaved_to_half"
TOKENS = ({"tokens": 1}, {"tokens": 256})

Run = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """``build(make, **sizes)`` gives a call without arguments, for each of ``cases``."""

    build: Callable[..., Run]
    cases: dict[str, dict[str, int]]


OPS: dict[str, Op] = {}
"""By the public function's name."""


def op(name: str, *sizes: dict[str, int]):
    """Enter the function below as the builder of this op's cases."""

    def enter(build):
        OPS[name] = Op(build, {" ".join(f"{k}={v}" for k, v in size.items()): size for size in sizes})
        return build

    return enter


class Make:
    """Arguments on a device."""

    def __init__(self, device: str):
        self.device = device

    def normal(self, *shape: int, scale: float = 1.0, dtype=torch.bfloat16) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(self.device, dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape).to(self.device)

    def counting(self, count: int, dtype=torch.int32) -> torch.Tensor:
        return torch.arange(count, dtype=dtype).to(self.device)

    def order(self, count: int, dtype=torch.int64) -> torch.Tensor:
        return torch.randperm(count).to(self.device, dtype)

    def choices(self, rows: int, count: int, below: int) -> torch.Tensor:
        """[rows, count] of different numbers below ``below``."""
        return torch.rand(rows, below).topk(count).indices.to(self.device, torch.int32)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.rand(4096, ROPE // 2) * 6
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def cache(self, tokens: int, layout: str | None = None) -> mk.LatentCache:
        """A cache of these tokens."""
        pages = -(-tokens // PAGE)
        cache = mk.LatentCache.allocate(pages, PAGE, dtype=torch.bfloat16, layout=layout, device=self.device)
        rows = self.normal(cache.num_slots, LATENT + ROPE)
        mk.scatter_tokens(rows[:, :LATENT], rows[:, LATENT:], self.counting(cache.num_slots, torch.int64), cache)
        return cache

    def keys(self, tokens: int) -> mk.IndexerCache:
        """An indexer's cache of these tokens, in fp8."""
        pages = -(-tokens // PAGE)
        cache = mk.IndexerCache.allocate(pages, PAGE, layout="fp8", device=self.device)
        norm = self.normal(INDEX_WIDTH, dtype=torch.float32)
        places = self.counting(pages * PAGE, torch.int64)
        rows = self.normal(pages * PAGE, INDEX_WIDTH)
        mk.write_indexer_key(
            rows, norm, norm, *self.tables(), places % 4096, places, cache, rope_dim=ROPE, rope="half"
        )  # fmt: skip
        return cache

    def paged(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table of shuffled pages, and lengths."""
        pages = -(-length // PAGE)
        lengths = torch.full((batch,), length, dtype=torch.int32)
        return self.order(batch * pages, torch.int32).view(batch, pages), lengths.to(self.device)

    def experts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up and down: one random expert, rolled by another count for each."""

        def stack(rows, columns):
            one = self.normal(rows, columns, scale=columns**-0.5)
            return torch.stack([one.roll(37 * expert) for expert in range(EXPERTS)])

        return stack(2 * INNER, HIDDEN), stack(HIDDEN, INNER)


# Caches


@op("write_latent", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, rows, norm = make.cache(tokens), make.normal(tokens, LATENT + ROPE), make.normal(LATENT)
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))

    def run():
        mk.write_latent(rows, norm, *tables, *places, cache, rope=ROTATION)
        return (cache.data,)

    return run


@op("write_kv", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache = mk.LatentCache.allocate(-(-tokens // PAGE), PAGE, latent_dim=LATENT, rope_dim=0, device=make.device)
    rows, norm = make.normal(tokens, LATENT), make.normal(LATENT, dtype=torch.float32)
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))

    def run():
        mk.write_kv(rows, norm, *tables, *places, cache)
        return (cache.data,)

    return run


def _compressor(make: Make, kind: str, tokens: int) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    """kv, gate, position bias, norm weight and tables of one of DeepSeek-V4's compressors, and its options."""
    ratio, overlap = (128, False) if kind == "hca" else (4, True)
    width = LATENT * (1 + overlap)
    kv, gate, bias = make.normal(tokens, width), make.normal(tokens, width), make.normal(ratio, width).float()
    return (kv, gate, bias, make.normal(LATENT, dtype=torch.float32), *make.tables()), {
        "ratio": ratio,
        "overlap": overlap,
    }


@op(
    "write_windows",
    {"kind": "hca", "sequences": 8, "tokens": 1},
    {"kind": "csa", "sequences": 8, "tokens": 1},
    {"kind": "csa", "sequences": 1, "tokens": 256},
)
def _(make: Make, kind: str, sequences: int, tokens: int) -> Run:
    """Every call completes a window of each sequence."""
    inputs, options = _compressor(make, kind, sequences * tokens)
    ratio, width = options["ratio"], inputs[0].shape[1]
    state = make.normal(sequences, ratio * (1 + options["overlap"]), 2, width)
    cache = mk.LatentCache.allocate(sequences * 8, PAGE, latent_dim=LATENT, rope_dim=0, device=make.device)
    bounds, lengths = make.counting(sequences + 1) * tokens, torch.full_like(make.counting(sequences), 1024)
    places = make.counting(sequences), bounds, lengths, make.counting(sequences * 8).view(sequences, 8)

    def run():
        mk.write_windows(*inputs, state, *places, cache, max_tokens=tokens, **options)
        return state, cache.data

    return run


@op("write_paged_windows", *({"kind": kind, "tokens": tokens} for kind in ("hca", "csa") for tokens in (8, 256)))
def _(make: Make, kind: str, tokens: int) -> Run:
    """The newest tokens of eight sequences, whose last one ends a window."""
    ratio, overlap, page = (128, False, 8) if kind == "hca" else (4, True, 4)
    table = make.order(8 * 256 // page, torch.int32).view(8, -1)
    states = make.normal(table.numel(), page, 2, LATENT * (1 + overlap), dtype=torch.float32)
    each = make.counting(tokens, torch.int64)
    positions, sequences = 255 - each // 8, (each % 8).int()
    slots = torch.where((positions + 1) % ratio == 0, each, -1)
    cache = mk.LatentCache.allocate(-(-tokens // PAGE), PAGE, latent_dim=LATENT, rope_dim=0, device=make.device)
    places, weights = (positions, slots, sequences, table), (make.normal(LATENT), *make.tables())

    def run():
        mk.write_paged_windows(states, *places, *weights, cache, ratio=ratio, overlap=overlap)
        return (cache.data,)

    return run


@op("compress_windows", {"kind": "hca", "tokens": 1024}, {"kind": "csa", "tokens": 1024})
def _(make: Make, kind: str, tokens: int) -> Run:
    inputs, options = _compressor(make, kind, tokens)
    ends = make.counting(2) * tokens
    return lambda: mk.compress_windows(*inputs, ends, **options)


@op("compress_latent", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, hidden, norm = make.cache(tokens), make.normal(tokens, HIDDEN), make.normal(LATENT)
    weight = make.normal(LATENT + ROPE, HIDDEN, scale=HIDDEN**-0.5)
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))

    def run():
        mk.compress_latent(hidden, weight, norm, *tables, *places, cache, rope=ROTATION)
        return (cache.data,)

    return run


@op("norm_and_write", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, q_a, kv_a = make.cache(tokens), make.normal(tokens, 1536), make.normal(tokens, LATENT + ROPE)
    q_norm, kv_norm = make.normal(1536), make.normal(LATENT)
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))

    def run():
        return mk.norm_and_write(q_a, q_norm, kv_a, kv_norm, *tables, *places, cache, rope=ROTATION), cache.data

    return run


@op("mla_prolog", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, hidden = make.cache(tokens), make.normal(tokens, HIDDEN)
    weights = mk.PrologWeights(
        make.normal(LATENT + ROPE, HIDDEN, scale=HIDDEN**-0.5),
        make.normal(LATENT),
        make.normal(HEADS * (NOPE + ROPE), HIDDEN, scale=HIDDEN**-0.5),
        make.normal(HEADS, NOPE, LATENT, scale=LATENT**-0.5),
        None,
    )
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))
    return lambda: (mk.mla_prolog(hidden, weights, *tables, *places, cache, rope=ROTATION)[0], cache.data)


@op("absorb_query", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    q, w_uk = make.normal(tokens, HEADS, NOPE + ROPE), make.normal(HEADS, NOPE, LATENT)
    tables, positions = make.tables(), make.counting(tokens, torch.int64)
    return lambda: (mk.absorb_query(q, w_uk, *tables, positions, rope=ROTATION),)


@op("expand_output", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    out, w_uv = make.normal(tokens, HEADS, LATENT), make.normal(HEADS, VALUE, LATENT)
    return lambda: (mk.expand_output(out, w_uv),)


@op("gather_tokens", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, slots = make.cache(tokens, "fp8_v32"), make.order(tokens)
    return lambda: (mk.gather_tokens(cache, slots),)


@op("scatter_tokens", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, slots, rows = make.cache(tokens, "fp8_v32"), make.order(tokens), make.normal(tokens, LATENT + ROPE)

    def run():
        mk.scatter_tokens(rows[:, :LATENT], rows[:, LATENT:], slots, cache)
        return (cache.data,)

    return run


@op("scatter_indexer_keys", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, slots, rows = make.keys(tokens), make.order(tokens), make.normal(tokens, INDEX_WIDTH)

    def run():
        mk.scatter_indexer_keys(rows, slots, cache)
        return (cache.data,)

    return run


@op("copy_pages", {"pages": 1}, {"pages": 64})
def _(make: Make, pages: int) -> Run:
    cache, order = make.cache(2 * pages * PAGE), make.order(2 * pages)

    def run():
        mk.copy_pages(cache, order[:pages], order[pages:])
        return (cache.data,)

    return run


@op("convert_cache", {"tokens": 1024})
def _(make: Make, tokens: int) -> Run:
    cache = make.cache(tokens)
    return lambda: (mk.convert_cache(cache, "fp8_v32").data,)


# Attention


@op("mla_decode", {"batch": 1, "length": 1024}, {"batch": 1, "length": 4096}, {"batch": 8, "length": 1024})
def _(make: Make, batch: int, length: int) -> Run:
    q, cache, places = (
        make.normal(batch, 1, HEADS, LATENT + ROPE),
        make.cache(batch * length),
        make.paged(batch, length),
    )
    return lambda: mk.mla_decode(q, cache, *places, softmax_scale=SCALE)


@op("mla_prefill", {"tokens": 512}, {"tokens": 2048})
def _(make: Make, tokens: int) -> Run:
    q, rope = make.normal(tokens, HEADS, NOPE + ROPE), make.normal(tokens, ROPE)
    k, v = make.normal(tokens, HEADS, NOPE + VALUE).split([NOPE, VALUE], -1)
    ends = make.counting(2) * tokens
    sizes = {"max_seqlen_q": tokens, "max_seqlen_k": tokens, "softmax_scale": SCALE}
    return lambda: mk.mla_prefill(q, k, v, ends, ends, k_rope=rope, **sizes)


@op("merge_states", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    outs, lses = make.normal(4, tokens, HEADS, LATENT), make.normal(4, tokens, HEADS, dtype=torch.float32)
    return lambda: mk.merge_states(outs, lses)


@op("sparse_mla_decode", {"batch": 1, "top_k": 2048}, {"batch": 8, "top_k": 2048})
def _(make: Make, batch: int, top_k: int) -> Run:
    q, cache = make.normal(batch, 1, HEADS, LATENT + ROPE), make.cache(4 * top_k)
    picks = make.choices(batch, top_k, 4 * top_k)[:, None]
    return lambda: mk.sparse_mla_decode(q, cache, picks, softmax_scale=SCALE)


@op("window_slots", {"batch": 1}, {"batch": 64})
def _(make: Make, batch: int) -> Run:
    table = make.paged(batch, 4096)
    return lambda: (mk.window_slots(*table, queries=1, window=128, page_size=PAGE),)


@op("entry_slots", {"batch": 1}, {"batch": 64})
def _(make: Make, batch: int) -> Run:
    table, lengths = make.paged(batch, 1024)  # pages of entries, one for 128 tokens
    sizes = {"queries": 1, "ratio": 128, "page_size": PAGE, "max_entries": 1024}
    return lambda: (mk.entry_slots(table, lengths * 128, **sizes),)


@op("prefill_rows", {"tokens": 4096})
def _(make: Make, tokens: int) -> Run:
    ends = make.counting(2) * tokens
    sizes = {"tokens": tokens, "window": 128, "entry_cu_seqlens": ends // 128, "ratio": 128}
    return lambda: (mk.prefill_rows(ends, **sizes, max_entries=tokens // 128),)


@op("sparse_mla_prefill", {"tokens": 32, "top_k": 512})
def _(make: Make, tokens: int, top_k: int) -> Run:
    q, rows = make.normal(tokens, HEADS, LATENT + ROPE), make.normal(4 * top_k, LATENT + ROPE)
    picks = make.choices(tokens, top_k, 4 * top_k)
    return lambda: mk.sparse_mla_prefill(q, rows, picks, softmax_scale=SCALE)[:2]


# Indexer


@op("write_indexer_key", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    cache, rows, norm = (
        make.keys(tokens),
        make.normal(tokens, INDEX_WIDTH),
        make.normal(INDEX_WIDTH, dtype=torch.float32),
    )
    tables, places = make.tables(), (make.counting(tokens, torch.int64), make.order(tokens))

    def run():
        mk.write_indexer_key(rows, norm, norm, *tables, *places, cache, rope_dim=ROPE, rope="half")
        return (cache.data,)

    return run


@op("rotate_indexer_query", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    q, tables, positions = (
        make.normal(tokens, INDEX_HEADS, INDEX_WIDTH),
        make.tables(),
        make.counting(tokens, torch.int64),
    )
    return lambda: (mk.rotate_indexer_query(q, *tables, positions, rope_dim=ROPE, rope="half"),)


@op("quantise_indexer_query", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    q, weights = make.normal(tokens, INDEX_HEADS, INDEX_WIDTH), make.normal(tokens, INDEX_HEADS, dtype=torch.float32)

    def run():
        codes, folded = mk.quantise_indexer_query(q, weights)
        return codes.view(torch.uint8), folded

    return run


@op("rotate_heads", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    x = make.normal(tokens, 64, 512)  # DeepSeek-V4-Flash's queries
    tables, positions = make.tables(), make.counting(tokens, torch.int64)
    return lambda: (mk.rotate_heads(x, *tables, positions, rope_dim=ROPE, norm_eps=1e-6),)


def _prompt(make: Make, tokens: int, keys: int) -> tuple[torch.Tensor, ...]:
    q, k = make.normal(tokens, INDEX_HEADS, INDEX_WIDTH), make.normal(keys, INDEX_WIDTH)
    ends = make.counting(tokens) + (keys - tokens + 1)
    return q, k, make.normal(tokens, INDEX_HEADS, dtype=torch.float32), torch.zeros_like(ends), ends


def _step(make: Make, batch: int, length: int) -> tuple:
    q, cache = make.normal(batch, 1, INDEX_HEADS, INDEX_WIDTH), make.keys(batch * length)
    return q, cache, make.normal(batch, 1, INDEX_HEADS, dtype=torch.float32), *make.paged(batch, length)


@op("indexer_logits", {"tokens": 1, "keys": 32768}, {"tokens": 64, "keys": 4096})
def _(make: Make, tokens: int, keys: int) -> Run:
    args = _prompt(make, tokens, keys)
    return lambda: (mk.indexer_logits(*args),)


@op("paged_indexer_logits", {"batch": 1, "length": 4096}, {"batch": 4, "length": 4096})
def _(make: Make, batch: int, length: int) -> Run:
    args = _step(make, batch, length)
    return lambda: (mk.paged_indexer_logits(*args),)


@op("indexer_topk", {"rows": 1, "keys": 131072}, {"rows": 64, "keys": 8192})
def _(make: Make, rows: int, keys: int) -> Run:
    logits = make.normal(rows, keys, dtype=torch.float32)
    return lambda: (mk.indexer_topk(logits, 2048),)


@op("select_keys", {"tokens": 1, "keys": 32768}, {"tokens": 64, "keys": 4096})
def _(make: Make, tokens: int, keys: int) -> Run:
    args = _prompt(make, tokens, keys)
    return lambda: (mk.select_keys(*args, 2048),)


@op("select_slots", {"batch": 1, "length": 4096}, {"batch": 4, "length": 4096})
def _(make: Make, batch: int, length: int) -> Run:
    args = _step(make, batch, length)
    return lambda: (mk.select_slots(*args, 2048),)


# Routers


@op("route", {"tokens": 1, "experts": 256}, {"tokens": 1024, "experts": 256})
def _(make: Make, tokens: int, experts: int) -> Run:
    logits, bias = (
        make.normal(tokens, experts, dtype=torch.float32),
        make.normal(experts, scale=0.1, dtype=torch.float32),
    )
    return lambda: mk.route(logits, 8, bias=bias, num_groups=8, top_k_groups=4, routed_scale=2.5)


@op("hash_route", {"tokens": 1, "experts": 256}, {"tokens": 1024, "experts": 256})
def _(make: Make, tokens: int, experts: int) -> Run:
    logits, table = make.normal(tokens, experts, dtype=torch.float32), make.choices(4096, TOP_K, experts)
    token_ids = make.order(4096)[:tokens]
    return lambda: mk.hash_route(logits, table, token_ids, routed_scale=1.5)


def _hyper(make: Make, tokens: int):
    """Streams, a layer's result, post, comb and the weights of DeepSeek-V4's hyper-connections, and a norm's weight."""
    streams, out = make.normal(tokens, 4, HIDDEN), make.normal(tokens, HIDDEN)
    fn = make.normal(24, 4 * HIDDEN, scale=0.02, dtype=torch.float32)
    weights = fn, make.normal(24, dtype=torch.float32), make.normal(3, dtype=torch.float32)
    return (streams, out, make.uniform(tokens, 4), make.uniform(tokens, 4, 4)), weights, make.normal(HIDDEN)


@op("hyper_pre", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    (streams, *_), weights, norm = _hyper(make, tokens)
    return lambda: mk.hyper_pre(streams, *weights, norm_weight=norm)


@op("hyper_post", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    written, _, _ = _hyper(make, tokens)
    return lambda: (mk.hyper_post(*written),)


@op("hyper_post_pre", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    written, weights, norm = _hyper(make, tokens)
    return lambda: mk.hyper_post_pre(*written, *weights, norm_weight=norm)


@op("hyper_head", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    (streams, *_), (fn, base, scale), norm = _hyper(make, tokens)
    return lambda: (mk.hyper_head(streams, fn[:4], base[:4], scale[:1], norm_weight=norm),)


@op("balance_loss", {"tokens": 1024, "experts": 160})
def _(make: Make, tokens: int, experts: int) -> Run:
    logits, ids = make.normal(tokens, experts, dtype=torch.float32), make.choices(tokens, TOP_K, experts)
    return lambda: (mk.balance_loss(logits, ids, scoring="softmax"),)


@op("expert_load", {"tokens": 1, "experts": 256}, {"tokens": 4096, "experts": 256})
def _(make: Make, tokens: int, experts: int) -> Run:
    ids = make.choices(tokens, 8, experts)
    return lambda: (mk.expert_load(ids, experts),)


@op("update_bias", {"experts": 256})
def _(make: Make, experts: int) -> Run:
    start, load = make.normal(experts, dtype=torch.float32), make.order(experts, torch.int32)

    def run():
        bias = start.clone()
        mk.update_bias(bias, load, 1e-3)
        return (bias,)

    return run


# Experts


@op("dispatch", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    ids = make.choices(tokens, TOP_K, EXPERTS)
    return lambda: tuple(mk.dispatch(ids, EXPERTS))


@op("align_blocks", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    ids = make.choices(tokens, TOP_K, EXPERTS)
    return lambda: tuple(mk.align_blocks(ids, EXPERTS, 64))


@op("permute", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    hidden, dispatched = make.normal(tokens, HIDDEN), mk.dispatch(make.choices(tokens, TOP_K, EXPERTS), EXPERTS)
    return lambda: (mk.permute(hidden, dispatched),)


@op("unpermute", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    dispatched = mk.dispatch(make.choices(tokens, TOP_K, EXPERTS), EXPERTS)
    rows, weights = make.normal(tokens * TOP_K, HIDDEN), make.uniform(tokens, TOP_K)
    return lambda: (mk.unpermute(rows, dispatched, weights),)


@op("combine", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    dispatched = mk.dispatch(make.choices(tokens, TOP_K, EXPERTS), EXPERTS)
    rows, weights = make.normal(tokens * TOP_K, HIDDEN), make.uniform(tokens, TOP_K)
    return lambda: (mk.combine(rows, weights, dispatched),)


@op("expert_ffn", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    hidden, weights = make.normal(tokens, HIDDEN), make.experts()
    dispatched = mk.dispatch(make.choices(tokens, TOP_K, EXPERTS), EXPERTS)
    return lambda: (mk.expert_ffn(hidden, *weights, dispatched),)


@op("fused_moe", *TOKENS)
def _(make: Make, tokens: int) -> Run:
    hidden, experts, weights = make.normal(tokens, HIDDEN), make.experts(), make.uniform(tokens, TOP_K)
    ids = make.choices(tokens, TOP_K, EXPERTS)
    return lambda: (mk.fused_moe(hidden, *experts, weights, ids),)


FORMATS = ("int8", "int8_w8a8", "int4", "mxfp4", "fp8_block")


@op("fused_experts", *({"tokens": tokens, "format": form} for form in FORMATS for tokens in (1, 256)))
def _(make: Make, tokens: int, format: str) -> Run:
    one = mk.ExpertWeights.quantise(
        make.normal(1, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5), make.normal(1, HIDDEN, INNER, scale=INNER**-0.5), format
    )
    tensors = {name: tensor.repeat(EXPERTS, *[1] * (tensor.dim() - 1)) for name, tensor in one.tensors().items()}
    experts = mk.ExpertWeights(format, **tensors, group_size=one.group_size)
    hidden, weights = make.normal(tokens, HIDDEN), make.uniform(tokens, TOP_K)
    ids = make.choices(tokens, TOP_K, EXPERTS)
    return lambda: (mk.fused_experts(hidden, experts, weights, ids),)
