"""What stands around a weight that decoding reads past its module's forward: it acts, or is refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as weight_norm_by_hook

from mla_kernels.compat.transformers import disable, enable
from tests.compat.models import FAMILIES, VOCABULARY, another_s_turn, fast_cpu, tiny

TOKENS = 21


@pytest.fixture(autouse=True)
def _fast_cpu():
    with fast_cpu():
        yield


def _projections(model):
    return [module.kv_b_proj for module in model.modules() if hasattr(module, "kv_b_proj")]


def _generate(model):
    ids = torch.randint(2, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)


class Low(nn.Module):
    """A low-rank adapter as a parametrization."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, weight.shape[1]) * 0.3)
        self.up = nn.Parameter(torch.randn(weight.shape[0], 4) * 0.3)

    def forward(self, weight):
        return weight + self.up @ self.down


class Adapted(nn.Module):
    """A low-rank adapter around a layer, as adapter libraries put it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.low = layer, Low(layer.weight)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + F.linear(x, self.low.up @ self.low.down)


class Derived(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _wrap(model):
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj = Adapted(module.kv_b_proj)


def _derive(model):
    for layer in _projections(model):
        layer.__class__ = Derived


def _hook(model):
    for layer in _projections(model):
        layer.register_forward_hook(lambda module, args, out: out * 2)


def _pre_hook(model):
    for layer in _projections(model):
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replace_forward(model):
    for layer in _projections(model):
        layer.forward = lambda x, own=layer.forward: own(x) * 2


def _weight_norm_by_hook(model):
    for layer in _projections(model):
        weight_norm_by_hook(layer)
        layer.weight_g.data *= 2


def _prune(model):
    for layer in _projections(model):
        prune.random_unstructured(layer, "weight", amount=0.5)


def _bias(model):
    for layer in _projections(model):
        layer.bias = nn.Parameter(torch.ones(layer.out_features))


def _eight_bits(model):
    for layer in _projections(model):
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


REFUSED = {
    "adapter around it": (_wrap, TypeError, r"kv_b_proj of layer 0: got \S+\.Adapted, torch.nn.Linear without bias"),
    "derived class": (_derive, TypeError, r"kv_b_proj of layer 0: got \S+\.Derived, torch.nn.Linear without bias"),
    "hook": (_hook, NotImplementedError, "kv_b_proj of layer 0: got forward hooks, none is accepted"),
    "pre-hook": (_pre_hook, NotImplementedError, "kv_b_proj of layer 0: got forward hooks, none is accepted"),
    "forward": (_replace_forward, NotImplementedError, "kv_b_proj of layer 0: its forward was replaced by other code"),
    "weight norm by a hook": (_weight_norm_by_hook, NotImplementedError, "kv_b_proj of layer 0: got forward hooks"),
    "pruning": (_prune, NotImplementedError, "kv_b_proj of layer 0: got forward hooks"),
    "bias": (_bias, TypeError, r"kv_b_proj of layer 0: got \S+\.Linear with a bias"),
    "8 bits": (_eight_bits, TypeError, "kv_b_proj of layer 0: got a weight of Parameter in torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_call_would_do_more_is_refused_before_and_after_enable(kind):
    change, error, message = REFUSED[kind]
    model = tiny("DeepseekV3")
    change(model)
    with pytest.raises(error, match=message):
        enable(model)
    assert "mla_kernels" not in vars(model.model), "a refusal leaves the model as it was"
    later = enable(tiny("DeepseekV3"))
    change(later)
    if kind != "8 bits":  # which the prefill cannot multiply
        with pytest.raises(error, match=message):
            _generate(later)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_every_family_are_refused_at_the_call(family):
    """Without them again, the tokens are transformers'."""
    model = tiny(family)
    expected = _generate(model)
    enable(model)
    handle = _projections(model)[-1].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(NotImplementedError, match=r"kv_b_proj of layer \d: got forward hooks, none is accepted"):
        _generate(model)
    handle.remove()
    assert torch.equal(_generate(model), expected)


