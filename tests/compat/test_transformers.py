"""enable(model): the same text as transformers' own code, through this library's ops."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers

from mla_kernels.compat import transformers as compat
from mla_kernels.compat import transformers_attention
from mla_kernels.compat.transformers import LatentLayer, disable, enable
from tests.compat.models import CACHE, VARIANTS, VOCABULARY, fast_cpu, tiny

PROMPT, NEW = 37, 24


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def _batch(rows: int = 2, padding: int = 9):
    """Token ids with the last row left-padded."""
    ids = torch.randint(2, VOCABULARY, (rows, PROMPT))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return ids, mask


def _generate(model, ids, mask, **options):
    settings = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0) | options
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_greedy_tokens_and_logits_in_a_left_padded_batch(variant, calls):
    family, changes = VARIANTS[variant]
    model = tiny(family, **changes)
    ids, mask = _batch()
    options = dict(return_dict_in_generate=True, output_logits=True)
    model.set_attn_implementation("eager")
    expected = _generate(model, ids, mask, **options)
    actual = _generate(enable(model), ids, mask, **options)
    assert expected.sequences[:, PROMPT:].unique().numel() > 8, "the greedy text must not be constant"
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    layers, sparse_layers = 3, 2
    prefills = {} if variant == "v2 no tiles" else {"mla_prefill": layers}
    assert calls == {"mla_decode": (NEW - 1) * layers, "fused_moe": NEW * sparse_layers} | prefills
    layer = actual[CACHE].layers[0]
    assert isinstance(layer, LatentLayer)
    assert layer.get_seq_length() == PROMPT + NEW - 1
    assert layer.seq_lens.tolist() == [PROMPT + NEW - 1, PROMPT + NEW - 1 - 9], "padding takes no slot"


def test_same_greedy_tokens_on_every_backend(backend, device, calls):
    model = tiny("DeepseekV2", num_hidden_layers=2).to(device)
    ids = torch.randint(2, VOCABULARY, (1, 17), device=device)
    expected = _generate(model, ids, torch.ones_like(ids), max_new_tokens=2)
    assert torch.equal(_generate(enable(model), ids, torch.ones_like(ids), max_new_tokens=2), expected)
    assert calls == {"mla_prefill": 2, "mla_decode": 2, "fused_moe": 2}


def test_cache_holds_what_transformers_caches():
    model = tiny("DeepseekV2")
    ids, mask = _batch()
    expected = _generate(model, ids, mask, return_dict_in_generate=True)[CACHE].layers[1]
    actual = _generate(enable(model), ids, mask, return_dict_in_generate=True)[CACHE].layers[1]
    real = torch.cat((mask, torch.ones(2, NEW - 1)), -1).bool()
    torch.testing.assert_close(actual.keys[:, 0][real], expected.keys[:, 0][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.values[:, 0][real], expected.values[:, 0][real], atol=1e-5, rtol=0)
    assert actual.bytes_per_token == (32 + 16) * 4


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "several beams", "sampling"],
)
def test_batch_operations_on_the_cache(family, options):
    model = tiny(family)
    ids, mask = _batch()
    torch.manual_seed(3)
    expected = _generate(model, ids, mask, **options)
    torch.manual_seed(3)
    assert torch.equal(_generate(enable(model), ids, mask, **options), expected)


def test_prompt_lookup_crops_the_cache(calls):
    model = tiny("DeepseekV3")
    ids = torch.randint(2, VOCABULARY, (1, 6)).repeat(1, 6)  # repeats, so that candidates are found
    options = dict(prompt_lookup_num_tokens=4, max_new_tokens=60)
    expected = _generate(model, ids, torch.ones_like(ids), **options)
    assert torch.equal(_generate(enable(model), ids, torch.ones_like(ids), **options), expected)
    assert calls["mla_decode"] > 0


def test_assistant_model():
    model, assistant = tiny("DeepseekV3"), tiny("DeepseekV3", num_hidden_layers=1)
    ids, mask = _batch(1, padding=0)
    expected = _generate(model, ids, mask)
    assert torch.equal(_generate(enable(model), ids, mask, assistant_model=enable(assistant)), expected)


def test_decode_loop_by_hand_in_chunks(calls):
    model = tiny("DeepseekV2")
    ids = torch.randint(2, VOCABULARY, (2, 60))
    expected = model(ids, use_cache=False).logits
    enable(model)
    past, logits = None, []
    for chunk in ids.split((20, 25, 3, 12), dim=1):  # a prefill, a prefill over cached tokens, two decodes
        out = model(chunk, **{CACHE: past})
        past = out[CACHE]
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)
    assert calls["mla_decode"] == 2 * 3
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)


def test_prefill_in_chunks_over_padding():
    model = tiny("DeepseekV3")
    ids, mask = _batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    enable(model)
    first = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])  # row 1 is padding only
    rest = model(ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:], **{CACHE: first[CACHE]})
    real = mask[:, 5:].bool()
    torch.testing.assert_close(rest.logits[real], expected[:, 5:][real], atol=1e-4, rtol=0)


def test_takes_over_a_cache_that_transformers_filled():
    model = tiny("DeepseekV3")
    ids, mask = _batch()
    step, positions = torch.tensor([[5], [6]]), torch.tensor([[PROMPT], [PROMPT - 9]])
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[CACHE]
    again = copy.deepcopy(cache)
    expected = model(step, attention_mask=longer, position_ids=positions, **{CACHE: again}).logits
    out = enable(model)(step, attention_mask=longer, position_ids=positions, **{CACHE: cache})
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
    assert out[CACHE] is cache
    assert isinstance(cache.layers[0], LatentLayer)


def test_enable_twice_and_disable_restores(calls):
    model = tiny("DeepseekV3")
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    before = model.config._attn_implementation, model.config._experts_implementation
    assert disable(model) is model, "disabling what is not enabled changes nothing"
    assert enable(model) is model
    assert enable(model) is model
    assert len(model.model._forward_pre_hooks) == 1
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("mla_kernels", "mla_kernels")
    disable(model)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert not model.model._forward_pre_hooks
    ids, mask = _batch()
    out = _generate(model, ids, mask, return_dict_in_generate=True)
    assert not calls
    assert not isinstance(out[CACHE].layers[0], LatentLayer)


def test_copies_and_checkpoints_of_an_enabled_model(tmp_path, calls):
    model = enable(tiny("DeepseekV2"))
    ids, mask = _batch()
    expected = _generate(model, ids, mask)
    twin = disable(copy.deepcopy(model))
    assert not twin.model._forward_pre_hooks
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = dict(calls)
    assert torch.equal(_generate(twin, ids, mask), expected)
    assert torch.equal(_generate(saved, ids, mask), expected)
    assert calls == before, "neither the disabled copy nor the loaded checkpoint is enabled"
    _generate(model, ids, mask)
    assert calls["mla_decode"] > before["mla_decode"]


def test_signatures_are_those_of_transformers_own_functions():
    own = inspect.signature(compat.ALL_EXPERTS_FUNCTIONS["grouped_mm"]).parameters
    assert list(inspect.signature(compat.experts).parameters) == list(own)
    own = inspect.signature(transformers_attention.ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters
    assert list(inspect.signature(compat.attention).parameters)[:5] == list(own)[:5]


def test_expert_parallel_sentinels_are_skipped():
    experts = enable(tiny("DeepseekV3")).model.layers[1].mlp.experts
    hidden, ids = torch.randn(5, 64), torch.randint(0, 8, (5, 2))
    weights = torch.rand(5, 2)
    elsewhere = torch.rand(5, 2) < 0.5
    actual = experts(hidden, ids.masked_fill(elsewhere, 8), weights)
    torch.testing.assert_close(actual, experts(hidden, ids, weights.masked_fill(elsewhere, 0)), atol=1e-5, rtol=0)


def test_experts_of_another_model():
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    ids = torch.randint(0, 64, (1, 8))
    expected = model(ids).logits
    model.set_experts_implementation("mla_kernels")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


class _HiddenLimit(torch.nn.Module):
    """A clamp whose limit no attribute names."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate.clamp(max=10)) * up.clamp(-10, 10)


