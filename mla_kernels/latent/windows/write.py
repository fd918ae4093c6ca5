"""write_windows: new tokens into the compressors' state, and the entries of the windows that they complete."""

from itertools import pairwise

import torch

from mla_kernels.checks import any_requires_grad, check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import windows as cpu
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.indexer.cache import IndexerCache, page_size_of
from mla_kernels.latent.windows.parts import (
    INDEXER_FP8,
    check_eps,
    check_rows,
    check_tables,
    check_whole_keys,
    layout_of,
    normalise,
    statics,
    store_row,
    stored_layout,
    stored_parts,
    window_mean,
    window_rule,
)
from mla_kernels.latent.write import check_fits, load_row, row_bytes
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

_INT32 = (torch.int32,)
STEP = 8
"""Most tokens that one item puts into the state."""


@triton.jit
def keep_tokens(
    kv, gate, state_row,
    begin, first, count, old, rows, kv_stride, gate_stride, row_stride, part_stride,
    W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Copy new tokens ``first`` to ``first`` + STEP, of ``count``, into their rows of a slot of the state."""
    column = tl.arange(0, W)
    for token in range(first, tl.minimum(first + STEP, count)):
        source = tl.cast(begin + token, tl.int64)
        out = state_row + tl.cast((old + token) % rows, tl.int64) * row_stride + column
        tl.store(out, tl.load(kv + source * kv_stride + column))
        tl.store(out + part_stride, tl.load(gate + source * gate_stride + column))


@triton.jit(do_not_specialize=["tokens", "per_sequence", "work"])
def write_windows_kernel(
    kv, gate,  # [tokens, W]
    position_bias,  # [RATIO, W]
    norm_weight,  # [WIDTH]
    cos, sin,  # [table_rows, ROPE / 2]
    state,  # [slots, rows, 2, W]
    state_slots, cu_seqlens, seq_lens, block_table,  # [B], [B + 1], [B], [B, table_pages]
    values, codes, scales, keys,  # the cache's parts
    tokens, table_rows, slots, rows, table_pages, num_pages, page_size,
    kv_stride, gate_stride, cos_stride, sin_stride, state_stride, row_stride, part_stride, table_stride,
    page_stride, slot_stride, scale_stride,
    eps, per_sequence, work,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, LAYOUT: tl.constexpr,
    ENTRIES: tl.constexpr, KEEP: tl.constexpr, STEP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Item: one of a sequence's new windows (ENTRIES) and STEP of its new tokens (KEEP).

    Both in one launch are right where no new token falls on a row that a new window reads: where rows are at least
    RATIO * (1 + OVERLAP) - 1 and the new tokens.
    """
    W: tl.constexpr = WIDTH * 2 if OVERLAP else WIDTH
    norm = load_row(norm_weight, WIDTH)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        sequence = item // per_sequence
        part = item - sequence * per_sequence
        begin = tl.maximum(tl.load(cu_seqlens + sequence), 0)
        count = tl.minimum(tl.load(cu_seqlens + sequence + 1), tokens) - begin
        length = tl.load(seq_lens + sequence)
        old = length - count
        slot = tl.load(state_slots + sequence)
        if ((count > 0) & (old >= 0)) & ((slot >= 0) & (slot < slots)):
            state_row = state + tl.cast(slot, tl.int64) * state_stride
            if ENTRIES:
                window = old // RATIO + part
                start = window * RATIO
                page_number = window // page_size
                if ((start + RATIO <= length) & (start < table_rows)) & (page_number < table_pages):
                    page = tl.load(block_table + tl.cast(sequence, tl.int64) * table_stride + page_number)
                    if (page >= 0) & (page < num_pages):
                        mean, _ = window_mean(
                            kv, gate, position_bias, start,
                            old, begin - old, kv_stride, gate_stride, state_row, rows, row_stride, part_stride,
                            WIDTH, RATIO, OVERLAP, True, BLOCK_T,
                        )  # fmt: skip
                        at = tl.cast(start, tl.int64)
                        row = normalise(mean, norm, cos + at * cos_stride, sin + at * sin_stride, eps, WIDTH, ROPE)
                        entry = tl.cast(page, tl.int64) * page_size + (window - page_number * page_size)
                        store_row(
                            row, values, codes, scales, keys, entry, page_size, page_stride, slot_stride, scale_stride,
                            WIDTH, LAYOUT,
                        )  # fmt: skip
            if KEEP:
                first = tl.maximum(count - rows, 0) + part * STEP
                keep_tokens(
                    kv, gate, state_row, begin, first, count, old, rows,
                    kv_stride, gate_stride, row_stride, part_stride, W, STEP,
                )  # fmt: skip


def _rule(chip, dtype, constants, sizes):
    tile = window_rule(chip, constants)
    named = {"LATENT": constants["WIDTH"], "ROPE": 0}
    check_fits("write_windows", chip, named, _memory(chip, dtype, constants, tile))
    return tile


def _memory(chip, dtype, constants, tile):
    """Ascend: as the 910's compiler plans it, nine copies of a block in fp32, 18 of a row, and fp8's 2-D steps."""
    width, block = constants["WIDTH"], tile["BLOCK_T"]
    if chip.is_gpu:
        return {"shared": 8 * width + 4 * width * tile["num_warps"]}
    steps = 152 * width if constants["LAYOUT"].startswith("fp8") else 0
    return {"UB": 36 * block * width + 72 * width + steps}


def entry_bytes(dtype, constants) -> int:
    """Bytes of an entry in the cache."""
    if constants["LAYOUT"] == INDEXER_FP8:
        return constants["WIDTH"] + 4
    return row_bytes(dtype, {"LATENT": constants["WIDTH"], "ROPE": 0, "LAYOUT": constants["LAYOUT"]})


def _cost(dtype, constants, sizes):
    """Each token's row in, and kept; each entry's tokens in, and its row out."""
    width, ratio, sides = constants["WIDTH"], constants["RATIO"], 1 + constants["OVERLAP"]
    row = 2 * width * sides * DTYPE_BYTES[dtype]
    entries = sizes["sequences"] * sizes["tokens"] / ratio
    read = entries * ratio * sides * width * (2 * DTYPE_BYTES[dtype]) if constants["ENTRIES"] else 0
    kept = sizes["sequences"] * sizes["tokens"] * 2 * row if constants["KEEP"] else 0
    written = entries * (entry_bytes(dtype, constants) + 4 * constants["ROPE"]) if constants["ENTRIES"] else 0
    return Cost(flops=entries * ratio * sides * width * 8.0, bytes=read + kept + written + 4 * ratio * sides * width)


def _work(dtype, constants, sizes, tile):
    programs = sizes["sequences"] * max(1, -(-sizes["tokens"] // min(constants["RATIO"], STEP)))
    whole = _cost(dtype, constants, sizes)
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def _statics(width, rope_dim, ratio, overlap, layout, entries, keep):
    return {
        **statics(width, rope_dim, ratio, overlap),
        "LAYOUT": layout,
        "ENTRIES": entries,
        "KEEP": keep,
        "STEP": min(ratio, STEP),
    }


def _case(name, width, ratio, overlap, layout, entries=True, keep=True, tokens=1, sequences=64, dtypes=("bf16",)):
    constants = _statics(width, 64, ratio, overlap, layout, entries, keep)
    return Case(name, constants, {"sequences": sequences, "tokens": tokens}, dtypes)


WRITE_WINDOWS = Kernel(
    write_windows_kernel,
    arguments={
        **dict.fromkeys(("kv", "gate"), "*T"),
        **dict.fromkeys(("position_bias", "norm_weight", "cos", "sin"), "*fp32"),
        "state": "*T",
        **dict.fromkeys(("state_slots", "cu_seqlens", "seq_lens", "block_table"), "*i32"),
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        "keys": "*T",
        **dict.fromkeys(("tokens", "table_rows", "slots", "rows", "table_pages", "num_pages", "page_size"), "i32"),
        **dict.fromkeys(
            ("kv_stride", "gate_stride", "cos_stride", "sin_stride", "state_stride", "row_stride", "part_stride"),
            "i32:16",
        ),
        "table_stride": "i32",
        **dict.fromkeys(("page_stride", "slot_stride", "scale_stride"), "i32:16"),
        "eps": "fp32",
        "per_sequence": "i32",
        "work": "i32",
    },
    statics=tuple(_statics(512, 64, 4, True, "unquantised", True, True)),
    tiles={"BLOCK_T": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("hca", 512, 128, False, "unquantised", dtypes=("bf16", "fp16", "fp32")),
        _case("csa", 512, 4, True, "unquantised", dtypes=("bf16", "fp16", "fp32")),
        _case("csa_fp8", 512, 4, True, "fp8_v4"),
        _case("csa_fp8_v32", 512, 4, True, "fp8_v32"),
        _case("csa_int8", 512, 4, True, "int8"),
        _case("indexer", 128, 4, True, INDEXER_FP8),
        _case("hca_prompt", 512, 128, False, "unquantised", keep=False, tokens=4096, sequences=1),
        _case("hca_kept", 512, 128, False, "unquantised", entries=False, tokens=128, sequences=1),
    ),
    uses_dot=False,
)


def _launch(
    kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, cache,
    layout, ratio, overlap, max_tokens, eps, batch_invariant=False,
):  # fmt: skip
    sequences, rows, width, chip = seq_lens.shape[0], state.shape[1], norm_weight.shape[0], chip_of(kv.device)
    if kv.shape[0] == 0 or sequences == 0 or max_tokens == 0:
        return
    max_tokens = min(max_tokens, kv.shape[0])
    key = (
        chip.device, kv.dtype, sequences, max_tokens, rows, width, cos.shape[1], ratio, overlap,
        layout, cache.dim(), batch_invariant,
    )  # fmt: skip
    plans = WRITE_WINDOWS.kept.plans.get(key)
    if plans is None:
        plans = WRITE_WINDOWS.keep(key, _plans(chip, DTYPE_NAMES[kv.dtype], *key[2:]))
    if batch_invariant:
        kv, gate = canonical(kv), canonical(gate)
    *parts, slot_stride, scale_stride = stored_parts(cache, layout, width, cos)
    args = (
        kv, gate, position_bias.contiguous(), norm_weight, cos, sin,
        state, state_slots, cu_seqlens, seq_lens, block_table, *parts,
        kv.shape[0], cos.shape[0], state.shape[0], rows, block_table.shape[1], cache.shape[0],
        page_size_of(cache, width),
        kv.stride()[0], gate.stride()[0], cos.stride()[0], sin.stride()[0], *state.stride()[:3],
        block_table.stride()[0], cache.stride()[0], slot_stride, scale_stride, eps,
    )  # fmt: skip
    for per_sequence, constants, tile in plans:
        work = sequences * per_sequence
        WRITE_WINDOWS.launch(chip, work, (*args, per_sequence, work), constants, tile)


def _plans(
    chip, dtype, sequences, max_tokens, rows, width, pairs, ratio, overlap, layout, dimensions, batch_invariant
):  # fmt: skip
    """(items of a sequence, constants, tile) of each launch: one where no new token can fall on what a new window
    reads, else the entries first and then the state."""
    stored = stored_layout(layout, dimensions)

    def plan(entries, keep, tokens, step):
        constants = _statics(width, 2 * pairs, ratio, overlap, stored, entries, keep)
        if batch_invariant:  # one tile, however a sequence's tokens come
            known = {**constants, "ENTRIES": True, "KEEP": True}
            tile = WRITE_WINDOWS.tile_for(chip, dtype, known, {"sequences": FIXED_TOKENS, "tokens": 1})
        else:
            tile = WRITE_WINDOWS.tile_for(chip, dtype, constants, {"sequences": sequences, "tokens": tokens})
        return -(-tokens // step), constants, tile | {"BLOCK_T": min(tile["BLOCK_T"], ratio)}

    if max_tokens <= rows - needed_rows(ratio, overlap) + 1:
        return (plan(True, True, max_tokens, min(ratio, STEP)),)
    return plan(True, False, max_tokens, ratio), plan(False, True, min(rows, max_tokens), min(ratio, STEP))


def needed_rows(ratio: int, overlap: bool) -> int:
    """Rows of the state that one new token a call needs: the window before, where it counts, and its own."""
    return ratio * (1 + overlap)


def _fake(*_):
    return None


def _check_values(
    kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, cache,
    layout, ratio, overlap, max_tokens, *_,
):  # fmt: skip
    bounds, lengths, slots = cu_seqlens.tolist(), seq_lens.tolist(), state_slots.tolist()
    counts = [end - begin for begin, end in pairwise(bounds)]
    if bounds[0] < 0 or bounds[-1] > kv.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"cu_seqlens: got {bounds}, ascending rows from 0 to {kv.shape[0]} are accepted")
    if max(counts, default=0) > max_tokens:
        raise ValueError(f"max_tokens: got {max_tokens}, a sequence has {max(counts)} new tokens")
    check_range("state_slots", state_slots, -1, state.shape[0], "slots of the state, -1 skips a sequence")
    taken = [slot for slot, count in zip(slots, counts) if slot >= 0 and count]
    if len(set(taken)) < len(taken):
        raise ValueError(f"state_slots: got {slots}, sequences with new tokens must have slots of their own")
    page_size, pages = page_size_of(cache, norm_weight.shape[0]), block_table.tolist()
    for b, (count, length) in enumerate(zip(counts, lengths)):
        if not count or slots[b] < 0:
            continue
        if length < count:
            raise ValueError(f"seq_lens: got {length} for sequence {b} with {count} new tokens, these included")
        first, last = (length - count) // ratio, length // ratio
        if first == last:
            continue
        if (last - 1) * ratio >= cos.shape[0]:
            raise ValueError(
                f"cos: got {cos.shape[0]} rows, sequence {b} has a window that begins at position {(last - 1) * ratio}"
            )
        if last > len(pages[b]) * page_size:
            raise ValueError(f"block_table: got {len(pages[b])} pages of {page_size}, sequence {b} has {last} entries")
        wrong = [
            page for page in pages[b][first // page_size : -(-last // page_size)] if not 0 <= page < cache.shape[0]
        ]
        if wrong:
            raise ValueError(f"block_table: got page {wrong[0]} for sequence {b}, the cache has {cache.shape[0]} pages")


_write_windows = define_op(
    "write_windows",
    "(Tensor kv, Tensor gate, Tensor position_bias, Tensor norm_weight, Tensor cos, Tensor sin, Tensor(a!) state, "
    "Tensor state_slots, Tensor cu_seqlens, Tensor seq_lens, Tensor block_table, Tensor(b!) cache, str layout, "
    "int ratio, bool overlap, SymInt max_tokens, float eps=1e-06, bool batch_invariant=False) -> ()",
    cpu=cpu.write_windows,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def write_windows(
    kv: torch.Tensor,
    gate: torch.Tensor,
    position_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    state: torch.Tensor,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    cache: LatentCache | IndexerCache,
    *,
    ratio: int,
    overlap: bool,
    max_tokens: int,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Put new tokens into a compressor's state, and write the entries of all windows that they complete, in place.

    DeepSeek-V4 keeps one entry for each window of ``ratio`` tokens: 128 (HCA), or 4 with overlap (CSA, and the
    indexer's keys). Entry w of a sequence is :func:`mla_kernels.compress_windows`'s, and goes to slot
    ``block_table[b, w // page_size] * page_size + w % page_size``.

    The state is a ring of the newest raw tokens: position p lies in row ``p % rows``. A call reads what a new window
    needs from before the new tokens, so prefill, chunked prefill and decode are the same call, and a sequence that
    gives draft tokens back has a smaller ``seq_lens`` the next time: their rows and entries are written anew.

    With ratio 4, no overlap and 5 rows, a sequence of 6 tokens has entry 0 in its cache, and positions 1 to 5 in rows
    1, 2, 3, 4 and 0. Two more tokens, 6 and 7, go to rows 1 and 2, and complete window 1: positions 4 to 7.

    One launch where ``max_tokens <= rows - ratio * (1 + overlap) + 1``, else two. The projections that make kv and gate
    are products of torch's: one kernel for a down-projection and its norm and write lost to them on a device.

    Args:
        kv, gate: ``[T, W]``, the outputs of ``kv_proj`` and ``gate_proj`` for the new tokens of all sequences, packed;
            W is D, or 2 D with overlap. bfloat16, float16 or float32, whatever the cache holds. Rows of any stride.
        position_bias: ``[ratio, W]`` float32.
        norm_weight: ``[D]``, in kv's dtype or float32.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables; an entry takes the row of its window's first position.
        state: ``[slots, rows, 2, W]`` in kv's dtype, kv before gate; ``rows`` at least ``ratio * (1 + overlap) - 1``
            and the new tokens of a decode step. What is behind a sequence's length may hold anything.
        state_slots: ``[B]`` int32, each sequence's slot of the state; -1 skips the sequence.
        cu_seqlens: ``[B + 1]`` int32: rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` are sequence b's new tokens;
            there may be none.
        seq_lens: ``[B]`` int32, its length with them.
        block_table: ``[B, P]`` int32, its pages of entries.
        cache: where entries go: a :class:`LatentCache` with ``latent_dim`` D and ``rope_dim`` 0, or an
            :class:`IndexerCache` with ``head_dim`` D, in any of their layouts.
        ratio: tokens of a window, a power of two.
        overlap: whether an entry also takes the first halves of the window before's rows.
        max_tokens: at least the most new tokens of any sequence.
        eps: added to the mean square.
        batch_invariant: whether a sequence's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back: a sequence whose slot or length is out of range is skipped, and so
    is an entry whose page or position is.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is neither cache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a value out of range, a
            length shorter than the new tokens, two sequences in one slot. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or D does not fit the chip.

    Source: Hugging Face ``DeepseekV4HCACompressor``, ``DeepseekV4CSACompressor`` and ``DeepseekV4Indexer``; softmax
    weights stay float32, where theirs are rounded to kv's dtype.
    """
    if not isinstance(cache, (LatentCache, IndexerCache)):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache or an IndexerCache is accepted")
    check_whole_keys(cache)
    check_rows(kv, gate, position_bias, norm_weight, ratio, overlap)
    layout, width = layout_of(cache)
    data = cache.data
    if norm_weight.shape[0] != width:
        raise ValueError(f"norm_weight: got {norm_weight.shape[0]} values, the cache holds rows of {width}")
    if data.device != kv.device:
        raise ValueError(f"cache: got a tensor on {data.device}, all arguments must be on {kv.device}")
    check_tables(cos, sin, width, kv.device)
    check_tensor("state", state, shape=(None, None, 2, kv.shape[1]), like=kv)
    rows = needed_rows(ratio, overlap)
    if state.shape[1] < rows:
        raise ValueError(f"state: got {state.shape[1]} rows, at least {rows} are accepted (what one new token needs)")
    if state.shape[1] * state.stride()[1] >= 1 << 31:
        raise ValueError(f"state: got rows {state.stride()[1]} values apart, a slot of fewer than 2^31 is accepted")
    batch = seq_lens.shape[0] if isinstance(seq_lens, torch.Tensor) and seq_lens.dim() == 1 else None
    check_tensor("seq_lens", seq_lens, shape=(batch,), dtypes=_INT32, device=kv.device)
    check_tensor("state_slots", state_slots, shape=(batch,), dtypes=_INT32, device=kv.device)
    check_tensor("cu_seqlens", cu_seqlens, shape=(batch + 1,), dtypes=_INT32, device=kv.device)
    check_tensor("block_table", block_table, shape=(batch, None), dtypes=_INT32, device=kv.device)
    check_int("max_tokens", max_tokens, 0)
    check_eps(eps)
    if any_requires_grad((kv, gate, position_bias, norm_weight, cos, sin, state, data)):
        check_no_grad(
            "write_windows", kv=kv, gate=gate, position_bias=position_bias, norm_weight=norm_weight, cos=cos, sin=sin,
            state=state, cache=data,
        )  # fmt: skip
    _write_windows(
        kv, gate, position_bias, norm_weight, cos, sin, state, state_slots, cu_seqlens, seq_lens, block_table, data,
        layout, ratio, overlap, max_tokens, float(eps), wanted(batch_invariant),
    )  # fmt: skip
