"""nn.HyperConnection and nn.HyperHead: Hugging Face's modules and layers with their weights, names of checkpoints."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.glm5_next import modeling_glm5_next as glm5
from transformers.models.hy_v4 import modeling_hy_v4 as hy_v4

from mla_kernels.nn import HyperConnection, HyperHead

SIZES = {"hidden_size": 64, "hc_mult": 4, "rms_norm_eps": 1e-4, "hc_eps": 1e-5}
MODELS = {"DeepseekV4": v4, "HYV4": hy_v4, "Glm5NextText": glm5}
LAYERS = ("sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention")


def config_of(family):
    more = {"hc_magnitude": 1.25} if family == "HYV4" else {"hc_sinkhorn_iters": 7}
    return getattr(transformers, f"{family}Config")(**SIZES, **more)


def filled(module):
    """Weights as large as trained ones: base and scale that make a difference."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.1 if name.endswith("fn") else 1.0)
    return module


def theirs(family, kind="HyperConnection"):
    config = config_of(family)
    made = getattr(MODELS[family], f"{family}{kind}")
    return filled(made() if (family, kind) == ("Glm5NextText", "HyperHead") else made(config)), config


@pytest.mark.parametrize("family", MODELS)
def test_connections_of_transformers(family, cpu_code):
    other, config = theirs(family)
    own = HyperConnection.from_hf(config)
    assert own.load_state_dict(other.state_dict()) and own.state_dict().keys() == other.state_dict().keys()
    streams = torch.randn(2, 3, 4, 64)
    collapsed, post, comb = own(streams)
    *weights, row = other(streams)
    torch.testing.assert_close(collapsed, row, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(post, weights[0], rtol=1e-5, atol=1e-5)
    if family == "HYV4":
        assert comb is None
    else:
        torch.testing.assert_close(comb, weights[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_heads_of_transformers(family, cpu_code):
    other, config = theirs(family, "HyperHead")
    own = HyperHead.from_hf(config)
    assert own.load_state_dict(other.state_dict()) and own.state_dict().keys() == other.state_dict().keys()
    streams = torch.randn(2, 3, 4, 64)
    torch.testing.assert_close(own(streams), other(streams), rtol=1e-5, atol=1e-5)
    weight = torch.rand(64)
    norm = v4.DeepseekV4RMSNorm(64, eps=config.rms_norm_eps)
    norm.weight.data.copy_(weight)
    torch.testing.assert_close(own(streams, weight), norm(other(streams)), rtol=1e-5, atol=1e-5)


def gradients(outputs, towards, leaves):
    """Of the leaves, for the gradients ``towards`` of those of the outputs that are there."""
    outputs = [x for x in outputs if x is not None]
    return torch.autograd.grad(outputs, leaves, towards[: len(outputs)])


def assert_close_to_their_largest(ours, theirs):
    for got, want in zip(ours, theirs, strict=True):
        assert want.any() and (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("family", MODELS)
def test_gradients_of_connections_of_transformers(family, cpu_code):
    """Of streams, fn, base and scale, within 1e-5 of transformers' own autograd, scaled by the largest."""
    other, config = theirs(family)
    own = HyperConnection.from_hf(config)
    own.load_state_dict(other.state_dict())
    streams = torch.randn(2, 3, 4, 64, requires_grad=True)
    towards = torch.randn(2, 3, 64), torch.randn(2, 3, 4), torch.randn(2, 3, 4, 4)
    *weights, row = other(streams)
    wanted = gradients([row, *weights], towards, [streams, *other.parameters()])
    assert_close_to_their_largest(gradients(own(streams), towards, [streams, *own.parameters()]), wanted)


@pytest.mark.parametrize("family", MODELS)
def test_gradients_of_heads_of_transformers(family, cpu_code):
    other, config = theirs(family, "HyperHead")
    own = HyperHead.from_hf(config)
    own.load_state_dict(other.state_dict())
    streams, towards = torch.randn(2, 3, 4, 64, requires_grad=True), (torch.randn(2, 3, 64),)
    wanted = gradients([other(streams)], towards, [streams, *other.parameters()])
    assert_close_to_their_largest(gradients([own(streams)], towards, [streams, *own.parameters()]), wanted)


def v4_model(layer_type):
    config = transformers.DeepseekV4Config(
        vocab_size=50, hidden_size=64, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, head_dim=32, q_lora_rank=48, o_groups=2, o_lora_rank=16, index_n_heads=4,
        index_head_dim=16, index_topk=4, num_hidden_layers=1, layer_types=[layer_type], mlp_layer_types=["moe"],
        sliding_window=8, hc_mult=4, qk_rope_head_dim=16, partial_rotary_factor=0.5, max_position_embeddings=512,
    )  # fmt: skip
    model = filled(transformers.DeepseekV4Model(config)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not name.endswith(("base", "scale")):
            nn.init.normal_(parameter, std=0.1)
    return model


class Layer(nn.Module):
    """A layer of V4: transformers' attention and experts between our connections, four launches in all, and one."""

    def __init__(self, layer, config):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.norms = nn.ModuleList([layer.input_layernorm, layer.post_attention_layernorm])
        self.attn_hc, self.ffn_hc = HyperConnection.from_hf(config), HyperConnection.from_hf(config)
        self.attn_hc.load_state_dict(layer.attn_hc.state_dict())
        self.ffn_hc.load_state_dict(layer.ffn_hc.state_dict())

    def forward(self, streams, input_ids=None, **options):
        collapsed, post, comb = self.attn_hc(streams, self.norms[0].weight)
        out, _ = self.self_attn(collapsed, **options)
        streams, collapsed, post, comb = self.ffn_hc.step(streams, out, post, comb, self.norms[1].weight)
        return self.ffn_hc.write(streams, self.mlp(collapsed, input_ids=input_ids), post, comb)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_a_layer_of_v4(layer_type, cpu_code):
    """Hidden states within 1e-4 and gradients within 1e-5 of transformers' in float32, scaled by their largest."""
    model = v4_model(layer_type)
    ids, towards = torch.randint(50, (2, 20)), torch.randn(2, 20, 64)
    layer, found = model.layers[0], []
    own = Layer(layer, model.config)
    for block in (layer, own):
        model.layers[0] = block
        model.zero_grad()
        embeddings = model.embed_tokens.weight.detach()[ids].requires_grad_()
        hidden = model(inputs_embeds=embeddings, input_ids=None, use_cache=False).last_hidden_state
        (hidden * towards).sum().backward()
        weights = [*block.attn_hc.named_parameters(), *block.ffn_hc.named_parameters()]
        norms = [x.weight.grad.clone() for x in (layer.input_layernorm, layer.post_attention_layernorm)]
        rest = [x.grad.clone() for x in layer.self_attn.parameters() if x.grad is not None]
        found.append((hidden.detach(), embeddings.grad, *(x.grad.clone() for _, x in weights), *norms, *rest))
    (hidden, *gradients), (expected, *wanted) = found[1], found[0]
    assert (hidden - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert len(gradients) == len(wanted) > 10
    for got, want in zip(gradients, wanted):
        assert want.any() and (got - want).abs().max() <= 1e-5 * want.abs().max()


def published(module, name):
    prefix = "hc_" if isinstance(module, HyperHead) else ""
    return {f"{name}_{key.removeprefix(prefix)}": value for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["hc_attn", "hc_ffn", "hc_head"])
@pytest.mark.parametrize("prefix", ["", "inner."])
def test_names_of_deepseek_s_files(name, prefix):
    make = HyperHead if name == "hc_head" else HyperConnection
    source, target = filled(make(8, 2)), make(8, 2)
    state = {prefix + key: value.bfloat16() for key, value in published(source, name).items()}
    assert {key.removeprefix(prefix) for key in state} == {f"{name}_{part}" for part in ("fn", "base", "scale")}
    (nn.ModuleDict({"inner": target}) if prefix else target).load_state_dict(state)
    for key, value in target.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, source.state_dict()[key].bfloat16().float())


def test_loading_is_strict():
    source, target = HyperConnection(8, 2), HyperConnection(8, 2)
    state = published(source, "hc_attn")
    with pytest.raises(RuntimeError, match=r"hc_attn_.* and hc_ffn_.*, one is accepted"):
        target.load_state_dict(state | published(source, "hc_ffn"))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"hc_attn_fn"'):
        target.load_state_dict(state | source.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
        target.load_state_dict({key: value for key, value in state.items() if key != "hc_attn_scale"})
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        target.load_state_dict(state | {"hc_attn_scale": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"hc_head_fn"'):
        target.load_state_dict(source.state_dict() | {"hc_head_fn": torch.ones(2, 16)})
    with pytest.raises(TypeError, match=r"fn: got torch.float8_e4m3fn, numbers are accepted"):
        target.load_state_dict(state | {"hc_attn_fn": state["hc_attn_fn"].to(torch.float8_e4m3fn)})


def test_weights_stay_in_float32(cpu_code):
    module = HyperConnection(16, 2).to(torch.bfloat16)
    assert {x.dtype for x in module.parameters()} == {torch.float32}
    collapsed, post, comb = module(torch.randn(3, 2, 16).bfloat16())
    assert (collapsed.dtype, post.dtype, comb.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(3, 2, 16))[0].dtype == torch.float32


def test_any_leading_dimensions_and_views(cpu_code):
    module, streams = filled(HyperConnection(16, 2)), torch.randn(2, 3, 2, 16)
    flat = module(streams.flatten(0, 1))
    for got, want in zip(module(streams), flat):
        torch.testing.assert_close(got.flatten(0, 1), want)
    for got, want in zip(module(streams.transpose(0, 1)), module(streams)):
        torch.testing.assert_close(got.transpose(0, 1), want)
    out = torch.randn(2, 3, 16)
    _, post, comb = module(streams)
    new = module.write(streams, out, post, comb)
    stepped, *rest = module.step(streams, out, post, comb)
    torch.testing.assert_close(stepped, new)
    for got, want in zip(rest, module(new)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: HyperConnection(0), ValueError, "hidden_size: got 0"),
        (lambda: HyperConnection(8, 5), ValueError, "num_streams: got 5, an integer from 1 to 4"),
        (lambda: HyperConnection(8, form="sinkhorn"), TypeError, "form: got str, a HyperForm is accepted"),
        (lambda: HyperHead(8, collapse="sum"), ValueError, "collapse: got 'sum'"),
        (lambda: HyperConnection.from_hf(transformers.DeepseekV3Config()), ValueError, "model_type: got 'deepseek_v3'"),
        (lambda: HyperConnection(8)(torch.zeros(2, 3, 8)), ValueError, r"streams: got shape \(2, 3, 8\)"),
        (lambda: HyperHead(8)(torch.zeros(8)), ValueError, "streams: got shape"),
    ],
)
def test_bad_arguments(make, error, match, cpu_code):
    with pytest.raises(error, match=match):
        make()


def test_compiled_without_breaks(cpu_code):
    torch._dynamo.reset()
    module, streams, out = HyperConnection(16, 2), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 16)

    def step(streams, out):
        collapsed, post, comb = module(streams)
        return module.step(streams, collapsed * out, post, comb)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(streams, out), step(streams, out)):
        torch.testing.assert_close(got, want)
