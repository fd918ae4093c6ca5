"""Weights as checkpoints store them: codes and their scales, found by name, checked, and turned into numbers.

A weight [N, K] called NAME, N outputs and K inputs, is stored as one of these; ue8m0 is a power of two in a byte.

===================== ============================================== ==================================================
in files of           codes                                          scales
===================== ============================================== ==================================================
DeepSeek-V3 to V3.2,  NAME.weight e4m3 [N, K]                        NAME.weight_scale_inv fp32, bf16 or ue8m0
Kimi-K2, GLM-5                                                       [ceil(N/128), ceil(K/128)]
DeepSeek-V4           NAME.weight e4m3 [N, K]                        NAME.scale ue8m0 [ceil(N/128), ceil(K/128)]
DeepSeek-V4's experts NAME.weight int8 [N, K/2], pairs of e2m1       NAME.scale ue8m0 [N, K/32]
compressed-tensors    NAME.weight_packed int32 [N, K/8] or [N, K/4]  NAME.weight_scale [N, K/group] or [N, 1]
compressed-tensors    NAME.weight int8 or e4m3 [N, K]                NAME.weight_scale [N, 1]
GPTQ, AWQ             NAME.qweight int32 [K/8, N] or [K, N/8]        NAME.scales [K/group, N], NAME.qzeros int32
===================== ============================================== ==================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mla_kernels.checks import FLOATS, check_tensor
from mla_kernels.quant.fp8_block import BLOCK as SCALE_BLOCK
from mla_kernels.quant.fp8_block import decode_e4m3, dequantise_fp8_block
from mla_kernels.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO
from mla_kernels.quant.int8_channel import dequantise_int8_channel
from mla_kernels.quant.mxfp4 import GROUP, decode_e2m1, decode_ue8m0
from mla_kernels.quant.nibbles import BLOCK, pack_nibbles

WORD = 8  # four-bit codes of an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows a word's nibbles hold, from the lowest bits up
GPTQ_ONES = 0x11111111  # one in each of a word's eight nibbles
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
_PARTS = (
    "weight", *SCALE_NAMES, "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"
)  # fmt: skip
_UNREAD = ("weight_zero_point", "weight_g_idx", "weight_scale_2", "weight_global_scale")  # not with plain codes
NUMBERS = (*FLOATS, torch.float64)
_SCALES = (*FLOATS, torch.float8_e8m0fnu)
_ROWS = 512  # rows that are turned into numbers at a time: bounds the memory of intermediate results


@dataclass(frozen=True)
class StoredWeight:
    """One weight [N, K] in codes.

    Attributes:
        format: "fp8_block", "int8", "int4" or "mxfp4" as in :class:`mla_kernels.ExpertWeights`; "fp8_row": e4m3 with a
            scale for each row, which only turns into numbers.
        shape: (N, K).
        scales: fp8_block fp32 [ceil(N/128), ceil(K/128)]; fp8_row and int8 fp32 [N]; int4 [N, K/group] in the file's
            dtype; mxfp4 uint8 [N, K/32].
        zeros: int4 uint8 [N, K/group], or None: 8 everywhere.
        unpack: gives the codes, uint8 [N, K] (int8 for int8), one a weight.
    """

    format: str
    shape: tuple[int, int]
    scales: torch.Tensor
    zeros: torch.Tensor | None
    unpack: Callable[[], torch.Tensor]

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in ``dtype``, each value rounded once."""
        codes = self.unpack()
        result = codes.new_empty(self.shape, dtype=dtype)
        for first in range(0, self.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            result[rows] = self._decode(codes[rows], rows, dtype)
        return result

    def _decode(self, codes, rows, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.format == "fp8_block":
            return dequantise_fp8_block(codes, self.scales, dtype, rows.start)
        if self.format == "fp8_row":
            return decode_e4m3(codes).to(wide) * self.scales[rows].to(wide)[:, None]
        if self.format == "int8":
            return dequantise_int8_channel(codes, self.scales[rows], dtype)
        scales = self.scales[rows]
        if self.format == "mxfp4":
            values, scales = decode_e2m1(codes << 4).to(wide), decode_ue8m0(scales)
        else:
            values = codes.to(wide)
            zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros[rows].to(wide)[..., None]
            values = (values.unflatten(1, (scales.shape[1], -1)) - zeros).flatten(1)
        return (values.unflatten(1, (scales.shape[1], -1)) * scales.to(wide)[..., None]).flatten(1)

    def packed(self, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales and zeros as :class:`mla_kernels.ExpertWeights` has them for one weight of the format."""
        if self.format not in ("int4", "mxfp4"):
            return self.unpack(), self.scales, None
        columns, group_size = self.shape[1], self.shape[1] // self.scales.shape[1]
        if columns < BLOCK:
            raise ValueError(f"{where}: got {columns} columns, at least {BLOCK} are accepted")
        fill = 0 if self.format == "mxfp4" else SYMMETRIC_ZERO
        if self.zeros is not None:
            fill = self.zeros.repeat_interleave(group_size, 1)
        return pack_nibbles(self.unpack(), fill), self.scales.contiguous(), self.zeros

    def part(self, rows: slice, columns: slice) -> StoredWeight:
        """Some rows and columns; bounds of columns, and of rows in fp8_block, are multiples of 128."""
        places = [range(size)[bounds] for size, bounds in zip(self.shape, (rows, columns))]
        own, zeros = self.scales, self.zeros
        if self.format == "fp8_block":
            whole = [slice(place.start // SCALE_BLOCK, -(-place.stop // SCALE_BLOCK)) for place in places]
            own = own[whole[0], whole[1]]
        elif own.dim() == 1:
            own = own[rows]
        else:
            group_size = self.shape[1] // own.shape[1]
            groups = slice(places[1].start // group_size, places[1].stop // group_size)
            own, zeros = own[rows, groups], None if zeros is None else zeros[rows, groups].contiguous()
        shape = len(places[0]), len(places[1])
        return StoredWeight(self.format, shape, own.contiguous(), zeros, lambda: self.unpack()[rows, columns])


def names_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[str, ...]:
    """Which names in ``tensors`` belong to the weight called ``name``."""
    return tuple(_key(name, part) for part in _PARTS if _key(name, part) in tensors)


def read_weight(
    where: str, tensors: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor | StoredWeight | None, tuple[str, ...]]:
    """The weight called ``name`` and the names of what it is made of; None where ``tensors`` hold nothing of it.

    A weight that is stored as numbers comes as its tensor.

    Raises:
        TypeError: codes without their scales, scales of a weight that is in numbers already, a wrong dtype. KeyError,
        ValueError: tensors that are missing or do not fit. NotImplementedError: GPTQ or AWQ, whose names do not say
        which it is; columns in act-order.
    """
    if _key(name, "qweight") in tensors:
        raise NotImplementedError(
            f"{where}.qweight: got a weight of GPTQ or AWQ, which load_state_dict cannot tell apart; "
            "ExpertWeights.from_gptq and from_awq take experts of these formats"
        )
    if _key(name, "weight_packed") in tensors:
        return read_compressed_tensors(where, tensors, name), names_of(tensors, name)
    weight = tensors.get(_key(name, "weight"))
    if weight is None:
        return None, ()
    scales = [part for part in SCALE_NAMES if _key(name, part) in tensors]
    if weight.dtype in NUMBERS:
        if scales:
            raise TypeError(
                f"{where}.{scales[0]}: got scales for a weight of {weight.dtype}, codes (float8_e4m3fn, int8) are "
                "accepted with them; are these codes that were cast, and not dequantised?"
            )
        return weight, (_key(name, "weight"),)
    others = [part for part in (*scales[1:], *_UNREAD) if _key(name, part) in tensors]
    if others:
        raise NotImplementedError(
            f"{where}.{others[0]}: got a tensor, codes are accepted with one tensor of scales and nothing else"
        )
    if not scales:
        raise TypeError(
            f"{where}.weight: got codes ({weight.dtype}) without scales ({', '.join(SCALE_NAMES)}); codes are no "
            "numbers: pass the scales with them, or dequantise the weight first"
        )
    part = _key(name, scales[0])
    stored = read_codes(f"{where}.weight", weight, f"{where}.{scales[0]}", tensors[part])
    return stored, (_key(name, "weight"), part)


def read_codes(where: str, weight: torch.Tensor, where_scales: str, scales: torch.Tensor) -> StoredWeight:
    """A weight [N, K] of e4m3 or int8, or [N, K/2] of e2m1 pairs; which of them dtypes and the scales' shape say."""
    if weight.dtype == torch.float8_e4m3fn:
        return _read_fp8(where, weight, where_scales, scales)
    check_tensor(where, weight, rank=2, dtypes=(torch.float8_e4m3fn, *_PAIRS))
    if scales.dtype in (torch.float8_e8m0fnu, torch.uint8):
        return _read_mxfp4(where, weight, where_scales, scales)
    check_tensor(where, weight, rank=2, dtypes=(torch.int8,))
    rows = weight.shape[0]
    scales = _row_scales(where_scales, scales, rows)
    return StoredWeight("int8", tuple(weight.shape), scales, None, lambda: weight)


def read_fp8(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> StoredWeight:
    """DeepSeek's e4m3 weight, float8_e4m3fn or its bytes, and weight_scale_inv (V4: scale) of 128 x 128 blocks."""
    weight, part = _get(where, tensors, _key(name, "weight")), "weight_scale_inv"
    if _key(name, part) not in tensors and _key(name, "scale") in tensors:
        part = "scale"
    scales = _get(where, tensors, _key(name, part))
    check_tensor(f"{where}.weight", weight, rank=2, dtypes=(torch.float8_e4m3fn, torch.uint8))
    check_tensor(f"{where}.{part}", scales, shape=_blocks(*weight.shape), dtypes=_SCALES, device=weight.device)
    return _read_fp8(f"{where}.weight", weight, f"{where}.{part}", scales)


def read_mxfp4(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> StoredWeight:
    """DeepSeek-V4's weight int8 [N, K/2], the even column in the low nibble, and scale ue8m0 [N, K/32]."""
    weight, scales = (_get(where, tensors, _key(name, part)) for part in ("weight", "scale"))
    return _read_mxfp4(f"{where}.weight", weight, f"{where}.scale", scales)


def read_compressed_tensors(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> StoredWeight:
    """compressed-tensors' "pack-quantized" of 4 or 8 bits, or its plain int8 weight.

    weight_packed int32 [N, ceil(K bits / 32)]: column c of a row in bits (c bits) % 32 of word (c bits) // 32, code =
    value + 2^(bits - 1). weight_scale [N, K/group], or [N, 1] for a whole row; weight_shape (N, K); with zeros
    weight_zero_point int32 [N/8, K/group], packed likewise along the rows.
    """
    scale = _get(where, tensors, _key(name, "weight_scale"))
    if _key(name, "weight_packed") not in tensors and _key(name, "weight") in tensors:
        weight = tensors[_key(name, "weight")]
        check_tensor(f"{where}.weight", weight, rank=2, dtypes=(torch.int8,))
        if _key(name, "weight_zero_point") in tensors:
            raise NotImplementedError(f"{where}.weight_zero_point: got a tensor, 8 bits are accepted without zeros")
        return read_codes(f"{where}.weight", weight, f"{where}.weight_scale", scale)
    packed, shape = (_get(where, tensors, _key(name, part)) for part in ("weight_packed", "weight_shape"))
    check_tensor(f"{where}.weight_packed", packed, rank=2, dtypes=(torch.int32,))
    check_tensor(f"{where}.weight_shape", shape, shape=(2,), dtypes=(torch.int32, torch.int64))
    rows, columns = shape.tolist()
    widths = {-(-columns * bits // 32): bits for bits in (8, 4)}
    if packed.shape[0] != rows or packed.shape[1] not in widths:
        raise ValueError(
            f"{where}.weight_packed: got shape {tuple(packed.shape)}, with weight_shape ({rows}, {columns}) "
            f"({rows}, {-(-columns // WORD)}) for 4 bits and ({rows}, {-(-columns // 4)}) for 8 are accepted"
        )
    zeros = tensors.get(_key(name, "weight_zero_point"))
    if widths[packed.shape[1]] == 8:
        if zeros is not None:
            raise NotImplementedError(f"{where}.weight_zero_point: got a tensor, 8 bits are accepted without zeros")
        scale = _row_scales(f"{where}.weight_scale", scale, rows)

        def codes():
            return (_octets(packed)[:, :columns] ^ 0x80).view(torch.int8)

        return StoredWeight("int8", (rows, columns), scale, None, codes)
    check_tensor(f"{where}.weight_scale", scale, shape=(rows, None), dtypes=FLOATS, device=packed.device)
    groups = scale.shape[1]
    group_size = _common_group(tensors, name, columns) if groups == 1 else columns // max(groups, 1)
    if group_size not in GROUP_SIZES or columns % group_size or groups not in (1, columns // group_size):
        raise ValueError(
            f"{where}.weight_scale: got {groups} scales a row of {columns} columns; one, or one for each group of "
            f"{', '.join(map(str, GROUP_SIZES))} columns, is accepted"
        )
    _check_order(f"{where}.weight_g_idx", tensors.get(_key(name, "weight_g_idx")), columns, group_size)
    if zeros is not None:
        check_tensor(f"{where}.weight_zero_point", zeros, shape=(-(-rows // WORD), groups), dtypes=(torch.int32,))
        zeros = _nibbles(zeros.t())[:, :rows].t().expand(rows, groups)
        zeros = _to_groups(zeros, columns // group_size)
    scale = _to_groups(scale, columns // group_size)
    return StoredWeight("int4", (rows, columns), scale, zeros, lambda: _nibbles(packed)[:, :columns])


def read_gptq(where: str, tensors: Mapping[str, torch.Tensor], name: str, version: int) -> StoredWeight:
    """GPTQ's qweight int32 [K/8, N] (bits 4 i of a word: column 8 word + i), scales [G, N], qzeros int32 [G, N/8].

    Version 1 stores a word of eight zeros less 0x11111111. A zero of 0 so borrows from its neighbours, and only the
    sum of whole words gives them back.
    """
    qweight, qzeros, scales = (_get(where, tensors, _key(name, part)) for part in ("qweight", "qzeros", "scales"))
    check_tensor(f"{where}.qweight", qweight, rank=2, dtypes=(torch.int32,))
    columns, rows = qweight.shape[0] * WORD, qweight.shape[1]
    group_size = _check_groups(where, rows, columns, qzeros, scales)
    _check_order(f"{where}.g_idx", tensors.get(_key(name, "g_idx")), columns, group_size)
    zeros = _nibbles(qzeros + GPTQ_ONES if version == 1 else qzeros).t()  # [N, G]; int32 wraps
    return StoredWeight(
        "int4", (rows, columns), scales.t().contiguous(), zeros.contiguous(), lambda: _nibbles(qweight.t())
    )


def read_awq(where: str, tensors: Mapping[str, torch.Tensor], name: str) -> StoredWeight:
    """AWQ's qweight int32 [K, N/8] and qzeros int32 [G, N/8], rows in AWQ_ORDER, and scales [G, N]."""
    qweight, qzeros, scales = (_get(where, tensors, _key(name, part)) for part in ("qweight", "qzeros", "scales"))
    check_tensor(f"{where}.qweight", qweight, rank=2, dtypes=(torch.int32,))
    columns, rows = qweight.shape[0], qweight.shape[1] * WORD
    _check_groups(where, rows, columns, qzeros, scales)
    zeros = _in_order(_nibbles(qzeros)).t().contiguous()

    def codes():
        return _in_order(_nibbles(qweight)).t().contiguous()

    return StoredWeight("int4", (rows, columns), scales.t().contiguous(), zeros, codes)


_PAIRS = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)


def _read_fp8(where, weight, where_scales, scales):
    check_tensor(where, weight, rank=2, dtypes=(torch.float8_e4m3fn, torch.uint8))
    codes = weight.view(torch.uint8)
    if codes.numel() and (codes.max() == 0xFF or codes.view(torch.int8).max() == 0x7F):  # the greatest of either order
        raise ValueError(f"{where}: got NaN, numbers are accepted")
    rows, columns = weight.shape
    check_tensor(where_scales, scales, dtypes=_SCALES, device=weight.device)
    if scales.shape != _blocks(rows, columns) and (scales.numel() == 1 or scales.shape[:1] == (rows,)):
        return StoredWeight("fp8_row", (rows, columns), _row_scales(where_scales, scales, rows), None, lambda: codes)
    check_tensor(where_scales, scales, shape=_blocks(rows, columns), dtypes=_SCALES)
    return StoredWeight("fp8_block", (rows, columns), _finite(where_scales, scales), None, lambda: codes)


def _read_mxfp4(where, weight, where_scales, scales):
    check_tensor(where, weight, rank=2, dtypes=_PAIRS)
    pairs = weight.view(torch.uint8)
    rows, columns = pairs.shape[0], 2 * pairs.shape[1]
    e8m0 = (torch.float8_e8m0fnu, torch.uint8)
    check_tensor(where_scales, scales, shape=(rows, columns // GROUP), dtypes=e8m0, device=weight.device)
    if columns % GROUP:
        raise ValueError(f"{where}: got {columns} columns, whole groups of {GROUP} are accepted")
    scales = scales.contiguous().view(torch.uint8)
    if scales.numel() and scales.max() == 0xFF:
        raise ValueError(f"{where_scales}: got scales that are not finite, finite ones are accepted")

    def codes():
        return torch.stack([pairs & 0xF, pairs >> 4], -1).flatten(1)

    return StoredWeight("mxfp4", (rows, columns), scales, None, codes)


def _blocks(rows, columns):
    return -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)


def _finite(where, scales):
    """In fp32."""
    scales = scales.float()
    if not scales.isfinite().all():
        raise ValueError(f"{where}: got scales that are not finite, finite ones are accepted")
    return scales.contiguous()


def _row_scales(where, scales, rows):
    """fp32 [rows] of scales [rows, 1], [rows], or of a single one."""
    check_tensor(where, scales, dtypes=FLOATS)
    if scales.numel() != 1 and scales.shape not in ((rows, 1), (rows,)):
        raise ValueError(f"{where}: got shape {tuple(scales.shape)}, one for each row, ({rows}, 1), is accepted")
    return _finite(where, scales.flatten().expand(rows))


def _to_groups(values, groups):
    return values.expand(-1, groups).contiguous() if values.shape[1] == 1 else values.contiguous()


def _common_group(tensors, name, columns):
    """The widest group that divides the columns of all projections of an expert, which share one size."""
    before = name.rpartition(".")[0]
    shapes = (tensors.get(_key(before, f"{other}.weight_shape")) for other in ("gate_proj", "down_proj"))
    sizes = [columns, *(int(shape[1]) for shape in shapes if shape is not None)]
    return next((size for size in reversed(GROUP_SIZES) if all(number % size == 0 for number in sizes)), 0)


def _key(name, part):
    return f"{name}.{part}" if name else part


def _get(where, tensors, name):
    if name not in tensors:
        raise KeyError(f"{where}: got no tensor named {name!r}")
    return tensors[name]


def _check_order(where, g_idx, columns, group_size):
    """Refuse columns whose groups are not ascending; None, no element or -1 everywhere is no order of its own."""
    if g_idx is None or not g_idx.numel() or (g_idx == -1).all():
        return
    check_tensor(where, g_idx, shape=(columns,), dtypes=(torch.int32, torch.int64))
    ascending = torch.arange(columns, device=g_idx.device, dtype=g_idx.dtype) // group_size
    if not torch.equal(g_idx, ascending):
        raise NotImplementedError(
            f"{where}: got columns that are not in ascending groups of {group_size} (desc_act, actorder 'group'); "
            "accepted are weights whose scales belong to neighbouring columns"
        )


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


def _octets(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().view(torch.uint8)  # little-endian: the lowest bits in the first byte


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, 8 n] of int32 words [rows, n], the lowest bits first."""
    octets = _octets(words)
    return torch.stack([octets & 0xF, octets >> 4], -1).flatten(1)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, 8 n] of AWQ's words, each eight put back in order."""
    inverse = sorted(range(WORD), key=AWQ_ORDER.__getitem__)
    return codes.unflatten(1, (-1, WORD))[..., inverse].flatten(1)
