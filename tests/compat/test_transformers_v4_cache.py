"""enable(model) on DeepSeek-V4 over caches in codes; and what a forward that raises leaves in a cache."""

import pytest
import torch

from mla_kernels.compat.transformers import disable, enable
from tests.compat.models import CACHE, fast_cpu
from tests.compat.models import tiny as other_family
from tests.compat.test_transformers_v4 import KINDS, VOCABULARY, generate, padded, tiny


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def wide(**changes):
    """In bfloat16, with heads that ``fp8_v4`` can hold, and no choice that rounding could change."""
    sizes = dict(head_dim=256, qk_rope_head_dim=64, index_head_dim=64, num_experts_per_tok=8, index_topk=64)
    return tiny(**sizes | changes).bfloat16()


# RMS of what a cache in codes changes in a step's logits, as part of theirs: a code is off by up to 2^-4 of a value in
# fp8, and by 1 / 254 of a token's largest in int8. bfloat16 itself changes them by 0.11 to 0.14 in these models.
TOLERANCES = {"fp8_v4": 2**-4, "fp8_v32": 2**-4, "int8": 2**-5}
BYTES = {None: 512, "fp8_v4": 192 + 128 + 4, "fp8_v32": 256 + 16, "int8": 256 + 16}


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("layout", [*TOLERANCES, None])
def test_caches_in_codes(layout, with_padding):
    """A prompt, a chunk past the step of the caches, and single tokens, beside the same over bfloat16."""
    model = wide(index_topk=64 if layout else 20)  # without codes fp8 keys choose, now and then another entry
    ids, mask = padded((140, 100)) if with_padding else (torch.randint(2, VOCABULARY, (2, 140)), None)
    runs = []
    for options in ({}, {"cache_layout": layout, "index_layout": "fp8"}):
        enable(model, **options)
        logits, past, start = [], None, 0
        for chunk in (60, 70, 1, 1, 8):
            rows = slice(start, start + chunk)
            start += chunk
            out = model(ids[:, rows], attention_mask=None if mask is None else mask[:, :start], **{CACHE: past})
            past = out[CACHE]
            logits.append(out.logits.float())
        runs.append(logits)
        disable(model)
    caches = past.layers[1].caches
    assert caches.window.layout_name == caches.entries.layout_name == (layout or "latent_16bit")
    assert caches.entries.bytes_per_token == BYTES[layout] and caches.index_keys.layout == "fp8"
    real = slice(None) if mask is None else mask[:, :60].bool()
    torch.testing.assert_close(runs[1][0][real], runs[0][0][real], atol=0, rtol=0)  # prompts do not read the cache
    exact, ours = (torch.cat(logits[1:], 1) for logits in runs)
    error = (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < TOLERANCES.get(layout, 2**-4), error


def test_generate_over_codes():
    """Greedy text begins as over bfloat16, and beams move with their codes: each has the text of a run by itself."""
    model = wide()
    ids = torch.randint(2, VOCABULARY, (2, 61))
    expected = generate(enable(model), ids, new=12)
    enable(disable(model), cache_layout="fp8_v4", index_layout="fp8")
    actual = generate(model, ids, new=12)
    assert torch.equal(actual.logits[0], expected.logits[0])
    first = ids[:, :21]
    beams = generate(model, first, num_beams=3, new=12, output_logits=False, output_scores=True)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    for row, text in enumerate(beams.sequences[:, None]):
        past, own = None, []
        for token in range(20, 32):
            new = text[:, : token + 1] if past is None else text[:, token : token + 1]
            out = model(new, use_cache=True, **{CACHE: past})
            past = out[CACHE]
            own.append(out.logits[0, -1].float().log_softmax(-1)[text[0, token + 1]])
        torch.testing.assert_close(scores[row], torch.stack(own), atol=0.05, rtol=0.05)


def test_layouts_stay_when_enabled_again_and_are_no_others():
    model = enable(wide(), cache_layout="int8")
    assert enable(model) is model
    cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True)[CACHE]
    assert cache.layers[2].caches.entries.layout_name == "int8" and cache.layers[1].caches.index_keys.layout == "bf16"
    with pytest.raises(ValueError, match="cache_layout: got 'fp8_v4', the model is enabled with 'int8'"):
        enable(model, cache_layout="fp8_v4")
    with pytest.raises(ValueError, match="index_layout: got 'fp8', the model is enabled with 'bf16'"):
        enable(model, index_layout="fp8")


@pytest.mark.parametrize(
    "make, options, error, words",
    [
        (wide, {"cache_layout": "fp8"}, ValueError, "cache_layout: got 'fp8', accepted: 'fp8_v32', 'fp8_v4', 'int8'"),
        (wide, {"index_layout": "int8"}, ValueError, "index_layout: got 'int8', accepted: 'bf16', 'fp8'"),
        (lambda: tiny().bfloat16(), {"cache_layout": "fp8_v4"}, ValueError,
         r"cache_layout: got 'fp8_v4', which layer 0 \(sliding_attention\) cannot hold: latent_dim: got 32, fp8_v4"),
        (tiny, {"cache_layout": "int8"}, TypeError, "which layer 0 .* cannot hold: dtype: got float32 for layout int8"),
        (lambda: other_family("DeepseekV3"), {"cache_layout": "int8"}, NotImplementedError,
         "cache_layout: got 'int8' for DeepseekV3Model, whose cache has the model's dtype"),
        (lambda: other_family("DeepseekV32"), {"index_layout": "fp8"}, NotImplementedError,
         "index_layout: got 'fp8' for DeepseekV32Model"),
    ],
)  # fmt: skip
def test_layouts_refused(make, options, error, words):
    model = make()
    with pytest.raises(error, match=words):
        enable(model, **options)
    assert model.config._attn_implementation != "mla_kernels", "a refused model is not enabled"


@pytest.mark.parametrize("failing", range(len(KINDS)))
@pytest.mark.parametrize("with_padding", [False, True])
def test_a_forward_that_raises_leaves_the_cache_as_it_was(failing, with_padding):
    """A prompt, a chunk longer than the rings have room for, and a step: each raises in a layer, and then does not."""
    model = enable(tiny())
    ids, mask = padded((150, 97)) if with_padding else (torch.randint(2, VOCABULARY, (2, 150)), None)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()

    def fail(*_):
        raise KeyError("on purpose")

    past, start = None, 0
    for chunk in (60, 80, 1, 9):
        rows = slice(start, start + chunk)
        arguments = {"attention_mask": None if mask is None else mask[:, : start + chunk], CACHE: past}
        handle = model.model.layers[failing].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="on purpose"):
            model(ids[:, rows], **arguments)
        handle.remove()
        assert past is None or past.get_seq_length() == start
        out = model(ids[:, rows], **arguments)
        past, start, own = out[CACHE], start + chunk, real[:, rows]
        torch.testing.assert_close(out.logits[own], whole[:, rows][own], atol=1e-4, rtol=0)


def test_a_cache_whose_first_forward_raised_takes_another_batch():
    model = enable(tiny())
    ids = torch.randint(2, VOCABULARY, (3, 30))
    cache = model(ids[:1], use_cache=True)[CACHE]
    cache.reset()
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:1], **{CACHE: cache})
    handle.remove()
    assert cache.get_seq_length() == 0
    out = model(ids, **{CACHE: cache})
    torch.testing.assert_close(out.logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=0)
