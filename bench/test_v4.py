"""One attention layer of DeepSeek-V4-Flash (hidden size 4096, 64 heads of 512) beside transformers' eager one."""

import copy

import pytest
import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from mla_kernels import nn

KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
CONTEXT, PROMPT, PAGE, CHUNK = 8191, 2048, 64, 512
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 65536}


def layers(kind, dtype):
    """transformers' layer and ours with the same random weights, and our tables of angles."""
    config = DeepseekV4Config(num_hidden_layers=1, layer_types=[kind], rope_parameters=dict(YARN))
    config._attn_implementation = "eager"
    theirs = v4.DeepseekV4Attention(config, 0)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if "proj" in name else 0.3)
        if "norm" in name:
            parameter.add_(1.0)
    own = nn.V4AttentionConfig.from_hf(config, 0)
    with torch.device("meta"):
        ours = nn.V4Attention(own)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs.to(dtype), ours.to(dtype), nn.rope_tables(64, CONTEXT + 1, config.rope_parameters[own.rope])


def eager(theirs, hidden, cache=None):
    place = (torch.arange(hidden.shape[1]) + (0 if cache is None else cache.get_seq_length()))[None]
    rotary = v4.DeepseekV4RotaryEmbedding(theirs.config)
    angles = {name: rotary(hidden, position_ids=place, layer_type=name) for name in ("main", "compress")}
    given = {"attention_mask": None, "position_ids": place, "cache": cache}
    mask = create_sliding_window_causal_mask(config=theirs.config, inputs_embeds=hidden, **given)
    return theirs(hidden, angles, place, mask, cache)[0]


def caches(ours, dtype):
    """Our caches for one sequence, and where it stands at a length."""
    config, ring = ours.config, 12
    cache = nn.V4Cache.allocate(
        config, num_pages=ring, page_size=PAGE, entry_pages=CONTEXT // PAGE + 1, new_tokens=CHUNK, dtype=dtype
    )
    window = torch.arange(CONTEXT // PAGE + 1, dtype=torch.int32)[None] % ring
    entries = {config.ratio: torch.arange(-(-(CONTEXT + 1) // max(config.ratio, 1) // PAGE), dtype=torch.int32)[None]}

    def places(first, tokens):
        position = torch.arange(first, first + tokens)[None]
        length, slot = torch.tensor([first + tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        slots = window.gather(1, position // PAGE) * PAGE + position % PAGE
        return slots, cache, nn.V4Sequences(length, window, entries if config.ratio else {}, slot)

    return places


def cost(ours, tokens, read):
    """Weights once, and ``read`` rows of 512 for each token; products of the projections and the attention."""
    weights = sum(p.numel() for p in ours.parameters())
    size = ours.q_a_proj.weight.itemsize
    attention = 4 * 64 * 512 * read * tokens
    return {"nbytes": weights * size + tokens * read * 512 * size, "flops": 2 * weights * tokens + attention}


ROWS = dict(zip(KINDS, (128, 128 + 512, 128 + CONTEXT // 128)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_v4_decode(race, kind, dtype):
    """One token at a context of 8k, which completes a window of every kind."""
    theirs, ours, tables = layers(kind, dtype)
    hidden, cache, places = (
        torch.randn(1, CONTEXT + 1, 4096).to(dtype),
        DynamicCache(config=theirs.config),
        caches(ours, dtype),
    )
    for first in range(0, CONTEXT, CHUNK):
        part = hidden[:, first : min(first + CHUNK, CONTEXT)]
        eager(theirs, part, cache)
        ours.decode(part, *tables, *places(first, part.shape[1]))
    token, step = hidden[:, CONTEXT:].contiguous(), places(CONTEXT, 1)
    filled = copy.copy(cache.layers[0].__dict__)
    dicts = {name: dict(value) for name, value in filled.items() if isinstance(value, dict)}

    def again():  # their update replaces tensors, and changes none
        cache.layers[0].__dict__.update(filled | {name: dict(value) for name, value in dicts.items()})
        return eager(theirs, token, cache)

    ours.prepack()

    def run():
        fresh = nn.V4Sequences(step[2].seq_lens, step[2].window_table, step[2].entry_tables, step[2].state_slots)
        return ours.decode(token, *tables, *step[:2], fresh)

    race(run, {"transformers": again}, again().double(), **cost(ours, 1, ROWS[kind]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_v4_prefill(race, kind, dtype):
    """A prompt of 2k tokens."""
    theirs, ours, tables = layers(kind, dtype)
    hidden, (slots, cache, _) = torch.randn(1, PROMPT, 4096).to(dtype), caches(ours, dtype)(0, PROMPT)
    slots = slots[0].where(torch.arange(PROMPT) >= PROMPT - 128, torch.tensor(-1))
    bounds = torch.tensor([0, PROMPT], dtype=torch.int32)
    places = caches(ours, dtype)

    def run():
        return ours.prefill(hidden[0], *tables, bounds, slots, cache, places(0, PROMPT)[2])[None]

    def again():
        return eager(theirs, hidden, DynamicCache(config=theirs.config))

    ours.prepack()
    race(run, {"transformers": again}, again().double(), **cost(ours, PROMPT, ROWS[kind] // 2))
