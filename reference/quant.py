"""What the weight formats of the experts hold, and what experts in these formats compute.

A weight is [..., N, K]: N outputs (rows), K inputs (columns), and any number of leading axes, usually one for experts.

| format    | codes                                | scales                             | value                  |
| --------- | ------------------------------------ | ---------------------------------- | ---------------------- |
| fp8_block | e4m3 as uint8 [..., N, K]            | fp32 [..., ceil(N/128), ceil(K/128)] | e4m3(code) * scale     |
| int8      | int8 [..., N, K], -127 to 127        | fp32 [..., N]                      | code * scale           |
| int4      | uint8 [..., N, bytes], two a byte    | float [..., N, K / group]          | (code - zero) * scale  |
| mxfp4     | uint8 [..., N, bytes], two a byte    | uint8 [..., N, K / 32]             | e2m1(code) * 2^(scale - 127) |

fp8_block is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2; `weight_scale_inv` of its checkpoints); int4 is that of
GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), zero 8 where symmetric; mxfp4 is OCP Microscaling Formats (MX) v1.0,
sections 5.3.3, 5.4.1 and 6.3.

**Four bits.** Both four-bit formats share one arrangement, made for kernels that multiply the low nibbles of a tile of
bytes and the high nibbles of the same bytes, each by contiguous columns of the activations. A row of K columns is cut
into blocks of 128. A block is 64 bytes: byte j holds column j of the block in its low nibble and column j + 64 in its
high nibble. Where 128 does not divide K, the last block is the row's last 128 columns; those that an earlier block
holds already have the code of the value 0 in it, so that a sum over all blocks counts every column once. K must be at
least 128. A row takes 64 * ceil(K / 128) bytes; block b starts at column min(128 b, K - 128), and since groups divide
both 128 and K, a group's scale belongs to whole 32-byte runs of a block's nibbles.

Example, K = 160, column c with code c % 16, zero code 8. Two blocks, of columns 0 to 127 and 32 to 159:

    byte   0 = code(0)  | code(64) << 4       byte  63 = code(63) | code(127) << 4
    byte  64 = 8        | 8 << 4              (columns 32 and 96: in block 0 already)
    byte  96 = 8        | code(128) << 4      (columns 64 and 128)
    byte 127 = 8        | code(159) << 4      (columns 95 and 159)

and with groups of 32 (5 scales a row) bytes 96 to 127 have scale 2 for their low nibbles and 4 for their high ones.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat

from .latent import decode_e4m3, encode_e4m3, power_of_two_scale, quantise_latent
from .moe import SWIGLU, Activation, apply_activation, combine, dispatch, fused_moe

BLOCK = 128  # rows and columns of a scale of fp8_block; columns of a packed block of four-bit codes
HALF = BLOCK // 2
GROUP_SIZES = (32, 64, 128)
MX_GROUP = 32
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def fused_experts(
    hidden: torch.Tensor,
    experts,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    activation: Activation = SWIGLU,
    weight_at: str = "output",
) -> torch.Tensor:
    """`fused_moe` of the dequantised weights; with the formats fp8_block and int8_w8a8, of quantised activations.

    hidden [T, H], weights [T, K], ids [T, K], activation and weight_at as in `fused_moe`; experts: an object with the
    attributes of mla_kernels.ExpertWeights. Returns [T, H] in hidden's dtype.

    fp8_block and int8_w8a8 replace what goes into either product by `round_activations` of it. The router's weight
    is left out of that: with weight_at "input" it multiplies gate_up's sums, with "activation" down's, before the bias.
    """
    gate_up, down = dequantise_experts(experts, dtype=hidden.dtype)
    biases = [None if bias is None else bias.to(hidden.dtype) for bias in (experts.gate_up_bias, experts.down_bias)]
    if experts.format not in ("fp8_block", "int8_w8a8"):
        options = {"gate_up_bias": biases[0], "down_bias": biases[1], "activation": activation, "weight_at": weight_at}
        return fused_moe(hidden, gate_up, down, weights, ids, **options)
    dispatched = dispatch(ids, len(gate_up))
    of_rows = rearrange(weights.flatten()[dispatched.order.long()], "row -> row 1")
    rows = torch.full((len(of_rows), hidden.shape[1]), torch.nan, dtype=hidden.dtype, device=hidden.device)
    for expert, (start, end) in enumerate(pairwise(dispatched.offsets.tolist())):
        x = round_activations(hidden[dispatched.tokens[start:end].long()], experts.format)
        both = einsum(x, gate_up[expert], "row hidden, out hidden -> row out")
        if weight_at == "input":
            both = (both * of_rows[start:end]).to(hidden.dtype)
        both = both if biases[0] is None else both + biases[0][expert]
        inner = apply_activation(both, activation.clamp, activation.limit, activation.alpha, activation.interleaved)
        inner = round_activations(inner, experts.format)
        y = einsum(inner, down[expert], "row inner, hidden inner -> row hidden")
        if weight_at == "activation":
            y = (y * of_rows[start:end]).to(hidden.dtype)
        rows[start:end] = y if biases[1] is None else y + biases[1][expert]
    return combine(rows, weights if weight_at == "output" else torch.ones_like(weights), dispatched)


def round_activations(x: torch.Tensor, format: str) -> torch.Tensor:
    """x [rows, K] as codes hold it, in x's dtype.

    "fp8_block": e4m3 with one power of two for each row's 128 columns, `power_of_two_scale` of the largest magnitude
    among them. "int8_w8a8": int8 with one scale a row, the largest magnitude / 127.
    """
    values = _wide(x)
    if format == "int8_w8a8":
        codes, scales = quantise_latent(values, "int8")
        return (codes.to(values.dtype) * scales.to(values.dtype)).to(x.dtype)
    parts = []
    for part in values.split(BLOCK, dim=-1):
        scales = power_of_two_scale(part.abs().amax(dim=-1, keepdim=True))
        parts.append(decode_e4m3(encode_e4m3(part / scales), values.dtype) * scales)
    return torch.cat(parts, dim=-1).to(x.dtype)


def dequantise_experts(experts, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I] of an object with the attributes of mla_kernels.ExpertWeights."""
    hidden_size, intermediate_size = experts.down.shape[1], experts.gate_up.shape[1] // 2
    result = []
    for name, columns in (("gate_up", hidden_size), ("down", intermediate_size)):
        codes, scales, zeros = (getattr(experts, name + part) for part in ("", "_scale", "_zero"))
        if experts.format == "plain":
            result.append(codes.to(dtype))
        elif experts.format == "fp8_block":
            result.append(dequantise_fp8_block(codes, scales, dtype=dtype))
        elif experts.format == "int4":
            result.append(dequantise_int4(codes, scales, zeros, columns, dtype=dtype))
        elif experts.format == "mxfp4":
            result.append(dequantise_mxfp4(codes, scales, columns, dtype=dtype))
        else:
            result.append(dequantise_int8(codes, scales, dtype=dtype))
    return tuple(result)


