"""mla_decode for Hopper: the declarations of its kernels, and their launch in place of the portable one.

There are two, chosen by the query rows of a sequence (S_q * heads, or the heads alone where a query's bits must not
depend on how many there are): :mod:`mla_kernels.hopper.few_rows_kernel` up to 32,
:mod:`mla_kernels.hopper.decode_kernel` from 33. Both files import Gluon, and are imported by a first launch.
"""

from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work

ROWS = 64
"""Query rows of a program with many, and keys of a block."""
FEW_ROWS = (16, 32)
"""Query rows of a program where a sequence has no more."""
_COLUMNS = 64  # of a box of queries or rotated keys: 128 bytes
_PAIR = 2 * ROWS
_ALIGNMENT = 8  # TMA reads from multiples of 16 bytes
SMALLEST_SCALE = 1e-30
"""Scores are masked with -inf before they are scaled: a scale of 0, or below, would make something else of it."""


def _boxes(statics):
    """A copy of keys is half as wide as half a value, but no less than a swizzled line."""
    return {
        "q_tiles": (1, statics.get("ROWS", ROWS), _COLUMNS),
        "key_tiles": (1, ROWS, max(_COLUMNS, min(128, statics["LATENT"] // 4))),
        "rope_tiles": (1, ROWS, _COLUMNS),
    }


def _memory(chip, dtype, statics, tile):
    """Queries and two blocks of keys, the rotated parts padded to 64 columns, weights or row statistics, barriers."""
    if chip.name in hopper.ELSEWHERE or dtype == "fp32":
        return {"shared": NO_MEMORY}
    rows, width = statics.get("ROWS", ROWS), (statics["LATENT"] + _COLUMNS) * 2
    return {"shared": rows * width + 2 * ROWS * width + (ROWS * rows * 2 if rows < ROWS else 0) + 2048}


def _splits(sizes) -> int:
    return max(1, -(-_keys(sizes) // sizes["split"]))


def _keys(sizes) -> int:
    return min(sizes["tokens"], sizes.get("window", sizes["tokens"]) + sizes["queries"] - 1)


def _cost(dtype, statics, sizes):
    sequences, keys, rows = sizes["batch"], _keys(sizes), sizes["queries"] * sizes["heads"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * sequences * rows * keys * (width + latent),
        bytes=sequences * (rows * (width + latent) * size + keys * width * size + rows * 4),
        workspace=_splits(sizes) * sequences * rows * (latent + 1) * 4 if statics["SPLIT"] else 0,
    )


def _work(dtype, statics, sizes, tile):
    latent, width, tall = statics["LATENT"], statics["LATENT"] + statics["ROPE"], statics.get("ROWS", ROWS)
    step = _PAIR if tall == ROWS else ROWS
    keys = -(-min(_keys(sizes), sizes["split"]) // step) * step
    return Work(
        programs=sizes["batch"] * _splits(sizes) * -(-sizes["queries"] * sizes["heads"] // tall),
        flops=2.0 * tall * keys * (width + latent),
        bytes=tall * (width * 2 + latent * 4) + keys * width * 2,
    )


def _case(
    name, heads, *, batch=8, tokens=4096, queries=1, page=64, window=None, sink=False, split=2048, latent=512, rope=64,
    fixed=False, dtypes=("bf16",),
):  # fmt: skip
    sizes = {"heads": heads, "queries": queries, "batch": batch, "tokens": tokens, "split": split}
    if window is not None:
        sizes["window"] = window
    statics = {"LATENT": latent, "ROPE": rope, "PAGE_SIZE": page, "CAUSAL": queries > 1, "WINDOW": window is not None}
    statics |= {"SINK": sink, "SPLIT": _splits(sizes) > 1, "FIXED": fixed}
    if queries * heads <= max(FEW_ROWS):
        statics["ROWS"] = _few(queries * heads)
    return Case(name, statics, sizes, dtypes)


def _few(rows: int) -> int:
    return min(size for size in FEW_ROWS if rows <= size)


_ARGUMENTS = {
    "out_ptr": "*T",
    **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("block_table_ptr", "seq_lens_ptr"), "*i32"),
    "sink_ptr": "*fp32",
    **dict.fromkeys(("q_tiles", "key_tiles", "rope_tiles"), TILE),
    "score_scale": "fp32",
    **dict.fromkeys(
        ("table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window", "splits", "zero"),
        "i32",
    ),
}  # fmt: skip
_STATICS = ("LATENT", "ROPE", "PAGE_SIZE", "CAUSAL", "WINDOW", "SINK", "SPLIT", "FIXED")
_SHARED = {
    "arguments": _ARGUMENTS,
    "boxes": _boxes,
    "memory": _memory,
    "cost": _cost,
    "work": _work,
    "uses_dot": True,
    "unsupported": hopper.ELSEWHERE,
}

HOPPER_MLA_DECODE = GluonKernel(
    "mla_kernels.hopper.decode_kernel",
    "hopper_mla_decode_kernel",
    worker_warps=4,
    statics=_STATICS,
    tiles={"REGISTERS": (248,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 248, "num_warps": 4},
    cases=(
        _case("v3", 128, dtypes=("bf16", "fp16")),
        _case("v3_two_tokens", 128, queries=2),
        _case("window_and_sink", 128, queries=2, window=512, sink=True),
        _case("pages_of_192", 64, page=192),
        _case("no_rope", 128, rope=0),
        _case("v3_fixed", 128, queries=2, fixed=True),
        _case("minicpm3", 40, latent=256, rope=32, dtypes=("fp16",)),
        _case("narrow", 64, latent=128, rope=16),
    ),
    **_SHARED,
)
HOPPER_MLA_DECODE_FEW_ROWS = GluonKernel(
    "mla_kernels.hopper.few_rows_kernel",
    "hopper_mla_decode_few_rows_kernel",
    worker_warps=0,
    statics=(*_STATICS, "ROWS"),
    tiles={"num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"num_warps": 4},
    cases=(
        _case("v3_tp8", 16, batch=64, dtypes=("bf16", "fp16")),
        _case("v3_tp8_two_tokens", 16, queries=2),
        _case("window_and_sink", 16, queries=2, window=512, sink=True),
        _case("pages_of_192", 20, page=192, dtypes=("fp16",)),
        _case("no_rope", 16, rope=0),
        _case("v3_tp8_fixed", 16, fixed=True),
        _case("narrow", 8, latent=128, rope=16),
    ),
    **_SHARED,
)


class Choice(NamedTuple):
    """A kernel, and what it compiles and launches."""

    kernel: GluonKernel
    statics: dict
    tile: dict
    row_tiles: int  # programs that share the keys of one split


def choose(chip, dtype, queries: int, heads: int, statics) -> Choice | None:
    """The kernel that calls of ``mla_decode`` of this form launch; see :func:`mla_kernels.hopper.chosen`.

    ``statics``: LATENT, ROPE, PAGE_SIZE, LAYOUT, CAUSAL, WINDOW and FIXED of the portable kernel.
    """
    rows, together = queries * heads, heads if statics["FIXED"] else queries * heads
    few = together <= max(FEW_ROWS)
    kernel = HOPPER_MLA_DECODE_FEW_ROWS if few else HOPPER_MLA_DECODE
    name = DTYPE_NAMES[dtype]
    if not hopper.chosen(kernel, chip, {"dtype": name, **statics}, lambda: refusal(name, statics)):
        return None
    own = {constant: value for constant, value in statics.items() if constant in _STATICS}
    tall = ROWS
    if few:
        tall = own["ROWS"] = _few(together)
    return Choice(kernel, own, kernel.rule(chip, name, own, {}), -(-rows // tall))


def refusal(dtype: str, statics) -> str:
    """Why the kernels do not serve a form, or nothing."""
    latent, rope, page_size = statics["LATENT"], statics["ROPE"], statics["PAGE_SIZE"]
    if statics["LAYOUT"] != "plain" or dtype not in ("bf16", "fp16"):
        return f"a cache of {dtype if statics['LAYOUT'] == 'plain' else statics['LAYOUT']}; bf16 and fp16 are carried"
    if latent not in (128, 256, 512):
        return f"latent_dim {latent}; 128, 256 and 512 are carried"
    if rope > _COLUMNS:
        return f"rope_dim {rope}; at most {_COLUMNS} is carried"
    if page_size % ROWS:
        return f"page_size {page_size}; multiples of {ROWS} are carried"
    return ""


def serves(choice: Choice, cache, softmax_scale: float) -> bool:
    """Whether this call, of the chosen form, can be launched: its scale, and how its cache lies in memory.

    Raises:
        NotImplementedError: it cannot, and the kernel is asked for by name.
    """
    reason = ""
    if not softmax_scale >= SMALLEST_SCALE:
        reason = f"softmax_scale {softmax_scale}; {SMALLEST_SCALE} and more is carried"
    elif _strides(cache) is None:
        at = cache.data_ptr() % 16
        reason = f"a cache with strides {cache.stride()} at byte {at} of 16; TMA reads from multiples of 16 bytes"
    return hopper.served(choice.kernel, reason)


def _strides(data) -> tuple[int, int, int] | None:
    return _tma_strides(data.data_ptr(), tuple(data.shape), data.stride(0), data.stride(1))


def _tma_strides(address: int, shape: tuple[int, int, int], outer: int, row: int) -> tuple[int, int, int] | None:
    """Strides of 16-bit elements as TMA takes them; None if it takes none.

    The stride of a dimension of size 1 is free in torch; TMA wants one that fits the others.
    """
    if shape[1] == 1:
        row = shape[2]
    if shape[0] == 1:
        outer = shape[1] * row
    fits = address % 16 == 0 and row % _ALIGNMENT == 0 and row >= shape[2] and outer >= row and outer % row == 0
    return (outer, row, 1) if fits else None


def launch(chip, choice: Choice, q, cache, table, results, sink, numbers) -> None:
    """Launch in place of the portable kernel, for a call that :func:`serves`.

    Args:
        q: [B, S_q, heads, width]; the rows of a sequence, query * heads + head, are equally far apart.
        cache: [num_pages, page_size, width].
        table: (block_table, seq_lens).
        results: (out, partial results, lse of these or of out), as the portable kernel fills them.
        sink: [S_q * heads] float32 or None.
        numbers: (score_scale, capacity, window, splits).
    """
    sequences, queries, heads, width = q.shape
    rows = queries * heads
    shape = sequences, rows, width
    strides = _tma_strides(q.data_ptr(), shape, q.stride(0), q.stride(2) if heads > 1 else q.stride(1))
    if strides is None:  # a slice at an odd place; a few rows are cheaply copied
        q = q.clone(memory_format=torch.contiguous_format)
        strides = rows * width, width, 1
    block_table, seq_lens = table
    out, partial, lse = results
    score_scale, capacity, window, splits = numbers
    keys = Tiles(cache, tuple(cache.shape), _strides(cache))
    args = (
        out, partial, lse, block_table, seq_lens, lse if sink is None else sink, Tiles(q, shape, strides), keys, keys,
        score_scale, block_table.stride(0), sequences, heads, rows, cache.shape[0], capacity, window, splits, 0,
    )  # fmt: skip
    choice.kernel.launch(chip, sequences * splits * choice.row_tiles, args, choice.statics, choice.tile)
