"""Published files into nn.MoE and nn.LatentAttention: every name and format, as numbers and as codes."""

import pytest
import torch
import transformers

from mla_kernels import ExpertWeights, launch
from mla_kernels.nn import AttentionConfig, LatentAttention, MoE, MoEConfig, RMSNorm, SwiGLU
from tests import published
from tests.moe.ranks import Ranks
from tests.moe.sharded_layer import EXPERTS_PER_RANK, load_codes

HUGGING_FACE, DEEPSEEK = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
SIZES = dict(hidden_size=256, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2, num_hidden_layers=4)
ROUTED_V3 = SIZES | dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
V4 = transformers.DeepseekV4Config(**SIZES, swiglu_limit=10.0)


def ue8m0(name, weight):
    return published.fp8(name, weight, dtype=published.E8M0)


FILES = {  # config, its prefix and projections in files, how weights are stored, the format of experts and shared ones
    "DeepSeek-V2": (
        transformers.DeepseekV2Config(**ROUTED_V3 | dict(n_shared_experts=2, topk_method="greedy")),
        "model.layers.2.mlp.", HUGGING_FACE, published.bf16, None, None,
    ),
    "DeepSeek-V3": (
        transformers.DeepseekV3Config(**ROUTED_V3), "model.layers.2.mlp.", HUGGING_FACE, published.fp8, "fp8_block",
        None,
    ),
    "two shared experts": (
        transformers.DeepseekV3Config(**ROUTED_V3 | dict(n_shared_experts=2)), "model.layers.2.mlp.", HUGGING_FACE,
        published.fp8, "fp8_block", None,
    ),
    "DeepSeek-V3.2": (
        transformers.DeepseekV32Config(**ROUTED_V3), "model.layers.2.mlp.", HUGGING_FACE, ue8m0, "fp8_block", None
    ),
    "DeepSeek-V4-Flash-Base": (V4, "layers.3.ffn.", DEEPSEEK, published.v4_fp8, "fp8_block", None),
    "DeepSeek-V4-Flash": (
        V4, "layers.3.ffn.", DEEPSEEK, {".experts.": published.v4_fp4, "shared": published.v4_fp8}, "mxfp4", "fp8_block"
    ),
    "Kimi-K2": (
        transformers.DeepseekV3Config(**ROUTED_V3, model_type="kimi_k2"), "model.layers.2.mlp.", HUGGING_FACE,
        published.fp8, "fp8_block", None,
    ),
    "Kimi-K2-Thinking": (
        transformers.DeepseekV3Config(**ROUTED_V3, model_type="kimi_k2"), "model.layers.2.mlp.", HUGGING_FACE,
        {".experts.": published.int4, "shared": published.bf16}, "int4", "plain",
    ),
    "GLM-5": (
        transformers.GlmMoeDsaConfig(**ROUTED_V3), "model.layers.2.mlp.", HUGGING_FACE, published.bf16, None, None
    ),
    "GLM-5-FP8": (
        transformers.GlmMoeDsaConfig(**ROUTED_V3), "model.layers.2.mlp.", HUGGING_FACE, published.fp8, "fp8_block", None
    ),
}  # fmt: skip
OPTIONS = {"int4": {"group_size": 32}}


@pytest.fixture(autouse=True)
def _torch_code():
    with launch.on_cpu("torch"), torch.no_grad():
        yield


def moe_file(name):
    """nn's config, the file's state dict, the experts' numbers, and format and options of quantised experts."""
    hf_config, prefix, projections, how, format, shared_format = FILES[name]
    config = MoEConfig.from_hf(hf_config, int(prefix.split(".")[-3]))
    state, true = published.store(published.expert_names(config, prefix, projections), how)
    state[f"{prefix}gate.weight"] = torch.randn(config.num_experts, config.hidden_size).bfloat16()
    if config.scoring != "softmax":
        bias = "gate.bias" if projections == DEEPSEEK else "gate.e_score_correction_bias"
        state[prefix + bias] = torch.randn(config.num_experts)
    options = {} if format is None else {"expert_format": format, "shared_format": shared_format}
    return config, state, published.stacked(true, config, prefix, projections), options | OPTIONS.get(format, {})


