"""Calls of the layers of :mod:`mla_kernels.nn` at a model's sizes."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from mla_kernels.autotune.making import Make
from mla_kernels.autotune.models import Geometry
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.moe.quantised.formats import WeightFormat
from mla_kernels.nn import (
    AttentionConfig,
    HyperConnection,
    HyperHead,
    LatentAttention,
    MoE,
    MoEConfig,
    V4Attention,
    V4AttentionConfig,
    V4Cache,
    V4Sequences,
)

V4_KINDS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
VOCABULARY = 129280


def calls(g: Geometry, make: Make, limits, formats, caches) -> Iterator[tuple[str, Callable, list[dict]]]:
    """(name, call, sizes) of each layer's calls."""
    batches = [batch for batch in range(1, limits.batch + 1) if batch <= 18 or batch % 64 < 3]
    if g.latent:
        yield from _attention(g, make, limits, caches, batches)
    elif g.streams:
        yield from _v4(g, make, limits, caches, batches)
    if g.experts:
        yield from _experts(g, make, limits, formats)
    if g.streams:
        yield from _hyper(g, make, limits)


def _sizes(limits, batches) -> tuple[list[dict], list[dict]]:
    """Of decoding steps, and of prompts. ``more``: pages beside those that tables name, so that their number is
    divisible by 16 or not; so is a table's width."""

    def places(contexts):
        every = itertools.product(limits.pages, contexts, (0, 1, 16))
        return [{"page": page, "context": n + page * (more % 2), "more": more} for page, n, more in every]

    rest = places(limits.contexts)
    steps = [{"batch": batch, "queries": q} | one for one in rest for q in limits.queries for batch in batches]
    prompts = [
        {"batch": batch, "tokens": tokens} | one
        for one in places(limits.contexts[:1])
        for batch in (1, 2, 16)
        for tokens in limits.counts()
        if tokens >= batch and (tokens <= 32 or tokens % 512 < 3)
    ]
    return steps, prompts


