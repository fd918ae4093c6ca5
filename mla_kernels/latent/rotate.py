"""RoPE of one row, as the kernels that write tokens do it: pairs taken apart and put together by one-hot sums.

Loads and stores with stride 2 would not do on Ascend: such a load reads past the end of its tensor, such a store
overflows the compiler's buffers, and split and join crash the 950's compiler. The comparisons are of floats, because
the 910 compares integers one by one.
"""

from mla_kernels.language import tl, triton


@triton.jit
def pair_lanes(HALF: tl.constexpr, MODE: tl.constexpr):
    """Lanes [HALF] of the first and of the second values of pairs: side by side, or with "half" apart by HALF."""
    pair = tl.arange(0, HALF).to(tl.float32)
    if MODE == "half":
        first = pair
        second = pair + HALF
    else:
        first = 2.0 * pair
        second = 2.0 * pair + 1.0
    return first, second


@triton.jit
def rotate_pairs(x, lane, first_lane, second_lane, cos_row, sin_row, HALF: tl.constexpr):
    """The rotated first and second values [HALF] of the pairs of x [lanes]; ``lane`` are its lanes' numbers."""
    first = tl.sum(tl.where(lane[:, None] == first_lane[None, :], x[:, None], 0.0), 0)  # [lanes, HALF] -> [HALF]
    second = tl.sum(tl.where(lane[:, None] == second_lane[None, :], x[:, None], 0.0), 0)
    cos = tl.load(cos_row + tl.arange(0, HALF))  # [HALF]
    sin = tl.load(sin_row + tl.arange(0, HALF))
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def join_pairs(first, second, lane, first_lane, second_lane):
    """[lanes] with the values of pairs [HALF] in their lanes, 0 elsewhere."""
    x = tl.where(first_lane[:, None] == lane[None, :], first[:, None], 0.0)  # [HALF, lanes]
    x += tl.where(second_lane[:, None] == lane[None, :], second[:, None], 0.0)
    return tl.sum(x, 0)


@triton.jit
def signs(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sylvester-Hadamard signs [ROWS, COLUMNS], both up to 16: -1 where row and column share an odd number of bits."""
    shared = tl.arange(0, ROWS)[:, None] & tl.arange(0, COLUMNS)[None, :]
    shared = shared ^ (shared >> 2)
    shared = (shared ^ (shared >> 1)) & 1
    return 1.0 - 2.0 * shared.to(tl.float32)


@triton.jit
def hadamard_row(x, row_signs, column_signs, HEAD_DIM: tl.constexpr):
    """x [HEAD_DIM] times the Hadamard matrix, the Kronecker product of the signs, times HEAD_DIM ** -0.5."""
    COLUMNS: tl.constexpr = 16 if HEAD_DIM >= 128 else 8
    ROWS: tl.constexpr = HEAD_DIM // COLUMNS
    grid = tl.reshape(x, [ROWS, COLUMNS])
    grid = tl.sum(grid[:, :, None] * column_signs[None, :, :], 1)  # [ROWS, COLUMNS]
    grid = tl.sum(row_signs[:, :, None] * grid[:, None, :], 0)
    return tl.reshape(grid, [HEAD_DIM]) * (1.0 / HEAD_DIM**0.5)