class WeightError(NamedTuple):
    """See `quantisation_error`."""

    relative_rms: float
    largest: float
    worst_expert: int
    worst_relative_rms: float


def quantisation_error(gate_up: torch.Tensor, down: torch.Tensor, experts) -> dict[str, WeightError]:
    """How far experts' weights are from gate_up [E, 2I, H] and down [E, H, I], as {"gate_up": ..., "down": ...}.

    relative_rms: RMS of all errors / RMS of all weights; largest: the largest error / the largest magnitude of its
    expert; worst_expert and worst_relative_rms: the expert whose own relative RMS error is largest, and that error.
    """
    report = {}
    for name, original, restored in zip(
        ("gate_up", "down"), (gate_up, down), dequantise_experts(experts, dtype=torch.float64)
    ):
        error = restored - original.double()
        ratios = error.square().sum(dim=(1, 2)).sqrt() / original.double().square().sum(dim=(1, 2)).sqrt()
        largest = (error.abs().amax(dim=(1, 2)) / original.double().abs().amax(dim=(1, 2))).max()
        relative = error.norm() / original.double().norm()
        report[name] = WeightError(relative.item(), largest.item(), int(ratios.argmax()), ratios.max().item())
    return report


def quantise_fp8_block(weight: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 [..., N, K]) and scales (fp32 [..., ceil(N/128), ceil(K/128)]) of fp8_block.

    A scale is the block's largest magnitude / 448, power_of_two: the next power of two from there; 1 for a block of
    zeros. Rounded to nearest even.
    """
    wide = _wide(weight)
    amax = _block_amax(wide)
    scales = amax / E4M3_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # 0.5 <= mantissa < 1
        scales = torch.ldexp(torch.ones_like(scales), torch.where(mantissa == 0.5, exponent - 1, exponent))
    scales = torch.where(amax > 0, scales, 1.0).float()
    values = wide / _spread(scales, weight.shape).to(wide.dtype)
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scales


def dequantise_fp8_block(
    codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[..., N, K], computed in fp64 and rounded once, to ``dtype``."""
    return (decode_e4m3(codes, torch.float64) * _spread(scales, codes.shape)).to(dtype)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8 [..., N, K]) and scales (fp32 [..., N]): largest magnitude / 127, 1 for a row of zeros."""
    wide = _wide(weight)
    amax = wide.abs().amax(dim=-1)
    scales = torch.where(amax > 0, amax / 127, 1.0).float()
    codes = (wide / scales[..., None].to(wide.dtype)).round().clamp(-127, 127).to(torch.int8)
    return codes, scales


def dequantise_int8(codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[..., N, K], computed in fp64 and rounded once, to ``dtype``."""
    return (codes.double() * scales[..., None]).to(dtype)


