"""mla_decode for Hopper: the declarations of its kernels, and their launch in place of the portable one.

Two for each kind of cache, chosen by the query rows of a sequence (S_q * heads, or the heads alone where a query's bits
must not depend on how many there are). For 16-bit latents :mod:`mla_kernels.hopper.few_rows_kernel` up to 32,
:mod:`mla_kernels.hopper.decode_kernel` from 33; for quantised ones :mod:`mla_kernels.hopper.few_rows_codes_kernel` and
:mod:`mla_kernels.hopper.codes_kernel`. These files import Gluon, and are imported by a first launch.
"""

from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work
from mla_kernels.quant.cache_layout import CacheLayout

ROWS = 64
"""Query rows of a program with many, and keys of a block."""
FEW_ROWS = (16, 32)
"""Query rows of a program where a sequence has no more."""
MOST_APART = 1 << 25
"""Bytes from a quantised token to the next: 64 of them are counted in 32 bits."""
_COLUMNS = 64  # of a box of queries or rotated keys: 128 bytes
_PAIR = 2 * ROWS
_WORD = 4  # bytes in which codes are read
_UNIT = 16  # bytes of which TMA wants multiples; strides of codes are counted in them
SMALLEST_SCALE = 1e-30
"""Scores are masked with -inf before they are scaled: a scale of 0, or below, would make something else of it."""
EXCHANGED = 2 * 2048
"""Bytes in which two groups' threads exchange results of 16 bits before they store them."""


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
    return {"shared": rows * width + 2 * ROWS * width + (ROWS * rows * 2 if rows < ROWS else EXCHANGED) + 2048}


def _codes_boxes(statics):
    return {"q_tiles": (1, statics.get("ROWS", ROWS), _COLUMNS)}


