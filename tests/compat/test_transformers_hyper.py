"""enable(model) on models with hyper-connections: their layers and heads, against transformers' own."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mla_kernels.compat import transformers_hyper
from mla_kernels.compat.transformers import disable, enable
from tests.compat import models
from tests.compat.models import fast_cpu
from tests.compat.test_transformers_v4 import KINDS, VOCABULARY
from tests.compat.test_transformers_v4 import tiny as tiny_v4

FAMILIES = ["DeepseekV4", *(name for name in ("HYV4", "Glm5Next") if name in models.FAMILIES)]
OPS = ("hyper_pre", "hyper_post_pre", "hyper_post", "hyper_head")
PROMPT = 21


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def tiny(family, **changes):
    """A model whose connections are as strong as trained ones."""
    changes = {"hc_mult": 4} | changes
    model = tiny_v4(**changes) if family == "DeepseekV4" else models.tiny(family, **changes)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.named_parameters():
        kind = name.rpartition(".")[2].removeprefix("hc_")
        if kind in ("fn", "base", "scale"):
            tensor.normal_(0, 0.1 if kind == "fn" else 1.0, generator=generator)
    return model


def one_layer(family):
    if family == "DeepseekV4":
        return dict(num_hidden_layers=1, layer_types=[KINDS[1]], mlp_layer_types=["moe"])
    return models.one_layer(family)


def batch(padding=0):
    ids = torch.randint(2, VOCABULARY, (2, PROMPT))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return ids, mask


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each op was called."""
    counts = Counter()

    def counting(name, op):
        def call(*args, **options):
            counts[name] += 1
            return op(*args, **options)

        return call

    for name in OPS:
        monkeypatch.setattr(transformers_hyper, name, counting(name, getattr(transformers_hyper, name)))
    return counts


def in_turn(layers: int) -> dict:
    """Calls of layers that hand over to each other."""
    return {"hyper_pre": 1, "hyper_post_pre": 2 * layers - 1, "hyper_post": 1, "hyper_head": 1}


