"""Converters of checkpoints, judged by what the formats' own projects do to restore a weight."""

import pytest
import torch

from mla_kernels import Activation, ExpertWeights, fused_experts, launch
from mla_kernels.reference import quant as reference

EXPERTS, HIDDEN, INTERMEDIATE = 2, 192, 160
SHAPES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(bits):
    """int32 of integers that fit 32 bits without a sign."""
    return (bits - (bits >> 31 << 32)).to(torch.int32)


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def gptq_weight(qweight, scales, qzeros, g_idx):
    """[K, N] as gptqmodel's PackableQuantLinear restores it from version 2 (nn_modules/qlinear/__init__.py), 4 bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None]
    zeros = torch.bitwise_right_shift(qzeros[:, :, None].expand(-1, -1, 8), shifts[None]).to(torch.int8) & 15
    zeros = zeros.reshape(scales.shape)
    weight = torch.bitwise_right_shift(qweight[:, None].expand(-1, 8, -1), shifts[..., None]).to(torch.int8) & 15
    weight = weight.reshape(-1, qweight.shape[1])
    return scales[g_idx.long()].double() * (weight - zeros[g_idx.long()])


def autoawq_weight(qweight, scales, qzeros, group_size):
    """[K, N] as AutoAWQ restores it (awq/utils/packing_utils.py: unpack_awq, reverse_awq_order, dequantize_gemm)."""
    shifts = torch.arange(0, 32, 4)

    def unpack(packed):
        values = torch.bitwise_right_shift(packed[:, :, None], shifts[None, None]).to(torch.int8).view(len(packed), -1)
        order = torch.arange(values.shape[1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
        return values[:, order] & 15

    scales = scales.repeat_interleave(group_size, 0).double()
    return (unpack(qweight) - unpack(qzeros).repeat_interleave(group_size, 0)) * scales


def gptq_expert(group_size, zeros=None):
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        groups = columns // group_size
        tensors |= {
            f"{name}.qweight": random_words(columns // 8, rows),
            f"{name}.scales": torch.rand(groups, rows).half(),
            f"{name}.qzeros": random_words(groups, rows // 8)
            if zeros is None
            else torch.full((groups, rows // 8), zeros, dtype=torch.int32),
            f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // group_size,
        }
    return tensors


def awq_expert(group_size):
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        groups = columns // group_size
        tensors |= {
            f"{name}.qweight": random_words(columns, rows // 8),
            f"{name}.scales": torch.rand(groups, rows).half(),
            f"{name}.qzeros": random_words(groups, rows // 8),
        }
    return tensors


def fp8_expert(intermediate=256, power_of_two=False):
    tensors = {}
    for name, (rows, columns) in {
        "gate_proj": (intermediate, 192),
        "up_proj": (intermediate, 192),
        "down_proj": (192, intermediate),
    }.items():
        codes, scales = reference.quantise_fp8_block(torch.randn(rows, columns), power_of_two=power_of_two)
        tensors |= {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}
    return tensors


def joined(weights):
    """gate_up and down [E, N, K] of one mapping of projections an expert."""
    gate_up = torch.stack([torch.cat([weight["gate_proj"], weight["up_proj"]]) for weight in weights])
    return gate_up, torch.stack([weight["down_proj"] for weight in weights])


def assert_restores(experts, weights):
    for got, exact in zip(experts.dequantise(torch.float64), joined(weights)):
        assert torch.equal(got, exact)


def to_version_1(expert):
    """gptqmodel's convert_gptq_v2_to_v1_format_module (utils/model.py), 4 bits: one subtraction a word."""
    return {
        name: tensor - 0b00010001000100010001000100010001 if name.endswith("qzeros") else tensor
        for name, tensor in expert.items()
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("with_g_idx", [True, False])
def test_gptq(version, with_g_idx):
    """Random zeros: in half of the words at least one is 0, which borrows in version 1."""
    tensors = [gptq_expert(32) for _ in range(EXPERTS)]
    parts = ("qweight", "scales", "qzeros", "g_idx")
    weights = [{name: gptq_weight(*(expert[f"{name}.{part}"] for part in parts)).T for name in SHAPES}
               for expert in tensors]  # fmt: skip
    tensors = [to_version_1(expert) if version == 1 else expert for expert in tensors]
    if not with_g_idx:
        tensors = [{name: tensor for name, tensor in expert.items() if "g_idx" not in name} for expert in tensors]
    experts = ExpertWeights.from_gptq(tensors, version=version)
    assert experts.group_size == 32 and experts.gate_up_scale.dtype == torch.float16
    assert_restores(experts, weights)


@pytest.mark.parametrize("largest, accepted", [(2.0**121, True), (2.0**122, False), (float("nan"), False)])
def test_scales_that_chips_would_decode_to_other_numbers(largest, accepted):
    """Which are of int4 in bfloat16 alone."""
    tensors = gptq_expert(32)
    scales = {name: value.float() for name, value in tensors.items() if name.endswith("scales")}
    scales["up_proj.scales"][0, 0] = largest
    ExpertWeights.from_gptq([tensors | scales])
    tensors |= {name: value.bfloat16() for name, value in scales.items()}
    if accepted:
        ExpertWeights.from_gptq([tensors])
        return
    with pytest.raises(ValueError, match=r"up_proj: got scales up to .*; in bfloat16 magnitudes below 2\^122 are"):
        ExpertWeights.from_gptq([tensors])


@pytest.mark.parametrize(
    ("zeros", "word"),
    [
        ((8,) * 8, 0x77777777),
        ((0,) * 8, 0xEEEEEEEF),
        ((15,) * 8, 0xEEEEEEEE),
        ((0, 8, 8, 8, 8, 8, 8, 8), 0x7777776F),
        ((8, 8, 8, 8, 8, 8, 8, 0), 0xF7777777),
        ((3, 0, 0, 9, 15, 0, 1, 0), 0xEFFE7EF2),
    ],
)
def test_gptq_zeros_of_version_1_by_hand(zeros, word):
    """A zero of 0 becomes 15 and borrows 1 from the next nibble, and so on through the word."""
    packed = sum(zero << 4 * place for place, zero in enumerate(zeros))
    assert (packed - 0x11111111) % 2**32 == word
    tensors = gptq_expert(32, zeros=word - (word >> 31 << 32))
    experts = ExpertWeights.from_gptq([tensors])
    if zeros == (8,) * 8:  # needs no tensor here
        assert experts.gate_up_zero is None and experts.down_zero is None
    else:
        assert experts.down_zero[0, :, 0].tolist() == list(zeros) * (HIDDEN // 8)
    exact = gptq_expert(32, zeros=packed - (packed >> 31 << 32)) | {
        name: tensor for name, tensor in tensors.items() if "qzeros" not in name
    }
    parts = ("qweight", "scales", "qzeros", "g_idx")
    assert_restores(experts, [{name: gptq_weight(*(exact[f"{name}.{part}"] for part in parts)).T for name in SHAPES}])


def test_gptq_in_act_order_is_refused():
    tensors = gptq_expert(32)
    tensors["up_proj.g_idx"] = tensors["up_proj.g_idx"].flip(0)
    with pytest.raises(NotImplementedError, match=r"experts\[0\]: up_proj.g_idx: got columns .*desc_act"):
        ExpertWeights.from_gptq([tensors])


def test_awq():
    tensors = [awq_expert(32) for _ in range(EXPERTS)]
    parts = ("qweight", "scales", "qzeros")
    weights = [
        {name: autoawq_weight(*(expert[f"{name}.{part}"] for part in parts), 32).T for name in SHAPES}
        for expert in tensors
    ]
    assert_restores(ExpertWeights.from_awq(tensors), weights)


def test_awq_packs_rows_in_its_order():
    """What the docstring says of a word's nibbles, by packing."""
    codes = torch.randint(0, 16, (128, 128))  # [K, N]
    packed = words(sum(codes[:, row::8] << 4 * place for place, row in enumerate(AWQ_ORDER)))
    scales, zeros = torch.ones(4, 128), torch.zeros(4, 16, dtype=torch.int32)
    expert = {f"{name}.{part}": tensor for name in SHAPES for part, tensor in
              (("qweight", packed), ("scales", scales), ("qzeros", zeros))}  # fmt: skip
    assert torch.equal(ExpertWeights.from_awq([expert]).dequantise()[1][0], codes.T.float())


def test_mxfp4_of_gpt_oss():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors as judge

    shapes = {"gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    tensors, exact = [], []
    for rows, columns in shapes.values():
        blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 140, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
        tensors += [blocks, scales]
        exact.append(judge(blocks, scales, dtype=torch.float32).transpose(1, 2))
    experts = ExpertWeights.from_mxfp4(*tensors)
    assert all(torch.equal(got, weight) for got, weight in zip(experts.dequantise(), exact))
    flat = [tensor.flatten(2).view(torch.int8) if tensor.dim() == 4 else tensor for tensor in tensors]
    assert torch.equal(ExpertWeights.from_mxfp4(*flat).gate_up, experts.gate_up)


def test_gpt_oss_by_the_names_of_its_files():
    """model.layers.0.mlp.experts.gate_up_proj_blocks and so on: gate's rows are the even ones."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors as judge

    prefix, file = "model.layers.0.mlp.experts.", {}
    for name, rows, columns in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
        file |= {
            f"{prefix}{name}_blocks": torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8),
            f"{prefix}{name}_scales": torch.randint(118, 123, (EXPERTS, rows, columns // 32), dtype=torch.uint8),
            f"{prefix}{name}_bias": torch.randn(EXPERTS, rows).bfloat16(),
        }
    parts = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales", "gate_up_proj_bias",
             "down_proj_bias")  # fmt: skip
    experts = ExpertWeights.from_mxfp4(*(file[prefix + part] for part in parts))
    gate_up, down = (
        judge(file[f"{prefix}{name}_blocks"], file[f"{prefix}{name}_scales"], dtype=torch.float32).double()
        for name in ("gate_up_proj", "down_proj")
    )  # [E, K, N]
    biases = [file[f"{prefix}{name}_bias"].double() for name in ("gate_up_proj", "down_proj")]
    hidden, weights, ids = torch.randn(5, HIDDEN).bfloat16(), torch.rand(5, 2), torch.tensor([[0, 1]] * 5)
    exact = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for expert in range(EXPERTS):
        both = hidden.double() @ gate_up[expert] + biases[0][expert]
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        out = (gate * (1.702 * gate).sigmoid() * (up + 1)) @ down[expert] + biases[1][expert]
        exact += weights[:, expert : expert + 1].double() * out
    activation = Activation("gpt_oss", limit=7.0, interleaved=True)
    with launch.on_cpu("torch"):
        out = fused_experts(hidden, experts, weights, ids.int(), activation=activation)
    assert ((out.double() - exact).abs().max() / exact.abs().max()) < 0.015


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_of_deepseek_v3(scale_dtype):
    from transformers.integrations import finegrained_fp8 as fp8

    tensors = [fp8_expert(power_of_two=scale_dtype == torch.float8_e8m0fnu) for _ in range(EXPERTS)]
    for expert in tensors:
        for name in SHAPES:
            expert[f"{name}.weight_scale_inv"] = expert[f"{name}.weight_scale_inv"].to(scale_dtype)
    experts = ExpertWeights.from_fp8(tensors)
    assert experts.gate_up_scale.dtype == torch.float32
    judge, weights = fp8.Fp8Dequantize(None)._dequantize_one, []
    for expert in tensors:
        restored = {}
        for name in SHAPES:
            codes = expert[f"{name}.weight"].view(torch.uint8)
            rows, columns = codes.shape
            whole = torch.nn.functional.pad(codes, (0, -columns % 128, 0, -rows % 128))  # the judge takes whole blocks
            scales = expert[f"{name}.weight_scale_inv"].float()
            restored[name] = judge(whole.view(torch.float8_e4m3fn), scales, torch.float32)[:rows, :columns]
        weights.append(restored)
    for got, exact in zip(experts.dequantise(), joined(weights)):
        assert torch.equal(got, exact)


def under_v4_names(expert):
    """DeepSeek-V4's own: w1, w3 and w2, and scale."""
    for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        expert = {name.replace(f"{ours}.", f"{theirs}."): tensor for name, tensor in expert.items()}
    return {name.replace("weight_scale_inv", "scale"): tensor for name, tensor in expert.items()}


def test_fp8_of_deepseek_v4():
    tensors = [fp8_expert(power_of_two=True) for _ in range(EXPERTS)]
    published = [
        {
            name: x.to(torch.float8_e8m0fnu) if name.endswith("scale") else x
            for name, x in under_v4_names(expert).items()
        }
        for expert in tensors
    ]
    assert sorted(published[0]) == [f"w{number}.{part}" for number in (1, 2, 3) for part in ("scale", "weight")]
    expected = ExpertWeights.from_fp8(tensors).tensors()
    for name, tensor in ExpertWeights.from_fp8(published).tensors().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8, torch.float4_e2m1fn_x2])
def test_mxfp4_of_deepseek_v4(codes):
    """One tensor a projection and expert, the even column in a byte's low nibble."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors as judge

    experts, weights = [], []
    for _ in range(EXPERTS):
        expert, weight = {}, {}
        for name, (rows, columns) in SHAPES.items():
            pairs = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
            scales = torch.randint(110, 140, (rows, columns // 32), dtype=torch.uint8)
            expert |= {f"{name}.weight": pairs.view(codes), f"{name}.scale": scales.view(torch.float8_e8m0fnu)}
            weight[name] = judge(pairs.view(1, rows, -1, 16), scales[None], dtype=torch.float32)[0].T.double()
        experts.append(under_v4_names(expert))
        weights.append(weight)
    assert_restores(ExpertWeights.from_mxfp4_experts(experts), weights)
    nan = {"w3.scale": torch.full((INTERMEDIATE, HIDDEN // 32), 255, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"up_proj.scale: got scales that are not finite"):
        ExpertWeights.from_mxfp4_experts([experts[0] | nan])
    del experts[1]["w3.scale"]
    with pytest.raises(KeyError, match=r"experts\[1\]: up_proj: got no tensor named 'w3.scale'"):
        ExpertWeights.from_mxfp4_experts(experts)


def test_rounding_to_fp8_is_that_of_transformers():
    """Codes and scales of its Fp8Quantize, up to how often it rounds a scale."""
    from types import SimpleNamespace

    from transformers.integrations import finegrained_fp8 as fp8

    for power_of_two in (False, True):
        scale_format = "ue8m0" if power_of_two else "float"
        config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_format)
        weight = torch.randn(256, 384)
        result = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"a.weight": weight})
        codes, scales = reference.quantise_fp8_block(weight, power_of_two=power_of_two)
        torch.testing.assert_close(scales, result["a.weight_scale_inv"].float(), rtol=2.0**-22, atol=0)
        same = codes == result["a.weight"].view(torch.uint8)
        assert same.all() if power_of_two else same.float().mean() > 0.999


def test_numbers_of_mxfp4_are_those_of_transformers():
    from transformers.integrations.mxfp4 import FP4_VALUES as table

    values = reference.decode_e2m1(torch.arange(16))
    assert values.tolist() == table
    assert torch.equal(reference.encode_e2m1(values), torch.arange(16, dtype=torch.uint8))
    middles = (values[:7] + values[1:8]) / 2
    even = [value for pair in zip(range(7), range(1, 8)) for value in pair if value % 2 == 0]
    assert reference.encode_e2m1(middles).tolist() == even
    assert reference.encode_e2m1(torch.tensor([7.0, 1e30, -7.0])).tolist() == [7, 7, 15]


def test_a_mapping_may_load_lazily():
    tensors, asked = gptq_expert(32), []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return tensors[name]

        def get(self, name):
            return self[name]

    ExpertWeights.from_gptq([Lazy.fromkeys(tensors)])
    assert sorted(asked) == sorted(tensors)


def test_refusals():
    gptq, awq, fp8 = gptq_expert(32), awq_expert(32), fp8_expert()
    blocks, scales = torch.zeros(1, 256, 4, 16, dtype=torch.uint8), torch.zeros(1, 256, 4, dtype=torch.uint8)
    halves, wide = {"up_proj.scales": torch.zeros(6, 164)}, {"down_proj.scales": torch.rand(5, 192)}
    nan = {"up_proj.weight": torch.full((256, 192), 0xFF, dtype=torch.uint8)}
    flat = {"up_proj.weight_scale_inv": torch.ones(2)}
    infinite = {"up_proj.weight_scale_inv": torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    small = {name: tensor[:1] if "scales" in name or "zeros" in name else tensor for name, tensor in gptq.items()}
    cases = [
        ("gptq", [], TypeError, r"experts: got list, a sequence of at least one"),
        ("gptq", iter([gptq]), TypeError, r"experts: got list_iterator"),
        ("gptq", [awq], ValueError, r"experts\[0\]: gate_proj: got 20 rows, a multiple of 8"),
        ("awq", [gptq], ValueError, r"experts\[0\]: gate_proj.scales: got shape"),
        ("gptq", [small], ValueError, r"gate_proj: got 1 scales a row of 192 columns"),
        ("gptq", [gptq | halves], ValueError, r"up_proj.scales: got shape \(6, 164\)"),
        ("gptq", [gptq, {}], KeyError, r"experts\[1\]: gate_proj: got no tensor named 'gate_proj.qweight'"),
        ("gptq", [gptq, gptq_expert(32) | wide], TypeError, r"experts\[1\]: down_scale: got dtype float32"),
        ("fp8", [gptq], KeyError, r"no tensor named 'gate_proj.weight'"),
        ("fp8", [fp8_expert(160)], NotImplementedError, r"got an intermediate size of 160, multiples of 128"),
        ("fp8", [fp8 | nan], ValueError, r"up_proj.weight: got NaN"),
        ("fp8", [fp8 | flat], ValueError, r"up_proj.weight_scale_inv: got shape \(2,\)"),
        ("fp8", [fp8 | infinite], ValueError, r"up_proj.weight_scale_inv: got scales that are not finite"),
    ]
    for format, experts, error, message in cases:
        with pytest.raises(error, match=message):
            getattr(ExpertWeights, f"from_{format}")(experts)
    with pytest.raises(ValueError, match=r"version: got 3, accepted: 1, 2"):
        ExpertWeights.from_gptq([gptq], version=3)
    with pytest.raises(ValueError, match=r"down_blocks: got shape \(1, 256, 2, 16\)"):
        ExpertWeights.from_mxfp4(blocks, scales, blocks[:, :, :2], scales)
    with pytest.raises(ValueError, match=r"gate_up_blocks: got 64 columns"):
        ExpertWeights.from_mxfp4(blocks[:, :, :2], scales[:, :, :2], blocks, scales)
