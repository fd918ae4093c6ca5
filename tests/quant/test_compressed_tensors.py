"""compressed-tensors' integer weights in ExpertWeights, packed by the formula that the project publishes.

compressed_tensors/compressors/pack_quantized/helpers.py: code + 2^(bits - 1), without a sign, column c in the bits from
c bits on of a row's words; compressors/naive_quantized: the codes themselves. Zero points are packed along the rows.
"""

import pytest
import torch

from mla_kernels import ExpertWeights

HIDDEN, INTERMEDIATE = 192, 160
SHAPES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}


def pack(codes, bits):
    """int32 [rows, ceil(columns bits / 32)] of signed codes [rows, columns]."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int64)
    for column in range(columns):
        words[:, column * bits // 32] |= (codes[:, column].long() + 2 ** (bits - 1)) << column * bits % 32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def expert(bits=4, group=32, zeros=False, scale_dtype=torch.bfloat16, shapes=SHAPES):
    """A file's tensors by their names after ``experts.{e}.``, and the true weights; ``group`` None: whole rows."""
    file, true = {}, {}
    for name, (rows, columns) in shapes.items():
        groups = 1 if group is None else columns // group
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))
        scale = (torch.rand(rows, groups) * 0.01 + 0.001).to(scale_dtype)
        zero = torch.randint(-8, 8, (rows, groups)) if zeros else torch.zeros(rows, groups, dtype=torch.int64)
        file |= {
            f"{name}.weight_packed": pack(codes, bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }
        if zeros:
            file[f"{name}.weight_zero_point"] = pack(zero.T, 4).T.contiguous()
        wide = [value.double().repeat_interleave(columns // groups, 1) for value in (zero, scale)]
        true[name] = (codes - wide[0]) * wide[1]
    return file, true


def assert_restores(experts, weights):
    gate_up, down = experts.dequantise(torch.float64)
    for number, weight in enumerate(weights):
        assert torch.equal(gate_up[number], torch.cat([weight["gate_proj"], weight["up_proj"]]))
        assert torch.equal(down[number], weight["down_proj"])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_in_groups(zeros, scale_dtype):
    """Kimi-K2-Thinking's: groups of 32, scales in bfloat16, no zeros."""
    files, weights = zip(*(expert(4, 32, zeros, scale_dtype) for _ in range(3)))
    experts = ExpertWeights.from_compressed_tensors(files)
    assert experts.format == "int4" and experts.group_size == 32 and experts.gate_up_scale.dtype == scale_dtype
    assert (experts.gate_up_zero is not None) == zeros
    assert_restores(experts, weights)


@pytest.mark.parametrize(("group", "expected"), [(64, 64), (128, 128), (None, 128)])
def test_int4_in_wider_groups_and_whole_rows(group, expected):
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    file, true = expert(4, group, zeros=True, shapes=shapes)
    experts = ExpertWeights.from_compressed_tensors([file])
    assert experts.group_size == expected
    assert_restores(experts, [true])


def test_whole_rows_of_unlike_widths_share_one_group():
    file, true = expert(4, None)
    experts = ExpertWeights.from_compressed_tensors([file])
    assert experts.group_size == 32  # 64 divides 192 and not 160
    assert_restores(experts, [true])


def test_an_expert_without_zeros_among_some_with():
    (first, one), (second, other) = expert(), expert(zeros=True)
    experts = ExpertWeights.from_compressed_tensors([first, second])
    assert (experts.gate_up_zero[0] == 8).all()
    assert_restores(experts, [one, other])
    mixed = first | {name: tensor for name, tensor in second.items() if name.startswith("up_proj")}
    assert_restores(ExpertWeights.from_compressed_tensors([mixed]), [one | {"up_proj": other["up_proj"]}])


@pytest.mark.parametrize("format", ["int8", "int8_w8a8"])
def test_int8(format):
    file, true = expert(8, None)
    experts = ExpertWeights.from_compressed_tensors([file], format=format)
    assert experts.format == format
    assert_restores(experts, [true])
    plain = {}
    for name, (_, columns) in SHAPES.items():
        plain[f"{name}.weight"] = (file[f"{name}.weight_packed"].view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)
        plain[f"{name}.weight_scale"] = file[f"{name}.weight_scale"]
    assert_restores(ExpertWeights.from_compressed_tensors([plain], format=format), [true])


def test_act_order():
    """g_idx of groups in order, or of -1 everywhere, says nothing; another order is refused."""
    file, true = expert()
    for order in (torch.arange(HIDDEN, dtype=torch.int32) // 32, torch.full((HIDDEN,), -1, dtype=torch.int32)):
        assert_restores(ExpertWeights.from_compressed_tensors([file | {"up_proj.weight_g_idx": order}]), [true])
    shuffled = {"up_proj.weight_g_idx": torch.arange(HIDDEN, dtype=torch.int32).flip(0) // 32}
    with pytest.raises(NotImplementedError, match=r"experts\[0\]: up_proj.weight_g_idx: got columns .*actorder"):
        ExpertWeights.from_compressed_tensors([file | shuffled])


def test_refusals():
    four, eight = expert(4)[0], expert(8, None)[0]
    grouped, with_zeros = expert(8, 32)[0], {"up_proj.weight_zero_point": torch.zeros(20, 6, dtype=torch.int32)}
    cases = [
        (four, {"format": "int8"}, ValueError, r"experts\[0\]: gate_proj: got format 'int4', experts of format 'int8'"),
        (eight, {}, ValueError, r"got format 'int8', experts of format 'int4'"),
        (four, {"format": "fp8_block"}, ValueError, r"format: got 'fp8_block', accepted: 'int4', 'int8', 'int8_w8a8'"),
        (grouped, {"format": "int8"}, ValueError, r"gate_proj.weight_scale: got shape \(160, 6\), one for each row"),
        (
            eight | with_zeros,
            {"format": "int8"},
            NotImplementedError,
            "weight_zero_point: got a tensor, 8 bits",
        ),
        (expert(4, 16)[0], {}, ValueError, r"gate_proj.weight_scale: got 12 scales a row of 192 columns; one, or"),
    ]
    changes = {
        "up_proj.weight_packed": (torch.zeros(160, 20, dtype=torch.int32), ValueError, r"got shape \(160, 20\), with"),
        "up_proj.weight_scale": (torch.ones(160, 6, dtype=torch.int8), TypeError, "weight_scale: got dtype int8"),
        "up_proj.weight_shape": (torch.tensor([160]), ValueError, r"weight_shape: got shape \(1,\), \(2\)"),
        "up_proj.weight_zero_point": (torch.zeros(160, 6), ValueError, r"weight_zero_point: got shape \(160, 6\)"),
    }
    cases += [(four | {name: value}, {}, error, message) for name, (value, error, message) in changes.items()]
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        without = {key: value for key, value in four.items() if key != f"up_proj.{name}"}
        cases.append((without, {}, KeyError, f"experts.0.: up_proj: got no tensor named 'up_proj.{name}'"))
    for file, options, error, message in cases:
        with pytest.raises(error, match=message):
            ExpertWeights.from_compressed_tensors([file], **options)
