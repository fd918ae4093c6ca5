"""DeepSeek-V3 in vLLM's own model code, attention over this library's by name, beside transformers'."""

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig

from mla_kernels.compat import vllm_attention
from tests.engines import tiny

SPECULATIVE = [[(0, 120), (1, 60), (2, 46)], [(0, 3), (1, 3), (2, 3)], [(0, 27), (1, 27), (2, 27)]]


@pytest.mark.parametrize(
    "steps, speculative", [(tiny.MIXED, 0), (SPECULATIVE, 2)], ids=["one at a time", "three at a time"]
)
def test_logits_are_those_of_transformers(steps, speculative):
    judge = tiny.judge(tiny.V3)
    prompts = tiny.prompts()
    engine = tiny.Engine(
        tiny.V3,
        judge.state_dict(),
        speculative=speculative,
        backend="MLA_KERNELS",
        mla_prefill_backend="MLA_KERNELS",
    )
    for layer in engine.layers.values():
        assert layer.impl.__class__.__name__ == "DenseImpl" and layer.prefill_backend.get_name() == "MLA_KERNELS"
    for prompt, cached, (logits, _) in zip(prompts, tiny.CACHED, tiny.serve(engine, prompts, steps), strict=True):
        with torch.no_grad():
            want = judge(torch.tensor([prompt])).logits[0][cached:]
        worst = (logits - want).abs().max() / want.abs().max()
        assert worst < 0.03, worst


NOTHING = dict.fromkeys(("alibi_slopes", "sliding_window", "logits_soft_cap", "kv_sharing_target_layer_name"))


@pytest.mark.parametrize("impl", [vllm_attention.DenseImpl, vllm_attention.SparseImpl])
@pytest.mark.parametrize("given", [{"sliding_window": 128}, {"logits_soft_cap": 30.0}, {"attn_type": "encoder"}])
def test_layers_that_attention_here_does_not_compute_are_refused(impl, given):
    """vLLM asks no backend whether it has a window of latent attention, and gives it to the implementation."""
    (name,) = given
    taken = NOTHING | {"attn_type": "decoder", "kv_cache_dtype": "auto"} | given
    with pytest.raises(NotImplementedError, match=name):
        impl(num_heads=4, head_size=576, scale=1.0, num_kv_heads=1, kv_lora_rank=512, **taken)


@pytest.mark.parametrize("widths, known", [((128, 64, 128), True), ((64, 32, 64), True), ((100, 64, 128), False),
                                           ((128, 64, 100), False), ((0, 0, 0), True)])  # fmt: skip
def test_prefill_tells_the_selector_which_widths_it_has(widths, known):
    named = dict(zip(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), widths))
    asked = MLAPrefillSelectorConfig(dtype=torch.bfloat16, mla_dimensions=MLADimensions(**named))
    reasons = vllm_attention.PrefillBackend.validate_configuration(DeviceCapability(8, 0), asked)
    assert bool(reasons) != known and (known or "MLA dimensions" in reasons[0])
