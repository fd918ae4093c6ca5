"""DeepSeek-V3.2 and GLM-5 in vLLM's own model code over this library's kernels, beside transformers' model.

vLLM's indexer scores in float8, transformers' in the model's dtype, and both keep the best 64 of up to 150 tokens: the
judge attends to the picks that vLLM's side made, which are held against its own scores apart. This library's kernels
run in Triton's interpreter in V3.2's mixed batches, elsewhere its CPU code runs.
"""

from contextlib import nullcontext

import pytest
import torch

from mla_kernels import launch
from mla_kernels.compat.vllm_attention import SparseImpl
from tests.engines import tiny

WHOLE = [[(0, 150)], [(1, 90)], [(2, 76)]]
THREE = [[(0, 120), (1, 60), (2, 46)], [(0, 3), (1, 3), (2, 3)], [(0, 2), (1, 3), (2, 1)], [(0, 25), (1, 24), (2, 26)]]
TWO = [[(0, 120), (1, 60), (2, 46)], [(0, 2), (1, 2), (2, 2)], [(0, 1), (1, 2), (2, 1)], [(0, 27), (1, 26), (2, 27)]]
SHORT = [[(0, 50)], [(0, 1), (1, 20)], [(0, 1), (1, 40)], [(0, 98), (1, 30), (2, 76)]]
"""Prompts, and a second part of one, within the top-k: dense, beside decoding."""
SCHEDULES = {
    "whole": (WHOLE, 0),
    "short": (SHORT, 0),
    "mixed": (tiny.MIXED, 0),
    "two at a time": (TWO, 1),
    "three at a time": (THREE, 2),
}
DENSE = {"short": 50 + 20 + 40, "mixed": 60}
"""Tokens that are attended densely in each layer: of prompts, cached ones included, within the top-k."""
SHAPES = {"V3.2": tiny.V32, "GLM-5": tiny.GLM5}
CASES = [("V3.2", schedule) for schedule in SCHEDULES] + [("GLM-5", "mixed")]


@pytest.fixture(scope="module")
def judges():
    return {name: tiny.judge(shape) for name, shape in SHAPES.items()}


def answers(judge, prompt, picks):
    """(logits where each layer attends to ``picks``, the part of them that transformers' own scores choose, too)."""
    shared = []
    with pytest.MonkeyPatch.context() as patch:
        for index, layer in enumerate(judge.model.layers):
            if layer.self_attn.indexer is None:
                continue
            chosen = picks[f"model.layers.{index}.self_attn.attn"]
            tokens = torch.arange(len(prompt), dtype=torch.int32)[:, None]
            seen = torch.arange(tiny.TOP_K, dtype=torch.int32).expand(len(prompt) - len(chosen), -1)  # all, if few
            chosen = torch.cat([torch.where(seen > tokens[: len(seen)], -1, seen), chosen])
            chosen = torch.where(chosen < 0, tokens, chosen)[None]  # the token itself is among them, or no pick

            def forward(*args, score=layer.self_attn.indexer.forward, chosen=chosen, **others):
                own = score(*args, **others)
                hits = (chosen[0, :, :, None] == own[0, :, None]).any(-1)
                shared.append(hits[tiny.TOP_K :].float().mean())
                return chosen

            patch.setattr(layer.self_attn.indexer, "forward", forward)
        with torch.no_grad():
            logits = judge(torch.tensor([prompt])).logits[0]
    return logits, torch.stack(shared).mean()


@pytest.mark.parametrize("cache_dtype, error", [("auto", 0.03), ("fp8_ds_mla", 0.1)])
@pytest.mark.parametrize("model, schedule", CASES)
def test_logits_are_those_of_transformers(judges, monkeypatch, cache_dtype, error, model, schedule):
    steps, speculative = SCHEDULES[schedule]
    dense = []

    def counted(self, q, *args, attend=SparseImpl.forward_mha, **others):
        dense.append(len(q))
        return attend(self, q, *args, **others)

    monkeypatch.setattr(SparseImpl, "forward_mha", counted)
    weights = judges[model].state_dict()
    engine = tiny.Engine(SHAPES[model], weights, cache_dtype, speculative, mla_prefill_backend="MLA_KERNELS")
    prompts = tiny.prompts()
    with nullcontext() if (model, schedule) == ("V3.2", "mixed") else launch.on_cpu("torch"):
        served = tiny.serve(engine, prompts, steps)
    for prompt, cached, (logits, picks) in zip(prompts, tiny.CACHED, served, strict=True):
        want, shared = answers(judges[model], prompt, picks)
        worst = (logits - want[cached:]).abs().max() / want.abs().max()
        assert worst < error and shared > 0.9, (worst, shared)
    assert sum(dense) == 2 * DENSE.get(schedule, 0)


def test_metadata_keeps_its_addresses(judges):
    """A captured graph reads the tensors of the builder's first call."""
    engine = tiny.Engine(tiny.V32, judges["V3.2"].state_dict())
    name = next(name for name, layer in engine.layers.items() if hasattr(layer, "impl"))
    with engine.current():
        first, second = (engine.metadata([([1], [5], 3), ([2], [6], n)])[0][name] for n in (4, 9))
    assert first.req_id_per_token.data_ptr() == second.req_id_per_token.data_ptr()
    assert second.req_id_per_token.tolist() == [0, 1] and second.num_decode_tokens == 2


def test_queries_of_the_indexer_are_packed_as_bytes(judges):
    """Triton compiles no kernel over float8 for capabilities below 8.9."""
    tiny.Engine(tiny.V32, judges["V3.2"].state_dict())
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.v1.attention.ops import common

    codes = torch.randn(5, 2, 128).to(torch.float8_e4m3fn)
    packed = sparse_attn_indexer.pack_seq_triton(codes, torch.tensor([2, 3]))
    assert packed.dtype == codes.dtype and packed.shape == (2, 3, 2, 128)
    found = torch.cat([packed[0, :2], packed[1]]).view(torch.uint8)
    assert torch.equal(found, codes.view(torch.uint8)) and not packed[0, 2].view(torch.uint8).any()
    (warmed,) = common._PACK_SEQ_TRITON_KERNEL.get_warmup_keys(dtype=torch.float8_e4m3fn, pad_value=-float("inf"))
    assert warmed.dtype == torch.uint8 and warmed.pad_value == 0
    plain = sparse_attn_indexer.pack_seq_triton(torch.ones(3, 4), torch.tensor([1, 2]))
    assert plain[0, 1].eq(-float("inf")).all()