def _module(make: Make, module: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        made = module()
    return made.to(make.dtype).to_empty(device=make.device).requires_grad_(False)


def _index_caches(g: Geometry, pages: int, page: int, make: Make):
    for layout in ("fp8", "bf16") if g.index_heads else (None,):
        yield (
            layout,
            None
            if layout is None
            else IndexerCache.allocate(
                pages, page, head_dim=g.index_width, dtype=make.dtype, layout=layout, device=make.device
            ),
        )


def _attention(g: Geometry, make: Make, limits, caches, batches):
    rope = "interleaved" if g.name.startswith("deepseek-v2") else "interleaved_to_half"
    config = AttentionConfig(
        hidden_size=g.hidden, num_heads=g.heads, q_lora_rank=g.q_rank or None, kv_lora_rank=g.latent, nope_dim=g.nope,
        rope_dim=g.rope, v_dim=g.value, rope=rope,
        index_top_k=g.index_top_k if g.index_heads else None, index_heads=max(1, g.index_heads),
        index_head_dim=g.index_width, index_rope="interleaved_to_half" if g.name.startswith("glm") else "half",
    )  # fmt: skip
    layer = _module(make, lambda: LatentAttention(config))
    layer.stack_projections()

    def cached(size, layout):
        page, context = size["page"], size["context"]
        pages = -(-context // page)
        cache = LatentCache.allocate(
            size["batch"] * pages + size["more"], page, latent_dim=g.latent, rope_dim=g.rope, dtype=make.dtype,
            layout=None if layout == "plain" else layout, device=make.device,
        )  # fmt: skip
        return cache, make.counting(size["batch"], pages)

    def decode(size, layout):
        batch, queries = size["batch"], size["queries"]
        cache, table = cached(size, layout)
        hidden = make.normal(batch, queries, g.hidden)
        for index_dtype in (torch.int32, torch.int64):
            places = make.full(batch, queries, value=5).to(index_dtype)
            for _, keys in _index_caches(g, cache.data.shape[0], cache.page_size, make):
                layer.decode(
                    hidden, *make.angles(g.rope), places, places, cache, table, make.full(batch, value=8),
                    indexer_cache=keys,
                )  # fmt: skip

    def prefill(size, layout):
        batch, tokens = size["batch"], size["tokens"]
        cache, table = cached(size, layout)
        hidden, places = make.normal(batch, tokens, g.hidden), make.full(batch, tokens, value=5)
        for _, keys in _index_caches(g, cache.data.shape[0], cache.page_size, make):
            for more in ({}, {"block_table": table, "context_lens": make.full(batch, value=8)}):
                layer.prefill(hidden, *make.angles(g.rope), places, places, cache, indexer_cache=keys, **more)

    steps, prompts = _sizes(limits, batches)
    prompts = [size | {"tokens": size["tokens"] // size["batch"]} for size in prompts]
    for layout in caches:
        yield f"LatentAttention.decode, {layout}", lambda size, layout=layout: decode(size, layout), steps
        yield f"LatentAttention.prefill, {layout}", lambda size, layout=layout: prefill(size, layout), prompts


def _experts(g: Geometry, make: Make, limits, formats):
    config = {
        "hidden_size": g.hidden, "intermediate_size": g.inner, "shared_intermediate_size": g.shared * g.inner,
        "num_experts": g.experts, "top_k": g.top_k, "scoring": g.scoring, "num_groups": g.groups,
        "top_k_groups": g.top_groups, "renormalize": g.renormalize, "activation": g.activation,
    }  # fmt: skip
    sizes = [{"tokens": tokens} for tokens in limits.counts()]
    for format in formats:
        kept = {} if format == WeightFormat.PLAIN.value else {"expert_format": format}
        layer = _module(make, lambda kept=kept: MoE(MoEConfig(**config), **kept))
        yield f"MoE, {format}", lambda size, layer=layer: layer(make.normal(size["tokens"], g.hidden)), sizes
    if g.streams:  # DeepSeek-V4's first layers choose experts by token id
        hashed = _module(make, lambda: MoE(MoEConfig(**config, hash_vocabulary=VOCABULARY)))

        def route(size):
            ids = make.integers(size["tokens"], below=VOCABULARY)
            for one in (ids, ids.long()):
                hashed.route(make.normal(size["tokens"], g.hidden), one)

        yield "MoE.route by token id", route, sizes


def _hyper(g: Geometry, make: Make, limits):
    connection = _module(make, lambda: HyperConnection(g.hidden, g.streams))
    head = _module(make, lambda: HyperHead(g.hidden, g.streams))
    norm = make.normal(g.hidden)

    def run(size):
        streams = make.normal(1, size["tokens"], g.streams, g.hidden)
        collapsed, post, comb = connection(streams, norm)
        connection.write(streams, collapsed, post, comb)
        connection.step(streams, collapsed, post, comb, norm)
        head(streams, norm)

    yield "HyperConnection", run, [{"tokens": tokens} for tokens in limits.counts()]


def _v4(g: Geometry, make: Make, limits, caches, batches):
    for kind, ratio in V4_KINDS.items():
        config = V4AttentionConfig(
            layer_type=kind, hidden_size=g.hidden, num_heads=g.heads, ratio=ratio, o_groups=math.gcd(8, g.heads)
        )
        layer = _module(make, lambda config=config: V4Attention(config))
        for layout in caches:

            def sequences(size, config=config, layout=layout, ratio=ratio):
                page, context, batch = size["page"], size["context"], size["batch"]
                entry_pages = -(-context // ratio // page) if ratio else 0
                index = "bf16" if layout == "plain" else "fp8"
                cache = V4Cache.allocate(
                    config, num_pages=4 * batch + size["more"], page_size=page,
                    entry_pages=batch * entry_pages + size["more"], slots=batch + 1,
                    new_tokens=max(limits.queries), dtype=make.dtype, layout=None if layout == "plain" else layout,
                    index_layout=index, device=make.device,
                )  # fmt: skip
                table = make.counting(batch, -(-context // page))
                tables = {ratio: make.counting(batch, entry_pages)} if ratio else {}
                lengths = make.full(batch, value=context)
                return cache, V4Sequences(lengths, table, tables, make.counting(batch))

            def decode(size, layer=layer, sequences=sequences):
                batch, queries = size["batch"], size["queries"]
                cache, places = sequences(size)
                hidden, slots = make.normal(batch, queries, g.hidden), make.full(batch, queries, value=1)
                for one in (slots, slots.long()):
                    layer.decode(hidden, *make.angles(64), one, cache, places)

            def prefill(size, layer=layer, sequences=sequences):
                batch, tokens = size["batch"], size["tokens"]
                cache, places = sequences(size)
                hidden, bounds = make.normal(tokens, g.hidden), make.counting(batch + 1) * (tokens // batch)
                slots = make.full(tokens, value=1)
                layer.prefill(hidden, *make.angles(64), bounds, slots, cache, places)

            steps, prompts = _sizes(limits, batches)
            yield f"V4Attention.decode, {kind}, {layout}", decode, steps
            yield f"V4Attention.prefill, {kind}, {layout}", prefill, prompts
