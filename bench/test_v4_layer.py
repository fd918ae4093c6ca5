"""A whole attention layer of DeepSeek-V4 beside transformers' eager one: a decode step at 8k context, a prompt of 2k.

``--wide`` takes V4-Flash's width; without it the layer is an eighth as wide.
"""

import copy
import inspect
from collections import namedtuple

import pytest
import torch
import transformers
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from mla_kernels.nn import V4Attention, V4AttentionConfig, V4Cache, V4Sequences, rope_tables

KINDS = {
    "sliding": "sliding_attention", "hca": "heavily_compressed_attention", "csa": "compressed_sparse_attention"
}  # fmt: skip
CONTEXT, PROMPT, PAGE = 8190, 2048, 64  # the token after the context completes no window
EIGHTH = {"hidden_size": 512, "num_attention_heads": 8, "q_lora_rank": 128, "o_groups": 1, "o_lora_rank": 1024}
CACHE = "cache" if "cache" in inspect.signature(hf.DeepseekV4Attention.forward).parameters else "past_key_values"

Layers = namedtuple("Layers", "theirs, ours, tables")


def layers(kind: str, wide: bool, dtype: torch.dtype) -> Layers:
    """transformers' layer with random weights, ours with the same, and ours's tables of angles."""
    config = transformers.DeepseekV4Config(
        num_hidden_layers=3, layer_types=list(KINDS.values()), attn_implementation="eager", **({} if wide else EIGHTH)
    )
    index = list(KINDS).index(kind)
    theirs = hf.DeepseekV4Attention(config, index).eval()
    for name, parameter in theirs.named_parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5 if "proj" in name else 0.3)
        if "norm" in name:
            parameter.add_(1)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    ours = V4Attention(V4AttentionConfig.from_hf(config, index)).eval().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    tables = rope_tables(ours.config.rope_dim, CONTEXT + 2, config.rope_parameters[ours.config.rope])
    return Layers(theirs, ours, tables)


