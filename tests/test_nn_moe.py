"""nn.MoE against transformers' mixture-of-experts modules, in fp32: outputs, gradients, state dicts."""

import copy

import pytest
import torch
import transformers
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from mla_kernels import launch
from mla_kernels.cpu.packed import packed
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.nn import MoE, MoEConfig
from tests.compat.models import EXPERTS, tiny
from tests.moe.ranks import Ranks
from tests.moe.sharded_layer import EXPERTS_PER_RANK, infer_quantised, train_sharded
from tests.support import assert_close

pytestmark = pytest.mark.usefixtures("_torch_code")
VOCABULARY, V4_HIDDEN = 50, 40
MODELS = {
    "v2 greedy": ("DeepseekV2", {"topk_method": "greedy"}),
    "v2 groups, norm ignored": ("DeepseekV2", {"topk_method": "group_limited_greedy", "norm_topk_prob": True}),
    "v2 two shared": ("DeepseekV2", {"topk_method": "greedy", "n_shared_experts": 2}),
    "v3": ("DeepseekV3", {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "v3 not renormalised": ("DeepseekV3", {"norm_topk_prob": False}),
    "v3 three shared": ("DeepseekV3", {"n_shared_experts": 3}),
    "v3.2": ("DeepseekV32", {}),
    "glm-5": ("GlmMoeDsa", {}),
    "glm-4.7-flash": ("Glm4MoeLite", {"norm_topk_prob": False}),
    "glm-4.5": ("Glm4Moe", {}),
    "v4 hash": ("DeepseekV4", 0),
    "v4": ("DeepseekV4", 3),
}


@pytest.fixture
def _torch_code():
    with launch.on_cpu("torch"):
        yield


def _v4_config(**changes):
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=V4_HIDDEN, moe_intermediate_size=24, n_routed_experts=8,
        num_experts_per_tok=3, num_hidden_layers=4, swiglu_limit=0.7, experts_implementation="eager",
    )  # fmt: skip
    return transformers.DeepseekV4Config(**sizes | changes)


def _filled(block):
    """With weights so large that V4's clamp cuts."""
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
            else:
                experts = block.experts.num_experts
                tensor.copy_(torch.rand(tensor.shape[0], experts).argsort(1)[:, : tensor.shape[1]])
    return block


def _pair(name):
    """transformers' module, ours with the same weights, and the config that both came from."""
    family, changes = MODELS[name]
    if family == "DeepseekV4":
        config, layer = _v4_config(), changes
        block = _filled(DeepseekV4SparseMoeBlock(config, layer))
    elif family == "Glm4Moe":  # has no latent attention
        config, layer = transformers.Glm4MoeConfig(**EXPERTS, hidden_size=64, experts_implementation="eager"), 1
        block = _filled(Glm4MoeMoE(config))
    else:
        model, layer = tiny(family, **changes), 1
        config, block = model.config, model.model.layers[layer].mlp.requires_grad_()
    ours = MoE(MoEConfig.from_hf(config, layer))
    ours.load_state_dict(block.state_dict())
    return block, ours, config


def _inputs(config, shape=(2, 19)):
    hidden = torch.randn(*shape, config.hidden_size)
    v4 = config.model_type == "deepseek_v4"
    return hidden, (torch.randint(VOCABULARY, shape),) if v4 else ()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name):
    block, ours, config = _pair(name)
    with torch.no_grad():
        for shape in ((2, 19), (1, 1)):
            hidden, ids = _inputs(config, shape)
            assert_close(ours(hidden, *ids), block(hidden, *ids).double())
        if not ids:  # transformers' module takes two leading dimensions only
            flat = ours(hidden[0])
            assert torch.equal(flat, ours(hidden)[0])
        assert ours(hidden[:, :0], *(x[:, :0] for x in ids)).shape == (1, 0, config.hidden_size)


@pytest.mark.parametrize("name", ["v2 two shared", "v3"])  # their routers are fp32 in transformers, too
def test_bfloat16(name):
    block, ours, config = _pair(name)
    router = copy.deepcopy(block.gate)
    block, ours = block.bfloat16(), ours.bfloat16()
    block.gate = router
    hidden = torch.randn(2, 19, config.hidden_size).bfloat16()
    with torch.no_grad():
        out, baseline = ours(hidden), block(hidden)
        assert out.dtype == torch.bfloat16
        assert_close(out, block.float()(hidden.float()).double(), baseline)


