"""DeepSeek-V4's attention core on the sparse ops, against what transformers' layers compute with their own masks.

A small model is run, and what its layers give to ``eager_attention_forward`` is kept: queries, the rows (raw tokens,
then compressed entries), the mask with the picks of the indexer in it, sinks, and the output.
"""

import functools

import pytest
import torch
import transformers
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from mla_kernels import LatentCache, entry_slots, prefill_rows, sparse_mla_decode, sparse_mla_prefill, window_slots
from mla_kernels.reference import sparse as reference
from tests.support import not_on

KINDS = ("sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention")
RATIOS = {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4}
SMALL = dict(num_attention_heads=4, head_dim=64, sliding_window=8)
WIDE = dict(num_attention_heads=64, head_dim=512, sliding_window=16)
SIZES = pytest.mark.parametrize("sizes, tokens", [(SMALL, 45), (WIDE, 37)], ids=["small", "64 x 512"])
each_kind = pytest.mark.parametrize("kind", range(3), ids=KINDS)


class Core:
    """Arguments and output of one layer's attention, [tokens, ...] of one sequence."""

    def __init__(self, module, query, key, value, mask, scaling, output):
        assert value is key
        self.module, self.mask, self.scale = module, mask[0, 0], scaling
        self.q, self.rows = query[0].transpose(0, 1).contiguous(), key[0, 0].contiguous()
        self.sink, self.output = module.sinks.detach(), output[0]
        self.tokens, self.window = len(self.q), module.sliding_window
        self.entries, self.ratio = len(self.rows) - self.tokens, RATIOS.get(module.layer_type)

    def picks(self):
        """[tokens, K] of the entries that the mask shows, -1 behind them; None where it shows all complete ones."""
        if self.module.layer_type != "compressed_sparse_attention":
            return None
        shown = self.mask[:, self.tokens :].eq(0)
        picks = torch.full((self.tokens, int(shown.sum(1).max())), -1, dtype=torch.int32)
        for row, some in zip(picks, shown):
            row[: int(some.sum())] = some.nonzero().flatten()
        return picks

    def indices(self):
        bounds = {"tokens": self.tokens, "window": self.window, "picks": self.picks()}
        if self.ratio is not None and bounds["picks"] is None:
            entries = torch.tensor([0, self.entries], dtype=torch.int32)
            bounds |= {"entry_cu_seqlens": entries, "ratio": self.ratio, "max_entries": self.entries}
        return prefill_rows(torch.tensor([0, self.tokens], dtype=torch.int32), **bounds)

    def eager(self, q, rows, sink):
        """transformers' function on these arguments: [tokens, heads, width]."""
        self.module.sinks.data.copy_(sink.detach())
        with torch.no_grad() if not sink.requires_grad else torch.enable_grad():
            stand_in = type("Module", (), {"sinks": sink, "training": False})()
            stand_in.num_key_value_groups = q.shape[1]
            key = rows[None, None]
            return v4.eager_attention_forward(stand_in, q.transpose(0, 1)[None], key, key, self.mask, self.scale)[0][0]


@functools.cache
def cores(sizes, tokens):
    """What each layer of a model with one layer of every kind was given, in order of KINDS."""
    torch.manual_seed(3)
    config = transformers.DeepseekV4Config(
        hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, q_lora_rank=24, num_experts_per_tok=2,
        n_routed_experts=4, vocab_size=50, layer_types=list(KINDS), compress_rates=dict(RATIOS), o_groups=2,
        o_lora_rank=8, index_n_heads=4, index_head_dim=32, index_topk=3, max_position_embeddings=512, hc_mult=2,
        attn_implementation="eager", partial_rotary_factor=16 / dict(sizes)["head_dim"], **dict(sizes),
    )  # fmt: skip
    model = v4.DeepseekV4Model(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm_like = weight.dim() == 1 and "norm" in name
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if norm_like else torch.randn_like(weight) * 0.3)
    found, eager = [], v4.eager_attention_forward

    def recorded(module, query, key, value, mask, scaling, **options):
        result = eager(module, query, key, value, mask, scaling, **options)
        found.append(Core(module, query, key, value, mask, scaling, result[0]))
        return result

    v4.eager_attention_forward = recorded
    try:
        with torch.no_grad():
            model(torch.arange(tokens)[None] % 50, use_cache=False)
    finally:
        v4.eager_attention_forward = eager
    return found


