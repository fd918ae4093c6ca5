"""enable(model, prepack=True): the same result from weights that were moved, and the same parameters afterwards."""

import copy
import io

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mla_kernels.compat import transformers_packed
from mla_kernels.compat.transformers import disable, enable
from mla_kernels.cpu import amx, packed
from tests.compat.models import VOCABULARY, fast_cpu, tiny
from tests.support import assert_close

IDS = torch.arange(18).view(2, 9) * 7 % VOCABULARY


@pytest.fixture(params=["huge pages", "onednn"])
def form(request, monkeypatch):
    """Both forms, whatever this processor takes."""
    monkeypatch.setattr(amx, "available", lambda: request.param == "huge pages")
    return request.param


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if ".experts.g" in name or ".experts.d" in name}


def bits(tensor):
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["DeepseekV3", "LongcatFlash"])
def test_result_and_the_same_bits_in_the_same_parameters(family, dtype, form):
    model = tiny(family).to(dtype)
    held = weights_of(model)
    for parameter in held.values():  # NaN and infinities among them, in an expert without tokens
        bits(parameter)[-1].view(-1)[:4] = torch.tensor([-1, 0x7F81, 1, -0x8000])
    before = {name: p.detach().clone() for name, p in held.items()}
    with fast_cpu():
        enable(model)
        expected = {tokens: model(IDS[:1, :tokens]).logits for tokens in (1, 9)}
        enable(model, prepack=True)
        assert all(p.numel() == 0 for p in weights_of(model).values())
        for tokens, logits in expected.items():
            baseline = None if dtype == torch.float32 else logits * 1.01
            assert_close(model(IDS[:1, :tokens]).logits, logits.double(), baseline)
        disable(model)
    after = weights_of(model)
    for name, weight in before.items():
        assert after[name] is held[name]
        assert torch.equal(bits(after[name]), bits(weight))
    model.load_state_dict(model.state_dict())


def test_the_memory_is_freed_parameter_by_parameter(form, monkeypatch):
    model = tiny("DeepseekV3")
    storages = [StorageWeakRef(p.untyped_storage()) for p in weights_of(model).values()]
    nbytes = sum(p.nbytes for p in weights_of(model).values())
    alive = []
    moved_of = transformers_packed._Moved.of

    def watched(*args, **kwargs):
        alive.append(sum(not storage.expired() for storage in storages))
        return moved_of(*args, **kwargs)

    monkeypatch.setattr(transformers_packed._Moved, "of", watched)
    enable(model, prepack=True)
    assert alive == [len(storages) - number for number in range(len(storages))]
    assert all(storage.expired() for storage in storages)
    kept = [m for module in model.modules() if transformers_packed.PLACE in vars(module)
            for m in vars(module)[transformers_packed.PLACE].moved]  # fmt: skip
    assert sum(expert.nbytes for m in kept for expert in m.experts) == nbytes


def test_what_needs_the_parameters_is_refused(form):
    model = enable(tiny("DeepseekV3"), prepack=True)
    with fast_cpu():
        expected = model(IDS).logits
        for call in (
            model.state_dict,
            lambda: copy.deepcopy(model),
            lambda: torch.save(model, io.BytesIO()),
        ):
            with pytest.raises(RuntimeError, match=r"prepacked experts, none is accepted: .* call .*disable\(model\)"):
                call()
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(tiny("DeepseekV3").state_dict())
        for other in ("eager", "grouped_mm"):
            model.set_experts_implementation(other)
            with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|batch sizes"):
                model(IDS)
        model.set_experts_implementation("mla_kernels")
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("which", ["hidden_states", "gate_up_proj"])
def test_gradients_are_refused_where_they_would_be_recorded(form, which):
    model = enable(tiny("DeepseekV3"), prepack=True)
    if which == "hidden_states":
        model.model.embed_tokens.weight.requires_grad_()
    else:
        model.model.layers[1].mlp.experts.gate_up_proj.requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"prepacked experts .* no backward and {which} requires grad"):
        model(IDS)
    with torch.no_grad():
        model(IDS)


