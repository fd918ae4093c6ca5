"""torch.compile(fullgraph=True) of an enabled DeepSeek-V4: without a cache, prompts, and decode steps."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mla_kernels.compat.transformers import enable
from tests.compat.models import CACHE, fast_cpu
from tests.compat.test_transformers_v4 import KINDS, VOCABULARY, padded, tiny


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with fast_cpu():
        yield
    torch._dynamo.reset()


def _model(kind):
    """One layer: tracing takes seconds a layer."""
    return enable(tiny(num_hidden_layers=1, layer_types=[kind], mlp_layer_types=["moe"]))


@pytest.mark.parametrize("use_cache, kind", [(False, KINDS[1]), (True, KINDS[2])])
def test_prompts(use_cache, kind):
    model, ids = _model(kind), torch.randint(2, VOCABULARY, (2, 45))
    expected = model(ids, use_cache=use_cache).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=use_cache).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.slow(when=lambda with_padding: not with_padding)
def test_decode_steps(with_padding):
    model = _model(KINDS[1])
    ids, mask = padded((70, 50)) if with_padding else (torch.randint(2, VOCABULARY, (2, 70)), None)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    out = model(ids[:, :60], attention_mask=None if mask is None else mask[:, :60])
    for token in range(60, 65):
        own = None if mask is None else mask[:, : token + 1].contiguous()
        out = compiled(ids[:, token : token + 1], attention_mask=own, **{CACHE: out[CACHE]})
        torch.testing.assert_close(out.logits[:, 0], whole[:, token], atol=1e-4, rtol=0)
    assert counter.frame_count <= 2
