"""ExpertWeights: rounding to every format and back against the reference, sizes, files, and what is refused."""

import dataclasses

import pytest
import torch

from mla_kernels import ExpertWeights, WeightFormat, quantisation_error
from mla_kernels.quant.nibbles import pack_nibbles, packed_bytes, unpack_nibbles
from mla_kernels.reference import quant as reference
from tests.quant.weights_problems import SIZES, VARIANTS, quantised, weights

BY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
ROUNDERS = {
    "fp8_block": lambda weight, power_of_two=False: reference.quantise_fp8_block(weight, power_of_two=power_of_two),
    "int8": reference.quantise_int8,
    "int8_w8a8": reference.quantise_int8,
    "int4": reference.quantise_int4,
    "mxfp4": reference.quantise_mxfp4,
}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain" and "searched" not in name])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_are_the_references(variant, sizes):
    format, options = VARIANTS[variant]
    originals = weights(*sizes)
    experts = ExpertWeights.quantise(*originals, format, **options)
    for name, original in zip(("gate_up", "down"), originals):
        for suffix, tensor in zip(("", "_scale", "_zero"), ROUNDERS[format](original, **options)):
            got = getattr(experts, name + suffix)
            assert torch.equal(got, tensor) if tensor is not None else got is None, name + suffix


@BY_VARIANT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_references(variant, dtype):
    experts = quantised(variant)
    for got, exact in zip(experts.dequantise(dtype), reference.dequantise_experts(experts, dtype=torch.float64)):
        assert got.dtype == dtype
        bound = {torch.float64: 0.0, torch.float32: 2.0**-24}.get(
            dtype, 2.0**-11 if dtype == torch.float16 else 2.0**-8
        )
        smallest = 2.0**-25 if dtype == torch.float16 else 2.0**-133
        assert ((got.double() - exact).abs() <= bound * exact.abs() * 1.01 + smallest).all()


@BY_VARIANT
def test_errors_are_those_of_the_format(variant):
    originals = tuple(torch.randn(2, rows, columns) * 0.05 for rows, columns in ((384, 256), (256, 192)))
    format, options = VARIANTS[variant]
    report = quantisation_error(*originals, ExpertWeights.quantise(*originals, format, **options))
    expected = {"plain": 0.0, "fp8_block": 0.027, "int8": 0.0075, "int8_w8a8": 0.0075, "int4": 0.1, "mxfp4": 0.12}
    for error in report.values():
        assert error.relative_rms <= expected[format]
        assert error.relative_rms <= error.worst_relative_rms <= 1.1 * error.relative_rms


@BY_VARIANT
def test_error_report_is_the_references(variant):
    originals, experts = weights(*SIZES[0]), quantised(variant)
    torch.manual_seed(0)
    experts = ExpertWeights.quantise(*originals, VARIANTS[variant][0], **VARIANTS[variant][1])
    report, exact = quantisation_error(*originals, experts), reference.quantisation_error(*originals, experts)
    for name in ("gate_up", "down"):
        assert report[name] == pytest.approx(exact[name], rel=1e-4, abs=1e-9)


def test_a_search_never_costs_accuracy():
    originals = weights(*SIZES[1])
    for format, options in (
        ("int4", {"group_size": 64}),
        ("int4", {"group_size": 64, "symmetric": False}),
        ("mxfp4", {}),
    ):
        plain, searched = (
            quantisation_error(*originals, ExpertWeights.quantise(*originals, format, search=search, **options))
            for search in (False, True)
        )
        assert all(searched[name].relative_rms < plain[name].relative_rms for name in plain)


@pytest.mark.parametrize("columns", [128, 160, 192, 224, 256, 288])
def test_nibbles(columns):
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    fill = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    packed = pack_nibbles(codes, fill)
    assert packed.shape == (5, packed_bytes(columns))
    assert torch.equal(packed, reference.pack_nibbles(codes, fill))
    assert torch.equal(unpack_nibbles(packed, columns), codes)
    assert torch.equal(reference.unpack_nibbles(packed, columns), codes)


