"""What the kernels of sparse MLA and of its gradients share: the picks of a tile, and the numbers of query rows."""

from mla_kernels.language import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_picks(indices, first, end, key, num_rows):
    """(row, seen) of picks first + key of a token: rows [BLOCK_N] in range, and whether they are picks at all."""
    slot = tl.load(indices + first + key, mask=key < end - first, other=-1)
    seen = (slot >= 0) & (slot < num_rows)
    return tl.minimum(tl.maximum(slot, 0), num_rows - 1), seen


@triton.jit
def load_pick_rows(kv_ptr, indices, first, end, key, num_rows, kv_stride, WIDE: tl.constexpr):
    """(pointers [BLOCK_N, 1] to the rows of kv that picks first + key name, seen [BLOCK_N]). WIDE: 64-bit offsets."""
    slot, seen = load_picks(indices, first, end, key, num_rows)
    if WIDE:
        slot = slot.to(tl.int64)
    return kv_ptr + (slot * kv_stride)[:, None], seen


@triton.jit
def load_row_numbers(lse_ptr, shift_ptr, row, line, inside):
    """lse in base 2 (0 where a query row sees nothing) and shift of query rows row + line."""
    lse = tl.load(lse_ptr + row + line, mask=inside, other=0.0)
    lse = tl.where(lse > float("-inf"), lse * LOG2E, 0.0)
    return lse, tl.load(shift_ptr + row + line, mask=inside, other=0.0)
