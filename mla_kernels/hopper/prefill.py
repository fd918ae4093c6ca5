"""mla_prefill for Hopper: the declaration of its kernel, and its launch in place of the portable one.

The kernel, :mod:`mla_kernels.hopper.prefill_kernel`, imports Gluon, and is imported by a first launch.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.hopper.decode import EXCHANGED, SMALLEST_SCALE
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work

ROWS = 64
"""Query rows of a group of warps."""
TILE_ROWS = 2 * ROWS
CARRIED = ((128, 0, 64, 128), (128, 64, 0, 128), (64, 0, 32, 64), (128, 64, 64, 256))
"""KEY and REST columns of a head's own key, of the rotated key that all heads share, of a value."""
KEPT_TOGETHER = 32 << 20
"""Bytes of keys and values that programs at work at a time should share: what fits the L2 of 50 MB beside the rest."""
_STAGES = 2
_UNIT = 8  # elements of 16 bits that TMA wants strides to be multiples of
_MOST_ROWS = 1 << 31  # of a matrix: coordinates of TMA have 32 bits


def block(statics) -> int:
    """Keys of a block."""
    return 128 if statics["VALUE"] <= 128 else 64


def _boxes(statics):
    key, keys = statics["KEY"], block(statics)
    rest, rope = (statics[part] or key for part in ("REST", "ROPE"))  # where there is none the first is given again
    return {
        "q_tiles": (ROWS, key),
        "q_rest_tiles": (ROWS, rest),
        "q_rope_tiles": (ROWS, rope),
        "k_tiles": (keys, key),
        "rest_tiles": (keys, rest),
        "rope_tiles": (keys, rope),
        "v_tiles": (keys, statics["VALUE"]),
    }


def _width(statics):
    return statics["KEY"] + statics["REST"] + statics["ROPE"]


def _memory(chip, dtype, statics, tile):
    """Queries, two blocks of keys and of values, barriers."""
    if chip.name in hopper.ELSEWHERE or dtype == "fp32":
        return {"shared": NO_MEMORY}
    width = _width(statics)
    tiles = (TILE_ROWS * width + _STAGES * block(statics) * (width + statics["VALUE"])) * 2
    return {"shared": tiles + EXCHANGED + 1024}


def _cost(dtype, statics, sizes):
    sequences, queries, keys, heads = (sizes[name] for name in ("batch", "queries", "keys", "heads"))
    rope, value, size = statics["ROPE"], statics["VALUE"], DTYPE_BYTES[dtype]
    width = _width(statics)
    pairs = queries * keys - (queries * (queries - 1) / 2 if statics["CAUSAL"] else 0)
    return Cost(
        flops=2.0 * sequences * heads * pairs * (width + value),
        bytes=sequences
        * (queries * heads * ((width + value) * size + 4) + keys * (heads * (width - rope + value) + rope) * size),
    )


def _work(dtype, statics, sizes, tile):
    width, value, size = _width(statics), statics["VALUE"], DTYPE_BYTES[dtype]
    seen = sizes["keys"] - (sizes["queries"] / 2 if statics["CAUSAL"] else 0)
    keys = math.ceil(seen / block(statics)) * block(statics)
    return Work(
        programs=sizes["batch"] * sizes["heads"] * -(-sizes["queries"] // TILE_ROWS),
        flops=2.0 * TILE_ROWS * keys * (width + value),
        bytes=(TILE_ROWS + keys) * (width + value) * size,
    )


def _case(name, heads, carried, *, queries=4096, keys=4096, causal=True, dtypes=("bf16", "fp16")):
    statics = dict(zip(("KEY", "REST", "ROPE", "VALUE"), carried)) | {"CAUSAL": causal}
    return Case(name, statics, {"heads": heads, "batch": 1, "queries": queries, "keys": keys}, dtypes)


HOPPER_MLA_PREFILL = GluonKernel(
    "mla_kernels.hopper.prefill_kernel",
    "hopper_mla_prefill_kernel",
    worker_warps=8,
    arguments={
        "out_ptr": "*T",
        "lse_ptr": "*fp32",
        **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
        **dict.fromkeys(
            ("q_tiles", "q_rest_tiles", "q_rope_tiles", "k_tiles", "rest_tiles", "rope_tiles", "v_tiles"), TILE
        ),
        "score_scale": "fp32",
        **dict.fromkeys(
            (
                "q_row", "q_column", "k_row", "k_column", "v_row", "v_column", "heads", "queries", "tokens",
                "max_queries", "max_keys", "tiles", "together", "zero",
            ),
            "i32",
        ),
    },
    boxes=_boxes,
    statics=("KEY", "REST", "ROPE", "VALUE", "CAUSAL"),
    tiles={"REGISTERS": (168,), "num_warps": (4,)},
    rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 168, "num_warps": 4},
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v3", 128, CARRIED[0]),
        _case("v3_context", 128, CARRIED[0], queries=2048, keys=16384, causal=False),
        _case("expanded_rope", 16, CARRIED[1], dtypes=("bf16",)),
        _case("minicpm3", 40, CARRIED[2], dtypes=("bf16",)),
        _case("glm4_lite", 20, CARRIED[3], dtypes=("bf16",)),
    ),
    uses_dot=True,
    unsupported=hopper.ELSEWHERE,
)  # fmt: skip


