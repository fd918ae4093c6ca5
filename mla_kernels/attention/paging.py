"""What kernels over paged caches share: which page and which row of it hold a tile's tokens."""

from mla_kernels.language import tl, triton

MAX_QUOTIENT = 1 << 20
"""Numbers below this are divided exactly by :func:`quotient`."""
COMMON_PAGE_SIZE = 1 << 16
"""Pages of up to so many tokens need no :func:`check_page_size`."""


@triton.jit
def quotient(x, divisor):
    """x // divisor in fp32, which is vectorised everywhere (the 910 divides integers one by one).

    Exact for 0 <= x < 2**20 and any divisor of at least 1: (x + 0.5) / divisor lies 0.5 / divisor or more from the next
    integer, and a reciprocal that is off by 2 units and a rounded product are off by less than x * 2**-21 / divisor.
    """
    return ((x.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def find_tokens(pages, first, count, key, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(page, row of the page, seen) of a sequence's tokens first + key; ``count`` of them may be looked at.

    Where BLOCK_N divides PAGE_SIZE, all are of one page: page and row are scalars, the row that of the first token.
    Else each has its own, [BLOCK_N]. A token of a page out of range is not seen, and its page is clamped.
    """
    row = first % PAGE_SIZE
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages + first // PAGE_SIZE)
        valid = (page >= 0) & (page < num_pages)
        seen = key < tl.where(valid, count, 0)
        page = tl.where(valid, page, 0)
    else:
        last = tl.maximum(row + count - 1, 0) // PAGE_SIZE
        row = row + key
        index = quotient(row, PAGE_SIZE)
        row -= index * PAGE_SIZE
        page = tl.load(pages + first // PAGE_SIZE + tl.minimum(index, last))
        seen = (key < count) & (page >= 0) & (page < num_pages)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
    return page, row, seen


def check_page_size(page_size: int) -> None:
    """Refuse pages within which rows are no longer found exactly; multiples of every BLOCK_N are not divided at all."""
    if page_size >= MAX_QUOTIENT // 2 and page_size % 256:
        raise ValueError(
            f"page_size: got {page_size:,}, less than {MAX_QUOTIENT // 2:,} and multiples of 256 are accepted"
        )