class _Gelu(torch.nn.Module):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.gelu(gate) * up


class _Ungated(torch.nn.Module):
    has_gate = False


class _Normed(_Gelu):
    has_post_expert_norm = True


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_HiddenLimit, "not SwiGLU"),
        (_Gelu, "not SwiGLU"),
        (_Ungated, "without a gate"),
        (_Normed, "a norm after each expert"),
    ],
)
def test_other_experts_are_refused_with_the_reason(kind, reason):
    experts = kind()
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(2, 16, 8))
    experts.down_proj = torch.nn.Parameter(torch.randn(2, 8, 8))
    with pytest.raises(NotImplementedError, match=f"cannot run {kind.__name__}: .*{reason}"):
        compat.experts(experts, torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))


def test_unsupported_models_are_refused():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM, accepted are .*DeepseekV2Model, DeepseekV3Model"):
        enable(llama)
    with pytest.raises(TypeError, match="got Linear"):
        enable(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="latent_dim: got 24"):
        enable(tiny("DeepseekV3", kv_lora_rank=24))
    with pytest.raises(NotImplementedError, match="DeepseekV2Experts cannot be fused: its gate is not SwiGLU"):
        enable(tiny("DeepseekV2", hidden_act="gelu"))
    adapted = tiny("DeepseekV3")
    adapted.model.layers[1].self_attn.kv_b_proj = torch.nn.Sequential(adapted.model.layers[1].self_attn.kv_b_proj)
    with pytest.raises(TypeError, match=r"kv_b_proj of layer 1: got torch\S*\.Sequential"):
        enable(adapted)
    assert adapted.config._attn_implementation != "mla_kernels", "a refusal leaves the model as it was"


