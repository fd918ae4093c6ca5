"""Experts with quantised weights, for CPU tensors.

Loops run over experts that have tokens and over 512 rows of a weight, never over tokens: no more than 512 rows of one
expert are ever held as numbers. bfloat16 products are torch's bfloat16 ones; float32 and float16 compute in float32.

- int8 multiplies few rows by the codes as they are (torch._weight_int8pack_mm), int8_w8a8 any number (torch._int_mm).
- fp8_block and mxfp4 multiply a single bfloat16 token by their codes as float16, which holds them: see `_one_row_fp8`.
- int4 does so from a copy of the codes in the layout of torch._weight_int4pack_mm_for_cpu, half a byte a weight, which
  `prepack` makes. Of fp8_block and mxfp4 it keeps the bfloat16 weights, two bytes each.
- Without a copy int4 converts the codes of each call, and so do fp8_block and mxfp4 for more than one token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mla_kernels.cpu import amx
from mla_kernels.cpu.gemm import linear, wide
from mla_kernels.cpu.moe import activate, combine, dispatch
from mla_kernels.quant.fp8_block import BLOCK, decode_e4m3, dequantise_fp8_block
from mla_kernels.quant.int4 import dequantise_int4
from mla_kernels.quant.mxfp4 import GROUP, decode_ue8m0, dequantise_mxfp4
from mla_kernels.quant.nibbles import HALF, unpack_nibbles

_ROWS = 512  # of a weight: a multiple of fp8's block
_FEW = 16  # rows of activations up to which reading codes costs less than converting them
_MOST_COLUMNS = 1 << 14  # sums of as many products of codes, up to 6 or 1.875, and numbers below 1 are finite in fp16
_SMALLEST_FP8_AMAX = 448e-4
_TINY = torch.finfo(torch.float32).tiny
_SHIFT_5, _SHIFT_7, _SHIFT_12, _3, _E4M3_MASK, _E2M1_MASK = (
    torch.tensor(value, dtype=torch.int16, device="cpu") for value in (1 << 5, 1 << 7, 1 << 12, 3, -0x4001, -0x7200)
)  # as tensors, which operators take faster than numbers


class Projection(NamedTuple):
    """One weight of all experts in its format, and what else a product takes."""

    format: str
    codes: torch.Tensor  # [E, rows, ...]
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    columns: int
    copy: "_Copy | None"


def fused_experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    format: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_scale: torch.Tensor,
    gate_up_zero: torch.Tensor | None,
    down_zero: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    group_size: int,
    clamp: str,
    limit: float | None,
    alpha: float,
    interleaved: bool,
    weight_at: str,
) -> torch.Tensor:
    """The op's arguments; a single token needs no sorting. ``group_size`` follows from shapes here."""
    del group_size
    copies = _copies_of(gate_up, gate_up_scale, gate_up_zero), _copies_of(down, down_scale, down_zero)
    inner = gate_up.shape[1] // 2
    first = Projection(format, gate_up, gate_up_scale, gate_up_zero, gate_up_bias, hidden.shape[1], copies[0])
    second = Projection(format, down, down_scale, down_zero, down_bias, inner, copies[1])
    call = first, second, (clamp, limit, alpha, interleaved), weight_at
    dtype, hidden = hidden.dtype, _rounded(hidden, format)
    if hidden.shape[0] == 1:
        return _one_token(hidden, weights, ids, call).to(dtype)
    order, tokens, inverse, offsets = dispatch(ids, gate_up.shape[0])
    bounds = offsets.tolist()
    rows = hidden.new_empty(tokens.shape[0], hidden.shape[1], dtype=wide(dtype))
    of_rows = weights.reshape(-1, 1).index_select(0, order)
    x = hidden.index_select(0, tokens[: bounds[-1]])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            rows[start:end] = _expert(x[start:end], of_rows[start:end], expert, *call)
    weights = weights if weight_at == "output" else torch.ones_like(weights)
    return combine(rows, weights, inverse, offsets, dtype)


def _rounded(x, format):
    """x as fp8_block's products take it: e4m3 codes times their scales, which bfloat16 and float32 hold."""
    return round_to_e4m3(x).to(wide(x.dtype)) if format == "fp8_block" else x


