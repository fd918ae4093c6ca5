"""enable(model) on every family: transformers' own eager text and logits, in inference and training."""

import copy
from collections import Counter

import pytest
import torch
import transformers

from mla_kernels.compat import transformers_attention, transformers_forward
from mla_kernels.compat.transformers import FAMILIES as TABLE
from mla_kernels.compat.transformers import LatentLayer, disable, enable
from tests.compat.models import (
    CACHE,
    CONFIGS,
    FAMILIES,
    GEOMETRY,
    HYBRID,
    VOCABULARY,
    another_s_turn,
    attentions,
    fast_cpu,
    one_layer,
    tiny,
)

PROMPT, PADDING, NEW = 29, 9, 8
INDEXED = [
    name for name in ("DeepseekV32", "GlmMoeDsa", "AXK2", "HYV4", "MistralLarge4", "Dots3Note") if name in FAMILIES
]
WINDOWS = [name for name in ("Dots3Note",) if name in FAMILIES]
POOLS = [name for name in ("Glm5Next",) if name in FAMILIES]  # their indexer chooses pools of keys


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def _eager(family, **changes):
    model = tiny(family, **changes)
    model.set_attn_implementation("eager")
    return model


def _batch():
    """Token ids, the last row left-padded."""
    ids = torch.randint(2, VOCABULARY, (2, PROMPT))
    mask = torch.ones_like(ids)
    mask[-1, :PADDING] = 0
    return ids, mask


def _generate(model, ids, mask, new=NEW):
    options = dict(return_dict_in_generate=True, output_logits=True, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


def _assert_same(actual, expected, atol=1e-4):
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_every_family_is_tested():
    names = {family.base.removesuffix("Model").removesuffix("Text") for family in TABLE}
    assert names == set(CONFIGS) == set(GEOMETRY)


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow(when=lambda family, heads: another_s_turn(family, heads == 4))
def test_same_greedy_tokens_and_logits_in_a_left_padded_batch(family, heads, calls):
    model = _eager(family, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=16 * heads)
    ids, mask = _batch()
    expected = _generate(model, ids, mask)
    assert expected.sequences[:, PROMPT:].unique().numel() > 4, "the greedy text must not be constant"
    actual = _generate(enable(model), ids, mask)
    _assert_same(actual, expected)
    layers = model.config.num_hidden_layers
    dense = {"MiniCPM3": layers, "Youtu": layers, "LongcatFlash": 2}.get(family, 1)  # layers without experts
    assert calls["fused_moe"] == NEW * (layers - dense)
    latent = len(attentions(model))
    sparse = len(WINDOWS) if family in WINDOWS else 0  # these choose slots under padding
    assert (calls["mla_prefill"], calls["sparse_mla_prefill"]) == (latent - sparse, sparse)
    assert (calls["mla_decode"], calls["sparse_mla_decode"]) == ((NEW - 1) * (latent - sparse), (NEW - 1) * sparse)
    cache = actual[CACHE]
    assert len(cache.layers) == layers
    stored = [layer for layer in cache.layers if isinstance(layer, LatentLayer)]
    assert len(stored) == latent - (family == "MistralLarge4"), "one layer has neither latents nor an indexer"
    for layer in stored:
        assert layer.get_seq_length() == PROMPT + NEW - 1
        assert layer.seq_lens.tolist() == [PROMPT + NEW - 1, PROMPT + NEW - 1 - PADDING], "padding takes no slot"


@pytest.mark.parametrize("family", FAMILIES)
def test_real_head_geometry(family, calls):
    nope, rope, value, latent = GEOMETRY[family]
    changes = dict(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, kv_lora_rank=latent)
    if family == "LongcatFlash":
        changes["head_dim"] = rope
    if family in INDEXED:
        changes["index_head_dim"] = 128
    model = _eager(family, **one_layer(family) | changes)
    ids, mask = _batch()
    expected = _generate(model, ids, mask, new=3)
    _assert_same(_generate(enable(model), ids, mask, new=3), expected)
    layers = model.config.num_hidden_layers
    assert (calls["mla_prefill"], calls["mla_decode"]) == (layers, 2 * layers)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*INDEXED, *POOLS])
