"""V4Attention against transformers' DeepseekV4Attention: forward, gradients, prefill and decode, published files."""

from dataclasses import fields, replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV4Config
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

from mla_kernels import IndexerCache, LatentCache, nn
from tests import published
from tests.compat.models import CACHE
from tests.support import assert_close

KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
POSITIONS = 128


def config(**changes):
    sizes = dict(
        hidden_size=48, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16, q_lora_rank=24, o_groups=2,
        o_lora_rank=16, sliding_window=6, compress_rates={KINDS[1]: 4, KINDS[2]: 8}, index_n_heads=16,
        index_head_dim=32, index_topk=3, num_hidden_layers=3, layer_types=list(KINDS), rope_parameters=dict(YARN),
        max_position_embeddings=POSITIONS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        vocab_size=64,
    )  # fmt: skip
    return DeepseekV4Config(**(sizes | changes), attn_implementation="eager")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def layers(kind, **changes):
    """transformers' layer with random weights, ours with the same, and the tables of both."""
    made = config(**changes)
    layer = KINDS.index(kind)
    theirs = v4.DeepseekV4Attention(made, layer)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0.0, 0.3 if "proj" not in name else parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.add_(1.0)
    ours = nn.V4Attention(nn.V4AttentionConfig.from_hf(made, layer))
    ours.load_state_dict(theirs.state_dict())
    tables = nn.rope_tables(16, POSITIONS, made.rope_parameters[ours.config.rope])
    return theirs, ours, tables


def run(theirs, hidden):
    """transformers' layer, eager and without a cache, over hidden [batch, tokens, hidden_size]."""
    place = torch.arange(hidden.shape[1])[None]
    rotary = v4.DeepseekV4RotaryEmbedding(theirs.config)
    angles = {name: rotary(hidden, position_ids=place, layer_type=name) for name in ("main", "compress")}
    theirs.config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(
        config=theirs.config, inputs_embeds=hidden, attention_mask=None, position_ids=place, **{CACHE: None}
    )
    return theirs(hidden, angles, place, mask, **{CACHE: None})[0]


@pytest.mark.parametrize("tokens", [3, 29])
def test_forward(kind, tokens, cpu_code):
    theirs, ours, tables = layers(kind)
    hidden = torch.randn(2, tokens, 48)
    torch.testing.assert_close(ours(hidden, *tables), run(theirs, hidden), atol=2e-6, rtol=1e-5)


def test_gradients(kind, cpu_code):
    theirs, ours, tables = layers(kind)
    hidden, toward = torch.randn(2, 29, 48), torch.randn(2, 29, 48)
    found = []
    for layer, call in ((theirs, run), (ours, lambda layer, hidden: layer(hidden, *tables))):
        leaf = hidden.clone().requires_grad_()
        call(layer, leaf).backward(toward)
        grads = {name: parameter.grad for name, parameter in layer.named_parameters() if ".indexer." not in name}
        found.append({"hidden": leaf.grad, **grads})
    for name, want in found[0].items():
        assert_close(found[1][name], want.double())


PAGE, RING = 4, 4  # tokens of a page, pages of a sequence's window


