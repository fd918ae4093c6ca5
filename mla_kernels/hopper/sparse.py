"""sparse_mla_decode and sparse_mla_prefill for Hopper: the declarations of their kernels, and their launch in place of
the portable one. Rows of prefill are a cache of pages of one token.

There are two, chosen by the heads: :mod:`mla_kernels.hopper.sparse_few_rows_kernel` up to 32,
:mod:`mla_kernels.hopper.sparse_kernel` from 33. Both files import Gluon, and are imported by a first launch.
"""

from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.hopper.decode import EXCHANGED, FEW_ROWS, ROWS, few_rows, tma_strides
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work
from mla_kernels.quant.cache_layout import ALIGNMENT

LAYOUTS = ("plain", "fp8_v32")
_COLUMNS = 64  # of a box of queries: 128 bytes
_UNIT = ALIGNMENT // 2  # elements of 16 bits
_PICKS = 256  # of a split in the declared problems


def _boxes(statics):
    return {"q_tiles": (1, statics.get("ROWS", ROWS), _COLUMNS)}


def _memory(chip, dtype, statics, tile):
    """Queries and two blocks of keys, the rotated parts padded to 64 columns, weights or row statistics, barriers."""
    if chip.name in hopper.ELSEWHERE or dtype == "fp32":
        return {"shared": NO_MEMORY}
    rows, width = statics.get("ROWS", ROWS), (statics["LATENT"] + _COLUMNS) * 2
    return {"shared": rows * width + 2 * ROWS * width + (ROWS * rows * 2 if rows < ROWS else EXCHANGED) + 2048}


def _token_bytes(dtype, statics) -> int:
    latent, rope, size = statics["LATENT"], statics["ROPE"], DTYPE_BYTES[dtype]
    return latent + latent // 32 + rope * size if statics["LAYOUT"] == "fp8_v32" else (latent + rope) * size