def test_hidden_states_of_another_dtype_are_refused(form):
    model = enable(tiny("DeepseekV3"), prepack=True)
    layer = model.model.layers[1].mlp.experts
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with torch.no_grad(), pytest.raises(TypeError, match="hidden_states: got dtype bfloat16, accepted: float32"):
        layer(torch.randn(2, 64).bfloat16(), ids, weights)
    with torch.no_grad(), pytest.raises(ValueError, match=r"hidden_states: got shape \(2, 32\), \(any, 64\)"):
        layer(torch.randn(2, 32), ids, weights)


def test_autocast_does_not_act_inside(form):
    model = enable(tiny("DeepseekV3"), prepack=True)
    layer = model.model.layers[1].mlp.experts
    args = torch.randn(5, 64), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    with torch.no_grad():
        expected = layer(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(*args), expected)


def test_torch_compile_says_what_it_does_not_take(form):
    model = enable(tiny("DeepseekV3"), prepack=True)
    layer = model.model.layers[1].mlp.experts
    args = torch.randn(5, 64), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    torch._dynamo.reset()
    with torch.no_grad():
        with pytest.raises(Exception, match=r"prepacked experts are not traced by torch\.compile"):
            torch.compile(layer, fullgraph=True, backend="eager")(*args)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, backend="eager")(*args), layer(*args))


def _training(model, experts):
    model.train()
    return ValueError, r"prepack=True and a model in training mode, one in eval mode is accepted"


def _float16(model, experts):
    model.half()
    return TypeError, r"gate_up_proj of DeepseekV3Experts .* got torch\.float16, .* bfloat16 or float32 is accepted"


def _meta(model, experts):
    experts.to("meta")
    return ValueError, r"gate_up_proj of DeepseekV3Experts .* got a tensor on meta, tensors on cpu are accepted"


def _strided(model, experts):
    experts.down_proj.data = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    return ValueError, r"down_proj of DeepseekV3Experts .* strides \(3072, 1, 64\), a contiguous tensor"


def _shared(model, experts):
    experts.down_proj = model.model.layers[1].mlp.experts.down_proj
    return ValueError, "down_proj .* got a parameter that another module has, too"


@pytest.mark.parametrize("spoil", [_training, _float16, _meta, _strided, _shared])
def test_refused_before_anything_changes(spoil):
    model = tiny("DeepseekV3")
    error, message = spoil(model, model.model.layers[2].mlp.experts)
    before = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in before.items()}
    implementation = model.config._experts_implementation
    with pytest.raises(error, match=message):
        enable(model, prepack=True)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert model.config._experts_implementation == implementation
    assert not any(transformers_packed.PLACE in vars(module) for module in model.modules())


def test_prepack_is_a_bool():
    with pytest.raises(TypeError, match="prepack: got str, a bool is accepted"):
        enable(tiny("DeepseekV3"), prepack="yes")


def test_torch_without_onednn_is_refused(monkeypatch):
    def missing():
        raise NotImplementedError("prepack: this build of torch has no oneDNN linear")

    monkeypatch.setattr(packed, "_reorder", missing)
    model = tiny("DeepseekV3")
    with pytest.raises(NotImplementedError, match="no oneDNN linear"):
        enable(model, prepack=True)
    assert all(p.numel() for p in weights_of(model).values())


def test_nothing_stays_packed_where_one_fails(form, monkeypatch):
    model = tiny("DeepseekV3")
    before = {name: p.detach().clone() for name, p in weights_of(model).items()}
    moved_of, calls = transformers_packed._Moved.of, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == len(before):
            raise MemoryError
        return moved_of(*args, **kwargs)

    monkeypatch.setattr(transformers_packed._Moved, "of", failing)
    with pytest.raises(MemoryError):
        enable(model, prepack=True)
    assert all(torch.equal(p, before[name]) for name, p in weights_of(model).items())
    assert model.state_dict().keys() >= before.keys()


def test_enabling_again_keeps_what_is_packed(form):
    model = enable(tiny("DeepseekV3"), prepack=True)
    with fast_cpu():
        expected = model(IDS).logits
        assert torch.equal(enable(model, prepack=True)(IDS).logits, expected)
        assert torch.equal(enable(model)(IDS).logits, expected)
    assert all(p.numel() == 0 for p in weights_of(model).values())


def test_a_model_without_experts_has_nothing_to_pack():
    assert enable(tiny("MiniCPM3"), prepack=True) is not None
