"""LatentAttention against transformers' attention layers: prefill, chunks, decode, training, every cache layout."""

import dataclasses

import pytest
import torch

from mla_kernels import launch
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.tools.gather import gather_tokens
from mla_kernels.nn import AttentionConfig, LatentAttention, rope_tables
from mla_kernels.nn import attention as nn_attention
from mla_kernels.nn.indexer import Indexer
from mla_kernels.reference import indexer as indexer_reference
from tests.compat.models import YARN, fast_cpu, tiny

PAGE_SIZE = 8
SPARSE = {"index_topk": 6}
VARIANTS = {
    "v2": ("DeepseekV2", {"q_lora_rank": None}),
    "v2 q_lora yarn": ("DeepseekV2", {"rope_parameters": YARN}),
    "v3": ("DeepseekV3", {}),
    "v3 half bias": ("DeepseekV3", {"rope_interleave": False, "attention_bias": True}),
    "v3 yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "v3.2 short": ("DeepseekV32", {"index_topk": 64}),
    "v3.2": ("DeepseekV32", SPARSE),
    "v3.2 yarn bias": ("DeepseekV32", SPARSE | {"rope_parameters": YARN, "attention_bias": True}),
    "glm": ("GlmMoeDsa", SPARSE | {"indexer_types": ["full"] * 3}),
    "glm-4.7-flash": ("Glm4MoeLite", {}),
}
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


