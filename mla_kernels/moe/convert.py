"""Projections of quantised checkpoints in the layouts of :class:`mla_kernels.ExpertWeights`: GPTQ, AWQ, DeepSeek-V3's
fp8, gpt-oss's MXFP4.

A projection is a weight [N, K]: N outputs, K inputs. Converters return codes, scales and zeros (None where there are
none) of one projection.
"""

from collections.abc import Mapping

import torch

from mla_kernels.checks import FLOATS, check_tensor
from mla_kernels.quant.fp8_block import BLOCK as SCALE_BLOCK
from mla_kernels.quant.int4 import GROUP_SIZES
from mla_kernels.quant.mxfp4 import GROUP
from mla_kernels.quant.nibbles import BLOCK, pack_nibbles, packed_bytes

WORD = 8  # four-bit codes of an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows a word's nibbles hold, from the lowest bits up
_ROWS = 512

Converted = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def gptq_projection(where: str, tensors: Mapping[str, torch.Tensor], name: str, version: int) -> Converted:
    """GPTQ's qweight int32 [K/8, N] (bits 4 i of a word: column 8 word + i), scales [G, N], qzeros int32 [G, N/8]."""
    qweight, qzeros, scales = (_get(where, tensors, f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
    check_tensor(f"{where}.qweight", qweight, rank=2, dtypes=(torch.int32,))
    columns, rows = qweight.shape[0] * WORD, qweight.shape[1]
    group_size = _check_groups(where, rows, columns, qzeros, scales)
    g_idx = tensors.get(f"{name}.g_idx")
    if g_idx is not None and g_idx.numel():
        check_tensor(f"{where}.g_idx", g_idx, shape=(columns,), dtypes=(torch.int32, torch.int64))
        ascending = torch.arange(columns, device=g_idx.device, dtype=g_idx.dtype) // group_size
        if not torch.equal(g_idx, ascending):
            raise NotImplementedError(
                f"{where}.g_idx: got columns that are not in ascending groups of {group_size} (desc_act); "
                "accepted are weights quantised with desc_act=False, whose scales belong to neighbouring columns"
            )
    codes = _nibbles(qweight.t())  # [N, K]
    zeros = _nibbles(qzeros).t()  # [N, G]
    return _packed(codes, scales.t(), (zeros + 1) & 0xF if version == 1 else zeros, group_size)


def awq_projection(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> Converted:
    """AWQ's qweight int32 [K, N/8] and qzeros int32 [G, N/8], rows in AWQ_ORDER, and scales [G, N]."""
    qweight, qzeros, scales = (_get(where, tensors, f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
    check_tensor(f"{where}.qweight", qweight, rank=2, dtypes=(torch.int32,))
    columns, rows = qweight.shape[0], qweight.shape[1] * WORD
    group_size = _check_groups(where, rows, columns, qzeros, scales)
    codes, zeros = (_in_order(_nibbles(words)).t() for words in (qweight, qzeros))
    return _packed(codes.contiguous(), scales.t(), zeros, group_size)


def fp8_projection(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> Converted:
    """weight e4m3 [N, K] and weight_scale_inv [ceil(N/128), ceil(K/128)]."""
    weight, scales = (_get(where, tensors, f"{name}.{part}") for part in ("weight", "weight_scale_inv"))
    check_tensor(f"{where}.weight", weight, rank=2, dtypes=(torch.float8_e4m3fn, torch.uint8))
    rows, columns = weight.shape
    shape = -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)
    check_tensor(f"{where}.weight_scale_inv", scales, shape=shape, dtypes=FLOATS, device=weight.device)
    codes = weight.view(torch.uint8)
    if ((codes & 0x7F) == 0x7F).any():
        raise ValueError(f"{where}.weight: got NaN, numbers are accepted")
    return codes, scales.float(), None


def mxfp4_projection(name: str, blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, N, K/32, 16] or [E, N, K/2], the even column in the low nibble, as bytes of this library's order."""
    e8m0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
    check_tensor(f"{name}_scales", scales, rank=3, dtypes=(torch.uint8, e8m0))
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
    codes, scales = torch.cat([gate[0], up[0]]), torch.cat([gate[1], up[1]])
    return codes, scales, None if gate[2] is None else torch.cat([gate[2], up[2]])


def _get(where, tensors, name):
    if name not in tensors:
        raise KeyError(f"{where}: got no tensor named {name!r}")
    return tensors[name]


def _check_groups(where, rows, columns, qzeros, scales) -> int:
    """Columns of a group."""
    if rows % WORD:
        raise ValueError(f"{where}: got {rows} rows, a multiple of {WORD} is accepted")
    check_tensor(f"{where}.scales", scales, shape=(None, rows), dtypes=FLOATS)
    groups = scales.shape[0]
    check_tensor(f"{where}.qzeros", qzeros, shape=(groups, rows // WORD), dtypes=(torch.int32,))
    group_size = columns // max(groups, 1)
    if columns < BLOCK or groups * group_size != columns or group_size not in GROUP_SIZES:
        raise ValueError(
            f"{where}: got {groups} scales a row of {columns} columns; at least {BLOCK} columns, in whole groups of "
            f"{', '.join(map(str, GROUP_SIZES))}, are accepted"
        )
    return group_size


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, 8 n] of int32 words [rows, n], the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)  # little-endian: the lowest bits in the first byte
    return torch.stack([octets & 0xF, octets >> 4], -1).flatten(1)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, 8 n] of AWQ's words, each eight put back in order."""
    inverse = sorted(range(WORD), key=AWQ_ORDER.__getitem__)
    return codes.unflatten(1, (-1, WORD))[..., inverse].flatten(1)


def _packed(codes, scales, zeros, group_size) -> Converted:
    """The converted projection; scales [N, G], zeros uint8 [N, G]."""
    packed = pack_nibbles(codes, zeros.repeat_interleave(group_size, 1))
    return packed, scales.contiguous(), zeros.contiguous()
