"""What the kernels of ``mla_prefill`` and of its backward share: where a sequence stands, and how a key is cut.

A key of any width is cut into powers of two, which tiles need: ``WIDE`` and ``REST`` columns of ``k`` (REST may be 0),
then ``ROPE`` columns of ``k_rope`` (0 without it). A query row is the same parts one after another. DeepSeek-V3's
128 + 64 is WIDE 128, ROPE 64 with ``k_rope``, and WIDE 128, REST 64 where the rotated key was expanded into ``k``.
"""

from mla_kernels.language import tl, triton

LOWEST = tl.constexpr(-3.0e38)  # start of the running maximum: finite, so that no difference is inf - inf
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
MAX_STRIDE = 1 << 22  # elements between two tokens, so that offsets within a tile fit 32 bits


@triton.jit
def sequence_span(cu_seqlens_ptr, sequence, tokens, longest):
    """(first row, rows) of a sequence: inside the tensor, whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), tokens)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), tokens)
    return start, tl.minimum(tl.maximum(end - start, 0), longest)


@triton.jit
def spare_blocks(cu_seqlens_ptr, sequence, sequences, start, count, rows, BLOCK: tl.constexpr):
    """(blocks before, blocks after, row of the first after, end): rows of no query or key that a sequence's programs
    clear in blocks of BLOCK. Before the first sequence, behind the last, and of any what passes the longest length;
    as a rule there are none."""
    tail = start + count
    end = tl.maximum(tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), rows), tail)
    end = tl.where(sequence == sequences - 1, rows, end)
    before = tl.where(sequence == 0, tl.cdiv(start, BLOCK), 0)
    return before, tl.cdiv(end - tail, BLOCK), tail, end


@triton.jit
def spare_rows(block, before, start, tail, end, BLOCK: tl.constexpr):
    """(first row, rows from it on) of a block; see :func:`spare_blocks`."""
    first = tl.where(block < before, block, block - before) * BLOCK
    row = tl.where(block < before, first, tail + first)
    return row, tl.where(block < before, start, end) - row


@triton.jit
def load_rows(base, stride, line, count, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[lines, WIDTH]: rows ``base + line * stride``; rows from ``count`` on are 0 if MASKED, else all must exist."""
    rows = base + line[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(rows, mask=line[:, None] < count, other=0.0)
    else:
        return tl.load(rows)


@triton.jit
def store_rows(base, stride, line, count, values, WIDTH: tl.constexpr):
    """Write rows below ``count`` of values [lines, WIDTH] to ``base + line * stride``."""
    rows = base + line[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(rows, values.to(base.dtype.element_ty), mask=line[:, None] < count)


@triton.jit
def hidden_as(scores, line, key, diagonal, keys, value, CAUSAL: tl.constexpr):
    """scores [lines, keys] with ``value`` where a line does not see a key: key > line + diagonal, or key >= keys.

    A causal line that exists sees no key past the sequence's end.
    """
    if CAUSAL:
        last = line.to(tl.float32) + diagonal.to(tl.float32)
        return tl.where(key.to(tl.float32)[None, :] <= last[:, None], scores, value)
    else:
        return tl.where((key < keys)[None, :], scores, value)


def widths(k_width: int) -> tuple[int, int]:
    """(WIDE, REST) of a key part: its largest power of two, and what is left."""
    wide = 1 << (k_width.bit_length() - 1) if k_width else 0
    return wide, k_width - wide