def test_hooks_act_where_the_module_is_called():
    """A prefill expands its keys and values through the module."""
    ours, theirs = enable(tiny("DeepseekV3")), tiny("DeepseekV3")
    ids = torch.randint(2, VOCABULARY, (2, TOKENS))
    before = theirs(ids).logits
    for model in (ours, theirs):
        _hook(model)
    expected = theirs(ids).logits
    assert (expected - before).abs().max() > 0.1
    for options in ({}, {"use_cache": False}):
        torch.testing.assert_close(ours(ids, **options).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_refused(register):
    model = enable(tiny("DeepseekV2"))
    expected = _generate(model)
    handle = getattr(torch.nn.modules.module, register)(lambda *args: None)
    try:
        with pytest.raises(NotImplementedError, match="kv_b_proj of layer 0: got forward hooks of all modules"):
            _generate(model)
    finally:
        handle.remove()
    assert torch.equal(_generate(model), expected)


@pytest.mark.parametrize("offload", [False, True])
def test_device_hooks_of_accelerate(offload):
    """Hooks that bring inputs to a layer's device are accepted, and those that fetch its weight are not."""
    model = tiny("DeepseekV3")
    expected = _generate(model)
    for layer in _projections(model):
        layer._hf_hook = type("AlignDevicesHook", (), {"__module__": "accelerate.hooks", "offload": offload})()
        layer.forward = lambda x, own=layer.forward: own(x.to(torch.device("cpu")))
    if offload:
        with pytest.raises(NotImplementedError, match="kv_b_proj of layer 0: its forward was replaced by other code"):
            enable(model)
    else:
        assert torch.equal(_generate(enable(model)), expected)


def _low_rank(layer):
    parametrize.register_parametrization(layer, "weight", Low(layer.weight))


def _weight_norm(layer):
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.mul_(1.5)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", [_low_rank, _weight_norm])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow(when=lambda family, change, after: another_s_turn(family, change is _low_rank, after))
def test_parametrized_weights_act(family, change, after):
    theirs = tiny(family)
    ours, before = copy.deepcopy(theirs), _generate(theirs)
    if after:
        enable(ours)
    for model in (theirs, ours):
        torch.manual_seed(1)
        for layer in _projections(model):
            change(layer)
    enable(ours)
    expected = _generate(theirs)
    assert not torch.equal(expected, before)
    assert torch.equal(_generate(ours), expected)


class Wrapped(torch.Tensor):
    """A tensor that says bfloat16 and holds something else, as quantisation libraries have them."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.bfloat16)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{function}: this weight is not to be used")

    __repr__ = object.__repr__


def test_weights_that_wrap_other_tensors_are_refused():
    model = tiny("MiniCPM3").to(torch.bfloat16)
    layer = _projections(model)[1]
    layer.weight = nn.Parameter(Wrapped(layer.weight.data), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"kv_b_proj of layer 1: got a weight of Wrapped in torch\.bfloat16, a tensor of"
    ):
        enable(model)


def test_a_weight_of_other_heads_is_refused():
    model = enable(tiny("Youtu"))
    layer = _projections(model)[0]
    layer.weight = nn.Parameter(layer.weight[:-80], requires_grad=False)
    with pytest.raises(ValueError, match=r"kv_b_proj of layer 0: got a weight of \(240, 32\) for 4 heads"):
        model(torch.ones(1, 1, dtype=torch.long))


def test_hooks_of_longcats_identity_expert_act():
    theirs = tiny("LongcatFlash")
    ours, before = enable(copy.deepcopy(theirs)), _generate(theirs)
    for model in (theirs, ours):
        for layer in model.model.layers:
            layer.mlp.experts.identity_expert.register_forward_hook(lambda module, args, out: out * 3)
    expected = _generate(theirs)
    assert not torch.equal(expected, before)
    assert torch.equal(_generate(ours), expected)


WITHOUT_ACT_FN = ("MiniCPM3", "Youtu", "HYV4", "Glm5Next")  # no experts, or experts that call silu as a function


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_ACT_FN])
def test_hooks_inside_an_expert_are_refused(family):
    model = tiny(family)
    expected = _generate(model)
    enable(model)
    (*_, inner) = (
        module for module in model.modules() if hasattr(module, "act_fn") and hasattr(module, "gate_up_proj")
    )
    handle = inner.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    for action in (lambda: _generate(model), lambda: enable(disable(model))):
        with pytest.raises(NotImplementedError, match="forward hooks on act_fn, which runs inside a kernel"):
            action()
    handle.remove()
    assert torch.equal(_generate(enable(model)), expected)
