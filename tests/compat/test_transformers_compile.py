"""torch.compile(fullgraph=True) of transformers' models over this library, from the first call on."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from mla_kernels.compat.transformers import enable, experts
from mla_kernels.compat.transformers_experts import _recognise
from tests.compat.models import CACHE, FAMILIES, VOCABULARY, fast_cpu, one_layer, tiny

SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, num_experts_per_tok=2,
)  # fmt: skip
MIXTURES = {
    "Qwen3Moe": dict(num_experts=4, moe_intermediate_size=16),
    "GptOss": dict(num_local_experts=4),  # biases, transposed and interleaved weights, a clamp
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    _recognise.cache_clear()
    with fast_cpu():
        yield
    torch._dynamo.reset()


def _mixture(name, seed=0):
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL | MIXTURES[name])
    )
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_compile_from_the_first_call(name):
    model, ids = _mixture(name), torch.randint(1, 61, (2, 20))
    expected = model(ids, use_cache=False).logits
    model.set_experts_implementation("mla_kernels")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    for seed in range(1, 5):  # other models that run in the process are none of its business
        other = _mixture(name, seed)
        other.set_experts_implementation("mla_kernels")
        other(ids, use_cache=False)
        compiled(ids, use_cache=False)
    assert counter.frame_count == 1


def test_experts_train_compiled():
    model, ids = _mixture("Qwen3Moe").train().requires_grad_(True), torch.randint(1, 61, (2, 20))
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("mla_kernels")
    compiled = torch.compile(twin, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    with torch.enable_grad():
        for each in (model, compiled):
            each(ids, labels=ids, use_cache=False).loss.backward()
    for (name, theirs), ours in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


class Limited(nn.Module):
    """Experts whose clamp has a limit of its own in each layer, as Step-3.7's."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.act_fn = limit, nn.SiLU()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 32, 16)), nn.Parameter(torch.randn(4, 16, 16))

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def test_limits_of_layers_are_compiled_once_each():
    counter = CompileCounter()
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    hidden, ids, weights = torch.randn(5, 16), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    for limit in (1.0, 2.5, 4.0, 1.0, 2.5):
        layer = Limited(limit).requires_grad_(False)
        expected = torch.zeros(5, 16)
        for slot in range(2):
            inner = layer._apply_gate(torch.einsum("toh,th->to", layer.gate_up_proj[ids[:, slot]], hidden))
            expected += weights[:, slot, None] * torch.einsum("tho,to->th", layer.down_proj[ids[:, slot]], inner)
        torch.testing.assert_close(compiled(layer, hidden, ids, weights), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 3


def _steps(model, ids, mask):
    """Logits of tokens 20 and later, one at a time, over a cache that another call filled."""
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    out = model(ids[:, :20], attention_mask=None if mask is None else mask[:, :20])
    logits = []
    for token in range(20, ids.shape[1]):
        options = {CACHE: out[CACHE], "attention_mask": None if mask is None else mask[:, : token + 1]}
        out = compiled(ids[:, token : token + 1], **options)
        logits.append(out.logits)
    return torch.cat(logits, 1), counter.frame_count


def _model(family, **changes):
    """One layer, with experts where the family allows that for its first: tracing takes seconds a layer."""
    sizes = FAMILIES[family] | one_layer(family)
    if "first_k_dense_replace" in sizes:
        sizes["first_k_dense_replace"] = 0
    return tiny(family, **sizes | changes)


def _families(*always):
    """Each takes seconds: these always, the others with --slow."""
    return [pytest.param(name, marks=[] if name in always else [pytest.mark.slow]) for name in FAMILIES]


@pytest.mark.parametrize("family", _families("DeepseekV32"))
def test_enabled_models(family):
    model = _model(family)
    ids = torch.randint(2, VOCABULARY, (2, 26))
    expected = model(ids).logits
    enable(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for options in ({"use_cache": False}, {"use_cache": True}):
        torch.testing.assert_close(compiled(ids, **options).logits, expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()
    logits, count = _steps(model, ids, None)
    torch.testing.assert_close(logits, expected[:, 20:], atol=1e-4, rtol=0)
    assert count == 2, "a length, and any length"


@pytest.mark.parametrize("family", _families("DeepseekV2"))
def test_decode_steps_under_a_mask(family):
    model = _model(family)
    ids = torch.randint(2, VOCABULARY, (2, 26))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[0, 23] = 0  # between generated tokens, too
    ids = ids * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 20:]
    logits, count = _steps(_positioned(enable(model)), ids, mask)
    real = mask[:, 20:].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
    assert count <= 4


def _positioned(model):
    """The model with the positions that its attention mask says."""

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, attention_mask, **options):
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            return self.inner(ids, attention_mask=attention_mask, position_ids=positions, **options)

    return Positioned()


@pytest.mark.parametrize("family", _families("DeepseekV2"))
def test_a_padded_prefill(family):
    """Nothing says how many of its tokens are real while it is traced: it attends with sdpa, over the same cache."""
    model = _model(family, **({"index_topk": 16} if "index_topk" in FAMILIES[family] else {}))
    ids = torch.randint(2, VOCABULARY, (2, 26))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    enable(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(ids[:, :25], attention_mask=mask[:, :25], position_ids=positions[:, :25])
    real = mask[:, :25].bool()
    torch.testing.assert_close(out.logits[real], expected[:, :25][real], atol=1e-4, rtol=0)
    out = model(ids[:, 25:], attention_mask=mask, position_ids=positions[:, 25:], **{CACHE: out[CACHE]})
    torch.testing.assert_close(out.logits, expected[:, 25:], atol=1e-4, rtol=0)
