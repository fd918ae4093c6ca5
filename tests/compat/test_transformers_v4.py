"""enable(model) on DeepSeek-V4: all three layer types, against transformers' own eager text and logits."""

import pytest
import torch
import transformers

from mla_kernels.compat.transformers import disable, enable
from mla_kernels.compat.transformers_v4_cache import V4Layer
from tests.compat.models import CACHE, SIZES, YARN, fast_cpu

KINDS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
VOCABULARY, PROMPT = SIZES["vocab_size"], 61


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def tiny(**changes):
    """A seeded model with a layer of each type, a hash layer among them; windows, entries and picks that run over."""
    yarn = {key: value for key, value in YARN.items() if "mscale" not in key and key != "rope_theta"}
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, head_dim=32, qk_rope_head_dim=16, q_lora_rank=24,
        o_groups=2, o_lora_rank=16, sliding_window=8, compress_rates={KINDS[1]: 4, KINDS[2]: 16}, index_n_heads=16,
        index_head_dim=32, index_topk=5, num_hidden_layers=3, layer_types=KINDS, rope_parameters=yarn, hc_mult=2,
        mlp_layer_types=["hash_moe", "moe", "moe"], max_position_embeddings=512, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        swiglu_limit=1.0,
    )  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**sizes | changes)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in name:
                tensor.copy_(torch.rand(tensor.shape[0], 8, generator=generator).argsort(1)[:, : tensor.shape[1]])
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and "inv_freq" not in name and "hc" not in name.split(".")[-2]:
                tensor.normal_(0, 0.15, generator=generator)
    model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def generate(model, ids, mask=None, new=40, **options):
    options = dict(return_dict_in_generate=True, output_logits=True, do_sample=False, pad_token_id=0) | options
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


def assert_same(actual, expected, atol=1e-4):
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("prompt", [3, PROMPT])
def test_same_greedy_tokens_and_logits(prompt):
    model = tiny()
    ids = torch.randint(2, VOCABULARY, (3, prompt))
    expected = generate(model, ids)
    assert expected.sequences[:, prompt:].unique().numel() > 4, "the greedy text must not be constant"
    actual = generate(enable(model), ids)
    assert_same(actual, expected)
    for layer in actual[CACHE].layers:
        assert isinstance(layer, V4Layer) and layer.get_seq_length() == prompt + 39
    assert_same(generate(disable(model), ids), expected)


def padded(lengths=(PROMPT, 30, 5)):
    """Token ids and mask of prompts of these lengths, padded on the left."""
    ids = torch.randint(2, VOCABULARY, (len(lengths), max(lengths)))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids.where(mask.bool(), torch.zeros_like(ids)), mask


def test_a_left_padded_batch_gives_what_each_prompt_gives_alone():
    """transformers' compressors take padding for tokens: its own padded results are others than those alone."""
    model = tiny()
    ids, mask = padded()
    alone = [generate(model, row[kept.bool()][None]) for row, kept in zip(ids, mask)]
    theirs = generate(model, ids, mask)
    actual = generate(enable(model), ids, mask)
    for row, expected in enumerate(alone):
        assert torch.equal(actual.sequences[row, PROMPT:], expected.sequences[0, -40:])
        for ours, exact in zip(actual.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours[row], exact[0], atol=1e-4, rtol=0)
    assert torch.equal(theirs.sequences[0, PROMPT:], alone[0].sequences[0, -40:])  # the row without padding
    off = (theirs.logits[0][1:] - torch.cat([one.logits[0] for one in alone[1:]])).abs().amax(-1)
    assert (off > 1e-2).all(), "transformers leaves padding out now: this difference can go from the documentation"
    layer = actual[CACHE].layers[0]
    assert layer.get_seq_length() == PROMPT + 39
    assert layer.book.seq_lens.tolist() == [length + 39 for length in (PROMPT, 30, 5)], "padding takes no slot"


def test_beams():
    """As without a cache: transformers 5.18 and 5.21 leave the compressors' states where they were."""
    model = tiny()
    ids = torch.randint(2, VOCABULARY, (2, 21))
    options = dict(num_beams=3, num_return_sequences=2, new=24)
    expected = generate(model, ids, use_cache=False, **options)
    actual = generate(enable(model), ids, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("with_padding", [False, True])
def test_chunks_of_a_prompt(with_padding):
    """Chunks past the step of the caches, of one token, and across windows."""
    model = tiny()
    ids, mask = padded((150, 97)) if with_padding else (torch.randint(2, VOCABULARY, (2, 150)), None)
    enable(model)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    past, start, real = None, 0, torch.ones_like(ids) if mask is None else mask
    for chunk in (37, 70, 1, 42):
        rows = slice(start, start + chunk)
        start += chunk
        out = model(ids[:, rows], attention_mask=None if mask is None else mask[:, :start], **{CACHE: past})
        past, own = out[CACHE], real[:, rows].bool()
        torch.testing.assert_close(out.logits[own], whole[:, rows][own], atol=1e-4, rtol=0)


def test_a_plain_forward_and_its_gradients():
    model = tiny().requires_grad_(True)
    ids = torch.randint(2, VOCABULARY, (2, 45))
    found = []
    for switch in (lambda model: model, enable):
        switch(model).zero_grad()
        with torch.enable_grad():
            out = model(ids, labels=ids, use_cache=False)
            out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.logits.detach(), grads))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, want in found[0][1].items():
        error = (found[1][1][name] - want).abs().max()
        assert error <= 2e-5 * want.abs().max().clamp_min(1e-3), f"{name}: {error}"