class Layer:
    """A layer of transformers and ours with its weights, over a batch of padded sequences."""

    def __init__(self, variant, *, tokens=23, leading=(5, 0), dtype=torch.float32, layout=None, **changes):
        family, own = VARIANTS[variant]
        self.model = tiny(family, **(own | changes))
        self.theirs = self.model.model.layers[1].self_attn
        for name, parameter in self.theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
        config = AttentionConfig.from_hf(self.model.config, 1)
        self.ours = LatentAttention(config).to(dtype)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.leading = torch.tensor(leading)
        batch = len(leading)
        self.hidden = torch.randn(batch, tokens, config.hidden_size, dtype=dtype)
        offsets = torch.arange(tokens)[None] - self.leading[:, None]  # [batch, tokens]
        self.positions = offsets.clamp(min=0)
        pages = -(-tokens // PAGE_SIZE)
        self.block_table = torch.randperm(batch * pages + 1)[: batch * pages].view(batch, pages).int()
        slots = self.block_table.gather(1, self.positions // PAGE_SIZE) * PAGE_SIZE + self.positions % PAGE_SIZE
        self.slots = torch.where(offsets < 0, -1, slots)
        self.tables = rope_tables(config.rope_dim, tokens, self.model.config.rope_parameters)
        shape = {"latent_dim": config.kv_lora_rank, "rope_dim": config.rope_dim}
        self.cache = LatentCache.allocate(batch * pages + 1, PAGE_SIZE, dtype=dtype, layout=layout, **shape)
        self.indexer = {}
        if config.index_top_k:
            keys = IndexerCache.allocate(batch * pages + 1, PAGE_SIZE, head_dim=config.index_head_dim, dtype=dtype)
            self.indexer = {"indexer_cache": keys}

    def expected(self, hidden=None) -> torch.Tensor:
        """transformers' layer over whole rows, causal, keys before ``leading`` masked."""
        hidden = self.hidden if hidden is None else hidden
        tokens = hidden.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        mask = mask & (torch.arange(tokens)[None] >= self.leading[:, None])[:, None, None]
        mask = mask | torch.eye(tokens, dtype=torch.bool)
        angles = self.model.model.rotary_emb(hidden, self.positions)
        return self.theirs(hidden_states=hidden, position_embeddings=angles, attention_mask=mask)[0]

    def prefill(self, start, stop, **options):
        """Tokens start to stop of every row; over what is cached of it where ``start`` is not 0."""
        if start:
            options |= {
                "block_table": self.block_table,
                "context_lens": (start - self.leading).clamp(min=0).int(),
            }
        part = slice(start, stop)
        return self.ours.prefill(
            self.hidden[:, part], *self.tables, self.positions[:, part], self.slots[:, part], self.cache,
            **options, **self.indexer,
        )  # fmt: skip

    def decode(self, start, stop):
        part, lengths = slice(start, stop), (stop - self.leading).int()
        return self.ours.decode(
            self.hidden[:, part], *self.tables, self.positions[:, part], self.slots[:, part], self.cache,
            self.block_table, lengths, **self.indexer,
        )  # fmt: skip

    def real(self, start, stop):
        return self.slots[:, start:stop] >= 0


@pytest.mark.parametrize("leading", [(5, 0), (0,), (3,)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_a_chunk_then_decode(variant, leading):
    layer = Layer(variant, leading=leading)
    expected = layer.expected()
    for start, stop in ((0, 9), (9, 17)):
        real = layer.real(start, stop)
        torch.testing.assert_close(layer.prefill(start, stop)[real], expected[:, start:stop][real], **TOLERANCE)
    for start, stop in ((17, 18), (18, 23)):  # one token, then several at once
        torch.testing.assert_close(layer.decode(start, stop), expected[:, start:stop], **TOLERANCE)


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
@pytest.mark.parametrize("variant", ["v3", pytest.param("v3.2", marks=pytest.mark.slow)])
def test_kernels(variant, mode):
    layer = Layer(variant, tokens=12, leading=(2, 0), v_head_dim=32)
    expected = layer.expected()
    with launch.on_cpu(mode):
        chunks = [layer.prefill(0, 5), layer.prefill(5, 10), layer.decode(10, 12)]
    out, real = torch.cat(chunks, 1), layer.real(0, 12)
    torch.testing.assert_close(out[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("variant", ["v2", "v3", "v3.2"])
def test_nothing_to_do(variant):
    layer = Layer(variant)
    ours, positions, hidden, lengths = layer.ours, layer.positions, layer.hidden, torch.zeros(2, dtype=torch.int32)
    for some in ((slice(0, 0), slice(None)), (slice(None), slice(0, 0))):
        tokens, places = hidden[some], (positions[some], layer.slots[some], layer.cache)
        assert ours(tokens, *layer.tables, places[0]).shape == tokens.shape
        assert ours.prefill(tokens, *layer.tables, *places, **layer.indexer).shape == tokens.shape
    context = {"block_table": layer.block_table[:0], "context_lens": lengths[:0]}
    tokens, places = hidden[:0], (positions[:0], layer.slots[:0], layer.cache)
    assert ours.prefill(tokens, *layer.tables, *places, **context, **layer.indexer).shape == tokens.shape
    out = ours.decode(tokens, *layer.tables, *places, layer.block_table[:0], lengths[:0], **layer.indexer)
    assert out.shape == tokens.shape


@pytest.mark.parametrize("variant", ["v3", "v3.2"])
def test_padding_on_either_side_of_a_chunk(variant):
    """Rows of a chunk hold 4, 0 and 6 tokens over 7, 12 and 3 cached ones, with other tokens' hidden states between."""
    layer = Layer(variant, tokens=12, leading=(0, 0, 0))
    expected = layer.expected()
    context, count, before = torch.tensor([7, 12, 3]), torch.tensor([4, 0, 6]), torch.tensor([2, 0, 0])
    hidden, slots, positions = torch.randn(3, 7, 64) * 9, torch.full((3, 7), -1), torch.zeros(3, 7, dtype=torch.int64)
    full, layer.slots = layer.slots, torch.where(torch.arange(12) < context[:, None], layer.slots, -1)
    layer.prefill(0, 12)
    for row, (start, tokens, lead) in enumerate(zip(context, count, before)):
        part, source = slice(lead, lead + tokens), slice(start, start + tokens)
        hidden[row, part], slots[row, part] = layer.hidden[row, source], full[row, source]
        positions[row, part] = layer.positions[row, source]
    for most in (None, 12):
        out = layer.ours.prefill(
            hidden, *layer.tables, positions, slots, layer.cache, layer.block_table, context.int(), max_context=most,
            **layer.indexer,
        )  # fmt: skip
        for row, (start, tokens, lead) in enumerate(zip(context, count, before)):
            want = expected[row, start : start + tokens]
            torch.testing.assert_close(out[row, lead : lead + tokens], want, **TOLERANCE)


def test_long_contexts_are_expanded_in_blocks(monkeypatch):
    layer = Layer("v3 yarn", leading=(5, 0))
    expected = layer.expected()
    layer.prefill(0, 17)
    whole = layer.prefill(17, 23)
    monkeypatch.setattr(nn_attention, "CONTEXT_BLOCK", 7)
    monkeypatch.setattr(nn_attention, "SPARSE_TOKENS", 4)
    parts = layer.prefill(17, 23, max_context=20)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts, expected[:, 17:], **TOLERANCE)


def test_a_cache_that_is_no_flat_list_of_rows(monkeypatch):
    """Chunks of sparse attention then go through the paged kernel, a few tokens at a time."""
    monkeypatch.setattr(nn_attention, "SPARSE_TOKENS", 4)
    layer = Layer("v3.2")
    pages, page_size, width = layer.cache.data.shape
    layer.cache = LatentCache(torch.zeros(pages, 2, page_size, width)[:, 1], layer.cache.latent_dim)
    expected = layer.expected()
    layer.prefill(0, 9)
    real = layer.real(9, 23)
    torch.testing.assert_close(layer.prefill(9, 23)[real], expected[:, 9:][real], **TOLERANCE)


@pytest.mark.parametrize("variant", ["v3", "v3.2"])
@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantised_caches(variant, layout):
    """Decode over a quantised cache is decode over the bfloat16 cache of what it holds."""
    layer = Layer(variant, dtype=torch.bfloat16, layout=layout, kv_lora_rank=128, qk_nope_head_dim=32)
    layer.prefill(0, 17)
    rows = gather_tokens(layer.cache, torch.arange(layer.cache.num_slots))
    first = layer.decode(17, 18)
    assert layer.prefill(18, 23).isfinite().all()
    layer.cache = LatentCache(rows.view(layer.cache.num_pages, PAGE_SIZE, -1).clone(), 128)
    plain = layer.decode(17, 18)
    error = (first - plain).float().square().mean().sqrt() / plain.float().square().mean().sqrt()
    assert error < 0.02  # the new token itself is quantised in one cache and not in the other


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_all_weights(variant):
    layer = Layer(variant, leading=(0, 0))
    trained = [name for name, _ in layer.ours.named_parameters() if not name.startswith("indexer")]
    with torch.enable_grad():
        results = []
        for module, run in (
            (layer.ours, lambda h: layer.ours(h, *layer.tables, layer.positions)),
            (layer.theirs, layer.expected),
        ):
            module.requires_grad_(True)
            hidden = layer.hidden.clone().requires_grad_()
            out = run(hidden)
            weights = dict(module.named_parameters())
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append((out.detach(), {"hidden": hidden.grad} | {name: weights[name].grad for name in trained}))
    (out, grads), (expected_out, expected) = results
    torch.testing.assert_close(out, expected_out, **TOLERANCE)
    for name, want in expected.items():
        scale = want.abs().max().item()
        torch.testing.assert_close(grads[name], want, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    if layer.ours.config.index_top_k:
        assert all(parameter.grad is None for parameter in layer.ours.indexer.parameters())


@pytest.mark.parametrize("variant", ["v3", "v3.2"])
def test_sequences_laid_end_to_end(variant):
    layer = Layer(variant, leading=(0, 0))
    lengths = (23, 9)
    rows = [layer.ours(layer.hidden[b : b + 1, :n], *layer.tables, layer.positions[b : b + 1, :n])[0]
            for b, n in enumerate(lengths)]  # fmt: skip
    hidden = torch.cat([layer.hidden[b, :n] for b, n in enumerate(lengths)])
    positions = torch.cat([layer.positions[b, :n] for b, n in enumerate(lengths)])
    cu_seqlens = torch.tensor([0, 23, 32], dtype=torch.int32)
    for longest in (None, 23):
        out = layer.ours(hidden, *layer.tables, positions, cu_seqlens, max_seqlen=longest)
        torch.testing.assert_close(out, torch.cat(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("nope", "value"), [(24, 20), (128, 128), (192, 256), (40, 100)])
def test_head_widths_without_tiles_are_filled_up(nope, value):
    layer = Layer("v3", leading=(0,), tokens=9, qk_nope_head_dim=nope, v_head_dim=value)
    torch.testing.assert_close(layer.prefill(0, 9), layer.expected(), **TOLERANCE)


@pytest.mark.parametrize("variant", ["v2", "v3 half bias", "v3.2"])
def test_prepacked(variant):
    layer = Layer(variant)
    expected = layer.expected()
    layer.ours.requires_grad_(False)
    linears = [m for m in layer.ours.modules() if isinstance(m, torch.nn.Linear)]
    assert layer.ours.prepack() == sum(m.weight.nbytes for m in linears) - layer.ours.kv_b_proj.weight.nbytes
    layer.prefill(0, 17)
    torch.testing.assert_close(layer.decode(17, 23), expected[:, 17:], **TOLERANCE)


@pytest.mark.parametrize("variant", ["v2", "v3", "v3 half bias"])
def test_stacked_projections(variant):
    layer = Layer(variant)
    state = {name: value.clone() for name, value in layer.ours.state_dict().items()}
    layer.prefill(0, 17)
    want = layer.decode(17, 18)
    layer.ours.stack_projections()
    assert all(torch.equal(value, state[name]) for name, value in layer.ours.state_dict().items())
    torch.testing.assert_close(layer.decode(17, 18), want, atol=1e-5, rtol=0)
    weights = layer.ours._prolog_weights()
    assert len(weights.down_parts) == 1
    kv_a = layer.ours.kv_a_proj_with_mqa.weight
    assert weights.down[-1].data_ptr() == kv_a[-1].data_ptr()  # nothing was copied
    layer.ours.load_state_dict({name: value * 0.5 for name, value in state.items()})
    assert torch.equal(layer.ours._prolog_weights().down[-1], kv_a[-1]) and kv_a[-1].equal(
        state["kv_a_proj_with_mqa.weight"][-1] * 0.5
    )


def test_an_indexer_cache_in_fp8():
    """Keys and queries are rounded after a Hadamard transform: most choices stay, and attention is close to that over
    them."""
    layer = Layer("v3.2", leading=(0, 0), index_topk=12)
    keys = layer.indexer["indexer_cache"]
    layer.indexer = {"indexer_cache": IndexerCache.allocate(keys.num_pages, PAGE_SIZE, head_dim=32, layout="fp8")}
    expected = layer.expected()
    layer.prefill(0, 17)
    error = (layer.decode(17, 23) - expected[:, 17:]).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.15


@pytest.mark.parametrize("layout", ["fp8", "bf16"])
def test_queries_of_the_indexer_are_codes_where_its_keys_are(layout):
    """What it chooses is the reference's choice by queries of the cache's kind."""
    torch.manual_seed(3)
    config = AttentionConfig(64, 4, 48, 32, 32, 16, 32, index_top_k=5, index_heads=16, index_head_dim=32)
    indexer = Indexer(config)
    cache = IndexerCache.allocate(4, 16, head_dim=32, dtype=torch.float32, layout=layout)
    hidden, q_latent, slots = torch.randn(40, 64), torch.randn(40, 48), torch.arange(40, dtype=torch.int32)
    angles = torch.rand(40, 8) * 6
    tables = angles.cos(), angles.sin(), slots
    indexer.write(hidden, *tables, slots, cache)
    newest, lengths = slice(38, 40), torch.tensor([40], dtype=torch.int32)
    at = hidden[newest], q_latent[newest], (*tables[:2], slots[newest])
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    got = indexer.select_slots(*at, (1, 2), cache, table, lengths)
    with torch.no_grad():
        q, weights = indexer._query(*at, hadamard=layout == "fp8")
    if layout == "fp8":
        q, weights = indexer_reference.quantise_indexer_query(q, weights)
    want = indexer_reference.select_slots(q[None].double(), cache.data, weights[None].double(), table, lengths, 5)
    assert torch.equal(got, want)


def test_weights_that_move_are_noticed():
    layer = Layer("v3")
    layer.prefill(0, 17)
    before = layer.decode(17, 18)
    layer.ours.kv_b_proj.weight.data = layer.ours.kv_b_proj.weight.data * 2
    layer.ours.q_b_proj.weight.mul_(0)
    after = layer.decode(17, 18)
    assert not torch.allclose(before, after)
    other = LatentAttention(layer.ours.config)
    other.load_state_dict(layer.ours.state_dict())
    layer.ours = other
    torch.testing.assert_close(layer.decode(17, 18), after)


def test_state_dicts_are_taken_strictly():
    layer = Layer("v3.2")
    state = layer.theirs.state_dict()
    assert {"indexer.wq_b.weight", "indexer.wk.weight", "indexer.k_norm.bias", "indexer.weights_proj.weight"} <= set(
        state
    )
    del state["indexer.k_norm.bias"]
    with pytest.raises(RuntimeError, match=r"indexer\.k_norm\.bias"):
        layer.ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match="indexer"):
        LatentAttention(dataclasses.replace(layer.ours.config, index_top_k=None)).load_state_dict(
            layer.theirs.state_dict()
        )


def test_refusals_name_the_argument():
    dense, sparse = Layer("v3"), Layer("v3.2")
    keys = sparse.indexer["indexer_cache"]
    sparse.indexer = {}
    with pytest.raises(ValueError, match="indexer_cache: got NoneType, an IndexerCache is accepted by this layer"):
        sparse.prefill(0, 9)
    with pytest.raises(ValueError, match="indexer_cache: got NoneType"):
        sparse.decode(0, 1)
    dense.indexer = {"indexer_cache": keys}
    with pytest.raises(ValueError, match="indexer_cache: got IndexerCache, None is accepted by this layer"):
        dense.decode(0, 1)
    dense.indexer = {}
    sparse.indexer = {"indexer_cache": IndexerCache.allocate(1, 8, head_dim=32, dtype=torch.float32)}
    with pytest.raises(ValueError, match="indexer_cache: got 8 slots, 56 are accepted, those of cache"):
        sparse.decode(0, 1)
    with pytest.raises(ValueError, match="context_lens: got None, block_table and context_lens are accepted together"):
        dense.prefill(0, 9, block_table=dense.block_table)
    with pytest.raises(ValueError, match="max_context: got an integer without context_lens"):
        dense.prefill(0, 9, max_context=3)
    with pytest.raises(ValueError, match=r"context_lens: got shape \(3,\), \(2\) is accepted"):
        dense.prefill(0, 9, block_table=dense.block_table, context_lens=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"hidden: got shape \(2, 23, 64\), \(any, 64\) is accepted"):
        dense.ours(dense.hidden, *dense.tables, dense.positions, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="max_seqlen: got an integer without cu_seqlens"):
        dense.ours(dense.hidden, *dense.tables, dense.positions, max_seqlen=3)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="requires grad"):
        dense.decode(0, 1)
    with pytest.raises(ValueError, match="index_top_k: got an indexer without q_lora_rank"):
        AttentionConfig(q_lora_rank=None, index_top_k=4)
    config = tiny("GlmMoeDsa").config
    with pytest.raises(NotImplementedError, match="layer 1: indexer type 'shared', 'full' is supported"):
        AttentionConfig.from_hf(config, 1)
