"""The cache's keyword and the mask, which transformers renames and rearranges: no token sees a later one, whatever way
the cache is passed, and where the cache does not arrive the result is an error."""

import copy
import functools
import importlib.util
import sys

import pytest
import torch
import transformers

from mla_kernels.compat import transformers as compat
from mla_kernels.compat.transformers import LatentLayer, enable
from mla_kernels.compat.transformers_forward import cache_keyword
from tests.compat.models import CACHE, FAMILIES, VOCABULARY, another_s_turn, fast_cpu, tiny

TOKENS = 23  # more than DECODE_TOKENS


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


@functools.cache
def _plain(family):
    """A model and its eager logits, [2, tokens, vocabulary], without a cache."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    return model, ids, model(ids, use_cache=False).logits


def _model(family):
    model, ids, expected = _plain(family)
    return enable(copy.deepcopy(model)), ids, expected


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_no_earlier_logit(family):
    model, ids, expected = _model(family)
    changed = ids.clone()
    changed[:, 12:] = changed[:, 12:].flip(1)
    for options in ({}, {"use_cache": True}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        logits, other = model(ids, **options).logits, model(changed, **options).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(other[:, :12], expected[:, :12], atol=1e-4, rtol=0)
        assert (other[:, 12:] - expected[:, 12:]).abs().max() > 0.1, "what follows does change"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_passed_in_any_way_gives_the_logits_of_the_whole(family):
    model, ids, expected = _model(family)
    base, head = model.model, model.lm_head if family != "MiniCPM3" else None
    ways = {
        "keyword": lambda rows, cache: base(input_ids=rows, **{CACHE: cache}, use_cache=True),
        "old keyword": lambda rows, cache: base(rows, past_key_values=cache),
        "position": lambda rows, cache: base(rows, None, None, cache, None, True),
        "position, embedded": lambda rows, cache: base(None, None, None, cache, base.embed_tokens(rows)),
    }
    whole = base(ids, use_cache=False).last_hidden_state
    if head is not None:
        torch.testing.assert_close(head(whole), expected, atol=1e-4, rtol=0)
    scaled = family == "MiniCPM3"  # its embeddings are scaled where ids are embedded, in 5.18 also given ones
    for name, way in ways.items():
        if scaled and "embedded" in name:
            continue
        cache, outs = None, []
        for chunk in ids.split((18, 1, 3, 1), dim=1):
            out = way(chunk, cache)
            cache = out[CACHE]
            outs.append(out.last_hidden_state)
        assert isinstance(cache.layers[-1], LatentLayer)
        assert cache.get_seq_length() == TOKENS
        torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_python_refuses_stay_errors(family):
    model, ids, _ = _model(family)
    with pytest.raises(TypeError, match=r"positional arguments|multiple values"):
        model.model(ids, None, None, None, None, True, "one too many")
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model.model(ids, input_ids=ids)


@pytest.mark.parametrize("where", ["layer", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_does_not_arrive_is_an_error(family, where, monkeypatch):
    """As if the next transformers renamed the keyword below the base model."""
    model, ids, _ = _model(family)
    layer = model.model.layers[-1]
    attention = layer.self_attn[0] if family == "LongcatFlash" else layer.self_attn
    module = layer if where == "layer" else attention

    def forward(*args, own=module.forward, **kwargs):
        return own(*args, **kwargs | {CACHE: None})

    monkeypatch.setattr(module, "forward", forward)
    index = attention.layer_idx
    with pytest.raises(RuntimeError, match=rf"layer {index}: the cache .* did not arrive|\[{index}\] stored no token"):
        model(ids)


def test_a_layer_whose_attention_is_not_ours_is_an_error():
    model, ids, _ = _model("DeepseekV3")
    layer = model.model.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(RuntimeError, match=r"attention of layers \[1\] stored no token there: this result is not"):
        model(ids)


@pytest.mark.parametrize("cls", ["DeepseekV3Model", "DeepseekV3Attention"])
def test_an_unknown_keyword_is_refused_with_the_version(cls, monkeypatch):
    model = copy.deepcopy(_plain("DeepseekV3")[0])
    cls = next(type(module) for module in model.modules() if type(module).__name__ == cls)

    def forward(self, hidden_states, memory=None, **kwargs):
        raise AssertionError("not to be called")

    monkeypatch.setattr(cls, "forward", forward)
    with pytest.raises(
        NotImplementedError, match=rf"{cls.__name__}.forward of transformers {transformers.__version__}"
    ):
        enable(model)
    assert compat.NAME not in vars(model.model)
    assert model.config._attn_implementation == "eager"


def test_the_keyword_is_the_one_of_the_forward():
    for family in compat.FAMILIES:
        base = getattr(transformers, family.base, None)
        if base is None and family.base.removesuffix("Model").removesuffix("Text") not in FAMILIES:
            continue  # not in this version of transformers
        assert cache_keyword(base) == CACHE
        attention = getattr(sys.modules[base.__module__], family.attention)
        assert cache_keyword(attention) == CACHE


def test_another_attention_implementation_is_an_error():
    model, ids, _ = _model("DeepseekV2")
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"implementation was set to 'sdpa' since; call .*disable\(model\) first"):
        model(ids)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow(when=lambda family, gradients: another_s_turn(family, gradients))
def test_gradient_checkpointing(family, gradients):
    """In training mode the layers take no cache then, so the mask must stay whole."""
    model, ids, expected = _model(family)
    model.train().requires_grad_(gradients)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.set_grad_enabled(gradients):
        for options in ({}, {"attention_mask": torch.ones_like(ids)}):
            out = model(ids, **options)
            torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
        if not gradients:
            return
        model(ids, labels=ids).loss.backward()
    plain = copy.deepcopy(_plain(family)[0]).train().requires_grad_(True)
    with torch.enable_grad():
        plain(ids, labels=ids, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_versions_outside_the_range_are_refused_at_import(monkeypatch):
    def load():
        spec = importlib.util.spec_from_file_location("another_copy", compat.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    for version in ("5.17.4", "4.57.1", "5.25.0", "5.25.0.dev0", "6.0.0rc1"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ImportError, match=rf"takes transformers from 5\.18 to 5\.24, not {version}: pip install"):
            load()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.18 or newer: pip install 'mla_kernels\[transformers"):
        load()