class Choice(NamedTuple):
    """What is compiled and launched."""

    statics: dict
    tile: dict
    form: frozenset  # as it was chosen


def choose(chip, dtype, statics) -> Choice | None:
    """What calls of ``mla_prefill`` of this form launch; see :func:`mla_kernels.hopper.chosen`.

    ``statics``: FIRST, REST, ROPE, VALUE and CAUSAL of the portable kernel.
    """
    name = DTYPE_NAMES[dtype]
    form = {"dtype": name, **statics}
    if not hopper.chosen(HOPPER_MLA_PREFILL, chip, form, lambda: refusal(name, statics)):
        return None
    own = {"KEY": statics["FIRST"], **{constant: statics[constant] for constant in HOPPER_MLA_PREFILL.statics[1:]}}
    return Choice(own, HOPPER_MLA_PREFILL.rule(chip, name, own, {}), hopper.frozen(form))


def refusal(dtype: str, statics) -> str:
    """Why the kernel does not serve a form, or nothing."""
    if dtype not in ("bf16", "fp16"):
        return f"tensors of {dtype}; bf16 and fp16 are carried"
    key, rest, rope, value = (statics[name] for name in ("FIRST", "REST", "ROPE", "VALUE"))
    if (key, rest, rope, value) not in CARRIED:
        return f"keys of {key + rest} + {rope} and values of {value}; {widths(CARRIED)} are carried"
    return ""


def widths(carried) -> str:
    """Carried widths in words."""
    return ", ".join(f"{key + rest} + {rope} and {value}" for key, rest, rope, value in carried)


class Matrix(NamedTuple):
    """A tensor [tokens, heads, width] as the matrix in which row t of head h stands at [t + h * row, h * column]."""

    tiles: Tiles
    row: int
    column: int


def matrix(tensor) -> Matrix | None:
    """Of a tensor, or of the rotated keys [tokens, width]; None where TMA cannot read it as one."""
    tokens, width = tensor.shape[0], tensor.shape[-1]
    heads = tensor.shape[1] if tensor.dim() == 3 else 1
    along, across = tensor.stride(0), tensor.stride(1) if heads > 1 else 0
    if tokens == 1:  # the stride of a dimension of size 1 is free in torch
        along = max(heads * across, width)
    row, column, left = 0, across, 0
    if across > along > 0:  # a head's tokens lie together
        (row, left), column = divmod(across, along), 0
    rows, columns = tokens + (heads - 1) * row, width + (heads - 1) * column
    aligned = tensor.data_ptr() % (2 * _UNIT) == 0 and along % _UNIT == 0 and column % _UNIT == 0
    if not aligned or left or along < columns or (heads > 1 and across < width) or rows >= _MOST_ROWS:
        return None
    return Matrix(Tiles(tensor, (rows, columns), (along, 1)), row, column)


def readable(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[dict[str, Matrix | None], str]:
    """(name -> matrix, why one of them is none)."""
    found = {}
    for name, tensor in tensors:
        found[name] = matrix(tensor)
        if found[name] is None:
            at = tensor.data_ptr() % (2 * _UNIT)
            return found, f"{name} with strides {tensor.stride()} at byte {at} of 16; TMA reads rows of a matrix"
    return found, ""


class Reading(NamedTuple):
    """The tensors of a call as matrices."""

    q: Matrix
    k: Matrix
    rope: Matrix
    v: Matrix


def read(choice: Choice, q, k, rope, v, softmax_scale: float) -> Reading | None:
    """How a call of the chosen form is launched; None where it cannot be: by its scale, or how its tensors lie.

    Raises:
        NotImplementedError: it cannot, and the kernel is asked for by name.
    """
    reason = ""
    if not softmax_scale >= SMALLEST_SCALE:
        reason = f"softmax_scale {softmax_scale}; {SMALLEST_SCALE} and more is carried"
    matrices, unreadable = readable((("q", q), ("k", k), ("rope", rope), ("v", v)))
    reason = reason or unreadable
    return Reading(**matrices) if hopper.served(HOPPER_MLA_PREFILL, choice.form, reason) else None


def launch(chip, choice: Choice, reading: Reading, bounds, results, numbers) -> None:
    """Launch in place of the portable kernel, for at least one query of at least one sequence, and one key.

    Args:
        bounds: (cu_seqlens_q, cu_seqlens_k).
        results: (out, lse), as the portable kernel fills them.
        numbers: (score_scale, max_seqlen_q, max_seqlen_k).
    """
    q, k, rope, v = reading
    out, lse = results
    queries, heads, value = out.shape
    score_scale, max_queries, max_keys = numbers
    tiles = -(-max_queries // TILE_ROWS)
    pairs = heads * (bounds[0].shape[0] - 1)
    together = KEPT_TOGETHER // max(1, 2 * max_keys * (choice.statics["KEY"] + choice.statics["REST"] + value))
    tokens = v.tiles.base.shape[0]
    args = (
        out, lse, *bounds, q.tiles, q.tiles, q.tiles, k.tiles, k.tiles, rope.tiles, v.tiles, score_scale,
        q.row, q.column, k.row, k.column, v.row, v.column, heads, queries, tokens, max_queries, max_keys, tiles,
        max(1, min(together, pairs)), 0,
    )  # fmt: skip
    HOPPER_MLA_PREFILL.launch(chip, pairs * tiles, args, choice.statics, choice.tile)