def _one_token(hidden, weights, ids, call):
    total, weight_at = torch.zeros(1, hidden.shape[1]), call[-1]
    for slot, (expert, weight) in enumerate(zip(ids[0].tolist(), weights[0].tolist())):
        if 0 <= expert < call[0].codes.shape[0]:
            y = _expert(hidden, weights[:, slot : slot + 1], expert, *call, alone=True)
            total.add_(y, alpha=weight if weight_at == "output" else 1.0)
    return total


def _expert(x, weight, expert, gate_up, down, activation, weight_at, alone=False):
    """One expert on its rows, as fp32 [rows, H]; weight [rows, 1]. Sums of products are weighted before the bias, or
    the activation where it would be rounded to float16. ``alone``: the call has one token. In others
    how many rows an expert has follows from other tokens; up to 16 of them no row's bits follow from that."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    both = _multiply(x, gate_up, expert, weight if weight_at == "input" else None, dtype, alone)
    inner = activate(both, *activation)
    at_activation = weight if weight_at == "activation" else None
    if gate_up.format not in ("fp8_block", "int8_w8a8"):  # those round it once, to codes
        if x.dtype == torch.float16 and at_activation is not None:
            inner, at_activation = inner.mul_(at_activation), None
        inner = inner.to(x.dtype)
    inner = _rounded(inner, gate_up.format)
    return _multiply(inner, down, expert, at_activation, dtype, alone)


def _multiply(x, projection, expert, weight, dtype, alone):
    """x [rows, columns] times the expert's weight transposed, products in ``dtype``, in fp32, times weight [rows, 1],
    plus the bias."""
    format, copy = projection.format, projection.copy
    if format == "int8_w8a8":
        y = _integers(x, projection.codes[expert], projection.scales[expert])
    elif format == "int8":
        y = _by_bytes(x.to(dtype), projection.codes[expert]).float().mul_(projection.scales[expert])
    else:
        y = None
        if copy is not None and dtype == torch.bfloat16 and x.shape[0] <= copy.most_rows:
            y = copy.multiply(x.to(dtype), expert).float()
        elif format in _ONE_ROW and alone and dtype == torch.bfloat16:
            y = _ONE_ROW[format](x.float(), projection, expert)
        if y is None:
            y = _converted(x.to(dtype), projection, expert)
    if weight is not None:
        y *= weight
    return y if projection.bias is None else y.add_(projection.bias[expert])


def _integers(x, codes, scales):
    """Both sides int8, sums in int32."""
    values = x.float()
    amax = values.abs().amax(1, keepdim=True)
    steps = amax / 127
    steps = torch.where(steps < _TINY, 1.0, steps).masked_fill_(~amax.isfinite(), float("nan"))
    rounded = (values / steps).round_().nan_to_num_(0.0).to(torch.int8)
    y = torch._int_mm(rounded, codes.t()) if _has_int_mm() else _by_bytes(rounded.float(), codes)
    return y.float().mul_(steps).mul_(scales)


def _by_bytes(x, codes):
    """x, bf16 or fp32, times int8 codes [rows, columns] transposed, without scales."""
    whole = x.shape[1] % 32 == 0  # torch's product reads a row by whole vectors, past its end if they do not fit
    if x.dtype == torch.bfloat16 and whole and x.shape[0] <= _FEW and _has_int8_product():
        return torch._weight_int8pack_mm(x, codes, _ones(codes.shape[0]))
    parts = [linear(x, codes[first : first + _ROWS].to(x.dtype)) for first in range(0, codes.shape[0], _ROWS)]
    return torch.cat(parts, 1)


def _one_row_fp8(x, projection, expert):
    """x [1, columns], fp32, times the expert's e4m3 codes transposed, in a quarter of `_converted`'s time; None where
    float16 might not hold a sum, or x or a scale is not finite.

    float16 holds the codes exactly. The scales go to x instead, once for each 128 rows; it is rounded to float16 as
    multiples of a power of two above its largest value.
    """
    codes, scales = projection.codes[expert].view(torch.int8), projection.scales[expert]
    rows, columns = codes.shape
    factors = x * scales.repeat_interleave(BLOCK, 1)[:, :columns]  # [row blocks, columns]
    units = _power_above(factors)
    if units is None or columns > _MOST_COLUMNS:
        return None
    y = torch.empty(rows, dtype=torch.float16)
    bits = torch.empty(BLOCK, columns, dtype=torch.int16)
    values = bits.view(torch.float16)
    for block, factor in enumerate((factors / units).half().unbind(0)):
        at = slice(block * BLOCK, min(rows, (block + 1) * BLOCK))
        count = at.stop - at.start
        # the sign fills the upper byte; the low bits move under float16's exponent, which reads them 2^8 too small
        bits[:count].copy_(codes[at]).mul_(_SHIFT_7).bitwise_and_(_E4M3_MASK)
        torch.mv(values[:count], factor, out=y[at])
    return y.float().mul_((units * 256).repeat_interleave(BLOCK)[:rows]).unsqueeze(0)


def _one_row_mxfp4(x, projection, expert):
    """`_one_row_fp8` for e2m1 codes: those of low nibbles and those of high ones, times their groups' scales as parts
    of the row's largest one."""
    codes, scales = projection.codes[expert].view(torch.int8), projection.scales[expert]
    (rows, half), columns = codes.shape, projection.columns
    unit = _power_above(x)
    exponents = scales.short()
    top = exponents.amax(1, keepdim=True)  # 255 is NaN
    if unit is None or columns > _MOST_COLUMNS or 2 * half != columns or int(top.max()) == 255:
        return None
    x = (x / unit).half().view(-1, 2, HALF).transpose(0, 1).flatten(1)  # [low and high, half]
    parts = exponents.sub_(top - 29).clamp_min_(0).mul_(1 << 10).view(torch.float16)  # 2^(scale - top + 14), or 0
    parts = parts.view(rows, -1, 2, HALF // GROUP).unbind(2)
    y = torch.empty(2, rows, dtype=torch.float16)
    bits = torch.empty(BLOCK, half, dtype=torch.int16)
    values = bits.view(torch.float16)
    for start in range(0, rows, BLOCK):
        at = slice(start, min(rows, start + BLOCK))
        count = at.stop - at.start
        for high in (0, 1):
            # the sign fills what stands above a code; its low bits move under float16's exponent, which reads them 2^14
            # too small
            lanes = bits[:count].copy_(codes[at])
            lanes = lanes.mul_(_SHIFT_5) if high else lanes.mul_(_SHIFT_12).bitwise_right_shift_(_3)
            lanes.bitwise_and_(_E2M1_MASK)
            factors = parts[high][at].reshape(count, -1, 1)
            values[:count].unflatten(1, (-1, GROUP)).mul_(factors)
            torch.mv(values[:count], x[high], out=y[high, at])
    return y.float().sum(0).mul_(decode_ue8m0(top.squeeze(1))).mul_(unit[0, 0]).unsqueeze(0)


def _power_above(x):
    """A power of two above each row's largest magnitude, [rows, 1], so that quotients are below 1; None if one is not
    finite or has none."""
    exponents = torch.frexp(x.abs().amax(1, keepdim=True))
    if not math.isfinite(exponents.mantissa.sum().item()) or int(exponents.exponent.max()) > 100:
        return None
    return torch.exp2(exponents.exponent.clamp_min(-100).float())


_ONE_ROW = {"fp8_block": _one_row_fp8, "mxfp4": _one_row_mxfp4}
"""Formats whose codes float16 holds: how one bfloat16 row is multiplied."""


def _converted(x, projection, expert):
    """x times 512 rows of the weight after another, each converted to x's dtype."""
    codes, scales = projection.codes[expert], projection.scales[expert]
    y = torch.empty(x.shape[0], codes.shape[0])
    for first in range(0, codes.shape[0], _ROWS):
        at = slice(first, first + _ROWS)
        zeros = None if projection.zeros is None else projection.zeros[expert]
        y[:, at] = linear(x, _values(projection.format, codes, scales, zeros, projection.columns, x.dtype, at))
    return y


def _values(format, codes, scales, zeros, columns, dtype, at):
    """Rows ``at`` of an expert's weight as numbers."""
    if format == "fp8_block":
        return dequantise_fp8_block(codes[at], scales, dtype, at.start)
    if format == "int4":
        return dequantise_int4(codes[at], scales[at], None if zeros is None else zeros[at], columns, dtype)
    return dequantise_mxfp4(codes[at], scales[at], columns, dtype)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """fp32 values of x as e4m3 codes with a power of two for each row's 128 columns hold it; bf16 holds them, too."""
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    amax = blocks.abs().amax(2, keepdim=True)
    mantissa, exponent = torch.frexp(amax.clamp_min(_SMALLEST_FP8_AMAX) / 448.0)
    scales = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    scales = scales.masked_fill_(~amax.isfinite(), float("nan"))
    codes = (blocks / scales).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return decode_e4m3(codes).float().mul_(scales).flatten(1)[:, :columns]


@dataclass(frozen=True)
class _Copy:
    """What multiplies up to ``most_rows`` bfloat16 rows by an expert's weight, ``multiply(x, expert)``."""

    state: tuple
    multiply: Callable[[torch.Tensor, int], torch.Tensor]
    most_rows: float


_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepack(format: str, projections: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]]) -> int:
    """Copy the weights of these projections into what torch multiplies fastest; the bytes that takes.

    A projection: codes [E, rows, ...], scales, zeros or None, columns. int4 becomes codes in the layout of torch's
    product, for up to 16 rows an expert; fp8_block and mxfp4 become bfloat16. `fused_experts` uses the copy for
    bfloat16. It is found by the codes' very tensor, freed with it, and dropped once one of these tensors is changed in
    place.

    Raises:
        NotImplementedError: torch has no such product, or 16 does not divide int4's rows.
    """
    if format == "int4":
        if _int4_product() is None:
            raise NotImplementedError("prepack: this build of torch has no int4 product for CPUs")
        for codes, *_ in projections:
            if codes.shape[1] % 16:
                raise NotImplementedError(f"prepack: got {codes.shape[1]} rows an expert, multiples of 16 are accepted")
        return sum(_keep_int4(*projection) for projection in projections)
    return sum(_keep_converted(format, *projection) for projection in projections)


