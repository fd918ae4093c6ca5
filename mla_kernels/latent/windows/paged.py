"""write_paged_windows: entries of the windows that tokens complete, out of paged states that hold these tokens already.

Serving engines keep the states of unfinished windows in pages, beside their caches, and put new tokens there first;
:mod:`mla_kernels.latent.windows.write` is for a ring of our own, which the same launch fills.
"""

import torch

from mla_kernels.checks import FLOATS, INDICES, any_requires_grad, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import windows as cpu
from mla_kernels.invariance import FIXED_TOKENS, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache, page_size_of
from mla_kernels.latent.windows.parts import (
    INDEXER_FP8,
    add_tokens,
    check_eps,
    check_tables,
    check_whole_keys,
    check_window,
    first_of_window,
    layout_of,
    normalise,
    statics,
    store_row,
    stored_layout,
    stored_parts,
    window_rule,
)
from mla_kernels.latent.windows.write import entry_bytes
from mla_kernels.latent.write import check_fits, load_row
from mla_kernels.launch import DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

_INT32, _FP32 = (torch.int32,), (torch.float32,)


@triton.jit
def paged_mean(
    states, pages,  # pages: this sequence's row of the table
    start,
    state_pages, state_page_size, state_stride, row_stride, part_stride,
    WIDTH: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The weighted mean [WIDTH] of a window that begins at position ``start``, and how many of the pages read are none.

    BLOCK_T divides the pages' size and RATIO: a block lies in one page, and on one side of an overlapping window. A
    page that does not exist is read as the first or the last.
    """
    line = tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    largest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    mean = tl.zeros([WIDTH], tl.float32)
    missing = 0
    for position in range(first_of_window(start, RATIO, OVERLAP), start + RATIO, BLOCK_T):
        number = position // state_page_size
        page = tl.load(pages + number)
        there = tl.minimum(tl.maximum(page, 0), state_pages - 1)
        missing += tl.where(there == page, 0, 1)
        side = tl.where(position >= start, WIDTH, 0) if OVERLAP else 0
        row = position - number * state_page_size
        block = states + tl.cast(there, tl.int64) * state_stride + tl.cast(row, tl.int64) * row_stride + side
        at = block + line[:, None] * row_stride + column[None, :]
        x = tl.load(at)  # [BLOCK_T, WIDTH]
        z = tl.load(at + part_stride)  # [BLOCK_T, WIDTH]
        largest, _, total, mean = add_tokens(x, z, largest, total, mean)
    return mean / total, missing


@triton.jit(
    do_not_specialize=["tokens", "batch", "table_pages", "state_pages", "table_rows", "num_slots", "table_stride"]
)
def write_paged_windows_kernel(
    states,  # [state_pages, state_page_size, 2, W]
    positions, slot_mapping, sequences,  # [tokens]
    block_table,  # [batch, table_pages]
    norm_weight,  # [WIDTH]
    cos, sin,  # [table_rows, ROPE / 2]
    values, codes, scales, keys,  # the cache's parts
    tokens, batch, table_pages, state_pages, state_page_size, table_rows, num_slots, page_size,
    table_stride, state_stride, row_stride, part_stride, cos_stride, sin_stride, page_stride, slot_stride, scale_stride,
    eps,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Item: one token, of which few complete a window; the others are done when their slot is read."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            first = tl.load(positions + token).to(tl.int64) - (RATIO - 1)
            sequence = tl.load(sequences + token)
            known = ((first >= 0) & (first < table_rows)) & ((sequence >= 0) & (sequence < batch))
            start = tl.cast(tl.where(known, first, 0), tl.int32)
            last_page = (start + (RATIO - 1)) // state_page_size
            if (known & (start % RATIO == 0)) & ((last_page < table_pages) & (state_pages > 0)):
                mean, missing = paged_mean(
                    states, block_table + tl.cast(sequence, tl.int64) * table_stride, start,
                    state_pages, state_page_size, state_stride, row_stride, part_stride,
                    WIDTH, RATIO, OVERLAP, BLOCK_T,
                )  # fmt: skip
                if missing == 0:
                    at = tl.cast(start, tl.int64)
                    norm = load_row(norm_weight, WIDTH)
                    row = normalise(mean, norm, cos + at * cos_stride, sin + at * sin_stride, eps, WIDTH, ROPE)
                    store_row(
                        row, values, codes, scales, keys, slot, page_size, page_stride, slot_stride, scale_stride,
                        WIDTH, LAYOUT,
                    )  # fmt: skip


def _rule(chip, dtype, constants, sizes):
    tile = window_rule(chip, constants)
    named = {"LATENT": constants["WIDTH"], "ROPE": 0}
    check_fits("write_paged_windows", chip, named, _memory(chip, dtype, constants, tile))
    return tile


def _memory(chip, dtype, constants, tile):
    """Ascend: copies of a block in fp32 and of a row, and fp8's 2-D steps, as for ``write_windows``."""
    width, block = constants["WIDTH"], tile["BLOCK_T"]
    if chip.is_gpu:
        return {"shared": 8 * width + 4 * width * tile["num_warps"]}
    steps = 152 * width if constants["LAYOUT"].startswith("fp8") else 0
    return {"UB": 36 * block * width + 72 * width + steps}


def _cost(dtype, constants, sizes):
    """Of ``tokens`` that follow each other: every RATIO-th completes a window."""
    width, ratio, sides = constants["WIDTH"], constants["RATIO"], 1 + constants["OVERLAP"]
    entries = sizes["tokens"] / ratio
    read = entries * ratio * sides * width * 8
    written = entries * (entry_bytes(dtype, constants) + 4 * constants["ROPE"] + 12)
    return Cost(flops=entries * ratio * sides * width * 8.0, bytes=read + written + 8 * sizes["tokens"])


def _work(dtype, constants, sizes, tile):
    whole, programs = _cost(dtype, constants, sizes), sizes["tokens"]
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def _statics(width, rope_dim, ratio, overlap, layout):
    return {**statics(width, rope_dim, ratio, overlap), "LAYOUT": layout}


def _case(name, width, ratio, overlap, layout, dtypes=("bf16",)):
    return Case(name, _statics(width, 64, ratio, overlap, layout), {"tokens": 256}, dtypes)


WRITE_PAGED_WINDOWS = Kernel(
    write_paged_windows_kernel,
    arguments={
        "states": "*fp32",
        **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
        **dict.fromkeys(("sequences", "block_table"), "*i32"),
        "norm_weight": "*T",
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        "keys": "*T",
        **dict.fromkeys(
            ("tokens", "batch", "table_pages", "state_pages", "state_page_size", "table_rows", "num_slots", "page_size",
             "table_stride"),
            "i32",
        ),
        **dict.fromkeys(
            ("state_stride", "row_stride", "part_stride", "cos_stride", "sin_stride", "page_stride", "slot_stride",
             "scale_stride"),
            "i32:16",
        ),
        "eps": "fp32",
    },
    statics=tuple(_statics(512, 64, 4, True, "unquantised")),
    tiles={"BLOCK_T": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("hca", 512, 128, False, "unquantised", ("bf16", "fp16", "fp32")),
        _case("hca_fp8", 512, 128, False, "fp8_v4"),
        _case("csa", 512, 4, True, "unquantised", ("bf16", "fp16", "fp32")),
        _case("csa_fp8", 512, 4, True, "fp8_v4"),
        _case("csa_fp8_v32", 512, 4, True, "fp8_v32"),
        _case("csa_int8", 512, 4, True, "int8"),
        _case("indexer", 128, 4, True, INDEXER_FP8),
    ),
    uses_dot=False,
)  # fmt: skip


def _launch(
    states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache, layout, ratio, overlap, eps,
    batch_invariant=False,
):  # fmt: skip
    tokens, width, chip = slot_mapping.shape[0], norm_weight.shape[0], chip_of(states.device)
    pages, page_size = states.shape[:2]
    key = (
        chip.device, cache.dtype, tokens, page_size, width, cos.shape[1], ratio, overlap,
        layout, cache.dim(), batch_invariant,
    )  # fmt: skip
    plan = WRITE_PAGED_WINDOWS.kept.plans.get(key)
    if plan is None:
        constants = _statics(width, 2 * cos.shape[1], ratio, overlap, stored_layout(layout, cache.dim()))
        dtype = "bf16" if cache.dtype == torch.uint8 else DTYPE_NAMES[cache.dtype]
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        tile = WRITE_PAGED_WINDOWS.tile_for(chip, dtype, constants, sizes)
        one_page = page_size & -page_size  # tokens from a multiple of it on lie together
        tile = tile | {"BLOCK_T": min(tile["BLOCK_T"], ratio, one_page)}
        plan = WRITE_PAGED_WINDOWS.keep(key, (constants, tile))
    *parts, slot_stride, scale_stride = stored_parts(cache, layout, width, cos)
    entries = page_size_of(cache, width)
    args = (
        states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, *parts,
        tokens, *block_table.shape, pages, page_size, cos.shape[0], cache.shape[0] * entries, entries,
        block_table.stride()[0], *states.stride()[:3], cos.stride()[0], sin.stride()[0],
        cache.stride()[0], slot_stride, scale_stride, eps,
    )  # fmt: skip
    WRITE_PAGED_WINDOWS.launch(chip, tokens, args, *plan)


def _fake(*_):
    return None


def _check_values(
    states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, cache, layout, ratio, overlap, *_
):  # fmt: skip
    slots = cache.shape[0] * page_size_of(cache, norm_weight.shape[0])
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")
    ends = slot_mapping >= 0
    ended, whose = positions[ends].long(), sequences[ends].long()
    wrong = ended[(ended < 0) | (ended % ratio != ratio - 1)]
    if wrong.numel():
        raise ValueError(f"positions: got {int(wrong[0])} with a slot, accepted are ends of windows of {ratio} tokens")
    check_range("positions", ended - (ratio - 1), 0, cos.shape[0], "rows of cos and sin that windows begin at")
    check_range("sequences", whose, 0, block_table.shape[0], "rows of block_table")
    page_size = states.shape[1]
    if ended.numel() and int(ended.max()) >= block_table.shape[1] * page_size:
        raise ValueError(
            f"block_table: got {block_table.shape[1]} pages of {page_size}, a window ends at position "
            f"{int(ended.max())}"
        )
    read = ended[:, None] + torch.arange(1 - ratio * (1 + overlap), 1)
    pages = block_table[whose[:, None], read.clamp_min(0) // page_size]
    wrong = pages[(read >= 0) & ((pages < 0) | (pages >= states.shape[0]))]
    if wrong.numel():
        raise ValueError(f"block_table: got page {int(wrong[0])} in a window, states has {states.shape[0]} pages")


_write_paged_windows = define_op(
    "write_paged_windows",
    "(Tensor states, Tensor positions, Tensor slot_mapping, Tensor sequences, Tensor block_table, Tensor norm_weight, "
    "Tensor cos, Tensor sin, Tensor(a!) cache, str layout, int ratio, bool overlap, float eps=1e-06, "
    "bool batch_invariant=False) -> ()",
    cpu=cpu.write_paged_windows,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def write_paged_windows(
    states: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    sequences: torch.Tensor,
    block_table: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: LatentCache | IndexerCache,
    *,
    ratio: int,
    overlap: bool,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Write the entries of the windows that tokens complete, out of paged states of tokens, in place, in one launch.

    For engines that keep DeepSeek-V4's raw tokens in pages of their own and have put the new ones there; what
    :func:`mla_kernels.write_windows` does from a ring that it fills itself. A token at position p whose slot is not -1
    is the last of a window; its entry is ``RMSNorm(sum_j softmax_j(score_j) kv_j) * norm_weight``, the trailing values
    rotated by row ``p + 1 - ratio`` of the tables (pairs of neighbours, as in :func:`mla_kernels.write_kv`). The
    softmax is taken for each feature by itself. Without overlap (HCA) j runs over the ``ratio`` tokens up to p; with
    overlap (CSA) over the first halves of the rows of the ``ratio`` tokens before these, then over the second halves of
    their own; the window at position 0 has only the latter. The arithmetic is float32, rounded or quantised once, with
    the scales that ``write_windows`` chooses.

    With ratio 4, pages of 4 states and table row ``[7, 2]``, a token at position 7 with slot 9 writes an entry to slot
    9: without overlap that of page 2, with overlap that of the first halves of page 7's rows and the second of page
    2's. Tokens at positions 4 to 6 have slot -1.

    Args:
        states: ``[pages, page_size, 2, W]`` float32: a token's kv, then its score, which holds the position's bias
            already; W is D, or 2 D with overlap. Pages and rows of any stride; vLLM's ``[pages, page_size, 2 * W]``
            through ``unflatten(2, (2, W))``. What no window of the call reads may hold anything.
        positions: ``[T]`` int32 or int64, each token's position in its sequence; read where there is a slot.
        slot_mapping: ``[T]`` int32 or int64, ``page * page_size + offset`` of the entry in ``cache``; -1 writes
            nothing: the token ends no window, or is padding. All slots of a call other than -1 must differ.
        sequences: ``[T]`` int32, each token's row of ``block_table``; read where there is a slot.
        block_table: ``[B, P]`` int32, each sequence's pages of states: position p lies in row ``p % page_size`` of page
            ``block_table[b, p // page_size]``. Entries that no window of the call reads may hold anything.
        norm_weight: ``[D]`` bfloat16, float16 or float32; D is a power of two of at least 16.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables.
        cache: where entries go: a :class:`LatentCache` with ``latent_dim`` D and ``rope_dim`` 0, or an
            :class:`IndexerCache` with ``head_dim`` D, in any of their layouts.
        ratio: tokens of a window, a power of two.
        overlap: whether an entry also takes the first halves of the window before's rows.
        eps: added to the mean square.
        batch_invariant: whether an entry's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back, so that the call may stand in a captured graph: a token whose
    slot, sequence or position is out of range, or does not end a window, writes nothing, and so does one whose window
    reads a page that does not exist.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is neither cache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also what is skipped on a
            device, except slot -1. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or D does not fit the chip.

    Source: vLLM 0.33.0, ``vllm/models/deepseek_v4/common/ops/fused_compress_quant_cache.py``, whose rows are rounded to
    bfloat16 before they are quantised, and of which the indexer's scales go below 2^-13.
    """
    if not isinstance(cache, (LatentCache, IndexerCache)):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache or an IndexerCache is accepted")
    check_whole_keys(cache)
    check_window(ratio, overlap)
    layout, width = layout_of(cache)
    device, data = cache.data.device, cache.data
    check_tensor("states", states, shape=(None, None, 2, width * (1 + overlap)), dtypes=_FP32, device=device)
    if states.shape[1] == 0:
        raise ValueError("states: got pages of 0 tokens, at least 1 is accepted")
    if states.shape[1] * states.stride()[1] >= 1 << 31:
        raise ValueError(f"states: got rows {states.stride()[1]} values apart, a page of fewer than 2^31 is accepted")
    check_tensor("slot_mapping", slot_mapping, rank=1, dtypes=INDICES, device=device)
    tokens = slot_mapping.shape
    check_tensor("positions", positions, shape=tokens, dtypes=INDICES, device=device)
    check_tensor("sequences", sequences, shape=tokens, dtypes=_INT32, device=device)
    check_tensor("block_table", block_table, rank=2, dtypes=_INT32, device=device)
    check_tensor("norm_weight", norm_weight, shape=(width,), dtypes=FLOATS, device=device)
    check_tables(cos, sin, width, device)
    check_eps(eps)
    if any_requires_grad((states, norm_weight, cos, sin, data)):
        check_no_grad("write_paged_windows", states=states, norm_weight=norm_weight, cos=cos, sin=sin, cache=data)
    _write_paged_windows(
        states, positions, slot_mapping, sequences, block_table, norm_weight, cos, sin, data, layout, ratio, overlap,
        float(eps), wanted(batch_invariant),
    )  # fmt: skip
