"""What the kernels of ``mla_prefill`` and of its backward share: where a sequence stands, and how a key is cut.

A key of any width is cut into powers of two, which tiles need: ``FIRST`` and ``REST`` columns of ``k`` (REST may be 0),
then ``ROPE`` columns of ``k_rope`` (0 without it). A query row is the same parts one after another. DeepSeek-V3's
128 + 64 is FIRST 128, ROPE 64 with ``k_rope``, and FIRST 128, REST 64 where the rotated key was expanded into ``k``.
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
def load_parts(
    base, stride, rope_base, rope_stride, line, count,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The parts of keys, or queries, [lines, FIRST], [lines, REST], [lines, ROPE]; see :func:`load_rows`. A part that
    a key does not have is the first one again, and no code."""
    first = load_rows(base, stride, line, count, FIRST, MASKED)
    rest = first
    rope = first
    if REST:
        rest = load_rows(base + FIRST, stride, line, count, REST, MASKED)
    if ROPE:
        rope = load_rows(rope_base, rope_stride, line, count, ROPE, MASKED)
    return first, rest, rope


@triton.jit
def multiply_parts(a_first, a_rest, a_rope, b_first, b_rest, b_rope, REST: tl.constexpr, ROPE: tl.constexpr):
    """Scores [lines of a, lines of b]: the sum of the products of their parts."""
    scores = tl.dot(a_first, tl.trans(b_first), input_precision="ieee")
    if REST:
        scores = tl.dot(a_rest, tl.trans(b_rest), scores, input_precision="ieee")
    if ROPE:
        scores = tl.dot(a_rope, tl.trans(b_rope), scores, input_precision="ieee")
    return scores


@triton.jit
def add_products(weights, first, rest, rope, first_sum, rest_sum, rope_sum, REST: tl.constexpr, ROPE: tl.constexpr):
    """The sums [lines, part] plus weights [lines, rows] times the parts of rows."""
    first_sum = tl.dot(weights, first, first_sum, input_precision="ieee")
    if REST:
        rest_sum = tl.dot(weights, rest, rest_sum, input_precision="ieee")
    if ROPE:
        rope_sum = tl.dot(weights, rope, rope_sum, input_precision="ieee")
    return first_sum, rest_sum, rope_sum


@triton.jit
def empty_sums(LINES: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr):
    """Zeros [LINES, part] in fp32 for each part."""
    first = tl.zeros([LINES, FIRST], tl.float32)
    rest = first
    rope = first
    if REST:
        rest = tl.zeros([LINES, REST], tl.float32)
    if ROPE:
        rope = tl.zeros([LINES, ROPE], tl.float32)
    return first, rest, rope


@triton.jit
def store_parts(
    base, stride, rope_base, rope_stride, line, count, first, rest, rope,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Write the parts where :func:`load_parts` reads them."""
    store_rows(base, stride, line, count, first, FIRST)
    if REST:
        store_rows(base + FIRST, stride, line, count, rest, REST)
    if ROPE:
        store_rows(rope_base, rope_stride, line, count, rope, ROPE)


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
    """(FIRST, REST) of a key part: its largest power of two, and what is left."""
    first = 1 << (k_width.bit_length() - 1) if k_width else 0
    return first, k_width - first