def test_a_transformers_without_expand_kv_is_refused(monkeypatch):
    model = tiny("DeepseekV3")
    monkeypatch.delattr(type(model.model.layers[0].self_attn), "expand_kv")
    with pytest.raises(NotImplementedError, match=r"has no DeepseekV3Attention.expand_kv"):
        enable(model)


def test_unsupported_caches_and_masks_are_refused():
    model = enable(tiny("DeepseekV3"))
    ids, mask = _batch()
    static = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match=f"{CACHE}: got StaticCache"):
        model(ids, **{CACHE: static})
    with pytest.raises(NotImplementedError, match="attention_mask: got "):
        model(ids, attention_mask=torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask: got 36 tokens, 0 past and 37 new"):
        model(ids, attention_mask=mask[:, 1:])
    cache = model(ids, attention_mask=mask)[CACHE]
    step = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask: got None, but the cache holds padding"):
        model(step, **{CACHE: cache})
    with pytest.raises(ValueError, match="attention_mask: it masks cached tokens in another way"):
        model(step, attention_mask=torch.ones(2, PROMPT + 1), **{CACHE: cache})
    disable(model)
    with pytest.raises(RuntimeError, match=r"call .*enable\(model\) first"):
        model(step, attention_mask=torch.cat((mask, step), 1), **{CACHE: cache})


def test_layer_operations_keep_lengths():
    layer = LatentLayer(page_size=16)
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    layer.expect(torch.tensor([[False, False, True], [True, True, True]]))
    latents, keys = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 16)
    layer.update(latents, keys)
    layer.batch_repeat_interleave(2)
    layer.expect(None)
    layer.update(latents[:, :, :1].repeat(2, 1, 1, 1), keys[:, :, :1].repeat(2, 1, 1, 1))
    assert layer.seq_lens.tolist() == [2, 2, 4, 4]
    layer.crop(-2)
    assert layer.seq_lens.tolist() == [0, 0, 2, 2]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert layer.seq_lens.tolist() == [2, 0]
    assert torch.equal(layer.keys[0], latents[1, :, :2])
    assert not layer.keys[1].any()
    assert layer.get_mask_sizes(4) == (6, 0)
    layer.expect(None)
    with pytest.raises(ValueError, match="got a batch of 3, the cache holds 2"):
        layer.update(latents[:1].repeat(3, 1, 1, 1), keys[:1].repeat(3, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        layer.offload()
    layer.reset()
    assert layer.cache is None
    assert layer.get_seq_length() == 0