def inside(module, prefix):
    """A model with this module under the names of a file, and nothing else."""
    for part in reversed(prefix.rstrip(".").split(".")):
        module = torch.nn.ModuleDict({part: module})
    return module


def weights_of(moe):
    """gate_up and down of all experts, shared ones last, in float32."""
    parts = []
    for experts in (moe.experts, moe.shared_experts) if moe.shared_apart else (moe.experts,):
        plain = not hasattr(experts, "weights")
        parts.append((experts.gate_up_proj, experts.down_proj) if plain else experts.weights.dequantise())
    return [torch.cat([part.float() for part in both]) for both in zip(*parts)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FILES)
def test_experts_as_numbers(name, dtype):
    config, state, true, _ = moe_file(name)
    for way in ({}, {"strict": False}, {"assign": True}):
        with torch.device("meta" if "assign" in way else "cpu"):
            moe = MoE(config).to(dtype)
        before = dict(state)
        inside(moe, FILES[name][1]).load_state_dict(state, **way)
        assert state.keys() == before.keys() and all(state[key] is before[key] for key in state)
        wanted = torch.bfloat16 if "assign" in way and name in ("DeepSeek-V2", "GLM-5") else dtype  # the file's own
        if name != "Kimi-K2-Thinking":  # whose shared experts are bfloat16, and assigned so
            assert moe.experts.gate_up_proj.dtype == wanted
        for got, exact in zip(weights_of(moe), true):
            assert torch.equal(got, exact.to(moe.experts.gate_up_proj.dtype).float())
        assert moe.gate.weight.dtype == torch.float32
        assert moe(torch.randn(3, config.hidden_size, dtype=moe.experts.down_proj.dtype)).isfinite().all()


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file[4]])
def test_experts_as_codes(name):
    config, state, true, options = moe_file(name)
    plain = MoE(config)
    inside(plain, FILES[name][1]).load_state_dict(state)
    hidden = torch.randn(5, config.hidden_size)
    expected = plain(hidden)
    for way in ({}, {"strict": False}, {"assign": True}):
        with torch.device("meta" if "assign" in way else "cpu"):
            moe = MoE(config, **options)
        inside(moe, FILES[name][1]).load_state_dict(state, **way)
        moe.float()  # shared experts that were assigned as they are
        assert moe.experts.weights.format == options["expert_format"]
        for got, exact in zip(weights_of(moe), true):
            assert torch.equal(got, exact.float())
        out = moe(hidden)
        error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < (0.05 if "fp8_block" in options.values() else 1e-5)  # which rounds activations, too
    other = MoE(config, **options)
    other.load_state_dict({key: value.clone() for key, value in moe.state_dict().items()})
    assert torch.equal(other(hidden), out)
    codes = {key: value for key, value in moe.state_dict().items() if key.startswith("experts.")}
    assert all(torch.equal(value, codes[key]) for key, value in moe.bfloat16().state_dict().items() if key in codes)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2-Thinking"])
@pytest.mark.parametrize("assign", [False, True])
def test_shards_of_a_file_one_after_the_other(name, assign):
    """Each leaves what others have loaded, of an expert too."""
    config, state, true, options = moe_file(name)
    first = {key: value for key, value in state.items() if ".experts.0." in key or "experts.1.up" in key}
    second = {key: value for key, value in state.items() if key not in first}
    for given in ({}, options):
        with torch.device("meta" if assign else "cpu"):
            moe = MoE(config, **given)
        for shard in (first, second):
            inside(moe, FILES[name][1]).load_state_dict(shard, strict=False, assign=assign)
        for got, exact in zip(weights_of(moe), true):
            assert torch.equal(got, exact.float())