def core_of(sizes, tokens, kind) -> Core:
    return cores(tuple(sorted(sizes.items())), tokens)[kind]


def close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double().cpu(), expected.double(), rtol=0, atol=1e-5 * scale)


@SIZES
@each_kind
def test_prefill(backend, device, sizes, tokens, kind):
    core = core_of(sizes, tokens, kind)
    assert core.entries == (tokens // core.ratio if core.ratio else 0)
    q, rows, indices, sink = (x.to(device) for x in (core.q, core.rows, core.indices(), core.sink))
    options = {"softmax_scale": core.scale, "latent_dim": rows.shape[1]}
    out, _ = sparse_mla_prefill(q, rows, indices, sink=sink, **options)
    close(out, core.output)
    close(core.eager(core.q, core.rows, core.sink), core.output)
    close(reference.sparse_mla_prefill(core.q, core.rows, core.indices(), sink=core.sink, **options)[0], core.output)


@SIZES
@each_kind
@not_on("takes the interpreter half a minute; the emulator runs these sizes", "interpret")
def test_gradients(backend, device, sizes, tokens, kind):
    core = core_of(sizes, tokens, kind)
    torch.manual_seed(0)
    weight = torch.randn(core.output.shape)
    leaves = [x.clone().requires_grad_() for x in (core.q, core.rows, core.sink)]
    expected = torch.autograd.grad((core.eager(*leaves) * weight).sum(), leaves)
    q, rows, sink = (x.to(device).requires_grad_() for x in (core.q.clone(), core.rows.clone(), core.sink.clone()))
    options = {"softmax_scale": core.scale, "latent_dim": rows.shape[1]}
    out, _ = sparse_mla_prefill(q, rows, core.indices().to(device), sink=sink, **options)
    for actual, exact in zip(torch.autograd.grad((out * weight.to(device)).sum(), (q, rows, sink)), expected):
        close(actual, exact)


def paged(rows, page_size, device):
    """A cache of these rows in shuffled pages, the rest NaN, and its block table."""
    pages = max(1, -(-len(rows) // page_size))
    data = torch.full((pages + 2, page_size, rows.shape[1]), float("nan"))
    table = torch.randperm(pages + 2)[:pages]
    places = torch.arange(len(rows))
    data[table[places // page_size], places % page_size] = rows
    return LatentCache(data.to(device), rows.shape[1]), table.int()[None].to(device)


@SIZES
@each_kind
def test_decode(backend, device, sizes, tokens, kind):
    """The two newest tokens over paged caches of another page size each."""
    core, lengths = core_of(sizes, tokens, kind), torch.tensor([tokens], dtype=torch.int32, device=device)
    raw, raw_table = paged(core.rows[:tokens], 16, device)
    window = window_slots(raw_table, lengths, queries=2, window=core.window, page_size=16)
    options = {"softmax_scale": core.scale, "sink": core.sink.to(device)}
    if core.entries:
        entries, table = paged(core.rows[tokens:], 3, device)
        if core.picks() is None:
            sizes = {"ratio": core.ratio, "page_size": 3, "max_entries": core.entries}
            slots = entry_slots(table, lengths, queries=2, **sizes)
        else:
            picks = core.picks()[-2:][None].to(device)
            slots = torch.where(picks < 0, -1, table[0][picks.clamp_min(0) // 3] * 3 + picks % 3).int()
        options |= {"extra_cache": entries, "extra_indices": slots}
    out, _ = sparse_mla_decode(core.q[-2:][None].to(device), raw, window, **options)
    close(out[0], core.output[-2:])
