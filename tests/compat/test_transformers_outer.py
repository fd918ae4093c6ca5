"""enable(model) where the family's base model is inside another: multimodal classes, and other heads."""

import copy

import pytest
import torch
import transformers

from mla_kernels.compat.transformers import LatentLayer, disable, enable
from tests.compat.models import CACHE, FAMILIES, SIZES, fast_cpu, one_layer, tiny

IMAGE, TOKENS = 190, 24
SMALL_VISION = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, patch_size=4)


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def _text(family, model_type):
    return SIZES | FAMILIES[family] | dict(num_hidden_layers=3, model_type=model_type)


def _kimi():
    """Kimi-K2.5: DeepSeek-V3's language model, whose configuration is of type kimi_k2."""
    return transformers.Kimi_K25ForConditionalGeneration(
        transformers.Kimi_K25Config(
            text_config=_text("DeepseekV3", "kimi_k2"),
            vision_config=SMALL_VISION | dict(pos_emb_height=4, pos_emb_width=4),
            projection_hidden_size=32, image_token_id=IMAGE, video_token_id=191, vision_start_token_id=192,
        )
    )  # fmt: skip


def _mistral():
    vision = SMALL_VISION | dict(model_type="pixtral", head_dim=16, image_size=16)
    config = transformers.Mistral3Config(
        text_config=_text("Mistral4", "mistral4"), vision_config=vision, image_token_index=IMAGE
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _llava():
    vision = SMALL_VISION | dict(model_type="clip_vision_model", image_size=16)
    config = transformers.LlavaConfig(
        text_config=_text("DeepseekV2", "deepseek_v2"), vision_config=vision, image_token_index=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config)


def _mistral_large():
    vision = SMALL_VISION | dict(model_type="pixtral", head_dim=16, image_size=16)
    text = SIZES | FAMILIES["MistralLarge4"] | one_layer("MistralLarge4")
    text |= dict(num_hidden_layers=3, indexer_types=["full"] * 3, no_rope_layers=[1, 0, 1], kv_source_layers=[0, 1, 2])
    config = transformers.MistralLarge4Config(
        text_config=text | dict(model_type="mistral_large4_text"), vision_config=vision, image_token_index=IMAGE
    )
    return transformers.MistralLarge4ForConditionalGeneration(config)


OUTER = {"Kimi-K2.5": _kimi, "Mistral 3": _mistral, "Llava": _llava}
if "MistralLarge4" in FAMILIES:
    OUTER["Mistral Large 4"] = _mistral_large


def _model(kind):
    torch.manual_seed(4)
    model = OUTER[kind]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return model


def _generate(model, **options):
    ids = torch.randint(2, 180, (2, TOKENS), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    if "pixel_values" in options:
        ids[:, 7:11] = IMAGE
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0) | options
    return model.generate(ids, **options, return_dict_in_generate=True)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", OUTER)
def test_language_models_inside_multimodal_ones(kind, inside, calls):
    model = _model(kind)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = [_generate(model), _generate(model, num_beams=2)]
    language_model = model.model.language_model
    part = language_model if inside else model
    assert enable(enable(part)) is part
    assert enable(model) is model, "enabling the whole after its part changes nothing"
    assert len(language_model._forward_pre_hooks) == 1
    actual = [_generate(model), _generate(model, num_beams=2)]
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours.sequences, theirs.sequences)
        assert isinstance(ours[CACHE].layers[0], LatentLayer)
    assert calls["mla_decode"] == 2 * 7 * 3
    before = dict(calls)
    assert disable(part) is part
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert torch.equal(_generate(model).sequences, expected[0].sequences)
    assert calls == before


def test_an_image_before_text(calls):
    model = _model("Kimi-K2.5")
    vision = model.model.vision_tower.config._attn_implementation
    options = dict(pixel_values=torch.randn(32, 3, 4, 4), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]))
    expected = _generate(model, **options).sequences
    assert not torch.equal(expected[:, TOKENS:], _generate(model).sequences[:, TOKENS:]), "the image must matter"
    assert torch.equal(_generate(enable(model), **options).sequences, expected)
    assert calls["mla_decode"] == 7 * 3
    assert model.model.vision_tower.config._attn_implementation == vision, "only the language model is changed"


def test_a_copy_of_a_whole_model_is_disabled_alone(calls):
    model = enable(_model("Kimi-K2.5"))
    expected = _generate(model).sequences
    before = dict(calls)
    twin = disable(copy.deepcopy(model))
    assert torch.equal(_generate(twin).sequences, expected)
    assert calls == before
    _generate(model)
    assert calls["mla_decode"] > before["mla_decode"]


def test_a_module_that_holds_two_models(calls):
    both = torch.nn.ModuleDict({"first": tiny("DeepseekV2"), "second": tiny("MiniCPM3")})
    ids = torch.randint(2, 180, (2, TOKENS))
    expected = [model(ids).logits for model in both.values()]
    enable(both)
    for model, logits in zip(both.values(), expected):
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
    assert calls["mla_prefill"] == 6
    disable(both)
    assert all(torch.equal(model(ids).logits, logits) for model, logits in zip(both.values(), expected))


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("DeepseekV3", "ForSequenceClassification"),
        ("DeepseekV3", "ForTokenClassification"),
        ("MiniCPM3", "ForSequenceClassification"),
        ("Mistral4", "ForTokenClassification"),
    ],
)
def test_other_heads(family, head, calls):
    config = tiny(family).config
    config.num_labels = 3
    model = getattr(transformers, family + head)(config).eval()
    ids = torch.randint(2, 180, (2, TOKENS))
    mask = torch.ones_like(ids)
    ids[0, -5:] = mask[0, -5:] = 0  # the id of padding
    expected = model(ids, attention_mask=mask).logits
    actual = enable(model)(ids, attention_mask=mask).logits
    kept = mask.bool() if actual.dim() == 3 else slice(None)
    torch.testing.assert_close(actual[kept], expected[kept], atol=1e-4, rtol=0)
    assert calls["mla_prefill"] == 3
