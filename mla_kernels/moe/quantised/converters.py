"""Stored projections of experts in the layouts of :class:`mla_kernels.ExpertWeights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mla_kernels.checks import check_tensor
from mla_kernels.moe.quantised.formats import FORMATS, WeightFormat
from mla_kernels.quant.fp8_block import BLOCK as SCALE_BLOCK
from mla_kernels.quant.int4 import SYMMETRIC_ZERO, check_int4_scales
from mla_kernels.quant.mxfp4 import GROUP
from mla_kernels.quant.nibbles import BLOCK, pack_nibbles, packed_bytes
from mla_kernels.quant.stored import StoredWeight

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
PUBLISHED = {"w1": GATE, "w2": DOWN, "w3": UP}
"""DeepSeek-V4's own names of an expert's projections, and Hugging Face's."""
_ROWS = 512


def stack_experts(
    format: WeightFormat, number: int, experts: Iterable[tuple[str, Mapping[str, StoredWeight]]]
) -> dict[str, torch.Tensor]:
    """Codes, scales and zeros of ``number`` experts, by the names of ExpertWeights' attributes.

    ``experts`` gives, in order, how errors call each and its gate_proj, up_proj and down_proj.
    """
    parts: dict[str, torch.Tensor] = {}
    for index, (where, projections) in enumerate(experts):
        gate, up, down = (projections[name] for name in (GATE, UP, DOWN))
        for name, stored in projections.items():
            check_format(f"{where}: {name}", stored, format)
        if gate.shape != up.shape or down.shape != gate.shape[::-1]:
            raise ValueError(
                f"{where}: got gate_proj of shape {gate.shape}, up_proj of {up.shape} and down_proj of {down.shape}; "
                "(I, H), (I, H) and (H, I) are accepted"
            )
        if not parts:
            group_size = gate.shape[1] // gate.scales.shape[1] if format is WeightFormat.INT4 else None
            options = {"scale_dtype": gate.scales.dtype, "group_size": group_size, "device": gate.scales.device}
            parts = empty_parts(format, number, down.shape, **options)
        if any(stored.zeros is not None for stored in projections.values()) and "gate_up_zero" not in parts:
            add_zeros(parts)
        for name, stored in projections.items():
            write_projection(where, parts, index, name, stored)
    return parts


def empty_parts(
    format: WeightFormat,
    number: int,
    shape: tuple[int, int],
    *,
    scale_dtype: torch.dtype | None = None,
    group_size: int | None = None,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Codes and scales of ``number`` experts of down's ``shape`` (H, I), all zero: every weight is 0.

    ``scale_dtype`` and ``group_size`` are int4's.
    """
    layout, (hidden, inner), parts = FORMATS[format], shape, {}
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        layout.check_columns(name, columns, group_size or GROUP)
        scale_shape = layout.scale_shape(rows, columns, group_size or GROUP)
        codes = number, rows, layout.row_length(columns)
        parts[name] = torch.zeros(codes, dtype=layout.codes[0], device=device)
        dtype = scale_dtype if format is WeightFormat.INT4 else layout.scales[0]
        parts[f"{name}_scale"] = torch.zeros(number, *scale_shape, dtype=dtype, device=device)
    return parts


def add_zeros(parts: dict[str, torch.Tensor]) -> None:
    """Zeros of 8, which is symmetric, beside int4's scales."""
    for name in ("gate_up", "down"):
        parts[f"{name}_zero"] = torch.full_like(parts[f"{name}_scale"], SYMMETRIC_ZERO, dtype=torch.uint8)


def write_projection(where: str, parts: dict[str, torch.Tensor], index: int, name: str, stored: StoredWeight) -> None:
    """Write gate_proj, up_proj or down_proj of one expert to its rows in ``parts``."""
    both = "down" if name == DOWN else "gate_up"
    codes, scales, zeros = stored.packed(f"{where}: {name}")
    if stored.format == "int4":
        check_int4_scales(f"{where}: {name}", scales)
    if name != DOWN and stored.format == "fp8_block" and stored.shape[0] % SCALE_BLOCK:
        raise NotImplementedError(
            f"{where}: got an intermediate size of {stored.shape[0]}, multiples of {SCALE_BLOCK} are accepted: a block "
            "of scales would hold rows of gate_proj and of up_proj"
        )
    for suffix, value in (("", codes), ("_scale", scales), ("_zero", zeros)):
        if f"{both}{suffix}" not in parts:
            if value is not None:
                raise ValueError(f"{where}: {name}: got zeros, a weight without is accepted by symmetric experts")
            continue
        place = parts[f"{both}{suffix}"][index]
        if name != DOWN:
            place = place.chunk(2)[name == UP]
        if value is None:
            place.fill_(SYMMETRIC_ZERO)
            continue
        check_tensor(f"{where}: {both}{suffix}", value, shape=tuple(place.shape), dtypes=(place.dtype,))
        place.copy_(value)


def check_format(where: str, stored: StoredWeight, format: WeightFormat) -> None:
    """Refuse a weight that is stored in another format than the experts'."""
    wanted = WeightFormat.INT8 if format is WeightFormat.INT8_W8A8 else format
    if stored.format != wanted.value:
        kind = "e4m3 with a scale for each row" if stored.format == "fp8_row" else f"format {stored.format!r}"
        raise ValueError(f"{where}: got {kind}, experts of format {format.value!r} are accepted here")


def mxfp4_projection(name: str, blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, N, K/32, 16] or [E, N, K/2], the even column in the low nibble, as bytes of this library's order."""
    check_tensor(f"{name}_scales", scales, rank=3, dtypes=(torch.uint8, torch.float8_e8m0fnu))
    experts, rows, groups = scales.shape
    check_tensor(f"{name}_blocks", blocks, dtypes=(torch.uint8, torch.int8), device=scales.device)
    if blocks.shape not in ((experts, rows, groups, GROUP // 2), (experts, rows, groups * GROUP // 2)):
        raise ValueError(
            f"{name}_blocks: got shape {tuple(blocks.shape)}, with {name}_scales of {tuple(scales.shape)} "
            f"({experts}, {rows}, {groups}, {GROUP // 2}) is accepted"
        )
    columns = groups * GROUP
    if columns < BLOCK:
        raise ValueError(f"{name}_blocks: got {columns} columns, at least {BLOCK} are accepted")
    blocks = blocks.reshape(experts, rows, columns // 2).view(torch.uint8)
    packed = blocks.new_empty(experts, rows, packed_bytes(columns))
    for expert in range(experts):
        for first in range(0, rows, _ROWS):
            pairs = blocks[expert, first : first + _ROWS]
            codes = torch.stack([pairs & 0xF, pairs >> 4], -1).flatten(1)
            packed[expert, first : first + _ROWS] = pack_nibbles(codes, 0)
    return packed, scales.contiguous().view(torch.uint8)