def test_the_example_of_the_arrangement():
    codes = (torch.arange(160) % 16).to(torch.uint8)[None]
    packed = pack_nibbles(codes, 8)[0].tolist()
    code = codes[0].tolist()
    assert (packed[0], packed[63]) == (code[0] | code[64] << 4, code[63] | code[127] << 4)
    assert (packed[64], packed[96], packed[127]) == (8 | 8 << 4, 8 | code[128] << 4, 8 | code[159] << 4)


def test_two_dots_a_block_are_the_product():
    """What kernels do with the arrangement: every block, without masks."""
    columns, x = 224, torch.randn(3, 224, dtype=torch.float64)
    weight = torch.randn(5, columns, dtype=torch.float64)
    packed, scales, zeros = reference.quantise_int4(weight, 32, symmetric=False)
    total = torch.zeros(3, 5, dtype=torch.float64)
    for block in range(2):
        start = min(128 * block, columns - 128)
        run = packed[:, 64 * block : 64 * block + 64]
        for half, codes in enumerate((run & 0xF, run >> 4)):
            at = torch.arange(start + 64 * half, start + 64 * half + 64)
            total += x[:, at] @ ((codes.double() - zeros[:, at // 32]) * scales[:, at // 32]).T
    torch.testing.assert_close(total, x @ reference.dequantise_int4(packed, scales, zeros, columns, dtype=x.dtype).T)


def test_every_code_of_four_bits():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)[None]
    scales = torch.tensor([[0, 127, 200, 254]], dtype=torch.uint8)
    tensors = {"gate_up": pack_nibbles(codes, 0), "down": pack_nibbles(codes, 0)}
    tensors |= {"gate_up_scale": scales, "down_scale": scales}
    rows = {name: 256 if "gate" in name else 128 for name in tensors}
    experts = ExpertWeights("mxfp4", **{name: tensors[name].repeat(1, rows[name], 1) for name in tensors})
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values]).repeat(2)
    expected = torch.cat([values * 2.0**exponent for exponent in (-127, 0, 73, 127)])
    assert torch.equal(experts.dequantise()[1][0, 7], expected)
    scales = torch.full_like(experts.down_scale, 255)
    assert dataclasses.replace(experts, down_scale=scales).dequantise()[1].isnan().all()


@BY_VARIANT
def test_sizes(variant):
    experts = quantised(variant, (3, 192, 160), biases=True)
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (3, 192, 160)
    assert experts.nbytes == sum(tensor.nbytes for tensor in experts.tensors().values())
    gate_up, down = (3 * rows * columns for rows, columns in ((320, 192), (192, 160)))
    packed = 3 * (320 + 192) * 128  # two blocks of 64 bytes for 192 columns as for 160
    groups = 3 * (320 * 6 + 192 * 5)
    scale_bytes = 2 if "bf16" in variant else 4
    expected = {
        "plain": 4 * (gate_up + down),
        "fp8_block": gate_up + down + 4 * 3 * (3 * 2 + 2 * 2),
        "int8": gate_up + down + 4 * 3 * (320 + 192),
        "int8_w8a8": gate_up + down + 4 * 3 * (320 + 192),
        "int4": packed + groups * (scale_bytes + ("zeros" in variant)),
        "mxfp4": packed + groups,
    }[experts.format.value]
    assert experts.bytes_per_parameter == expected / (gate_up + down)


@BY_VARIANT
def test_a_file_keeps_everything(variant, tmp_path):
    from safetensors import safe_open
    from safetensors import torch as save

    experts, path = quantised(variant, biases=True), tmp_path / "experts.safetensors"
    save.save_file(experts.tensors(), path, experts.metadata())
    with safe_open(path, "pt") as file:
        restored = ExpertWeights.from_tensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
    assert restored.format == experts.format and restored.group_size == experts.group_size
    assert restored.tensors().keys() == experts.tensors().keys()
    assert all(torch.equal(tensor, getattr(experts, name)) for name, tensor in restored.tensors().items())


@BY_VARIANT
def test_to_another_device(variant):
    experts = quantised(variant, biases=True)
    assert experts.to("cpu") is experts
    moved = experts.to("meta")
    assert moved.device.type == "meta" and moved.bytes_per_parameter == experts.bytes_per_parameter


