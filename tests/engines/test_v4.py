"""DeepSeek-V4 in vLLM's own model code over this library's kernels, beside transformers' model."""

import pytest
import torch

from mla_kernels import launch
from tests.engines import tiny_v4

WHOLE = [[(0, 280)], [(1, 90), (2, 34)]]
MIXED = [
    [(0, 125)],
    [(0, 1), (1, 61)],
    [(0, 1), (1, 1)],
    [(0, 131), (1, 24)],
    [(0, 1), (1, 1), (2, 20)],
    [(0, 1), (1, 1), (2, 1)],
    [(0, 20), (1, 2), (2, 13)],
]
TWO = [[(0, 260), (1, 60)], [(0, 2), (1, 2), (2, 20)], [(0, 1), (1, 2), (2, 2)], [(0, 2), (1, 2), (2, 1)],
       [(0, 15), (1, 24), (2, 11)]]  # fmt: skip
SCHEDULES = {"whole": (WHOLE, 0), "mixed": (MIXED, 0), "two at a time": (TWO, 1)}


@pytest.fixture(scope="module", autouse=True)
def _cuda():
    """Streams, events and products in another dtype, which are CUDA's; this library's CPU code, which is faster."""
    product = torch.mm

    def mm(a, b, out_dtype=None, **others):
        return product(a, b, **others) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype), **others)

    class Nothing:
        def __init__(self, *args, **others): ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Nothing)
        patch.setattr(torch.cuda, "Event", Nothing)
        patch.setattr(torch, "mm", mm)
        with launch.on_cpu("torch"):
            yield


@pytest.fixture(scope="module")
def judge():
    return tiny_v4.judge()


def answers(model, prompt, picks):
    """(logits where the indexed layer attends to ``picks``, the part of transformers' own picks among them)."""
    indexer, shared = model.model.layers[1].self_attn.compressor.indexer, []

    def forward(*args, score=indexer.forward, **others):
        own = score(*args, **others)[0]
        hits = (own[:, :, None] == picks[:, None]).any(-1)[own >= 0]
        shared.append(hits.float().mean())
        return picks[None].long()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(indexer, "forward", forward)
        return model(torch.tensor([prompt])).logits[0], shared[0]


@pytest.mark.parametrize(
    "schedule, cache_dtype", [("whole", "auto"), ("mixed", "bfloat16"), ("mixed", "auto"), ("two at a time", "auto")]
)
def test_logits_are_those_of_transformers(judge, schedule, cache_dtype):
    model, weights = judge
    steps, speculative = SCHEDULES[schedule]
    error = {"bfloat16": 0.03, "auto": 0.12}[cache_dtype]  # "auto" is fp8_ds_mla
    engine = tiny_v4.Engine(tiny_v4.V4, weights, cache_dtype, speculative)
    assert all(type(layer.attn).__name__ == "V4Attention" for layer in engine.model.model.layers)
    prompts = tiny_v4.prompts()
    served = tiny_v4.serve(engine, prompts, steps)
    for prompt, cached, (logits, picks) in zip(prompts, tiny_v4.CACHED, served, strict=True):
        want, shared = answers(model, prompt, torch.cat([served[0][1][:cached], picks]))
        worst = (logits - want[cached:]).abs().max() / want.abs().max()
        assert worst < error and shared > 0.9, (worst, shared)


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_published_formats_are_built(experts):
    """In DeepSeek's float8, with experts in either format: vLLM's own products and experts beside this attention."""
    stored = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
              "weight_block_size": [128, 128]}  # fmt: skip
    engine = tiny_v4.Engine({**tiny_v4.V4, "expert_dtype": experts, "quantization_config": stored}, None)
    layer = engine.model.model.layers[1].attn.wo_a
    scale = layer.weight_scale_inv.data
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight.shape == (128, 1024) and scale.shape == (1, 8)
    layer.weight.data.copy_(torch.randn(128, 1024))
    scale.copy_(2.0 ** torch.arange(-4, 4).float()[None])
    want = layer.weight.data.float() * 2.0 ** torch.arange(-4, 4).repeat_interleave(128)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.float(), want)
    assert not hasattr(layer, "weight_scale_inv")


def test_other_caches_are_refused():
    with pytest.raises(NotImplementedError, match="kv_cache_dtype: got 'fp8_e5m2'"):
        tiny_v4.Engine(tiny_v4.V4, None, "fp8_e5m2")