def _keep_int4(codes, scales, zeros, columns) -> int:
    copies, factors, product = [], [], _int4_product()
    for expert in range(codes.shape[0]):
        integers = unpack_nibbles(codes[expert], columns).int()
        copies.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1))
        scale = scales[expert].float()
        offset = torch.zeros_like(scale) if zeros is None else (8.0 - zeros[expert].float()) * scale
        factors.append(torch.stack([scale, offset], -1).transpose(0, 1).to(torch.bfloat16).contiguous())
    group_size = columns // scales.shape[2]
    _copies[codes] = _Copy(
        _state(codes, scales, zeros),
        lambda x, expert: product(x, copies[expert], group_size, factors[expert]),
        _FEW,
    )
    return sum(tensor.nbytes for tensor in copies + factors)


def _keep_converted(format, codes, scales, zeros, columns) -> int:
    """The weights as `_converted` has them, so that results have its bits."""
    kept = torch.empty(*codes.shape[:2], columns, dtype=torch.bfloat16)
    for weight, own, factors in zip(kept, codes, scales):
        for first in range(0, codes.shape[1], _ROWS):
            at = slice(first, first + _ROWS)
            weight[at] = _values(format, own, factors, None, columns, torch.bfloat16, at)
    product = amx.product if amx.serves(kept) else linear
    _copies[codes] = _Copy(_state(codes, scales, zeros), lambda x, expert: product(x, kept[expert]), math.inf)
    return kept.nbytes