def test_eight_bit_floats_are_taken_as_bytes():
    experts = quantised("fp8_block")
    tensors = experts.tensors() | {
        name: getattr(experts, name).view(torch.float8_e4m3fn) for name in ("gate_up", "down")
    }
    assert torch.equal(ExpertWeights("fp8_block", **tensors).gate_up, experts.gate_up)
    with pytest.raises(TypeError, match=r"gate_up: got torch.float8_e5m2"):
        ExpertWeights("fp8_block", **experts.tensors() | {"gate_up": experts.gate_up.view(torch.float8_e5m2)})
    with pytest.raises(TypeError, match=r"gate_up: got torch.float8_e4m3fn, format 'plain' has codes"):
        ExpertWeights.plain(tensors["gate_up"], tensors["down"])
    with pytest.raises(TypeError, match=r"gate_up: got torch.float8_e4m3fn, format 'mxfp4' has codes"):
        ExpertWeights("mxfp4", **quantised("mxfp4").tensors() | {"gate_up": tensors["gate_up"]})


def test_scales_that_are_powers_of_two_in_a_byte():
    experts = quantised("fp8_block, powers of two")
    names = ("gate_up_scale", "down_scale")
    scales = {name: getattr(experts, name).to(torch.float8_e8m0fnu) for name in names}
    again = ExpertWeights("fp8_block", **experts.tensors() | scales)
    assert torch.equal(again.gate_up_scale, experts.gate_up_scale) and again.gate_up_scale.dtype == torch.float32
    codes = quantised("int8").tensors()
    with pytest.raises(TypeError, match="gate_up_scale of format 'int8': got dtype float8_e8m0fnu"):
        ExpertWeights("int8", **codes | {name: codes[name].to(torch.float8_e8m0fnu) for name in names})


def test_weights_larger_than_a_working_set_are_rounded_in_parts():
    """More rows than are worked on at a time, and rows that end inside a block of scales."""
    gate_up, down = torch.randn(1, 1400, 128), torch.randn(1, 128, 700)
    for format in ("fp8_block", "int8"):
        experts = ExpertWeights.quantise(gate_up, down, format)
        codes, scales = ROUNDERS[format](gate_up)
        assert torch.equal(experts.gate_up, codes) and torch.equal(experts.gate_up_scale, scales)
        assert torch.equal(experts.dequantise()[0], reference.dequantise_experts(experts)[0])


def remade(experts, **changes):
    return lambda: ExpertWeights(
        **{field.name: getattr(experts, field.name) for field in dataclasses.fields(experts) if field.init} | changes
    )


def rounded(*weights, **options):
    return lambda: ExpertWeights.quantise(*weights, **options)


def from_tensors(tensors):
    return lambda: ExpertWeights.from_tensors(tensors, {"format": "plain"})