def test_autocast_leaves_the_router_in_fp32():
    _, ours, config = _pair("v3")
    hidden, _ = _inputs(config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weights, out = ours.route(hidden)[0], ours(hidden)
    with torch.no_grad():
        assert torch.equal(weights, ours.route(hidden)[0])
        assert torch.equal(out, ours(hidden))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_transformers(name):
    block, ours, config = _pair(name)
    hidden, ids = _inputs(config)
    own, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    grad = torch.randn_like(hidden)
    ours(own, *ids).backward(grad)
    block(theirs, *ids).backward(grad)
    assert_close(own.grad, theirs.grad.double())
    with torch.no_grad():  # gradients by the names of a state dict: the same split
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    split = ours.state_dict()
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad.abs().max() > 0, parameter_name
        assert_close(split[parameter_name], parameter.grad.double())


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_that_of_transformers(name):
    block, ours, _ = _pair(name)
    theirs, own = block.state_dict(), ours.state_dict()
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(own[key], value), key
    for tensor in theirs.values():
        tensor.zero_()
    block.load_state_dict(own)
    for key, value in block.state_dict().items():
        assert torch.equal(value, own[key]), key


def test_state_dict_inside_a_model_and_assigned():
    _, ours, _ = _pair("v3 three shared")
    with torch.device("meta"):
        other = torch.nn.ModuleDict({"mlp": MoE(ours.config)})
    saved = {f"mlp.{key}": value for key, value in ours.state_dict().items()}
    other.load_state_dict(saved, assign=True)
    hidden = torch.randn(5, ours.config.hidden_size)
    with torch.no_grad():
        assert torch.equal(other["mlp"](hidden), ours(hidden))
    assert other.state_dict().keys() == saved.keys()
    assert other["mlp"].experts.gate_up_proj.shape[0] == 8 + 3


def _published(state, names):
    """The names of the files that DeepSeek publishes: an expert's three weights by themselves."""
    gate, down, up = names
    found = {}
    for key, value in state.items():
        if key == "experts.gate_up_proj":
            for expert, both in enumerate(value):
                first, second = both.chunk(2)
                found |= {f"experts.{expert}.{gate}.weight": first, f"experts.{expert}.{up}.weight": second}
        elif key == "experts.down_proj":
            found |= {f"experts.{expert}.{down}.weight": x for expert, x in enumerate(value)}
        else:
            for ours, theirs in zip(("gate_proj", "down_proj", "up_proj"), names):
                key = key.replace(f"shared_experts.{ours}.", f"shared_experts.{theirs}.")
            found[key.replace("e_score_correction_bias", "bias") if gate == "w1" else key] = value
    return found


@pytest.mark.parametrize(
    ("name", "names"), [("v3 three shared", ("gate_proj", "down_proj", "up_proj")), ("v4", ("w1", "w2", "w3"))]
)
def test_published_names_load(name, names):
    _, ours, _ = _pair(name)
    state = ours.state_dict()
    other = MoE(ours.config)
    other.load_state_dict(_published(state, names))
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key
    partial = _published(state, names)
    del partial[f"experts.3.{names[2]}.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.3.up_proj.weight"'):
        other.load_state_dict(partial)


def test_loading_is_strict_in_the_checkpoints_names():
    _, ours, _ = _pair("v3")
    state = ours.state_dict()
    for key in state:
        others = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
            ours.load_state_dict(others)
        assert ours.load_state_dict(others, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts.bias"):
        ours.load_state_dict(state | {"experts.bias": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for shared_experts.up_proj.weight.*48, 63.*48, 64"):
        ours.load_state_dict(state | {"shared_experts.up_proj.weight": torch.zeros(48, 63)})
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.down_proj"):
        ours.load_state_dict(state | {"experts.down_proj": torch.zeros(7, 64, 48)})


def test_without_shared_experts():
    config = MoEConfig(32, 16, 0, 8, 2, num_groups=1, top_k_groups=1)
    moe = MoE(config)
    assert moe.state_dict().keys() == {
        "gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"
    }  # fmt: skip
    assert moe(torch.randn(3, 32)).shape == (3, 32)


def test_route_is_what_forward_uses():
    _, ours, config = _pair("v3")
    hidden, _ = _inputs(config)
    weights, ids = ours.route(hidden)
    assert weights.shape == ids.shape == (38, config.num_experts_per_tok)
    assert ids.max() < config.n_routed_experts and weights.dtype == torch.float32


def test_prepack():
    _, ours, config = _pair("v4")
    hidden, ids = _inputs(config)
    with torch.no_grad():
        expected = ours(hidden, *ids)
        assert ours.prepack() == sum(x.nbytes for x in ours.experts.parameters())
        assert packed(ours.experts.gate_up_proj) is not None
        assert_close(ours(hidden, *ids), expected.double())


def test_configs():
    v4 = _v4_config()
    assert MoEConfig.from_hf(v4, 3).activation == Activation("pre", 0.7)
    assert MoEConfig.from_hf(v4, 3).hash_vocabulary is None and MoEConfig.from_hf(v4, 2).hash_vocabulary == VOCABULARY
    assert MoEConfig.from_hf(transformers.DeepseekV4Config(), 5).activation.limit == 10.0
    with pytest.raises(ValueError, match="layer_idx: got None"):
        MoEConfig.from_hf(v4)
    with pytest.raises(ValueError, match="layer_idx: got 4, an integer from 0 to 3"):
        MoEConfig.from_hf(v4, 4)
    with pytest.raises(ValueError, match=r"config.scoring_func: got 'softmax'"):
        MoEConfig.from_hf(_v4_config(scoring_func="softmax"), 3)
    v3 = transformers.DeepseekV3Config(**EXPERTS, num_hidden_layers=3, first_k_dense_replace=1)
    with pytest.raises(ValueError, match="layer_idx: got 0, a dense layer"):
        MoEConfig.from_hf(v3, 0)
    glm = transformers.GlmMoeDsaConfig(num_hidden_layers=5, mlp_layer_types=["dense", "sparse"] * 2 + ["sparse"])
    assert MoEConfig.from_hf(glm, 1) == MoEConfig.from_hf(glm) == MoEConfig(6144, num_groups=1, top_k_groups=1)
    with pytest.raises(ValueError, match="layer_idx: got 2, a dense layer; 1 is the first MoE"):
        MoEConfig.from_hf(glm, 2)
    kimi = transformers.DeepseekV3Config(
        model_type="kimi_k2", n_routed_experts=384, n_group=1, topk_group=1, routed_scaling_factor=2.827,
        first_k_dense_replace=1, num_hidden_layers=61, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
    )  # fmt: skip
    wanted = MoEConfig(num_experts=384, num_groups=1, top_k_groups=1, routed_scale=2.827)
    assert MoEConfig.from_hf(kimi, 1) == wanted
    for change in ({"topk_method": "greedy"}, {"scoring_func": "softmax"}, {"moe_layer_freq": 2}):
        with pytest.raises(ValueError, match=f"config.{min(change)}: got"):
            MoEConfig.from_hf(transformers.DeepseekV3Config(**change))
    for other in ("LlamaConfig", "LongcatFlashConfig", "KimiLinearConfig", "Mistral4Config", "GptOssConfig"):
        with pytest.raises(ValueError, match=r"config.model_type: got '.*', accepted: 'deepseek_v2', .*'kimi_k2'"):
            MoEConfig.from_hf(getattr(transformers, other)())
    with pytest.raises(ValueError, match="shared_intermediate_size: got 24, a multiple of intermediate_size, 16"):
        MoEConfig(32, 16, 24)
    one_group = {"num_groups": 1, "top_k_groups": 1}
    with pytest.raises(ValueError, match="top_k: got 9, an integer from 1 to 8"):
        MoEConfig(32, 16, 16, 8, 9, **one_group)
    with pytest.raises(ValueError, match="scoring: got 'tanh'"):
        MoEConfig(32, 16, 16, 8, 2, scoring="tanh", **one_group)
    with pytest.raises(ValueError, match="num_groups: got 3, a divisor of 8 experts"):
        MoEConfig(32, 16, 16, 8, 2, num_groups=3)
    with pytest.raises(ValueError, match="top_k_groups: got 4, an integer from 1 to 2"):
        MoEConfig(32, 16, 16, 8, 2, num_groups=2)
    with pytest.raises(ValueError, match="num_groups: got 8 with hash_vocabulary"):
        MoEConfig(32, 16, 16, 8, 2, hash_vocabulary=50)
    with pytest.raises(NotImplementedError, match="interleaved"):
        MoEConfig(32, 16, 16, activation=Activation(interleaved=True))


def test_arguments():
    moe = MoE(MoEConfig(64, 16, 16, 8, 2, num_groups=1, top_k_groups=1))
    with pytest.raises(ValueError, match="hidden: got shape"):
        moe(torch.zeros(3, 63))
    with pytest.raises(ValueError, match="chunks: got 2 without parallel"):
        MoE(moe.config, chunks=2)
    hashed = MoE(MoEConfig(64, 16, 16, 8, 2, num_groups=1, top_k_groups=1, scoring="sqrt_softplus", hash_vocabulary=9))
    with pytest.raises(ValueError, match="input_ids: got None"):
        hashed(torch.zeros(3, 64))
    with pytest.raises(ValueError, match="input_ids: got 2 ids, one for each of 3"):
        hashed(torch.zeros(3, 64), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("format", ["fp8_block", "int8", "int8_w8a8", "int4", "mxfp4"])
def test_to_quantized(format):
    """The experts of the format, the router as it was."""
    config = MoEConfig(160, 128, 256, 8, 2, num_groups=1, top_k_groups=1, activation=Activation("pre", 1.0))
    moe = MoE(config).requires_grad_(False)
    options = {"group_size": 32} if format == "int4" else {}
    quantized = moe.to_quantized(format, **options)
    hidden = torch.randn(11, 160)
    out = quantized(hidden)
    plain = copy.deepcopy(moe)
    experts = quantized.experts.weights
    plain.experts.gate_up_proj.data, plain.experts.down_proj.data = experts.dequantise(torch.float32)
    error = (out - plain(hidden)).square().mean().sqrt() / out.square().mean().sqrt()
    assert error < (0.05 if format in ("fp8_block", "int8_w8a8") else 1e-5)  # those round activations, too
    assert experts.num_experts == 8 + 2
    before = {name: value.dtype for name, value in quantized.experts.named_buffers()}
    quantized.bfloat16()
    assert {name: value.dtype for name, value in quantized.experts.named_buffers()} == before
    assert not list(quantized.experts.parameters())
    with pytest.raises(ValueError, match="format"):
        moe.to_quantized("int3")
    with pytest.raises(NotImplementedError, match="quantised experts"):
        quantized.prepack()
    with pytest.raises(NotImplementedError, match="in codes already"):
        quantized.to_quantized(format)


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2)
    yield pool
    pool.close()


def test_quantised_experts_spread_over_ranks(ranks):
    config = MoEConfig(160, 128, 128, 8, 2, num_groups=1, top_k_groups=1)
    moe = MoE(config).requires_grad_(False)
    hidden = torch.randn(9, 160)
    parts = ranks.run(infer_quantised, config, moe.state_dict(), hidden, "int8")
    assert_close(torch.cat(parts), moe.to_quantized("int8")(hidden).double())


@pytest.mark.parametrize(("name", "chunks"), [("v3 three shared", 1), ("v4 hash", 2)])
def test_experts_spread_over_ranks(ranks, name, chunks):
    _, ours, config = _pair(name)
    hidden, ids = _inputs(config, (9,))
    grad = torch.randn_like(hidden)
    parts = ranks.run(train_sharded, ours.config, ours.state_dict(), hidden, ids, grad, [5, 4], chunks)
    hidden.requires_grad_()
    out = ours(hidden, *ids)
    out.backward(grad)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), hidden.grad, **close)
    for index, parameter in ((2, ours.experts.gate_up_proj), (3, ours.experts.down_proj)):
        routed = torch.cat([part[index][:count] for part, count in zip(parts, EXPERTS_PER_RANK)])
        torch.testing.assert_close(routed, parameter.grad[:8], **close)
        for part, count in zip(parts, EXPERTS_PER_RANK):
            torch.testing.assert_close(part[index][count:], parameter.grad[8:], **close)
    for part in parts:
        torch.testing.assert_close(part[4], ours.gate.weight.grad, **close)