def _copies_of(codes, scales, zeros) -> _Copy | None:
    copy = _copies.get(codes)
    if copy is None:
        return None
    if copy.state != _state(codes, scales, zeros):
        del _copies[codes]
        return None
    return copy


def _state(*tensors):
    return tuple(None if tensor is None else (tensor._version, tensor.data_ptr()) for tensor in tensors)


@cache
def _int4_product() -> Callable | None:
    """torch's int4 product if it gives what its documentation in the sources says; it is no public function."""
    try:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.full((16, 32), 9, dtype=torch.int32), 1)
        factors = torch.tensor([2.0, 1.0], dtype=torch.bfloat16).repeat(1, 16, 1)
        trial = product(torch.ones(1, 32, dtype=torch.bfloat16), packed, 32, factors)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product if torch.equal(trial.float(), torch.full((1, 16), 96.0)) else None


@cache
def _has_int8_product() -> bool:
    """Whether torch multiplies bfloat16 by int8 codes."""
    ones = torch.ones(16, 32, dtype=torch.bfloat16)
    try:
        trial = torch._weight_int8pack_mm(ones[:1], ones.to(torch.int8), ones[:, 0].contiguous())
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(trial.float(), torch.full((1, 16), 32.0))


@cache
def _has_int_mm() -> bool:
    """Whether torch multiplies int8 by int8."""
    ones = torch.ones(2, 32, dtype=torch.int8)
    try:
        trial = torch._int_mm(ones, ones.t())
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(trial, torch.full((2, 2), 32, dtype=torch.int32))


@cache
def _ones(rows: int) -> torch.Tensor:
    return torch.ones(rows, dtype=torch.bfloat16)
