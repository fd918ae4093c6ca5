"""Converters of checkpoints, judged by what the formats' own projects do to restore a weight."""

import pytest
import torch

from mla_kernels import ExpertWeights
from mla_kernels.reference import quant as reference

EXPERTS, HIDDEN, INTERMEDIATE = 2, 192, 160
SHAPES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(bits):
    """int32 of integers that fit 32 bits without a sign."""
    return (bits - (bits >> 31 << 32)).to(torch.int32)


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def autogptq_weight(qweight, scales, qzeros, g_idx, wrap=True):
    """[K, N] as AutoGPTQ's QuantLinear.forward restores it (nn_modules/qlinear/qlinear_cuda_old.py), 4 bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None]
    zeros = torch.bitwise_right_shift(qzeros[:, :, None].expand(-1, -1, 8), shifts[None]).to(torch.int8) & 15
    zeros = ((zeros + 1) & 15 if wrap else zeros).reshape(scales.shape)
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


def fp8_expert(intermediate=256):
    tensors = {}
    for name, (rows, columns) in {
        "gate_proj": (intermediate, 192),
        "up_proj": (intermediate, 192),
        "down_proj": (192, intermediate),
    }.items():
        codes, scales = reference.quantise_fp8_block(torch.randn(rows, columns))
        tensors |= {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}
    return tensors


def joined(weights):
    """gate_up and down [E, N, K] of one mapping of projections an expert."""
    gate_up = torch.stack([torch.cat([weight["gate_proj"], weight["up_proj"]]) for weight in weights])
    return gate_up, torch.stack([weight["down_proj"] for weight in weights])


def assert_restores(experts, weights):
    for got, exact in zip(experts.dequantise(torch.float64), joined(weights)):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("with_g_idx", [True, False])
def test_gptq(version, with_g_idx):
    tensors = [gptq_expert(32) for _ in range(EXPERTS)]
    weights = [
        {name: autogptq_weight(*(expert[f"{name}.{part}"] for part in ("qweight", "scales", "qzeros", "g_idx")),
                               wrap=version == 1).T for name in SHAPES}
        for expert in tensors
    ]  # fmt: skip
    if not with_g_idx:
        tensors = [{name: tensor for name, tensor in expert.items() if "g_idx" not in name} for expert in tensors]
    experts = ExpertWeights.from_gptq(tensors, version=version)
    assert experts.group_size == 32 and experts.gate_up_scale.dtype == torch.float16
    assert_restores(experts, weights)


def test_gptq_without_zeros_of_its_own():
    """Symmetric checkpoints store 7 for 8 everywhere, which needs no tensor here."""
    tensors = [gptq_expert(32, zeros=0x77777777)]
    experts = ExpertWeights.from_gptq(tensors)
    assert experts.gate_up_zero is None and experts.down_zero is None
    parts = ("qweight", "scales", "qzeros", "g_idx")
    assert_restores(
        experts, [{name: autogptq_weight(*(tensors[0][f"{name}.{part}"] for part in parts)).T for name in SHAPES}]
    )


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


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_of_deepseek_v3(scale_dtype):
    from transformers.integrations import finegrained_fp8 as fp8

    tensors = [fp8_expert() for _ in range(EXPERTS)]
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