def test_a_forward_that_records_gradients_fills_the_cache_too():
    model = enable(tiny().requires_grad_(True))
    ids = torch.randint(2, VOCABULARY, (2, 45))
    with torch.enable_grad():
        out = model(ids[:, :44], labels=ids[:, :44], use_cache=True)
    assert out.loss.requires_grad
    step = model(ids[:, 44:], **{CACHE: out[CACHE]})
    torch.testing.assert_close(step.logits[:, 0], model(ids, use_cache=False).logits[:, -1], atol=1e-4, rtol=0)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="the cache keeps no gradients"):
        model(ids[:, :1], **{CACHE: step[CACHE]})


@pytest.mark.parametrize("with_padding", [False, True])
def test_under_autocast(with_padding):
    """Projections are bfloat16 then, and so are the caches of a float32 model; chunks give what the whole gives."""
    model = enable(tiny(num_experts_per_tok=8, index_topk=64))  # no choice that rounding could change
    ids, mask = padded((41, 30)) if with_padding else (torch.randint(2, VOCABULARY, (2, 41)), None)
    exact = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    first = None if mask is None else mask[:, :36]
    with torch.autocast("cpu", torch.bfloat16):
        past = model(ids[:, :36], attention_mask=first, use_cache=True)[CACHE]
        step = model(ids[:, 36:], attention_mask=mask, **{CACHE: past}).logits[:, -1]
    assert past.layers[1].caches.entries.dtype == past.layers[1].caches.state.dtype == torch.bfloat16
    torch.testing.assert_close(step.float(), exact, atol=0.2, rtol=0)
    if with_padding:
        mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
    with pytest.raises(TypeError, match="the cache was filled with"):
        model(ids[:, :1], attention_mask=mask, **{CACHE: past})
    assert past.get_seq_length() == 41, "a refused token must not count"


def test_training_under_autocast_with_transformers_default_cache():
    model = enable(tiny().requires_grad_(True)).train()
    ids = torch.randint(2, VOCABULARY, (2, 45))
    grads = []
    for use_cache in (False, True):
        model.zero_grad()
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_the_cache_of_another_model_is_refused():
    """Its windows and entries would be read as this model's."""
    model, other = enable(tiny()), enable(tiny(sliding_window=16))
    ids = torch.randint(2, VOCABULARY, (1, 9))
    cache = other(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="got the cache of another model"):
        model(ids[:, :1], **{CACHE: cache})
    assert cache.get_seq_length() == 9


class Adapter(torch.nn.Module):
    """A module around a projection, which has no weight of its own to read."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 1.5 * self.base(x)


@pytest.mark.parametrize("first", ["enabled", "adapted"])
def test_modules_put_around_projections_act(first):
    """Before and after enable: what the model holds at the call is what counts."""
    model = tiny()
    ids = torch.randint(2, VOCABULARY, (2, 21))
    if first == "enabled":
        enable(model)
    attention = model.model.layers[1].self_attn
    for holder, name in (
        (attention, "q_b_proj"), (attention, "kv_proj"), (attention.compressor, "gate_proj"),
        (attention.compressor.indexer, "kv_proj"),
    ):  # fmt: skip
        setattr(holder, name, Adapter(getattr(holder, name)))
    actual = generate(enable(model), ids, new=8)
    assert_same(actual, generate(disable(model), ids, new=8))


@pytest.mark.parametrize("layer, name", [(2, "compressor"), (0, "q_a_norm"), (0, "kv_norm"), (1, "compressor.kv_norm")])
def test_hooks_on_what_is_not_called_are_refused(layer, name):
    """Its forward does not run, so that they would be forgotten; on projections and the attention they run."""
    model = tiny()
    ids = torch.randint(2, VOCABULARY, (1, 9))
    module = model.model.layers[layer].self_attn.get_submodule(name)
    refused = rf"{type(module).__name__} \({name.split('.')[-1]}\) has forward hooks"
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=refused):
        enable(model)
    handle.remove()
    enable(model)
    module.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=refused):
        model(ids)