def refusals():
    int4, int8, fp8, plain = (quantised(name) for name in ("int4 with zeros", "int8", "fp8_block", "plain"))
    weights = plain.gate_up, plain.down
    large = [torch.full_like(weight, 2.0**125).bfloat16() for weight in weights]
    return [
        (remade(int8, format="int5"), ValueError, r"format: got 'int5', accepted: 'plain', 'fp8_block'"),
        (remade(int8, down=int4.down), TypeError, r"down: got torch.uint8, format 'int8' has codes of torch.int8"),
        (remade(int8, format="mxfp4"), TypeError, r"gate_up: got torch.int8, format 'mxfp4' has codes of"),
        (remade(int8, format="plain"), TypeError, r"gate_up: got torch.int8, format 'plain' has codes"),
        (remade(plain, down=plain.down.half()), ValueError, r"down: got torch.float16 on cpu, gate_up's are "),
        (remade(int8, gate_up=None), TypeError, r"gate_up: got None"),
        (remade(int8, gate_up=[1]), TypeError, r"gate_up: got list, a torch.Tensor"),
        (remade(int8, gate_up=int8.gate_up[0]), ValueError, r"gate_up: got 2 dimensions"),
        (remade(int8, gate_up=int8.gate_up[:, 1:]), ValueError, r"gate_up: got 319 rows an expert"),
        (remade(int8, gate_up=int8.gate_up[:, :, 1:]), ValueError, r"gate_up: got shape \(3, 320, 191\), with E 3"),
        (remade(int8, down=int8.down[:2]), ValueError, r"down: got shape \(2, 192, 160\)"),
        (remade(int8, gate_up=int8.gate_up.mT.contiguous().mT), ValueError, r"gate_up: got strides"),
        (remade(int8, gate_up_scale=None), ValueError, r"gate_up_scale: got None, format 'int8' has \(3, 320\)"),
        (remade(int8, gate_up_scale=fp8.gate_up_scale), ValueError, r"gate_up_scale of format 'int8': got shape"),
        (remade(int8, down_scale=int8.down_scale.half()), TypeError, r"down_scale of format 'int8': got dtype float16"),
        (remade(int8, down_zero=int4.down_zero), ValueError, r"down_zero: got a tensor, format 'int8' has none"),
        (remade(plain, down_scale=int8.down_scale), ValueError, r"down_scale: got a tensor, format 'plain' has none"),
        (remade(int4, down_zero=None), ValueError, r"gate_up_zero, down_zero: got one of them"),
        (remade(int4, down_scale=int4.down_scale.half()), TypeError, r"down_scale: got torch.float16, gate_up_scale"),
        (remade(int4, group_size=None), ValueError, r"group_size: got None, with format 'int4' accepted: 32, 64, 128"),
        (remade(int4, group_size=48), ValueError, r"group_size: got 48"),
        (remade(int4, group_size=128), ValueError, r"gate_up: got 192 columns; at least 128, in whole groups of 128"),
        (remade(int4, group_size=64), ValueError, r"gate_up_scale of format 'int4': got shape \(3, 320, 6\)"),
        (remade(int8, group_size=32), ValueError, r"group_size: got 32, with format 'int8' accepted: None"),
        (remade(int8, down_bias=torch.ones(3, 160)), ValueError, r"down_bias of format 'int8': got shape \(3, 160\)"),
        (remade(int8, down_bias=torch.ones(3, 192).int()), TypeError, r"down_bias of format 'int8': got dtype int32"),
        (lambda: quantised("int4", (1, 128, 64)), ValueError, r"down: got 64 columns; at least 128"),
        (rounded(*weights, format="int8", group_size=32), ValueError, r"group_size: format 'int8' has no such option"),
        (rounded(*weights, format="mxfp4", symmetric=False), ValueError, r"symmetric: format 'mxfp4' has no such"),
        (rounded(*weights, format="int4", group_size=128), ValueError, r"gate_up: got 192 columns"),
        (rounded(*weights, format="int4", group_size=32, scale_dtype=torch.int8), ValueError, r"scale_dtype: got"),
        (rounded(weights[0] / 0, weights[1], format="int8"), ValueError, r"gate_up: got values that are not finite in"),
        (rounded(*large, format="int4", group_size=32), ValueError, r"gate_up: expert 0: got scales up to 6.06e"),
        (rounded(int8.gate_up, int8.down, format="int8"), TypeError, r"gate_up: got torch.int8, format 'plain'"),
        (from_tensors({"gate": plain.gate_up}), ValueError, r"tensors: name: got 'gate', accepted: 'gate_up'"),
        (from_tensors({"down": plain.down}), ValueError, r"tensors: got none named 'gate_up'"),
        (lambda: quantisation_error(plain.down, plain.down, int8), ValueError, r"gate_up: got shape \(3, 192, 160\)"),
        (int8.to("meta").prepack, ValueError, r"prepack: got weights on meta"),
    ]  # fmt: skip


def test_refusals():
    for build, error, message in refusals():
        with pytest.raises(error, match=message):
            build()


def test_formats_are_strings():
    assert WeightFormat("int4") is WeightFormat.INT4 == "int4"
    assert quantised("int4").format is WeightFormat.INT4
    assert quantised("mxfp4").group_size == 32
