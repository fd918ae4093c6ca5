"""Stored projections of experts in the layouts of :class:`mla_kernels.ExpertWeights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mla_kernels.checks import check_tensor
from mla_kernels.moe.formats import WeightFormat
from mla_kernels.quant.fp8_block import BLOCK as SCALE_BLOCK
from mla_kernels.quant.int4 import SYMMETRIC_ZERO
from mla_kernels.quant.mxfp4 import GROUP
from mla_kernels.quant.nibbles import BLOCK, pack_nibbles, packed_bytes
from mla_kernels.quant.stored import StoredWeight

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
PUBLISHED = {"w1": GATE, "w2": DOWN, "w3": UP}
"""DeepSeek-V4's own names of an expert's projections, and Hugging Face's."""
_ROWS = 512

Converted = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def stack_experts(
    number: int,
    experts: Iterable[tuple[str, Mapping[str, StoredWeight]]],
    out: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Codes, scales and zeros of ``number`` experts, by the names of ExpertWeights' attributes.

    Args:
        experts: (how errors call it, its gate_proj, up_proj and down_proj) of each expert, in order.
        out: tensors to fill where dtype and shape are those of a result; the others are made.
    """
    parts: dict[str, torch.Tensor] = {}
    for index, (where, projections) in enumerate(experts):
        gate, up, down = (projections[name].packed(f"{where}: {name}") for name in (GATE, UP, DOWN))
        for name, converted in (("gate_up", join_rows(where, gate, up)), ("down", down)):
            for suffix, tensor in zip(("", "_scale", "_zero"), converted):
                key = name + suffix
                if key not in parts:
                    if tensor is None:
                        continue
                    parts[key] = _place(number, tensor, (out or {}).get(key))
                    if index:  # zeros, which the experts before had not: they are symmetric
                        parts[key][:index] = SYMMETRIC_ZERO
                place = parts[key][index]
                if tensor is None:
                    place.fill_(SYMMETRIC_ZERO)
                    continue
                wanted = {"shape": tuple(place.shape), "dtypes": (place.dtype,)}
                check_tensor(f"{where}: {key}", tensor, **wanted)
                place.copy_(tensor)
    return parts


def check_format(where: str, stored: StoredWeight, format: WeightFormat) -> None:
    """Refuse a weight that is stored in another format than the experts'."""
    wanted = WeightFormat.INT8 if format is WeightFormat.INT8_W8A8 else format
    if stored.format != wanted.value:
        kind = "e4m3 with a scale for each row" if stored.format == "fp8_row" else f"format {stored.format!r}"
        raise ValueError(f"{where}: got {kind}, experts of format {format.value!r} are accepted here")


def _place(number, like, given):
    """[number, *like.shape]: ``given`` if it is that, else a new tensor where that was, or where ``like`` is."""
    shape = (number, *like.shape)
    if given is not None and given.shape == shape and given.dtype == like.dtype:
        return given
    return like.new_empty(shape, device=like.device if given is None else given.device)


def join_rows(where: str, gate: Converted, up: Converted) -> Converted:
    """gate's rows, then up's."""
    if gate[0].shape != up[0].shape or gate[1].shape != up[1].shape:
        raise ValueError(
            f"{where}: got gate_proj of {tuple(gate[0].shape)} codes and {tuple(gate[1].shape)} scales, up_proj of "
            f"{tuple(up[0].shape)} and {tuple(up[1].shape)}; equal shapes are accepted"
        )
    rows, scale_rows = gate[0].shape[0], gate[1].shape[0]
    if scale_rows != rows and rows % SCALE_BLOCK:
        raise NotImplementedError(
            f"{where}: got an intermediate size of {rows}, multiples of {SCALE_BLOCK} are accepted: a block of scales "
            "would hold rows of gate_proj and of up_proj"
        )
    zeros, like = None, gate[2] if up[2] is None else up[2]
    if like is not None:  # None beside it is symmetric
        zeros = torch.cat([torch.full_like(like, SYMMETRIC_ZERO) if x is None else x for x in (gate[2], up[2])])
    return torch.cat([gate[0], up[0]]), torch.cat([gate[1], up[1]]), zeros


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
