"""WeightFormat: what the formats of experts' weights hold, and how one expert's weight is rounded to them and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from mla_kernels.checks import FLOATS
from mla_kernels.quant.fp8_block import BLOCK as SCALE_BLOCK
from mla_kernels.quant.fp8_block import dequantise_fp8_block, quantise_fp8_block
from mla_kernels.quant.int4 import check_int4_scales, dequantise_int4, quantise_int4
from mla_kernels.quant.int8_channel import dequantise_int8_channel, quantise_int8_channel
from mla_kernels.quant.mxfp4 import dequantise_mxfp4, quantise_mxfp4
from mla_kernels.quant.nibbles import BLOCK, packed_bytes

_ROWS = 4 * SCALE_BLOCK  # rows of a weight that are worked on at a time: bounds the memory of intermediate results


class WeightFormat(str, Enum):
    """How weights of experts are stored; see :class:`mla_kernels.ExpertWeights`.

    ``fp8_block`` and ``int8_w8a8`` quantise activations, too; ``int8``, ``int4`` and ``mxfp4`` do not.
    """

    PLAIN = "plain"
    FP8_BLOCK = "fp8_block"
    INT8 = "int8"
    INT8_W8A8 = "int8_w8a8"
    INT4 = "int4"
    MXFP4 = "mxfp4"


@dataclass(frozen=True)
class Layout:
    """Dtypes and shapes of a format's tensors, for one expert's weight [rows, columns]."""

    codes: tuple[torch.dtype, ...]
    scales: tuple[torch.dtype, ...]
    scale_shape: Callable[[int, int, int | None], tuple[int, ...] | None]
    options: tuple[str, ...] = ()
    packed: bool = False
    zeros: bool = False
    strided: bool = False

    def row_length(self, columns: int) -> int:
        """Codes, or bytes, of a row."""
        return packed_bytes(columns) if self.packed else columns

    def check_columns(self, name: str, columns: int, group_size: int | None) -> None:
        """Refuse a number of columns that the format cannot hold."""
        if self.packed and (columns < BLOCK or columns % group_size):
            raise ValueError(
                f"{name}: got {columns} columns; at least {BLOCK}, in whole groups of {group_size}, are accepted"
            )


def _no_scales(rows, columns, group_size):
    return None


def _block_scales(rows, columns, group_size):
    return -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)


def _row_scales(rows, columns, group_size):
    return (rows,)


def _group_scales(rows, columns, group_size):
    return rows, columns // group_size


_INT8 = Layout((torch.int8,), (torch.float32,), _row_scales)
FORMATS = {
    WeightFormat.PLAIN: Layout(FLOATS, (), _no_scales, strided=True),
    WeightFormat.FP8_BLOCK: Layout((torch.uint8,), (torch.float32,), _block_scales, ("power_of_two",)),
    WeightFormat.INT8: _INT8,
    WeightFormat.INT8_W8A8: _INT8,
    WeightFormat.INT4: Layout(
        (torch.uint8,), FLOATS, _group_scales, ("group_size", "symmetric", "scale_dtype", "search"),
        packed=True, zeros=True,
    ),
    WeightFormat.MXFP4: Layout((torch.uint8,), (torch.uint8,), _group_scales, ("search",), packed=True),
}  # fmt: skip


def quantise_weight(
    name: str, weight: torch.Tensor, format: WeightFormat, options: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros (or None) of weight [E, N, K], in fp32 for 512 rows at a time."""
    experts, rows, columns = weight.shape
    layout, group_size = FORMATS[format], options.get("group_size", 32)
    layout.check_columns(name, columns, group_size)
    codes = weight.new_empty(experts, rows, layout.row_length(columns), dtype=layout.codes[0])
    scale_dtype = options["scale_dtype"] if format is WeightFormat.INT4 else layout.scales[0]
    scales = weight.new_empty(experts, *layout.scale_shape(rows, columns, group_size), dtype=scale_dtype)
    asymmetric = format is WeightFormat.INT4 and not options.get("symmetric", True)
    zeros = weight.new_empty(scales.shape, dtype=torch.uint8) if asymmetric else None
    scale_rows = SCALE_BLOCK if format is WeightFormat.FP8_BLOCK else 1
    for expert in range(experts):
        for first in range(0, rows, _ROWS):
            part = weight[expert, first : first + _ROWS].float()
            if not part.isfinite().all():
                raise ValueError(f"{name}: got values that are not finite in expert {expert}, finite ones are accepted")
            rounded = _quantise(part, format, options)
            if format is WeightFormat.INT4:
                check_int4_scales(f"{name}: expert {expert}", rounded[1])
            at, scale_at = slice(first, first + _ROWS), slice(first // scale_rows, (first + _ROWS) // scale_rows)
            codes[expert, at], scales[expert, scale_at] = rounded[:2]
            if asymmetric:
                zeros[expert, at] = rounded[2]
    return codes, scales, zeros


def _quantise(weight: torch.Tensor, format: WeightFormat, options: dict) -> tuple:
    if format is WeightFormat.FP8_BLOCK:
        return quantise_fp8_block(weight, options.get("power_of_two", False))
    if format is WeightFormat.INT4:
        group_size, symmetric = options["group_size"], options.get("symmetric", True)
        return quantise_int4(weight, group_size, symmetric, options["scale_dtype"], options.get("search", False))
    if format is WeightFormat.MXFP4:
        return quantise_mxfp4(weight, options.get("search", False))
    return quantise_int8_channel(weight)


def weight_shape(experts, name: str) -> tuple[int, int]:
    """Rows and columns of gate_up or down of :class:`ExpertWeights`."""
    if name == "gate_up":
        return experts.gate_up.shape[1], experts.hidden_size
    return experts.hidden_size, experts.intermediate_size


def dequantise_weight(experts, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's gate_up or down in ``dtype``, worked on 512 rows at a time."""
    codes = getattr(experts, name)[expert]
    if experts.format is WeightFormat.PLAIN:
        return codes.to(dtype)
    scales, zeros = (getattr(experts, f"{name}_{part}") for part in ("scale", "zero"))
    scales, zeros = scales[expert], None if zeros is None else zeros[expert]
    shape = weight_shape(experts, name)
    values = codes.new_empty(shape, dtype=dtype)
    for first in range(0, shape[0], _ROWS):
        at = slice(first, first + _ROWS)
        if experts.format is WeightFormat.FP8_BLOCK:
            values[at] = dequantise_fp8_block(codes[at], scales, dtype, first)
        elif experts.format is WeightFormat.INT4:
            zero = None if zeros is None else zeros[at]
            values[at] = dequantise_int4(codes[at], scales[at], zero, shape[1], dtype)
        elif experts.format is WeightFormat.MXFP4:
            values[at] = dequantise_mxfp4(codes[at], scales[at], shape[1], dtype)
        else:
            values[at] = dequantise_int8_channel(codes[at], scales[at], dtype)
    return values
