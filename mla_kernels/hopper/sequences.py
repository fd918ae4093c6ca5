"""What the Hopper kernels of mla_prefill and of its gradients share: where rows stand, and rows that nobody owns."""

from mla_kernels.hopper.language import fence_async_shared, gl, gluon, reinterpret

ATOM = gl.constexpr(8)  # rows after which the swizzle repeats
SPARE = gl.constexpr(64)  # rows that are cleared at a time
SPARE_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def sequence_span(bounds_ptr, sequence, tokens, longest):
    """(first row, rows) of a sequence: inside the tensor, whatever its bounds hold."""
    start = gl.minimum(gl.maximum(gl.load(bounds_ptr + sequence), 0), tokens)
    end = gl.minimum(gl.load(bounds_ptr + sequence + 1), tokens)
    return start, gl.minimum(gl.maximum(end - start, 0), longest)


@gluon.jit
def place(tiles, together, heads):
    """(sequence, head, tile) of this program. A *pair* is a sequence's head; programs take the tiles of ``together``
    pairs, which read what fits a cache, before those of the next pairs: first the first tile of each, then the second.
    """
    pairs = gl.num_programs(0) // tiles
    set_first = gl.program_id(0) // (together * tiles) * together
    within = gl.program_id(0) - set_first * tiles
    set_size = gl.minimum(pairs - set_first, together)
    tile = within // set_size
    pair = set_first + within - tile * set_size
    sequence = pair // heads
    return sequence, pair - sequence * heads, tile


@gluon.jit
def spare_blocks(bounds_ptr, sequence, sequences, start, count, rows):
    """(blocks before the sequence, blocks in all, the first row behind it, the end): blocks of SPARE rows that belong
    to nobody and fall to a sequence's programs. Before the first sequence, behind the last, and of any what passes the
    longest length; as a rule there are none."""
    tail = start + count
    stop = gl.maximum(gl.minimum(gl.load(bounds_ptr + sequence + 1), rows), tail)
    stop = gl.where(sequence == sequences - 1, rows, stop)
    before = gl.where(sequence == 0, (start + SPARE - 1) // SPARE, 0)
    return before, before + (stop - tail + SPARE - 1) // SPARE, tail, stop


@gluon.jit
def spare_rows(block, before, start, tail, stop):
    """(first row, rows from it on) of a block; see spare_blocks."""
    first = block * SPARE
    end = start
    if block >= before:
        first = tail + (block - before) * SPARE
        end = stop
    return first, end - first


@gluon.jit
def store_zeros(out_ptr, stride, count, WIDTH: gl.constexpr):
    """Zeros in ``count`` of SPARE rows of WIDTH columns, ``stride`` elements apart."""
    line = gl.arange(0, SPARE, layout=gl.SliceLayout(1, SPARE_LAYOUT))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SPARE_LAYOUT))
    nothing = gl.zeros([SPARE, WIDTH], out_ptr.dtype.element_ty, layout=SPARE_LAYOUT)
    gl.store(out_ptr + line[:, None] * stride + column[None, :], nothing, mask=(line < count)[:, None])


@gluon.jit
def store_sums(sums, out_ptr, stride, count):
    """The first ``count`` rows of sums to out_ptr, ``stride`` elements apart, in its element type, from the registers
    where the product left them: the exchange of :func:`mla_kernels.hopper.parts.store_rows` spills beside the sums of
    gradients (Triton 3.6.0)."""
    LAYOUT: gl.constexpr = sums.type.layout
    row = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    values = sums.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row[:, None] * stride + column[None, :], values, mask=(row < count)[:, None])


@gluon.jit
def clear_rows(tile, stage, count):
    """Zero the rows from ``count`` on of a stage of a tile [stages, rows, width], by a single warp."""
    ROWS: gl.constexpr = tile.shape[1]
    COLUMNS: gl.constexpr = 64 if tile.shape[2] > 64 else tile.shape[2]  # that TMA and wgmma swizzle together
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * COLUMNS, element_bitwidth=16, rank=2)
    PANELS: gl.constexpr = tile.shape[2] // COLUMNS
    COUNT: gl.constexpr = tile.shape[0] * PANELS * ROWS // ATOM
    CELLS: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // COLUMNS, COLUMNS // 8], [1, 1], [1, 0])
    atoms = reinterpret(tile, tile.dtype, [COUNT, ATOM, COLUMNS], FLAT)
    line = gl.arange(0, ATOM, layout=gl.SliceLayout(1, CELLS))
    for atom in range(count // ATOM, ROWS // ATOM):
        for panel in gl.static_range(PANELS):
            cells = atoms.index((stage * PANELS + panel) * (ROWS // ATOM) + atom)
            kept = gl.where((line + atom * ATOM < count)[:, None], cells.load(CELLS), 0.0)
            cells.store(kept)  # [8, COLUMNS]
    fence_async_shared()  # the cleared rows