def alone(layers: int) -> dict:
    return {"hyper_pre": layers, "hyper_post_pre": layers, "hyper_post": layers, "hyper_head": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_greedy_tokens_and_logits(family, calls):
    """With left padding, but of DeepSeek-V4, of whose padded prompts transformers makes another thing."""
    model, (ids, mask) = tiny(family), batch(0 if family == "DeepseekV4" else 9)
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(ids, attention_mask=mask, **options)
    assert not calls and expected.sequences[:, PROMPT:].unique().numel() > 4
    actual = enable(model).generate(ids, attention_mask=mask, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert calls == {name: 40 * count for name, count in in_turn(len(model.model.layers)).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_layer(family, checkpointing, calls):
    """Of every parameter, and of what the layer is given, within 1e-5 of transformers', scaled by their largest."""
    model = tiny(family, **one_layer(family)).train().requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, found = batch()[0], []
    apart = torch.randn(2, PROMPT, 4, 64)  # of streams that are all the same, weights have no gradient but rounding
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + apart, *args[1:]))
    towards = torch.randn(2, PROMPT, VOCABULARY)
    for switch in (lambda model: model, enable):
        switch(model).zero_grad()
        embeddings = model.model.embed_tokens.weight.detach()[ids].requires_grad_()
        inputs = {"inputs_embeds": embeddings, "use_cache": False}
        with torch.enable_grad():
            (model(**inputs).logits * towards).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"embeddings": embeddings.grad, **grads})
    theirs, ours = found
    assert theirs.keys() == ours.keys() and sum("hc" in name for name in theirs) >= 6
    for name, want in theirs.items():
        error = (ours[name] - want).abs().max()
        assert error <= 1e-5 * want.abs().max(), f"{name}: {error} of {want.abs().max()}"
    twice = {name: count * (2 if checkpointing and name != "hyper_head" else 1) for name, count in alone(1).items()}
    assert calls == twice


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_others_have_changed_are_called(family):
    """Hooks, adapters and parametrizations, from before enable and from after: they act as under transformers."""
    ids, _ = batch()

    def hook(module, args, output):
        return (*output[:-1], output[-1] * 1.5)

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, streams):
            return self.base(streams * 0.5)

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    def change(layers):
        layers[0].attn_hc.register_forward_hook(hook)
        layers[1].ffn_hc.register_forward_hook(hook)
        layers[1].attn_hc = Adapter(layers[1].attn_hc)
        layers[2].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        layers[2].post_attention_layernorm.variance_epsilon = 0.1
        parametrize.register_parametrization(layers[2].ffn_hc, "fn", Doubled())

    for first in (change, enable):
        model = tiny(family)
        plain = model(ids).logits
        if first is enable:
            enable(model)
        change(model.model.layers)
        ours = enable(model)(ids).logits
        theirs = disable(model)(ids).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert (theirs - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_between_layers(family, calls):
    """They see the streams, and may change them in place."""
    model, (ids, _) = tiny(family), batch()
    expected = model(ids, output_hidden_states=True).hidden_states
    actual = enable(model)(ids, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    layers = model.model.layers

    def steer(module, args, output):
        (output if isinstance(output, torch.Tensor) else output[0]).mul_(-0.5)

    def push(module, args):
        args[0].add_(0.25)

    layers[0].register_forward_hook(steer)
    layers[2].register_forward_pre_hook(push)
    ours = model(ids).logits
    torch.testing.assert_close(ours, disable(model)(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family):
    """Streams stay float32, and what is computed of them; rounding acts in the projections alone."""
    model, (ids, _) = tiny(family, **one_layer(family)), batch()
    exact = enable(model)(ids, use_cache=False).logits
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, use_cache=False).logits
    streams = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert streams.dtype == torch.float32
    torch.testing.assert_close(rounded.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_the_hooks_of_accelerate(family, calls):
    """``device_map``'s, which only move inputs, around the layers and their modules of hyper-connections."""
    model, (ids, _) = tiny(family), batch()
    expected = model(ids).logits
    hook = type("AlignDevicesHook", (), {"__module__": "accelerate.hooks", "offload": False})()
    moved = [model.model.hc_head]
    for layer in model.model.layers:
        moved += [layer, layer.attn_hc, layer.ffn_hc, layer.input_layernorm, layer.post_attention_layernorm]
    passed = []

    def around(module):
        module._hf_hook, module._old_forward = hook, module.forward

        def forward(*args, **kwargs):
            passed.append(module)
            return module._old_forward(*args, **kwargs)

        module.forward = forward

    for module in moved:
        around(module)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.testing.assert_close(enable(model)(ids).logits, expected, atol=1e-4, rtol=0)
    layers = list(model.model.layers)
    assert calls == in_turn(len(layers)) and passed == [*layers, model.model.hc_head]
    disable(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    model.model.layers[0]._hf_hook = type("AlignDevicesHook", (), {"__module__": "accelerate.hooks", "offload": True})()
    with pytest.raises(NotImplementedError, match=r"DecoderLayer.forward of this model was replaced"):
        enable(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()}.keys() == state.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_forwards(family, calls):
    """A layer's class with a forward of its own keeps it; then no layer hands over. A replaced one is refused."""
    model, (ids, _) = tiny(family), batch()
    layer = model.model.layers[1]

    class Own(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states * 2, **kwargs)

    layer.__class__ = Own
    expected = model(ids).logits
    torch.testing.assert_close(enable(model)(ids).logits, expected, atol=1e-4, rtol=0)
    assert calls == alone(len(model.model.layers) - 1)
    disable(model)
    layer.__class__ = Own.__base__
    layer.forward = layer.forward
    with pytest.raises(NotImplementedError, match=r"DecoderLayer.forward of this model was replaced by other code"):
        enable(model)
    assert "mla_kernels" not in vars(model.model)


@pytest.mark.parametrize("changes", [{"hc_mult": 5}, {"hc_sinkhorn_iters": 65}, {"hc_eps": 0.0}])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_the_ops_do_not_take(family, changes, calls):
    """They stay transformers' own code."""
    if family == "HYV4" and "hc_sinkhorn_iters" in changes:
        changes = {"hc_mult": 6}
    model, (ids, _) = tiny(family, **one_layer(family), **changes), batch()
    expected = model(ids).logits
    torch.testing.assert_close(enable(model)(ids).logits, expected, atol=1e-4, rtol=0)
    assert not calls and not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_other_kinds(family, calls):
    """16-bit weights are read in float32, as transformers does; tensors that wrap others are left to its modules."""
    model, (ids, _) = tiny(family, **one_layer(family)), batch()
    for name, parameter in model.named_parameters():
        if "hc" in name:
            parameter.data = parameter.data.bfloat16()
    expected = model(ids).logits
    torch.testing.assert_close(enable(model)(ids).logits, expected, atol=1e-4, rtol=0)
    assert calls["hyper_pre"] == calls["hyper_post_pre"] == 1

    class Sharded(nn.Parameter):
        to_local = None

    connection = model.model.layers[0].attn_hc
    connection.fn = Sharded(connection.fn.data, requires_grad=False)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert calls["hyper_pre"] == 1 and calls["hyper_post_pre"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_many_layers(family):
    """A copy takes no frame of Python a layer: what a layer knows does not hold the next one."""
    changes = one_layer(family)
    changes |= {} if family == "DeepseekV4" else {"indexer_types": ["full"]}
    many = {name: value * 40 if isinstance(value, list) else value for name, value in changes.items()}
    model = tiny(family, **many | {"num_hidden_layers": 40, "hidden_size": 64})
    twin = copy.deepcopy(enable(model))
    ids = batch()[0][:1, :3]
    expected = model(ids, use_cache=False).logits
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(ids, use_cache=False).logits, expected)