def quantise_int4(
    weight: torch.Tensor, group_size: int, *, symmetric: bool = True, scale_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed codes, scales [..., N, K / group_size] (``scale_dtype``, default weight's) and zeros (uint8, or None).

    symmetric: scale = largest magnitude / 7, zero 8, codes 1 to 15. Else scale = (largest - smallest) / 15, 0 counted
    among the values, and zero the code nearest to 0. A group of zeros has scale 1. Codes are chosen for the scale as it
    is stored. Rounded to nearest even.
    """
    _check_columns(weight.shape[-1], group_size)
    groups = rearrange(_wide(weight), "... row (group column) -> ... row group column", column=group_size)
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scales = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    scales = scales.to(scale_dtype or weight.dtype)
    scales = torch.where(scales > 0, scales, 1.0)
    wide = scales.to(groups.dtype)
    zeros = torch.full_like(wide, 8.0) if symmetric else (-low / wide).round().clamp(0, 15)
    codes = ((groups / wide[..., None]).round() + zeros[..., None]).clamp(0, 15)
    codes = rearrange(codes, "... row group column -> ... row (group column)").to(torch.uint8)
    zeros = zeros.to(torch.uint8)
    fill = repeat(zeros, "... group -> ... (group column)", column=group_size)
    return pack_nibbles(codes, fill), scales, None if symmetric else zeros


def dequantise_int4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    columns: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[..., N, columns]: (code - zero) * scale, computed in fp64 and rounded once, to ``dtype``."""
    group_size = columns // scales.shape[-1]
    zeros = torch.full_like(scales, 8) if zeros is None else zeros
    zeros, scales = (repeat(x.double(), "... group -> ... (group column)", column=group_size) for x in (zeros, scales))
    return ((unpack_nibbles(packed, columns) - zeros) * scales).to(dtype)


def quantise_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed e2m1 codes and scales (uint8 [..., N, K / 32], biased by 127): section 6.3 of OCP MX v1.0.

    A group's scale is 2^(floor(log2(largest magnitude)) - 2), at least 2^-127; values are rounded to nearest even and
    saturate at 6 scales. A group of zeros has scale 2^-127.
    """
    _check_columns(weight.shape[-1], MX_GROUP)
    groups = rearrange(_wide(weight), "... row (group column) -> ... row group column", column=MX_GROUP)
    amax = groups.abs().amax(dim=-1)
    exponent = torch.frexp(amax).exponent - 1 - 2  # floor(log2(amax)) is frexp's exponent less 1
    scales = torch.where(amax > 0, exponent + 127, 0).clamp(0, 254)
    values = torch.ldexp(groups, (127 - scales)[..., None])
    codes = encode_e2m1(rearrange(values, "... row group column -> ... row (group column)"))
    return pack_nibbles(codes, torch.zeros_like(codes)), scales.to(torch.uint8)


def dequantise_mxfp4(
    packed: torch.Tensor, scales: torch.Tensor, columns: int, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[..., N, columns] in ``dtype``. The scale 255 is NaN."""
    exponent = torch.where(scales == 255, torch.nan, scales.double() - 127)
    factors = repeat(torch.exp2(exponent), "... group -> ... (group column)", column=MX_GROUP)
    return (decode_e2m1(unpack_nibbles(packed, columns)) * factors).to(dtype)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 (uint8): sign, two bits of exponent, one of mantissa; to nearest even, at most 6."""
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for middle, tie_goes_up in E2M1_MIDDLES:
        codes += (magnitude >= middle) if tie_goes_up else (magnitude > middle)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """fp64 values of codes 0 to 15."""
    table = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), dtype=torch.float64)
    return table.to(codes.device)[codes.long()]


def pack_nibbles(codes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Bytes [..., N, 64 ceil(K / 128)] of codes [..., N, K] from 0 to 15, arranged as the module's docstring says.

    fill [..., N, K]: each column's code of the value 0, for columns of the last block that stand in the one before.
    """
    columns = codes.shape[-1]
    _check_columns(columns, MX_GROUP)
    blocks = []
    for start in _starts(columns):
        block = codes[..., start : start + BLOCK].clone()
        again = len(blocks) * BLOCK - start  # columns that the blocks before have already
        block[..., :again] = fill[..., start : start + again]
        low, high = block.split(HALF, dim=-1)
        blocks.append(low | (high << 4))
    return torch.cat(blocks, dim=-1)


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes (uint8 [..., N, columns]) of what `pack_nibbles` returned."""
    codes = torch.zeros(*packed.shape[:-1], columns, dtype=torch.uint8, device=packed.device)
    for number, start in reversed(list(enumerate(_starts(columns)))):  # earlier blocks overwrite the last one's fill
        block = packed[..., number * HALF : (number + 1) * HALF]
        codes[..., start : start + BLOCK] = torch.cat([block & 0xF, block >> 4], dim=-1)
    return codes


def _starts(columns: int) -> list[int]:
    """First column of every block."""
    return [min(start, columns - BLOCK) for start in range(0, columns, BLOCK)]


def _check_columns(columns: int, group_size: int) -> None:
    if columns < BLOCK or columns % group_size:
        raise ValueError(
            f"{columns} columns: at least {BLOCK} and a multiple of the group of {group_size} are accepted"
        )


def _block_amax(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every block of 128 x 128, the last ones cut off: [..., ceil(N/128), ceil(K/128)]."""
    rows = [part.abs().amax(dim=-2) for part in weight.split(BLOCK, dim=-2)]
    return torch.stack([part.amax(dim=-1) for part in torch.stack(rows, dim=-2).split(BLOCK, dim=-1)], dim=-1)


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks, one for every element of ``shape``."""
    spread = repeat(scales, "... row column -> ... (row a) (column b)", a=BLOCK, b=BLOCK)
    return spread[..., : shape[-2], : shape[-1]]


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """In fp32, or in fp64 if it is fp64."""
    return weight if weight.dtype == torch.float64 else weight.float()