def test_what_transformers_has_fused():
    """gate_up_proj [E, 2I, H] with gate_up_proj_scale_inv."""
    config, state, true, options = moe_file("DeepSeek-V3")
    prefix = FILES["DeepSeek-V3"][1]
    experts = [{key.removeprefix(f"{prefix}experts.{e}."): value for key, value in state.items()
                if key.startswith(f"{prefix}experts.{e}.")} for e in range(config.num_experts)]  # fmt: skip
    weights = ExpertWeights.from_fp8(experts)
    fused = {key: value for key, value in state.items() if ".experts." not in key} | {
        f"{prefix}experts.{name}_proj{suffix}": value
        for name in ("gate_up", "down")
        for suffix, value in (
            ("", getattr(weights, name).view(torch.float8_e4m3fn)),
            ("_scale_inv", getattr(weights, f"{name}_scale")),
        )
    }
    for given in ({}, options):
        moe = MoE(config, **given)
        inside(moe, prefix).load_state_dict(fused)
        assert all(torch.equal(got, exact.float()) for got, exact in zip(weights_of(moe), true))
        broken = {key: value.clone() for key, value in fused.items()}
        broken[f"{prefix}experts.down_proj"].view(torch.uint8)[3, 0, 0] = 0x7F
        with pytest.raises(ValueError, match=r"mlp.experts.down_proj\[3\]: got NaN"):
            inside(MoE(config, **given), prefix).load_state_dict(broken)
        without = {key: value for key, value in fused.items() if not key.endswith("down_proj_scale_inv")}
        with pytest.raises(TypeError, match=r"mlp.experts.down_proj: got codes \(torch.float8_e4m3fn\) without scales"):
            inside(moe, prefix).load_state_dict(without, strict=False)


def test_gptq_experts_by_the_names_of_expert_weights():
    """What ExpertWeights read from any file goes into a module by its own names."""
    config, state, _, _ = moe_file("Kimi-K2-Thinking")
    gate_up, down = torch.randn(5, 256, 256), torch.randn(5, 256, 128)
    weights = ExpertWeights.quantise(gate_up, down, "int4", group_size=32, symmetric=False, scale_dtype=torch.float16)
    options = {"expert_format": "int4", "group_size": 32, "symmetric": False, "scale_dtype": torch.float16}
    moe = MoE(config, **options)
    router = {key.split("mlp.")[1]: value for key, value in state.items() if "gate." in key}
    moe.load_state_dict(router | {f"experts.{name}": value for name, value in weights.tensors().items()})
    assert all(torch.equal(got, want) for got, want in zip(moe.experts.weights.dequantise(), weights.dequantise()))