def _parts(statics, sizes) -> int:
    return max(1, -(-sizes["top_k"] // _PICKS)) if statics["SPLIT"] else 1


def _cost(dtype, statics, sizes):
    tokens, heads, top_k, parts = sizes["tokens"], sizes["heads"], sizes["top_k"], _parts(statics, sizes)
    latent, width, size = statics["LATENT"], statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * tokens * heads * top_k * (width + latent),
        bytes=tokens * (heads * ((width + latent) * size + 4) + top_k * (_token_bytes(dtype, statics) + 4)),
        workspace=parts * tokens * heads * (latent + 1) * 4 if parts > 1 else 0,
    )


def _work(dtype, statics, sizes, tile):
    latent, width, rows = statics["LATENT"], statics["LATENT"] + statics["ROPE"], statics.get("ROWS", ROWS)
    parts, step = _parts(statics, sizes), 2 * ROWS if rows == ROWS else ROWS
    picks = -(-sizes["top_k"] // parts // step) * step
    return Work(
        programs=sizes["tokens"] * parts * -(-sizes["heads"] // rows),
        flops=2.0 * rows * picks * (width + latent),
        bytes=rows * (width * 2 + latent * 4) + picks * (_token_bytes(dtype, statics) + 4),
    )


def _case(
    name, heads, *, tokens=64, top_k=2048, split=True, layout="plain", page=1, lengths=False, sink=False, latent=512,
    rope=64, max_logits=False, dtypes=("bf16",),
):  # fmt: skip
    statics = {"LATENT": latent, "ROPE": rope, "LAYOUT": layout, "PAGE_SIZE": page, "LENGTHS": lengths}
    statics |= {"SINK": sink, "MAX_LOGITS": max_logits, "SPLIT": split}
    if heads <= max(FEW_ROWS):
        statics["ROWS"] = few_rows(heads)
    return Case(name, statics, {"heads": heads, "tokens": tokens, "top_k": top_k}, dtypes)


_ARGUMENTS = {
    "out_ptr": "*T",
    **dict.fromkeys(("partial_ptr", "lse_ptr", "max_ptr"), "*fp32"),
    "latent_ptr": "*L",
    "scale_ptr": "*fp32",
    **dict.fromkeys(("indices_ptr", "lengths_ptr"), "*i32"),
    "sink_ptr": "*fp32",
    "q_tiles": TILE,
    "score_scale": "fp32",
    **dict.fromkeys(
        (
            "page_stride", "token_stride", "index_stride", "tokens", "queries", "heads", "num_slots", "top_k", "share",
            "splits", "zero",
        ),
        "i32",
    ),
}  # fmt: skip
_FORM = ("LATENT", "ROPE", "LAYOUT", "PAGE_SIZE", "MAX_LOGITS")
_STATICS = ("LATENT", "ROPE", "LAYOUT", "PAGE_SIZE", "LENGTHS", "SINK", "MAX_LOGITS", "SPLIT")
_SHARED = {
    "arguments": _ARGUMENTS,
    "boxes": _boxes,
    "memory": _memory,
    "cost": _cost,
    "work": _work,
    "uses_dot": True,
    "unsupported": hopper.ELSEWHERE,
}

HOPPER_SPARSE_MLA = GluonKernel(
    "mla_kernels.hopper.sparse_kernel",
    "hopper_sparse_mla_kernel",
    worker_warps=8,
    statics=_STATICS,
    tiles={"REGISTERS": (168,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 168, "num_warps": 4},
    cases=(
        _case("v32", 128, dtypes=("bf16", "fp16")),
        _case("v32_fp8", 128, layout="fp8_v32"),
        _case("v32_prefill", 128, tokens=1024, split=False, max_logits=True),
        _case("lengths_and_sink", 64, split=False, lengths=True, sink=True, page=64),
        _case("no_rope", 128, rope=0),
        _case("narrow", 64, latent=128, rope=16, dtypes=("fp16",)),
        _case("narrow_fp8", 64, latent=256, rope=32, layout="fp8_v32", page=61),
    ),
    **_SHARED,
)
HOPPER_SPARSE_MLA_FEW_ROWS = GluonKernel(
    "mla_kernels.hopper.sparse_few_rows_kernel",
    "hopper_sparse_mla_few_rows_kernel",
    worker_warps=4,
    statics=(*_STATICS, "ROWS"),
    tiles={"REGISTERS": (248,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 248, "num_warps": 4},
    cases=(
        _case("v32_tp8", 16, dtypes=("bf16", "fp16")),
        _case("v32_tp8_fp8", 16, layout="fp8_v32"),
        _case("v32_prefill_tp8", 16, tokens=1024, split=False, max_logits=True),
        _case("v32_tp4", 32),
        _case("lengths_and_sink", 20, split=False, lengths=True, sink=True, page=64),
        _case("no_rope", 16, rope=0),
        _case("narrow", 8, latent=128, rope=16, dtypes=("fp16",)),
        _case("narrow_fp8", 32, latent=256, rope=32, layout="fp8_v32", page=61),
    ),
    **_SHARED,
)


class Choice(NamedTuple):
    """A kernel, and what it compiles and launches."""

    kernel: GluonKernel
    statics: dict  # but for what a call adds: LENGTHS, SINK, SPLIT
    tile: dict
    rows: int  # heads of a program
    form: frozenset  # as it was chosen


def choose(chip, dtype, heads: int, strides: tuple[int, int], statics) -> Choice | None:
    """The kernel that calls over a source of this form launch; see :func:`mla_kernels.hopper.chosen`.

    ``strides``: of pages and tokens, as the portable kernel takes them. ``statics``: its LATENT, ROPE, LAYOUT,
    PAGE_SIZE and MAX_LOGITS.
    """
    few = heads <= max(FEW_ROWS)
    kernel, name = HOPPER_SPARSE_MLA_FEW_ROWS if few else HOPPER_SPARSE_MLA, DTYPE_NAMES[dtype]
    rows = few_rows(heads) if few else ROWS
    own = {constant: statics[constant] for constant in _FORM} | ({"ROWS": rows} if few else {})
    form = {"dtype": name, **own}
    if not hopper.chosen(kernel, chip, form, lambda: refusal(name, strides, own)):
        return None
    return Choice(kernel, own, kernel.rule(chip, name, own, {}), rows, hopper.frozen(form))


def refusal(dtype: str, strides: tuple[int, int], statics) -> str:
    """Why the kernels do not serve a form, or nothing."""
    latent, rope, layout = statics["LATENT"], statics["ROPE"], statics["LAYOUT"]
    if layout not in LAYOUTS or dtype not in ("bf16", "fp16"):
        return f"a cache of {dtype if layout in LAYOUTS else layout}; bf16, fp16 and fp8_v32 are carried"
    if latent not in (128, 256, 512):
        return f"latent_dim {latent}; 128, 256 and 512 are carried"
    if rope > _COLUMNS:
        return f"rope_dim {rope}; at most {_COLUMNS} is carried"
    page, token = strides
    if layout == "plain" and (token % _UNIT or (statics["PAGE_SIZE"] > 1 and page % _UNIT)):
        return f"a cache with strides {page} and {token}; rows are copied from multiples of 16 bytes"
    return ""


def serves(choice: Choice, data) -> bool:
    """Whether a cache of the chosen form lies where rows can be copied from.

    Raises:
        NotImplementedError: it does not, and the kernel is asked for by name.
    """
    at = data.data_ptr() % ALIGNMENT
    reason = f"a cache at byte {at} of 16; rows are copied from multiples of 16 bytes" if at else ""
    return hopper.served(choice.kernel, choice.form, reason)


def launch(chip, choice: Choice, q, places, results, sink, numbers) -> None:
    """Launch in place of the portable kernel, over a source that :func:`serves`.

    Args:
        q: [tokens, heads, width].
        places: (latents, or codes as int8, with the first token's first; scales or None; indices [tokens, top_k];
            topk_length or None).
        results: (out, partial results, lse of these or of out, largest scores), None if unused, as the portable kernel
            fills them.
        sink: [heads] float32 or None.
        numbers: (score_scale, page_stride and token_stride as the portable kernel takes them, queries, slots, share,
            splits).
    """
    shape = tokens, heads, width = q.shape
    strides = tma_strides(q.data_ptr(), shape, q.stride(0), q.stride(1))
    if strides is None:  # a slice at an odd place; a few rows are cheaply copied
        q = q.clone(memory_format=torch.contiguous_format)
        strides = heads * width, width, 1
    latents, scales, indices, lengths = places
    out, partial, lse, largest = results
    score_scale, page_stride, token_stride, queries, slots, share, splits = numbers
    unit = _UNIT if choice.statics["LAYOUT"] == "plain" else 1
    args = (
        q if out is None else out, lse if partial is None else partial, lse, lse if largest is None else largest,
        latents, lse if scales is None else scales, indices, indices if lengths is None else lengths,
        lse if sink is None else sink, Tiles(q, shape, strides),
        score_scale, page_stride // unit, token_stride // unit, indices.stride(0), tokens, queries, heads, slots,
        indices.shape[1], share, splits, 0,
    )  # fmt: skip
    statics = {
        **choice.statics, "LENGTHS": lengths is not None, "SINK": sink is not None, "SPLIT": partial is not None
    }  # fmt: skip
    choice.kernel.launch(chip, tokens * splits * -(-heads // choice.rows), args, statics, choice.tile)
