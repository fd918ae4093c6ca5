"""Four-bit codes, two a byte, as kernels multiply them: the low nibbles of a run of bytes by one run of columns, the
high nibbles of the same bytes by another.

A row of K columns is cut into blocks of 128, 64 bytes each: byte j holds column j of its block in the low nibble
and column j + 64 in the high one. Where 128 does not divide K, the last block is the row's last 128 columns, and those
that the block before holds already have the code of the value 0 there: a sum over all blocks counts every column once.
A row takes 64 * ceil(K / 128) bytes, and block b starts at column min(128 b, K - 128).

Example, K = 160, column c with code c % 16, and 8 the code of 0. Two blocks, of columns 0 to 127 and 32 to 159:

    byte   0 = code(0)  | code(64) << 4       byte  63 = code(63) | code(127) << 4
    byte  64 = 8        | 8 << 4              (columns 32 and 96: in block 0 already)
    byte  96 = 8        | code(128) << 4      (columns 64 and 128)
    byte 127 = 8        | code(159) << 4      (columns 95 and 159)
"""

import torch

BLOCK = 128
HALF = BLOCK // 2


def packed_bytes(columns: int) -> int:
    """Bytes of a row."""
    return -(-columns // BLOCK) * HALF


def pack_nibbles(codes: torch.Tensor, fill: torch.Tensor | int) -> torch.Tensor:
    """uint8 [rows, packed_bytes(K)] of codes uint8 [rows, K], each below 16, K at least 128.

    ``fill``: the code of the value 0, for all columns or uint8 [rows, K].
    """
    rows, columns = codes.shape
    rest = columns % BLOCK
    if rest:
        last = codes[:, -BLOCK:].clone()
        last[:, :-rest] = fill if isinstance(fill, int) else fill[:, columns - BLOCK : columns - rest]
        codes = torch.cat([codes[:, : columns - rest], last], 1)
    low, high = codes.view(rows, -1, 2, HALF).unbind(2)
    return (high << 4).bitwise_or_(low).view(rows, -1)


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes uint8 [rows, columns] of what :func:`pack_nibbles` returned."""
    low, high = split_nibbles(packed)
    return by_column(low, high, columns)


def split_nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high nibbles of bytes, eight bytes an operation."""
    words = packed.contiguous().view(torch.int64)
    low, high = words & 0x0F0F0F0F0F0F0F0F, (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return low.view(torch.uint8), high.view(torch.uint8)


def by_column(low: torch.Tensor, high: torch.Tensor, columns: int) -> torch.Tensor:
    """[rows, columns] of what belongs to the low and to the high nibbles, each [rows, packed_bytes(columns)]."""
    rows = low.shape[0]
    values = torch.stack([low.view(rows, -1, HALF), high.view(rows, -1, HALF)], 2).view(rows, -1)
    rest = columns % BLOCK
    return values if rest == 0 else torch.cat([values[:, : columns - rest], values[:, -rest:]], 1)