def attention_file(family, how):
    """nn's config, a file's state dict under ``model.layers.1.self_attn.``, and the numbers of its matrices."""
    sizes = dict(hidden_size=192, num_attention_heads=4, q_lora_rank=160, kv_lora_rank=128, qk_nope_head_dim=64,
                 qk_rope_head_dim=32, v_head_dim=64, num_hidden_layers=2)  # fmt: skip
    indexed = family in ("DeepseekV32", "GlmMoeDsa")
    sizes |= dict(index_n_heads=4, index_head_dim=64, index_topk=8) if indexed else {}
    config = AttentionConfig.from_hf(getattr(transformers, f"{family}Config")(**sizes), 1)
    shapes = {name: tuple(value.shape) for name, value in LatentAttention(config).named_parameters()}
    matrices = {f"model.layers.1.self_attn.{name.removesuffix('.weight')}": shape
                for name, shape in shapes.items() if len(shape) == 2}  # fmt: skip
    state, true = published.store(matrices, {"weights_proj": published.bf16, "": how})
    for name, shape in shapes.items():
        if len(shape) == 1:
            norm = torch.rand(shape) + 0.5
            state[f"model.layers.1.self_attn.{name}"] = norm if "k_norm" in name else norm.bfloat16()
    return config, state, true


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("DeepseekV2", published.bf16), ("DeepseekV3", published.fp8), ("DeepseekV32", published.fp8),
        ("DeepseekV32", ue8m0), ("GlmMoeDsa", published.bf16), ("GlmMoeDsa", published.fp8),
        ("Glm4MoeLite", published.bf16), ("DeepseekV3", published.int4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(family, how, dtype):
    """192 and 160 are no multiples of 128."""
    config, state, true = attention_file(family, how)
    if family == "DeepseekV3":  # Kimi-K2's and Moonlight's files have it in every layer
        state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(16)
    for way in ({}, {"strict": False}, {"assign": True}):
        with torch.device("meta" if "assign" in way else "cpu"):
            attention = LatentAttention(config).to(dtype)
        attention.stack_projections()
        result = inside(attention, "model.layers.1.self_attn.").load_state_dict(state, **way)
        assert not result.missing_keys and not result.unexpected_keys
        for name, exact in true.items():
            weight = attention.get_parameter(name.removeprefix("model.layers.1.self_attn.") + ".weight")
            assert torch.equal(weight.double(), exact.to(weight.dtype).double())
            if "weights_proj" in name:
                assert weight.dtype == torch.float32
            elif how is not published.bf16:
                assert weight.dtype == dtype
        if config.index_top_k:
            k_norm = state["model.layers.1.self_attn.indexer.k_norm.bias"]
            assert torch.equal(attention.indexer.k_norm.bias, k_norm)


def test_dense_layers_and_scales_of_rows():
    """SwiGLU's names; compressed-tensors' e4m3 with a scale for each row, and int8."""
    names = {"gate_proj": (192, 160), "up_proj": (192, 160), "down_proj": (160, 192)}
    state, true = published.store(names, published.fp8)
    codes = {"gate_proj": torch.randint(-127, 128, (192, 160), dtype=torch.int8),
             "up_proj": (torch.randn(192, 160) * 9).to(torch.float8_e4m3fn)}  # fmt: skip
    for name, value in codes.items():
        del state[f"{name}.weight_scale_inv"]
        scale = torch.rand(192, 1).bfloat16()
        state |= {f"{name}.weight": value, f"{name}.weight_scale": scale}
        true[name] = value.double() * scale.double()
    dense = SwiGLU(160, 192)
    dense.load_state_dict(state)
    for name, exact in true.items():
        assert torch.equal(dense.get_parameter(f"{name}.weight"), exact.float())


def _without(state, *endings):
    return {key: value for key, value in state.items() if not key.endswith(endings)}


@pytest.mark.parametrize("strict", [True, False])
def test_codes_without_scales_are_refused(strict):
    """By name, and before anything is written."""
    config, state, _, options = moe_file("DeepSeek-V3")
    _, dense, _ = attention_file("DeepseekV32", published.fp8)
    cases = [(MoE(config), "model.layers.2.mlp.", state, "experts.2.up_proj"),
             (MoE(config), "model.layers.2.mlp.", state, "shared_experts.down_proj"),
             (MoE(config, **options), "model.layers.2.mlp.", state, "experts.2.up_proj"),
             (LatentAttention(attention_file("DeepseekV32", published.fp8)[0]), "model.layers.1.self_attn.", dense,
              "indexer.wk")]  # fmt: skip
    for module, prefix, given, name in cases:
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(
            TypeError, match=rf"{prefix}{name}.weight: got codes \(torch.float8_e4m3fn\) without scales"
        ):
            inside(module, prefix).load_state_dict(_without(given, f"{name}.weight_scale_inv"), strict=strict)
        cast = {f"{prefix}{name}.weight": given[f"{prefix}{name}.weight"].bfloat16()}
        with pytest.raises(
            TypeError, match=rf"{prefix}{name}.weight_scale_inv: got scales for a weight of torch.bfloat"
        ):
            inside(module, prefix).load_state_dict(given | cast, strict=strict)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_other_codes_are_refused():
    config, state, _, options = moe_file("DeepSeek-V3")
    state = {key.removeprefix("model.layers.2.mlp."): value for key, value in state.items()}
    name = "experts.1.gate_proj"
    bytes_ = torch.zeros(128, 256, dtype=torch.uint8)
    changes = [
        ({f"{name}.weight": bytes_}, TypeError, rf"{name}.weight: got dtype uint8"),
        ({f"{name}.weight": bytes_.view(torch.float8_e5m2)}, TypeError, rf"{name}.weight: got dtype float8_e5m2"),
        ({f"{name}.weight": bytes_ | 0x7F}, TypeError, "got dtype uint8"),
        ({f"{name}.weight": (bytes_ | 0xFF).view(torch.float8_e4m3fn)}, ValueError, rf"{name}.weight: got NaN"),
        ({f"{name}.weight": (bytes_ | 0x7F).view(torch.float8_e4m3fn)}, ValueError, rf"{name}.weight: got NaN"),
        ({f"{name}.weight_scale_inv": torch.ones(2, 2)}, ValueError, rf"{name}.weight_scale_inv: got shape \(2, 2\)"),
        ({f"{name}.weight_scale_inv": torch.full((1, 2), torch.inf)}, ValueError, "scales that are not finite"),
        (
            {f"{name}.weight_scale": torch.ones(1)},
            NotImplementedError,
            rf"{name}.weight_scale: got a tensor, codes are",
        ),
        ({f"{name}.weight_scale_2": torch.ones(1)}, NotImplementedError, rf"{name}.weight_scale_2: got a tensor"),
        ({f"{name}.weight_zero_point": bytes_}, NotImplementedError, rf"{name}.weight_zero_point: got a tensor"),
        ({f"{name}.qweight": bytes_}, NotImplementedError, rf"{name}.qweight: got a weight of GPTQ or AWQ.*from_gptq"),
        ({"gate.weight": torch.zeros(4, 256, dtype=torch.int8)}, TypeError, r"gate.weight: got codes \(torch.int8\)"),
        ({"gate.e_score_correction_bias": torch.zeros(4).to(torch.float8_e4m3fn)}, TypeError, "numbers are accepted"),
        ({"experts.gate_up_proj": torch.zeros(4, 256, 256)}, ValueError, "stacked experts beside experts.0.gate_proj"),
    ]
    for change, error, message in changes:
        for given in ({}, options):
            with pytest.raises(error, match=message):
                MoE(config, **given).load_state_dict(state | change)
    with pytest.raises(TypeError, match=r"weight: got codes \(torch.float8_e4m3fn\) without scales"):
        RMSNorm(4).load_state_dict({"weight": torch.ones(4).to(torch.float8_e4m3fn)})


def test_codes_of_another_format_are_refused():
    config, state, _, options = moe_file("DeepSeek-V3")
    mixed, thinking, _, kept = moe_file("Kimi-K2-Thinking")
    _, numbers, _, _ = moe_file("GLM-5")
    prefix = "model.layers.2.mlp."
    cases = [
        (MoE(config, expert_format="mxfp4"), state, ValueError, "got format 'fp8_block', experts of format 'mxfp4'"),
        (
            MoE(config, **options),
            numbers,
            TypeError,
            r"got torch.bfloat16, experts of format 'fp8_block' are loaded from",
        ),
        (
            MoE(mixed, expert_format="int4", group_size=32),
            thinking,
            TypeError,
            r"shared_experts.*shared_format='plain'",
        ),
        (MoE(mixed, **kept | {"group_size": 64}), thinking, ValueError, r"got group_size=32, .* have group_size=64"),
        (
            MoE(mixed, **kept, scale_dtype=torch.float16),
            thinking,
            ValueError,
            "have group_size=32, scale_dtype=torch.flo",
        ),
    ]
    for module, given, error, message in cases:
        with pytest.raises(error, match=message):
            inside(module, prefix).load_state_dict(given)
    per_row = {f"{prefix}experts.0.up_proj.weight_scale": torch.rand(128, 1)}
    given = _without(state, "experts.0.up_proj.weight_scale_inv") | per_row
    with pytest.raises(ValueError, match=r"up_proj.weight: got e4m3 with a scale for each row, experts of format"):
        inside(MoE(config, **options), prefix).load_state_dict(given)


@pytest.mark.parametrize("format", ["fp8_block", "int8", "int8_w8a8", "int4", "mxfp4"])
def test_state_dicts_of_quantised_experts(format):
    """What to_quantized returns is saved and loaded into a module made for it; other dtypes and zeros are refused."""
    config, state, _, _ = moe_file("GLM-5")
    source = MoE(config)
    inside(source, "model.layers.2.mlp.").load_state_dict(state)
    int4 = {"group_size": 64, "symmetric": False, "scale_dtype": torch.float16} if format == "int4" else {}
    quantized = source.to_quantized(format, **int4)
    hidden = torch.randn(3, 256)
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            other = MoE(config, expert_format=format, **int4)
        other.load_state_dict(quantized.state_dict(), assign=assign)
        assert torch.equal(other(hidden), quantized(hidden))
        assert other.state_dict().keys() == quantized.state_dict().keys()
    saved, other = quantized.state_dict(), MoE(config, expert_format=format, **int4)
    wrong = {"experts.gate_up": saved["experts.gate_up"].float()}
    with pytest.raises(TypeError, match=r"experts.gate_up: got dtype float32, accepted: "):
        other.load_state_dict(saved | wrong)
    with pytest.raises(RuntimeError, match=r'Missing key.*"experts.down_scale"'):
        other.load_state_dict(_without(saved, "experts.down_scale"))
    if format == "int4":
        other = MoE(config, expert_format=format, **int4 | {"symmetric": True})
        with pytest.raises(
            ValueError, match=r"experts.gate_up_zero: got a tensor, these experts of format 'int4' have no"
        ):
            other.load_state_dict(saved, strict=False)
    else:
        with pytest.raises(ValueError, match=f"down_zero: got a tensor, these experts of format '{format}' have none"):
            other.load_state_dict(saved | {"experts.down_zero": torch.zeros(1)})


def test_experts_that_were_not_loaded_are_zero():
    config = moe_file("DeepSeek-V3")[0]
    for format in ("fp8_block", "int8", "int8_w8a8", "int4", "mxfp4"):
        assert not MoE(config, expert_format=format)(torch.randn(3, 256)).any()


def test_arguments():
    config = moe_file("DeepSeek-V3")[0]
    alone = MoEConfig(256, 128, 0, 4, 2, num_groups=1, top_k_groups=1)
    cases = [
        (config, {"expert_format": "plain"}, ValueError, "expert_format: got 'plain', accepted: None, 'fp8_block'"),
        (config, {"shared_format": "plain"}, ValueError, "shared_format: got 'plain' without expert_format"),
        (alone, {"expert_format": "int8", "shared_format": "plain"}, ValueError, "without shared experts"),
        (config, {"expert_format": "int8", "group_size": 32}, TypeError, "group_size: got an option that only"),
        (config, {"expert_format": "int4", "size": 32}, TypeError, "size: got an option"),
        (config, {"group_size": 32}, TypeError, "group_size: got an option"),
        (config, {"expert_format": "int4", "group_size": 16}, ValueError, "group_size: got 16, accepted: 32, 64, 128"),
        (config, {"expert_format": "int4", "scale_dtype": torch.int8}, ValueError, "scale_dtype: got torch.int8"),
    ]
    for config, options, error, message in cases:
        with pytest.raises(error, match=message):
            MoE(config, **options)
    narrow = MoEConfig(256, 64, 64, 4, 2, num_groups=1, top_k_groups=1)
    with pytest.raises(ValueError, match="down: got 64 columns; at least 128"):
        MoE(narrow, expert_format="mxfp4")


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # torch's own, of the router
def test_experts_on_the_meta_device_say_that_they_take_nothing():
    config, state, _, options = moe_file("DeepSeek-V3")
    for given in ({}, options):
        with torch.device("meta"):
            moe = MoE(config, **given)
        with pytest.warns(UserWarning, match="nothing was loaded into experts on the meta device, pass assign=True"):
            inside(moe, "model.layers.2.mlp.").load_state_dict(state)


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2-Thinking"])
def test_each_rank_takes_its_experts(ranks, name):
    options = moe_file(name)[3]
    config = MoEConfig(256, 128, 128, 8, 2, num_groups=1, top_k_groups=1)
    how = FILES[name][3]
    how = how if callable(how) else {"shared": how["shared"], "": how[".experts."]}
    state, true = published.store(published.expert_names(config), how)
    state |= {"gate.weight": torch.randn(8, 256), "gate.e_score_correction_bias": torch.zeros(8)}
    gate_up, down = published.stacked(true, config)
    hidden = torch.randn(6, 256)
    whole = MoE(config, **options)
    whole.load_state_dict(state)
    fp8 = torch.float8_e4m3fn  # which tensors cannot be pickled in
    sent = {key: value.view(torch.uint8) if value.dtype == fp8 else value for key, value in state.items()}
    for given in ({}, options):
        parts = ranks.run(load_codes, config, sent, hidden, given)
        start = 0
        for (own_gate_up, own_down, _), count in zip(parts, EXPERTS_PER_RANK):
            for got, all_of_them in ((own_gate_up, gate_up), (own_down, down)):
                assert torch.equal(got[:count], all_of_them[start : start + count].float())
                assert torch.equal(got[count:], all_of_them[8:].float())
            start += count
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole(hidden), atol=1e-5, rtol=1e-4)