@pytest.mark.slow(when=lambda family, padded: another_s_turn(family, padded))
def test_indexer_chooses_the_same_keys(family, padded, calls):
    """A context beyond top_k: prefill, chunks over it and decoding attend to the chosen keys only."""
    model = _eager(family, index_topk=16)
    ids, mask = _batch() if padded else (torch.randint(2, VOCABULARY, (2, PROMPT)), torch.ones(2, PROMPT).long())
    expected = _generate(model, ids, mask, new=4)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    _assert_same(_generate(enable(model), ids, mask, new=4), expected)
    indexers = sum(type(module).__name__.endswith("Indexer") for module in model.modules())
    layers, latent = model.config.num_hidden_layers, len(attentions(model))
    windows = len(WINDOWS) if family in WINDOWS and not padded else 0
    assert calls == Counter(
        select_slots=4 * indexers, sparse_mla_prefill=latent,
        sparse_mla_decode=3 * (latent - windows), mla_decode=3 * windows, fused_moe=4 * (layers - 1),
    )  # fmt: skip
    past, start = None, 0
    for chunk in (10, 17, 2):  # up to the limit, a prefill across it, and decoding
        rows = slice(start, start + chunk)
        start += chunk
        out = model(ids[:, rows], attention_mask=mask[:, :start], position_ids=positions[:, rows], **{CACHE: past})
        past, real = out[CACHE], mask[:, rows].bool()
        torch.testing.assert_close(out.logits[real], whole[:, rows][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [*INDEXED[:1], *POOLS])
def test_chosen_keys_of_several_pages(family):
    """Chunks of 300 tokens, whose keys take more pages; and beams, which take them along."""
    model = _eager(family, index_topk=16)
    ids, mask = torch.randint(2, VOCABULARY, (2, 300)), torch.ones(2, 300).long()
    mask[1, :22] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    beams = dict(num_beams=3, max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(ids[:, 250:], attention_mask=mask[:, 250:], **beams)
    enable(model)
    past, start = None, 0
    for chunk in (90, 1, 203, 1, 5):
        rows = slice(start, start + chunk)
        start += chunk
        out = model(ids[:, rows], attention_mask=mask[:, :start], position_ids=positions[:, rows], **{CACHE: past})
        past, real = out[CACHE], mask[:, rows].bool()
        torch.testing.assert_close(out.logits[real], whole[:, rows][real], atol=1e-4, rtol=0)
    assert family not in POOLS or past.layers[0].pools.data.shape[1] == 128
    assert torch.equal(model.generate(ids[:, 250:], attention_mask=mask[:, 250:], **beams), expected)


@pytest.mark.slow
def test_indexer_on_every_backend(backend, device, calls):
    small = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, index_n_heads=8)
    model = _eager("DeepseekV32", **small, index_topk=16).to(device)
    ids = torch.randint(2, VOCABULARY, (1, 17), device=device)
    expected = _generate(model, ids, torch.ones_like(ids), new=2)
    _assert_same(_generate(enable(model), ids, torch.ones_like(ids), new=2), expected)
    assert calls == {"select_slots": 2, "sparse_mla_prefill": 1, "sparse_mla_decode": 1}


@pytest.mark.parametrize("top_k", [16, 64])
@pytest.mark.parametrize("family", ["DeepseekV3", *INDEXED, *HYBRID])
@pytest.mark.slow(when=lambda family, top_k: another_s_turn(family, top_k == 16))
def test_padding_anywhere(family, top_k):
    """Padding before, within and after a prompt, and in a later chunk."""
    model = _eager(family, **({"index_topk": top_k} if "index_topk" in FAMILIES[family] else {}))
    ids, mask = _batch()
    mask[0, 11:14] = 0
    mask[0, 26:] = 0
    mask[1, 20:24] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    enable(model)
    past = None
    for rows in (slice(0, 4), slice(4, 22), slice(22, PROMPT)):
        options = dict(attention_mask=mask[:, : rows.stop], position_ids=positions[:, rows], **{CACHE: past})
        out = model(ids[:, rows], **options)
        past, real = out[CACHE], mask[:, rows].bool()
        torch.testing.assert_close(out.logits[real], expected[:, rows][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", INDEXED)
def test_indexer_cache_holds_what_transformers_caches(family):
    model = _eager(family, index_topk=16)
    ids, mask = _batch()
    expected = _generate(model, ids, mask)[CACHE]
    actual = _generate(enable(model), ids, mask)[CACHE]
    real = torch.cat((mask, torch.ones(2, NEW - 1)), -1).bool()
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        if getattr(theirs, "indexer_keys", None) is None:  # a layer that takes the choice of another, or a window
            assert getattr(ours, "indexer_keys", None) is None
            continue
        torch.testing.assert_close(ours.indexer_keys[real], theirs.indexer_keys[real], atol=1e-4, rtol=0)
        ours.batch_repeat_interleave(2)
        ours.crop(-3)
        ours.batch_select_indices(torch.tensor([3, 1]))
        swapped = theirs.indexer_keys.flip(0)[:, :-3]
        kept = real.flip(0)[:, :-3]
        torch.testing.assert_close(ours.indexer_keys[kept], swapped[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"num_beams": 3}) for family in (*INDEXED, *HYBRID)),
        *((family, {"prompt_lookup_num_tokens": 4}) for family in INDEXED),  # linear layers cannot forget tokens
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_caches_follow_their_sequences(family, options):
    model = _eager(family, **({"index_topk": 16} if "index_topk" in FAMILIES[family] else {}))
    ids = torch.randint(2, VOCABULARY, (1, 6)).repeat(1, 4)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0) | options
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(enable(model).generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow(when=lambda family, dtype: another_s_turn(family, dtype == torch.float16))
def test_half_precision(family, dtype):
    dense = {"MistralLarge4": {"first_k_dense_replace": 4}, "Glm5Next": {"mlp_layer_types": ["dense"] * 4}}
    model = _eager(family, **dense.get(family, {})).to(dtype)  # rounding moves these two's choice of experts
    ids, mask = _batch()
    expected = _generate(model, ids, mask, new=2)
    actual = _generate(enable(model), ids, mask, new=2)
    scale = expected.logits[0].float().abs().max().item()
    torch.testing.assert_close(actual.logits[0].float(), expected.logits[0].float(), atol=0.05 * scale, rtol=0)
    layer = next(layer for layer in actual[CACHE].layers if isinstance(layer, LatentLayer))
    assert layer.bytes_per_token == (32 + FAMILIES[family].get("qk_rope_head_dim", 16)) * 2
    if family in INDEXED:  # rounding may move the choice of a key, so that texts part
        assert layer.index_cache.data.dtype == (torch.float32 if family == "Dots3Note" else dtype), "as transformers'"
        sparse = enable(tiny(family, index_topk=16).to(dtype))
        assert _generate(sparse, ids, mask, new=2).logits[1].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_restores_the_model_and_its_bits(family, calls):
    model = _eager(family)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    settings = model.config._attn_implementation, model.config._experts_implementation
    ids, mask = _batch()
    expected = model(ids, attention_mask=mask).logits
    assert enable(enable(model)) is model
    assert len(model.model._forward_pre_hooks) == (2 if hasattr(model.config, "hc_mult") else 1)
    model(ids, attention_mask=mask)
    disable(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert (model.config._attn_implementation, model.config._experts_implementation) == settings
    before = dict(calls)
    out = model(ids, attention_mask=mask)
    assert calls == before
    assert torch.equal(out.logits, expected)
    assert not isinstance(out[CACHE].layers[0], LatentLayer)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow(when=lambda family, padded: another_s_turn(family, padded))
def test_gradients_without_a_cache(family, padded, calls):
    model = _eager(family).train()
    model.requires_grad_(True)
    twin = enable(copy.deepcopy(model))
    ids, mask = _batch()
    labels = ids.clone()
    if padded:
        labels[-1, : PADDING + 1] = -100  # what padding attends to is anybody's choice
    else:
        mask = None
    with torch.enable_grad():
        for each in (model, twin):
            each(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    latent = len(attentions(model))
    assert (calls.pop("fused_moe", 0) > 0) == (family not in ("MiniCPM3", "Youtu"))  # those have no experts
    assert calls == ({} if padded or family in (*INDEXED, *POOLS) else {"mla_prefill": latent})
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_reach_through_the_cache(family):
    model = enable(tiny(family))
    model.requires_grad_(True)
    ids = torch.randint(2, VOCABULARY, (1, 8))
    with torch.enable_grad():
        first = model(ids, labels=ids, use_cache=True)
        first.loss.backward()
        with pytest.raises(NotImplementedError, match="keeps no gradients: pass use_cache=False"):
            model(ids[:, :1], **{CACHE: first[CACHE]})
    assert model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize(
    "family", ["DeepseekV3", "LongcatFlash", *HYBRID, *(family for family in INDEXED if family not in WINDOWS)]
)
def test_takes_over_a_cache_that_transformers_filled(family):
    model = _eager(family)
    ids, mask = _batch()
    step, positions = torch.tensor([[5], [6]]), torch.tensor([[PROMPT], [PROMPT - PADDING]])
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[CACHE]
    again = copy.deepcopy(cache)
    expected = model(step, attention_mask=longer, position_ids=positions, **{CACHE: again}).logits
    out = enable(model)(step, attention_mask=longer, position_ids=positions, **{CACHE: cache})
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
    assert isinstance(cache.layers[-1], LatentLayer)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_independent(family):
    model = enable(tiny(family))
    ids, mask = _batch()
    expected = _generate(model, ids, mask, new=2)
    twin = copy.deepcopy(model)
    twin.model.embed_tokens.weight.add_(0.5)
    assert not torch.equal(_generate(twin, ids, mask, new=2).logits[0], expected.logits[0])
    disable(twin)
    _assert_same(_generate(model, ids, mask, new=2), expected, atol=0)


def test_longcat_experts_that_give_the_token_back():
    model = _eager("LongcatFlash", num_hidden_layers=2)
    experts = model.model.layers[0].mlp.experts
    hidden, weights = torch.randn(7, 64), torch.rand(7, 3)
    for ids in (torch.randint(0, 8, (7, 3)), torch.full((7, 3), 7), torch.zeros(7, 3, dtype=torch.long)):
        expected = experts(hidden, ids, weights)
        actual = enable(model).model.layers[0].mlp.experts(hidden, ids, weights)
        disable(model)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_windows_without_tiles_for_their_latents(monkeypatch, calls):
    """As on a device whose ops hold no latent of 1024 columns: over the expanded keys of the window."""
    for family in WINDOWS:  # older versions of transformers have none
        calls.clear()
        model = _eager(family)
        ids, mask = _batch()
        expected = _generate(model, ids, mask)
        for module in (transformers_attention, transformers_forward):
            monkeypatch.setattr(module, "expands_windows", lambda latent, device: latent == 64)
        enable(model)
        _assert_same(_generate(model, ids, mask), expected)
        assert (calls["mla_decode"], calls["sparse_mla_decode"]) == ((NEW - 1) * 2, 0)
        whole, past = model(ids).logits, None
        for chunk in ids.split((18, 3, 8), 1):
            out = model(chunk, **{CACHE: past})
            past = out[CACHE]
        torch.testing.assert_close(out.logits, whole[:, 21:], atol=1e-4, rtol=0)


def test_filled_windows_are_refused():
    for family in WINDOWS:  # older versions of transformers have none
        model = _eager(family)
        ids, _ = _batch()
        cache = model(ids)[CACHE]
        with pytest.raises(NotImplementedError, match="got a filled DynamicSlidingWindowLayer, an empty one is"):
            enable(model)(ids[:, :1], **{CACHE: cache})


def test_latent_layers_in_place_of_linear_ones_are_refused():
    for family in HYBRID:  # the same
        model = enable(tiny(family))
        layers = model.config.layer_types
        cache = transformers.Cache(layers=[LatentLayer() for _ in layers])
        with pytest.raises(ValueError, match=rf"got latent layers at \[{layers.index('linear_attention')}"):
            model(torch.ones(1, 2, dtype=torch.long), **{CACHE: cache})


def test_sliding_windows_are_refused():
    model = tiny("Youtu")
    model.config.sliding_window = 32
    with pytest.raises(NotImplementedError, match=r"window 32; attention to the whole context is accepted"):
        enable(model)
    model = tiny("DeepseekV32", layer_types=["indexed_attention"] * 3)
    model.config.layer_types = ["indexed_attention", "sliding_attention", "indexed_attention"]
    with pytest.raises(NotImplementedError, match=r"got layer types \['sliding_attention'\]"):
        enable(model)
    assert "mla_kernels" not in vars(model)


def test_layers_of_several_configurations_are_refused():
    model = tiny("DeepseekV3")
    model.config.per_layer_config = {1: {"rope_interleave": False}}
    with pytest.raises(NotImplementedError, match=r"layers of several configurations \(per_layer_config\), one is"):
        enable(model)


def test_attention_dropout_over_a_cache_is_refused():
    model = enable(tiny("Youtu", attention_dropout=0.1)).train()
    ids, mask = _batch()
    with pytest.raises(NotImplementedError, match=r"attention dropout: got 0.1 .*model.eval\(\), or pass use_cache"):
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask, use_cache=False)


def test_caches_of_several_page_sizes_are_refused():
    model = enable(tiny("DeepseekV32"))
    cache = transformers.Cache(layers=[LatentLayer(page_size=size) for size in (64, 64, 32)])
    ids, mask = _batch()
    with pytest.raises(ValueError, match="got layers of several page sizes, one is accepted with an indexer"):
        model(ids, attention_mask=mask, **{CACHE: cache})
    cache = transformers.Cache(layers=[LatentLayer(page_size=16) for _ in range(3)])
    assert model(ids, attention_mask=mask, **{CACHE: cache})[CACHE] is cache
    assert cache.layers[2].index_cache.page_size == 16


def test_indexer_widths_are_checked():
    with pytest.raises(ValueError, match="head_dim: got 24"):
        enable(tiny("GlmMoeDsa", index_head_dim=24))


def test_masks_are_not_materialised():
    model = enable(tiny("DeepseekV32"))
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ids, mask = _batch()
    model(ids, attention_mask=mask)
    model(ids)
    assert [mask.shape for mask in seen] == [(2, 1, PROMPT, PROMPT)] * 2
    assert [mask.untyped_storage().nbytes() for mask in seen] == [2 * PROMPT, 1]


def test_replaced_methods_are_refused():
    model = tiny("LongcatFlash")
    experts = model.model.layers[0].mlp.experts
    experts.forward = experts.forward
    with pytest.raises(NotImplementedError, match=r"LongcatFlashExperts.forward of this model was replaced"):
        enable(model)


def test_adapters_and_biases_on_the_absorbed_weight_are_refused():
    model = tiny("MiniCPM3")
    attention = model.model.layers[2].self_attn
    attention.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(attention.kv_b_proj.out_features))
    with pytest.raises(TypeError, match=r"kv_b_proj of layer 2: got torch\S*\.Linear with a bias"):
        enable(model)


def test_experts_of_another_activation_are_refused():
    with pytest.raises(NotImplementedError, match="LongcatFlashExperts cannot be fused: its gate is not SwiGLU"):
        enable(tiny("LongcatFlash", hidden_act="gelu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family):
    """A float32 model's attention stays float32, and so does its cache; chunks give what the whole gives."""
    model, ids = enable(tiny(family)), torch.randint(2, VOCABULARY, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(ids, use_cache=False).logits
        past = model(ids[:, :17], use_cache=True)[CACHE]
        parts = [model(ids[:, start:end], **{CACHE: past}).logits for start, end in ((17, 18), (18, 20))]
    latents = [layer for layer in past.layers if isinstance(layer, LatentLayer)]
    assert latents and all(layer.dtype == torch.float32 for layer in latents)
    got, want = torch.cat(parts, 1).float(), whole[:, 17:].float()
    near = (got - want).abs().amax(-1) < 0.2  # experts and linear layers round, and may choose others in a row
    assert near.float().mean() > 0.6, (got - want).abs().amax(-1)


def test_training_under_autocast_with_an_adapter():
    """What an adapter adds to kv_b_proj acts, and has gradients."""
    model = enable(tiny("DeepseekV3").requires_grad_(True)).train()
    attention = attentions(model)[0]
    attention.kv_b_proj = Adapted(attention.kv_b_proj)
    ids = torch.randint(2, VOCABULARY, (2, 12))
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert attention.kv_b_proj.down.grad.abs().max() > 0


class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, torch.nn.Parameter(0.1 * torch.randn_like(base.weight))

    def forward(self, latents):
        return self.base(latents) + torch.nn.functional.linear(latents, self.down)
