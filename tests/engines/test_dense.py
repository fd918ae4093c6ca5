"""DeepSeek-V3 in vLLM's own model code, attention over this library's by name, beside transformers'."""

import pytest
import torch
import vllm._custom_ops as cuda_ops
from vllm.model_executor.layers.attention import mla_attention

from mla_kernels.compat import vllm, vllm_ops
from tests.engines import tiny

LENGTHS, PAGES, CACHED = (150, 90, 140), ([3, 7, 1], [2, 9], [3, 11, 5]), (0, 0, 64)
STEPS = [
    [(0, 100)],
    [(0, 1), (1, 60)],
    [(0, 1), (1, 1), (2, 40)],
    [(0, 1), (1, 1), (2, 1)],
    [(0, 47), (1, 28), (2, 35)],
]
SPECULATIVE = [[(0, 120), (1, 60), (2, 46)], [(0, 3), (1, 3), (2, 3)], [(0, 27), (1, 27), (2, 27)]]


@pytest.fixture(autouse=True)
def _ops(monkeypatch):
    """vLLM's CUDA functions are this library's of the same names: there is no CUDA here."""
    for name in ("gather_and_maybe_dequant_cache",):
        monkeypatch.setattr(cuda_ops, name, getattr(vllm_ops, name))
    monkeypatch.setattr(mla_attention, "merge_attn_states", vllm.merge_attn_states)


@pytest.mark.parametrize("steps, speculative", [(STEPS, 0), (SPECULATIVE, 2)], ids=["one at a time", "three at a time"])
def test_logits_are_those_of_transformers(steps, speculative):
    judge = tiny.judge(tiny.V3)
    torch.manual_seed(1)
    first, second, third = (torch.randint(0, 512, (length,)).tolist() for length in LENGTHS)
    prompts = [first, second, first[: CACHED[2]] + third[CACHED[2] :]]
    engine = tiny.Engine(
        tiny.V3,
        judge.state_dict(),
        speculative=speculative,
        backend="MLA_KERNELS",
        mla_prefill_backend="MLA_KERNELS",
    )
    for layer in engine.layers.values():
        assert layer.impl.__class__.__name__ == "DenseImpl" and layer.prefill_backend.get_name() == "MLA_KERNELS"
    for prompt, cached, (logits, _) in zip(prompts, CACHED, tiny.serve(engine, prompts, PAGES, CACHED, steps)):
        with torch.no_grad():
            want = judge(torch.tensor([prompt])).logits[0][cached:]
        worst = (logits - want).abs().max() / want.abs().max()
        assert worst < 0.03, worst