def caches(ours: V4Attention, batch: int, tokens: int, dtype: torch.dtype):
    """Caches with random contents and room for ``tokens``, their sequences, and the table of pages."""
    config = ours.config
    pages, ratio = -(-tokens // PAGE), config.ratio
    cache = V4Cache.allocate(
        config, num_pages=batch * pages, entry_pages=batch * pages if ratio else 0, slots=batch, dtype=dtype
    )
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    slots = torch.arange(batch, dtype=torch.int32)
    sequences = V4Sequences(lengths, table, {ratio: table} if ratio else {}, slots, max_seqlen=tokens)
    for data in (cache.window.data, *([] if cache.entries is None else [cache.entries.data, cache.state])):
        data.normal_()
    if cache.index_keys is not None:
        cache.index_state.normal_()
        # so many entries as are chosen are clearly the best: rounding chooses no others
        likeness, best = torch.randn(config.index_head_dim), torch.ones(batch, pages * PAGE, 1)
        best[:, torch.randperm(tokens // ratio)[: config.index_top_k]] = 2.0
        cache.index_keys.data.copy_((likeness * best).view(cache.index_keys.data.shape))
    return cache, sequences, table


def copied_cache(theirs, ours, cache: V4Cache, table: torch.Tensor, tokens: int, dtype: torch.dtype):
    """transformers' cache of ``tokens`` with the contents of ours, and a function that brings it back to them."""
    past = transformers.DynamicCache(config=theirs.config)
    layer, config = past.layers[theirs.layer_idx], ours.config

    def rows(part, first, last):
        data = part.data.view(table.shape[0], -1, part.data.shape[-1])  # the pages of a sequence in order
        return data[:, first:last].to(dtype)

    window = rows(cache.window, tokens - config.window + 1, tokens)[:, None]
    held = {"keys": window, "values": window, "cumulative_length": tokens}
    layer.lazy_initialization(window, window)
    if config.ratio:
        known = {"compressor": (cache.entries, cache.state, theirs.compressor)}
        if config.overlap:
            known["indexer"] = (cache.index_keys, cache.index_state, theirs.compressor.indexer)
        ratio, entries = config.ratio, tokens // config.ratio
        begin = entries * ratio
        names = ["buffer_kv", "buffer_gate", "compressed_kv", "entry_count"]
        held |= {name: {} for name in names + ["overlap_kv", "overlap_gate"] * config.overlap}
        for name, (part, state, module) in known.items():
            own = state[:, torch.arange(begin, tokens) % state.shape[1]].to(dtype)  # [batch, tokens, 2, W]
            held["buffer_kv"][name], held["buffer_gate"][name] = own[:, :, 0], own[:, :, 1]
            held["compressed_kv"][name], held["entry_count"][name] = rows(part, 0, entries), entries
            if config.overlap:
                own = state[:, torch.arange(begin - ratio, begin) % state.shape[1], :, : part.data.shape[-1]].to(dtype)
                bias = module.position_bias[:, : part.data.shape[-1]]
                held["overlap_kv"][name], held["overlap_gate"][name] = own[:, :, 0], own[:, :, 1] + bias

    def restore():
        for name, value in held.items():
            setattr(layer, name, dict(value) if isinstance(value, dict) else value)
        return past

    return restore


def angles_of(theirs, hidden, places):
    rotary = hf.DeepseekV4RotaryEmbedding(theirs.config)
    return {name: rotary(hidden, position_ids=places, layer_type=name) for name in ("main", "compress")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_decode(race, request, kind, batch, dtype):
    """One token of each sequence."""
    theirs, ours, tables = layers(kind, request.config.getoption("--wide"), dtype)
    tokens = CONTEXT + 1
    cache, sequences, table = caches(ours, batch, tokens, dtype)
    if ours.config.overlap:  # weights of heads that are positive: see ``caches``
        for layer in (ours, theirs):
            layer.compressor.indexer.scorer.weights_proj.weight.fill_(ours.config.hidden_size**-1)
    hidden = (torch.randn(batch, 1, ours.config.hidden_size) + 1.0).to(dtype)
    places = torch.full((batch, 1), CONTEXT)
    slots = table[:, CONTEXT // PAGE, None] * PAGE + CONTEXT % PAGE

    def step(layer, dtype):
        restore = copied_cache(layer, ours, cache, table, CONTEXT, dtype)
        rows, angles = hidden.to(dtype), angles_of(layer, hidden.to(dtype), places)
        mask = torch.zeros(batch, 1, 1, ours.config.window, dtype=dtype)
        return lambda: layer(rows, angles, places, mask, **{CACHE: restore()})[0]

    def own_step():
        fresh = V4Sequences(sequences.seq_lens, table, sequences.entry_tables, sequences.state_slots, tokens)
        return ours.decode(hidden, *tables, slots, cache, fresh)

    exact = step(copy.deepcopy(theirs).double(), torch.float64)()
    weights = sum(parameter.nbytes for parameter in ours.parameters())
    entries = min(tokens // ours.config.ratio, ours.config.index_top_k) if ours.config.ratio else 0
    read = entries + ours.config.window
    race(
        own_step,
        {"HF eager": step(theirs, dtype)},
        exact,
        nbytes=weights + batch * read * ours.config.head_dim * dtype.itemsize,
        flops=2 * batch * (weights // dtype.itemsize + 2 * read * ours.config.num_heads * ours.config.head_dim),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill(race, request, kind, dtype):
    """A whole prompt, both with a cache."""
    theirs, ours, tables = layers(kind, request.config.getoption("--wide"), dtype)
    cache, sequences, _ = caches(ours, 1, PROMPT, dtype)
    hidden = torch.randn(1, PROMPT, ours.config.hidden_size).to(dtype)
    places = torch.arange(PROMPT)[None]
    bounds = torch.tensor([0, PROMPT], dtype=torch.int32)

    def prefill(layer, rows):
        angles = angles_of(layer, rows, places)
        mask = create_sliding_window_causal_mask(
            config=layer.config, inputs_embeds=rows, attention_mask=None, position_ids=places, **{CACHE: None}
        )
        return lambda: layer(rows, angles, places, mask, **{CACHE: transformers.DynamicCache(config=layer.config)})[0]

    exact = prefill(copy.deepcopy(theirs).double(), hidden.double())()
    weights = sum(parameter.nbytes for parameter in ours.parameters())
    entries = PROMPT // ours.config.ratio if ours.config.ratio else 0
    read = entries // 2 + ours.config.window
    slots = places[0].int()
    race(
        lambda: ours.prefill(hidden[0], *tables, bounds, slots, cache, sequences)[None],
        {"HF eager": prefill(theirs, hidden)},
        exact,
        nbytes=weights + 2 * hidden.nbytes + (PROMPT + entries) * ours.config.head_dim * dtype.itemsize,
        flops=2 * PROMPT * (weights // dtype.itemsize + 2 * read * ours.config.num_heads * ours.config.head_dim),
    )