def _splits(sizes) -> int:
    return max(1, -(-_keys(sizes) // sizes["split"]))


def _keys(sizes) -> int:
    return min(sizes["tokens"], sizes.get("window", sizes["tokens"]) + sizes["queries"] - 1)


def _cost(dtype, statics, sizes):
    sequences, keys, rows = sizes["batch"], _keys(sizes), sizes["queries"] * sizes["heads"]
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * sequences * rows * keys * (width + latent),
        bytes=sequences * (rows * (width + latent) * size + keys * _token_bytes(statics) + rows * 4),
        workspace=_splits(sizes) * sequences * rows * (latent + 1) * 4 if statics["SPLIT"] else 0,
    )


def _token_bytes(statics) -> int:
    layout = CacheLayout(statics.get("LAYOUT", CacheLayout.LATENT_16BIT))
    return layout.bytes_per_token(statics["LATENT"], statics["ROPE"])


def _work(dtype, statics, sizes, tile):
    latent, width, tall = statics["LATENT"], statics["LATENT"] + statics["ROPE"], statics.get("ROWS", ROWS)
    step = _PAIR if tall == ROWS and "LAYOUT" not in statics else ROWS
    keys = -(-min(_keys(sizes), sizes["split"]) // step) * step
    return Work(
        programs=sizes["batch"] * _splits(sizes) * -(-sizes["queries"] * sizes["heads"] // tall),
        flops=2.0 * tall * keys * (width + latent),
        bytes=tall * (width * 2 + latent * 4) + keys * _token_bytes(statics),
    )


def _case(
    name, heads, *, batch=8, tokens=4096, queries=1, page=64, window=None, sink=False, split=2048, latent=512, rope=64,
    fixed=False, layout=None, dtypes=("bf16",),
):  # fmt: skip
    sizes = {"heads": heads, "queries": queries, "batch": batch, "tokens": tokens, "split": split}
    if window is not None:
        sizes["window"] = window
    statics = {"LATENT": latent, "ROPE": rope, "PAGE_SIZE": page, "CAUSAL": queries > 1, "WINDOW": window is not None}
    statics |= {"SINK": sink, "SPLIT": _splits(sizes) > 1, "FIXED": fixed}
    if layout is not None:
        statics["LAYOUT"] = layout
    if queries * heads <= max(FEW_ROWS):
        statics["ROWS"] = few_rows(queries * heads)
    return Case(name, statics, sizes, dtypes)


def few_rows(rows: int) -> int:
    """Columns of the products of a few query rows."""
    return min(size for size in FEW_ROWS if rows <= size)


_RESULTS = {
    "out_ptr": "*T",
    **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("block_table_ptr", "seq_lens_ptr"), "*i32"),
    "sink_ptr": "*fp32",
}
_NUMBERS = dict.fromkeys(
    ("table_stride", "sequences", "heads", "rows", "num_pages", "capacity", "window", "splits", "zero"), "i32"
)
_ARGUMENTS = {
    **_RESULTS,
    **dict.fromkeys(("q_tiles", "key_tiles", "rope_tiles"), TILE),
    "score_scale": "fp32",
    **_NUMBERS,
}
_CODES_ARGUMENTS = {
    **_RESULTS,
    "codes_ptr": "*i32",
    "scales_ptr": "*fp32",
    "rope_ptr": "*i32",
    "q_tiles": TILE,
    "score_scale": "fp32",
    **dict.fromkeys(("page_units", "token_units"), "i32"),
    **_NUMBERS,
}
_STATICS = ("LATENT", "ROPE", "PAGE_SIZE", "CAUSAL", "WINDOW", "SINK", "SPLIT", "FIXED")
_CODES_STATICS = ("LATENT", "ROPE", "PAGE_SIZE", "LAYOUT", "CAUSAL", "WINDOW", "SINK", "SPLIT", "FIXED")
_SHARED = {
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
    arguments=_ARGUMENTS,
    boxes=_boxes,
    statics=_STATICS,
    tiles={"REGISTERS": (248,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 248, "num_warps": 4},
    cases=(
        _case("v3", 128, dtypes=("bf16", "fp16")),
        _case("v3_two_tokens", 128, queries=2),
        _case("v3_unsplit", 128, batch=66, split=4096),
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
    arguments=_ARGUMENTS,
    boxes=_boxes,
    statics=(*_STATICS, "ROWS"),
    tiles={"num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"num_warps": 4},
    cases=(
        _case("v3_tp8", 16, batch=64, dtypes=("bf16", "fp16")),
        _case("v3_tp8_two_tokens", 16, queries=2),
        _case("v3_tp8_unsplit", 16, batch=132, split=4096),
        _case("window_and_sink", 16, queries=2, window=512, sink=True),
        _case("pages_of_192", 20, page=192, dtypes=("fp16",)),
        _case("no_rope", 16, rope=0),
        _case("v3_tp8_fixed", 16, fixed=True),
        _case("narrow", 8, latent=128, rope=16),
    ),
    **_SHARED,
)


HOPPER_MLA_DECODE_CODES = GluonKernel(
    "mla_kernels.hopper.codes_kernel",
    "hopper_mla_decode_codes_kernel",
    worker_warps=8,
    arguments=_CODES_ARGUMENTS,
    boxes=_codes_boxes,
    statics=_CODES_STATICS,
    tiles={"REGISTERS": (168,), "RIGHT": (160,), "DECODER": (112,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 168, "RIGHT": 160, "DECODER": 112, "num_warps": 4},
    cases=(
        _case("v3_fp8", 128, layout="fp8_v32"),
        _case("v3_int8", 128, layout="int8"),
        _case("v3_int8_unsplit", 128, batch=66, split=4096, layout="int8"),
        _case("window_and_sink", 128, queries=2, window=512, sink=True, layout="fp8_v32"),
        _case("window_and_sink_int8", 128, queries=2, window=512, sink=True, layout="int8"),
        _case("pages_of_192", 64, page=192, layout="fp8_v32"),
        _case("no_rope", 128, rope=0, layout="int8"),
        _case("v3_fixed", 128, queries=2, fixed=True, layout="fp8_v32"),
        _case("narrow", 64, latent=128, rope=16, layout="fp8_v32"),
        _case("minicpm3", 40, latent=256, rope=32, layout="int8"),
    ),
    **_SHARED,
)


def _few_rows_codes_rule(chip, dtype, statics, sizes):
    """Triton 3.9.0's ptxas spills with the other number."""
    return {"REGISTERS": 144, "DECODER": 96 if statics.get("WINDOW") else 104, "num_warps": 4}


HOPPER_MLA_DECODE_FEW_ROWS_CODES = GluonKernel(
    "mla_kernels.hopper.few_rows_codes_kernel",
    "hopper_mla_decode_few_rows_codes_kernel",
    worker_warps=8,
    arguments=_CODES_ARGUMENTS,
    boxes=_codes_boxes,
    statics=(*_CODES_STATICS, "ROWS"),
    tiles={"REGISTERS": (144,), "DECODER": (96, 104), "num_warps": (4,)},
    rule=_few_rows_codes_rule,
    cases=(
        _case("v3_fp8_tp8", 16, batch=64, layout="fp8_v32"),
        _case("v3_int8_tp8", 16, batch=64, layout="int8"),
        _case("v3_int8_tp8_unsplit", 16, batch=132, split=4096, layout="int8"),
        _case("window_and_sink", 16, queries=2, window=512, sink=True, layout="fp8_v32"),
        _case("window_and_sink_int8", 16, queries=2, window=512, sink=True, layout="int8"),
        _case("pages_of_192", 20, page=192, layout="int8"),
        _case("no_rope", 16, rope=0, layout="fp8_v32"),
        _case("v3_tp8_fixed", 16, fixed=True, layout="int8"),
        _case("narrow", 8, latent=128, rope=16, layout="fp8_v32"),
    ),
    **_SHARED,
)


def kernel_for(rows: int, layout: str = "plain") -> GluonKernel:
    """The kernel for so many query rows, and a cache of this LAYOUT."""
    few = rows <= max(FEW_ROWS)
    if layout == "plain":
        return HOPPER_MLA_DECODE_FEW_ROWS if few else HOPPER_MLA_DECODE
    return HOPPER_MLA_DECODE_FEW_ROWS_CODES if few else HOPPER_MLA_DECODE_CODES


class Choice(NamedTuple):
    """A kernel, and what it compiles and launches."""

    kernel: GluonKernel
    statics: dict
    tile: dict
    row_tiles: int  # programs that share the keys of one split
    form: frozenset  # as it was chosen


def choose(chip, dtype, queries: int, heads: int, statics) -> Choice | None:
    """The kernel that calls of ``mla_decode`` of this form launch; see :func:`mla_kernels.hopper.chosen`.

    ``statics``: LATENT, ROPE, PAGE_SIZE, LAYOUT, CAUSAL, WINDOW and FIXED of the portable kernel.
    """
    rows, together = queries * heads, heads if statics["FIXED"] else queries * heads
    kernel = kernel_for(together, statics["LAYOUT"])
    name = DTYPE_NAMES[dtype]
    few = {"ROWS": few_rows(together)} if "ROWS" in kernel.statics else {}
    form = {"dtype": name, **statics, **few}
    if not hopper.chosen(kernel, chip, form, lambda: refusal(name, statics)):
        return None
    own = {constant: value for constant, value in statics.items() if constant in kernel.statics} | few
    tall = own.get("ROWS", ROWS)
    return Choice(kernel, own, kernel.rule(chip, name, own, {}), -(-rows // tall), hopper.frozen(form))


def refusal(dtype: str, statics) -> str:
    """Why the kernels do not serve a form, or nothing."""
    latent, rope, page_size = statics["LATENT"], statics["ROPE"], statics["PAGE_SIZE"]
    if dtype not in ("bf16", "fp16"):
        return f"a cache of {dtype}; bf16, fp16, fp8_v32 and int8 are carried"
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
    elif "LAYOUT" in choice.statics and cache.stride(1) >= MOST_APART:
        reason = f"tokens {cache.stride(1)} bytes apart; less than {MOST_APART} is carried"
    return hopper.served(choice.kernel, choice.form, reason)


def _strides(data) -> tuple[int, int, int] | None:
    return tma_strides(data.data_ptr(), tuple(data.shape), data.stride(0), data.stride(1), data.element_size())


def tma_strides(
    address: int, shape: tuple[int, int, int], outer: int, row: int, size: int = 2
) -> tuple[int, int, int] | None:
    """Strides of elements of ``size`` bytes as TMA takes them; None if it takes none.

    The stride of a dimension of size 1 is free in torch; TMA wants one that fits the others.
    """
    if shape[1] == 1:
        row = shape[2]
    if shape[0] == 1:
        outer = max(1, shape[1]) * row
    aligned = address % _UNIT == 0 and row * size % _UNIT == 0
    fits = aligned and row >= shape[2] and outer >= row and outer % row == 0
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
    strides = tma_strides(q.data_ptr(), shape, q.stride(0), q.stride(2) if heads > 1 else q.stride(1))
    if strides is None:  # a slice at an odd place; a few rows are cheaply copied
        q = q.clone(memory_format=torch.contiguous_format)
        strides = rows * width, width, 1
    block_table, seq_lens = table
    out, partial, lse = results
    score_scale, capacity, window, splits = numbers
    q_tiles = Tiles(q, shape, strides)
    if "LAYOUT" in choice.statics:
        read = _codes(cache, q_tiles, score_scale, choice.statics)
    else:
        keys = Tiles(cache, tuple(cache.shape), _strides(cache))
        read = q_tiles, keys, keys, score_scale
    args = (
        out, partial, lse, block_table, seq_lens, lse if sink is None else sink, *read, block_table.stride(0),
        sequences, heads, rows, cache.shape[0], capacity, window, splits, 0,
    )  # fmt: skip
    choice.kernel.launch(chip, sequences * splits * choice.row_tiles, args, choice.statics, choice.tile)


def _codes(cache, q_tiles: Tiles, score_scale: float, statics) -> tuple:
    """What a kernel for codes takes of a quantised cache's bytes, around the queries."""
    outer, row, _ = _strides(cache)
    words = cache.view(torch.int32)
    scales = words[..., statics["LATENT"] // _WORD :]
    rope = words[..., words.shape[2] - statics["ROPE"] // 2 :]
    return words, scales.view(torch.float32), rope, q_tiles, score_scale, outer // _UNIT, row // _UNIT