def caches(ours, batch, *, new_tokens=1, **options):
    """Caches of one layer for so many sequences, garbage in them, and the tables of their pages."""
    config = ours.config
    entry_pages = -(-POSITIONS // PAGE) if config.ratio else 0
    cache = nn.V4Cache.allocate(
        config, num_pages=batch * RING, page_size=PAGE, entry_pages=batch * entry_pages, slots=batch + 1,
        new_tokens=new_tokens, **{"dtype": torch.float32} | options,
    )  # fmt: skip
    for part in (cache.window, cache.entries):
        if part is not None and not part.layout.quantised:
            part.data.fill_(float("nan"))
    order = torch.randperm(batch * RING, dtype=torch.int32).view(batch, RING)
    window = order[:, torch.arange(POSITIONS // PAGE) % RING]
    tables = {}
    if config.ratio:
        tables[config.ratio] = torch.randperm(batch * entry_pages, dtype=torch.int32).view(batch, entry_pages)
    slots = torch.randperm(batch + 1, dtype=torch.int32)[:batch]

    def sequences(lengths, **more):
        return nn.V4Sequences(torch.tensor(lengths, dtype=torch.int32), window, tables, slots, **more)

    return cache, sequences


def slots_of(sequences, sequence, positions):
    pages = sequences.window_table[sequence, positions // PAGE]
    return pages * PAGE + positions % PAGE


def prefill(ours, tables, prompts, cache, sequences):
    """Prompts of several lengths, packed."""
    lengths = [len(prompt) for prompt in prompts]
    places = sequences(lengths)
    slots = []
    for sequence, length in enumerate(lengths):
        own = slots_of(places, sequence, torch.arange(length))
        own[: max(length - ours.config.window, 0)] = -1  # the ring has no room for them
        slots.append(own)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = ours.prefill(torch.cat(prompts), *tables, bounds, torch.cat(slots), cache, places)
    return packed.split(lengths)


def decode(ours, tables, hidden, lengths, cache, sequences, **more):
    """hidden [batch, tokens, hidden_size] after sequences of these lengths."""
    tokens = hidden.shape[1]
    places = sequences([length + tokens for length in lengths], **more)
    slots = torch.stack([slots_of(places, b, length + torch.arange(tokens)) for b, length in enumerate(lengths)])
    return ours.decode(hidden, *tables, slots, cache, places)


LENGTHS = (29, 3, 16)


@pytest.mark.parametrize("step", [1, 3])
def test_prefill_and_decode(kind, step, cpu_code):
    """Ragged prompts, then steps of one and of several tokens: what each sequence gives alone, at once."""
    theirs, ours, tables = layers(kind)
    sequences = [torch.randn(1, length + 12, 48) for length in LENGTHS]
    want = [run(theirs, hidden)[0] for hidden in sequences]
    cache, places = caches(ours, len(LENGTHS), new_tokens=step)
    got = prefill(ours, tables, [hidden[0, :length] for hidden, length in zip(sequences, LENGTHS)], cache, places)
    for mine, exact, length in zip(got, want, LENGTHS):
        torch.testing.assert_close(mine, exact[:length], atol=2e-6, rtol=1e-5)
    for done in range(0, 12, step):
        lengths = [length + done for length in LENGTHS]
        hidden = torch.cat([x[:, length : length + step] for x, length in zip(sequences, lengths)])
        out = decode(ours, tables, hidden, lengths, cache, places)
        for mine, exact, length in zip(out, want, lengths):
            torch.testing.assert_close(mine, exact[length : length + step], atol=2e-6, rtol=1e-5)


def test_drafts_are_taken_back(kind, cpu_code):
    """Three tokens at a time, of which only the first stays: a shorter length at the next call."""
    theirs, ours, tables = layers(kind)
    hidden = torch.randn(1, 20, 48)
    want = run(theirs, hidden)[0]
    cache, places = caches(ours, 1, new_tokens=3)
    prefill(ours, tables, [hidden[0, :6]], cache, places)
    for length in range(6, 18):
        drafts = torch.cat((hidden[:, length : length + 1], torch.randn(1, 2, 48)), 1)
        out = decode(ours, tables, drafts, [length], cache, places)
        torch.testing.assert_close(out[0, 0], want[length], atol=2e-6, rtol=1e-5)


def test_packed_sequences_are_rows(kind, cpu_code):
    _, ours, tables = layers(kind)
    parts = [torch.randn(1, length, 48) for length in LENGTHS]
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = ours(torch.cat(parts, 1)[0], *tables, bounds, max_seqlen=max(LENGTHS))
    for part, got in zip(parts, packed.split(LENGTHS)):
        torch.testing.assert_close(got, ours(part, *tables)[0], atol=2e-6, rtol=1e-5)
    assert ours(torch.randn(2, 0, 48), *tables).shape == (2, 0, 48)


@pytest.mark.parametrize("layout, index_layout", [(None, "bf16"), ("int8", "fp8")])
def test_sixteen_bits(kind, layout, index_layout, cpu_code):
    """In bfloat16, and over caches in codes, no further from float32 than these roundings are."""
    _, exact, tables = layers(kind, index_topk=64)
    ours = nn.V4Attention(exact.config).bfloat16()
    ours.load_state_dict(exact.state_dict())
    kept = ["sinks", "q_a_norm.weight", "kv_norm.weight"] + ["compressor.position_bias"] * bool(ours.config.ratio)
    assert {name for name, p in ours.named_parameters() if p.dtype == torch.float32} >= set(kept)
    hidden = torch.randn(1, 33, 48).bfloat16()
    want = exact(hidden.float(), *tables)
    cache, places = caches(ours, 1, dtype=torch.bfloat16, layout=layout, index_layout=index_layout)
    got = [prefill(ours, tables, [hidden[0, :20]], cache, places)[0]]
    got += [decode(ours, tables, hidden[:, t : t + 1], [t], cache, places)[0] for t in range(20, 33)]
    error = (torch.cat(got).float() - want[0]).abs().max() / want.abs().max()
    assert error < (0.03 if layout is None else 0.06), error


PUBLISHED = {
    "q_a_proj": "wq_a", "q_a_norm": "q_norm", "q_b_proj": "wq_b", "kv_proj": "wkv", "kv_norm": "kv_norm",
    "o_a_proj": "wo_a", "o_b_proj": "wo_b", "sinks": "attn_sink", "compressor.kv_proj": "compressor.wkv",
    "compressor.gate_proj": "compressor.wgate", "compressor.position_bias": "compressor.ape",
    "compressor.kv_norm": "compressor.norm", "compressor.indexer.kv_proj": "indexer.compressor.wkv",
    "compressor.indexer.gate_proj": "indexer.compressor.wgate",
    "compressor.indexer.position_bias": "indexer.compressor.ape",
    "compressor.indexer.kv_norm": "indexer.compressor.norm", "compressor.indexer.q_b_proj": "indexer.wq_b",
    "compressor.indexer.scorer.weights_proj": "indexer.weights_proj",
}  # fmt: skip
"""transformers' names and those of DeepSeek's files."""


@pytest.mark.parametrize("how", ["bf16", "v4_fp8"])
def test_published_files(kind, how, cpu_code):
    """DeepSeek's names, big projections in e4m3 with ue8m0 scales, others in bfloat16 and float32, strictly."""
    theirs, _, tables = layers(kind)
    file, true = {}, {}
    for name, tensor in theirs.state_dict().items():
        stem = name.removesuffix(".weight")
        coded = how == "v4_fp8" and "proj" in name and "compressor." not in name
        if coded:
            stored, exact = published.v4_fp8("w", tensor)
        else:
            stored = {"w.weight" if name != stem else "w": tensor.bfloat16() if "proj" in name else tensor}
            exact = next(iter(stored.values()))
        true[name] = exact.float()
        file |= {f"layers.7.attn.{PUBLISHED[stem]}{key.removeprefix('w')}": value for key, value in stored.items()}
    config = nn.V4AttentionConfig.from_hf(theirs.config, KINDS.index(kind))
    for way in ({}, {"assign": True}):
        with torch.device("meta" if way else "cpu"):
            ours = nn.V4Attention(config)
        holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"7": torch.nn.ModuleDict({"attn": ours})})})
        before = dict(file)
        holder.load_state_dict(file, **way)
        assert file.keys() == before.keys()
        for name, want in true.items():
            assert torch.equal(ours.state_dict()[name].float(), want), name
    theirs.load_state_dict(true)
    ours = nn.V4Attention(config)
    ours.load_state_dict(true)
    hidden = torch.randn(1, 9, 48)
    torch.testing.assert_close(ours(hidden, *tables), run(theirs, hidden), atol=2e-6, rtol=1e-5)
    if how == "v4_fp8":
        with pytest.raises(TypeError, match=r"q_a_proj.*codes"):
            ours.load_state_dict({name: value for name, value in _stripped(file).items() if name != "wq_a.scale"})
    missing = {name: value for name, value in _stripped(file).items() if name != "attn_sink"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"sinks"'):
        ours.load_state_dict(missing)


def _stripped(file):
    return {name.removeprefix("layers.7.attn."): value for name, value in file.items()}


def test_from_hf_and_sizes():
    made = config()
    configs = [nn.V4AttentionConfig.from_hf(made, layer) for layer in range(3)]
    assert [(own.layer_type, own.ratio, own.overlap, own.rope) for own in configs] == [
        (KINDS[0], 0, False, "main"), (KINDS[1], 4, True, "compress"), (KINDS[2], 8, False, "compress"),
    ]  # fmt: skip
    flash = DeepseekV4Config()
    sparse = nn.V4AttentionConfig.from_hf(flash, flash.layer_types.index(KINDS[1]))
    assert sparse == nn.V4AttentionConfig()


@pytest.mark.parametrize(
    "kind, ratio, layout, index_layout, want",
    [
        (KINDS[0], 0, None, "bf16", 0.0),
        (KINDS[1], 4, None, "bf16", (1024 + 256) / 4),
        (KINDS[1], 4, "fp8_v4", "fp8", (584 + 132) / 4),
        (KINDS[2], 128, None, "bf16", 1024 / 128),
        (KINDS[2], 128, "fp8_v4", "bf16", 584 / 128),
    ],
)
def test_bytes_of_a_token_of_v4_flash(kind, ratio, layout, index_layout, want):
    """DeepSeek-V3 has 1,152 a layer."""
    own = nn.V4AttentionConfig(kind, ratio=ratio)
    cache = nn.V4Cache.allocate(own, num_pages=1, layout=layout, index_layout=index_layout)
    assert cache.bytes_per_token(own) == want


REFUSED = {
    "layer type": (lambda: nn.V4AttentionConfig("linear"), ValueError, "layer_type: got 'linear', accepted"),
    "ratio": (lambda: nn.V4AttentionConfig(KINDS[0]), ValueError, "ratio: got 4 with layer_type 'sliding_attention'"),
    "no ratio": (lambda: nn.V4AttentionConfig(KINDS[1], ratio=0), ValueError, "ratio: got 0, an integer of at least 1"),
    "groups": (lambda: nn.V4AttentionConfig(num_heads=6), ValueError, "o_groups: got 8, a divisor of num_heads"),
    "rope": (lambda: nn.V4AttentionConfig(index_head_dim=32), ValueError, "rope_dim: got 64, an integer from 16 to 32"),
    "family": (
        lambda: nn.V4AttentionConfig.from_hf(DeepseekV3Config(), 0), ValueError, "config.model_type: got 'deepseek_v3'",
    ),
    "layer": (lambda: nn.V4AttentionConfig.from_hf(config(), 3), ValueError, "layer: got 3, an integer from 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


REFUSED_CALLS = {
    "a cache of another type": (
        lambda a: {"cache": nn.V4Cache(a["cache"].window)}, ValueError, "cache.entries: got None, a value is accepted",
    ),
    "widths": (
        lambda a: {"cache": replace(a["cache"], window=LatentCache.allocate(4, 4, latent_dim=64, dtype=torch.float32))},
        ValueError, "cache.window: got latent_dim 64 and rope_dim 64, 32 and 0 are accepted",
    ),
    "index slots": (
        lambda a: {"cache": replace(a["cache"], index_keys=IndexerCache.allocate(3, 4, head_dim=32))}, ValueError,
        "cache.index_keys: got 12 slots, 128 are accepted",
    ),
    "no cache": (lambda a: {"cache": a["cache"].window}, TypeError, "cache: got LatentCache, a V4Cache is accepted"),
    "sequences": (lambda a: {"sequences": 1}, TypeError, "sequences: got int, V4Sequences are accepted"),
    "tables": (
        lambda a: {"sequences": replace(a["sequences"], entry_tables={})}, ValueError,
        "entry_tables: got tables of ratios .*, a layer of 'compressed_sparse_attention' needs 4",
    ),
    "no slots": (
        lambda a: {"sequences": replace(a["sequences"], state_slots=None)}, ValueError, "state_slots: got None",
    ),
    "pages beyond the cache": (
        lambda a: {"sequences": replace(a["sequences"], window_table=a["sequences"].window_table + 99)}, ValueError,
        "window_table: got values from .*slots, by its pages, of cache.window",
    ),
    "too few pages": (
        lambda a: {"sequences": replace(a["sequences"], window_table=a["sequences"].window_table[:, :0])}, ValueError,
        "seq_lens: got values from 1 to 1, accepted: 0 to 0",
    ),
    "slots beyond the state": (
        lambda a: {"sequences": replace(a["sequences"], state_slots=a["sequences"].state_slots + 99)}, ValueError,
        "state_slots: got values from .*slots of the state",
    ),
    "a raw slot beyond the cache": (
        lambda a: {"slot_mapping": a["slot_mapping"] + 999}, ValueError, "slot_mapping: got values from 999 to 999",
    ),
    "a length that no table holds": (
        lambda a: {"sequences": replace(a["sequences"], seq_lens=a["sequences"].seq_lens + 3, entry_tables={
            ratio: table[:, :0] for ratio, table in a["sequences"].entry_tables.items()})}, ValueError,
        "seq_lens: got values from 4 to 4",
    ),
    "a longest length that is none": (
        lambda a: {"sequences": replace(a["sequences"], seq_lens=a["sequences"].seq_lens + 3, max_seqlen=1)},
        ValueError, "max_entries: got 0, a sequence has 1",
    ),
    "a short state": (
        lambda a: {"cache": replace(a["cache"], state=a["cache"].state[:, :7])}, ValueError,
        "cache.state: got 7 rows, at least 8 are accepted",
    ),
    "an index state of its own": (
        lambda a: {"cache": replace(a["cache"], index_state=a["cache"].index_state[:, :-1])}, ValueError,
        r"cache.index_state: got shape",
    ),
    "entries of another layout": (
        lambda a: {"cache": replace(a["cache"], entries=LatentCache.allocate(
            32, 4, latent_dim=32, rope_dim=0, layout="int8"))}, TypeError,
        "cache.entries.data: got dtype uint8, accepted: float32",
    ),
    "a state of another dtype": (
        lambda a: {"cache": replace(a["cache"], state=a["cache"].state.bfloat16())}, TypeError,
        "cache.state: got dtype bfloat16, accepted: float32",
    ),
    "index keys of another width": (
        lambda a: {"cache": replace(a["cache"], index_keys=IndexerCache.allocate(
            32, 4, head_dim=64, dtype=torch.float32))}, ValueError,
        "cache.index_keys: got head_dim 64, 32 is accepted",
    ),
    "index keys of another dtype": (
        lambda a: {"cache": replace(a["cache"], index_keys=IndexerCache.allocate(32, 4, head_dim=32))}, TypeError,
        "cache.index_keys.data: got dtype bfloat16, accepted: float32",
    ),
    "caches of another dtype": (
        lambda a: {"cache": nn.V4Cache.allocate(
            nn.V4AttentionConfig.from_hf(config(), 1), num_pages=4, page_size=4, entry_pages=32, slots=2)}, TypeError,
        "hidden: its projections are torch.float32, cache.window takes torch.bfloat16",
    ),
    "no page of entries": (
        lambda a: {"cache": replace(a["cache"], entries=replace(a["cache"].entries, data=a["cache"].entries.data[:0]),
            index_keys=replace(a["cache"].index_keys, data=a["cache"].index_keys.data[:0]))}, ValueError,
        "cache.entries: got 0 slots, 1 to",
    ),
    "lengths of other sequences": (
        lambda a: {"sequences": nn.V4Sequences(
            torch.ones(2, dtype=torch.int32), a["sequences"].window_table.repeat(2, 1),
            {4: a["sequences"].entry_tables[4].repeat(2, 1)}, torch.arange(2, dtype=torch.int32))}, ValueError,
        r"seq_lens: got shape \(2,\), \(1\) is accepted",
    ),
    "an older page beyond the entries": (
        lambda a: {"sequences": replace(a["sequences"], seq_lens=a["sequences"].seq_lens + 20, entry_tables={
            4: a["sequences"].entry_tables[4].where(torch.arange(32) > 0, torch.tensor(99, dtype=torch.int32))})},
        ValueError, "block_table: got values from .*pages of the cache",
    ),
    "hidden": (lambda a: {"hidden": a["hidden"][..., :40]}, ValueError, r"hidden: got shape \(1, 1, 40\)"),
    "cos": (lambda a: {"cos": a["cos"][:, :3]}, ValueError, r"cos: got shape"),
    "slot_mapping": (lambda a: {"slot_mapping": a["slot_mapping"][0]}, ValueError, "slot_mapping: got 1 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_refused(name, cpu_code):
    change, error, words = REFUSED_CALLS[name]
    _, ours, tables = layers(KINDS[1])
    cache, sequences = caches(ours, 1)
    arguments = {
        "hidden": torch.randn(1, 1, 48), "cos": tables[0], "sin": tables[1],
        "slot_mapping": torch.zeros(1, 1, dtype=torch.int32), "cache": cache, "sequences": sequences([1]),
    }  # fmt: skip
    parts = cache.window.data, cache.entries.data, cache.state, cache.index_keys.data, cache.index_state
    before = [part.clone() for part in parts]
    with pytest.raises(error, match=words):
        ours.decode(**(arguments | change(arguments)))
    for part, held in zip(parts, before):
        torch.testing.assert_close(part, held, equal_nan=True, rtol=0, atol=0)
    ours.decode(**arguments)


REFUSED_PROMPTS = {
    "a raw slot beyond the cache": (
        lambda a: {"slot_mapping": a["slot_mapping"] + 999}, "slot_mapping: got values from 999",
    ),
    "slots beyond the state": (
        lambda a: {"sequences": replace(a["sequences"], state_slots=a["sequences"].state_slots + 99)},
        "state_slots: got values from .*slots of the state",
    ),
    "one state slot for two prompts": (
        lambda a: {"sequences": replace(a["sequences"], state_slots=a["sequences"].state_slots * 0)},
        r"state_slots: got \[0, 0\]",
    ),
    "prompts of other lengths": (
        lambda a: {"sequences": replace(a["sequences"], seq_lens=a["sequences"].seq_lens + 1)},
        r"seq_lens: got \[10, 7\], the prompts' lengths by cu_seqlens are accepted \(\[9, 6\]\)",
    ),
    "bounds of other prompts": (
        lambda a: {"cu_seqlens": torch.tensor([0, 15], dtype=torch.int32)}, r"cu_seqlens: got shape \(2,\)",
    ),
    "a page beyond the entries": (
        lambda a: {"sequences": replace(a["sequences"], entry_tables={
            4: a["sequences"].entry_tables[4] + 999})}, "block_table: got page",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ["prefill", "write"])
@pytest.mark.parametrize("name", REFUSED_PROMPTS)
def test_prompts_refused(name, call, cpu_code):
    """Nothing is written, and the same prompts without the fault are taken."""
    change, words = REFUSED_PROMPTS[name]
    _, ours, tables = layers(KINDS[1])
    cache, sequences = caches(ours, 2)
    arguments = {
        "hidden": torch.randn(15, 48), "cos": tables[0], "sin": tables[1],
        "cu_seqlens": torch.tensor([0, 9, 15], dtype=torch.int32), "slot_mapping": torch.arange(15, dtype=torch.int32),
        "cache": cache, "sequences": sequences([9, 6]),
    }  # fmt: skip
    parts = cache.window.data, cache.entries.data, cache.state, cache.index_keys.data, cache.index_state
    before = [part.clone() for part in parts]
    with pytest.raises(ValueError, match=words):
        getattr(ours, call)(**(arguments | change(arguments)))
    for part, held in zip(parts, before):
        torch.testing.assert_close(part, held, equal_nan=True, rtol=0, atol=0)
    getattr(ours, call)(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_on_every_backend(backend, device, kind):
    """A prompt and two decode steps in the kernels."""
    theirs, ours, tables = layers(kind, num_attention_heads=2, index_n_heads=8)
    ours, tables = ours.to(device), [table.to(device) for table in tables]
    hidden = torch.randn(1, 19, 48)
    want = run(theirs, hidden)[0]
    cache, places = caches(ours, 1)
    cache = moved(cache, device)

    def sequences(lengths):
        made = places(lengths)
        tensors = {ratio: table.to(device) for ratio, table in made.entry_tables.items()}
        return replace(
            made, seq_lens=made.seq_lens.to(device), window_table=made.window_table.to(device), entry_tables=tensors,
            state_slots=made.state_slots.to(device),
        )  # fmt: skip

    got = [prefill(ours, tables, [hidden[0, :17].to(device)], cache, sequences)[0]]
    got += [decode(ours, tables, hidden[:, t : t + 1].to(device), [t], cache, sequences)[0] for t in (17, 18)]
    torch.testing.assert_close(torch.cat(got).cpu(), want, atol=2e-5, rtol=1e-4)


def moved(cache, device):
    parts = {}
    for field in fields(cache):
        part = getattr(cache, field.name)
        if isinstance(part, torch.Tensor):
            part = part.to(device)
        elif part is not None:
            part = replace(part, data=part.data.to(device))
        parts[field.name] = part
    return nn.V4Cache(**parts)
