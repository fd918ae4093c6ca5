"""Gradients of mla_prefill for Hopper: declarations of the kernels, and their launch in place of the portable ones.

The kernels, of keys up to 192 wide in :mod:`mla_kernels.hopper.prefill_gradients_kernel` and of 256 in
:mod:`mla_kernels.hopper.prefill_wide_gradients_kernel`, import Gluon, and are imported by a first launch.
"""

import math
from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel
from mla_kernels.hopper.decode import SMALLEST_SCALE
from mla_kernels.hopper.prefill import CARRIED, KEPT_TOGETHER, Matrix, matrix, readable, widths
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work

ROWS = 64
"""Rows of a group of warps, and of a block of the other side."""
TAIL = 64
"""Columns that are counted as the tail of a key whose width is a power of two."""
WIDE = 256
"""Width of a key whose gradients have kernels of their own; a program owns 64 such keys, not 128."""
_STAGES = 3
_WIDE_STAGES = 2
_PANEL = 64


def _width(statics):
    return statics["KEY"] + statics["ROPE"]


def _boxes(statics):
    key, rope, value = ((ROWS, statics[name]) for name in ("KEY", "ROPE", "VALUE"))
    return {"q_tiles": key, "q_rope_tiles": rope, "k_tiles": key, "rope_tiles": rope, "v_tiles": value,
            "grad_tiles": value}  # fmt: skip


def _wide_boxes(statics):
    panel, value = (ROWS, _PANEL), (ROWS, statics["VALUE"])
    return {"q_tiles": (ROWS, _width(statics)), "k_tiles": panel, "rope_tiles": panel, "v_tiles": value,
            "grad_tiles": value}  # fmt: skip


def tile_rows(statics) -> int:
    """Keys or queries that a program owns, by its kernel's constants."""
    return ROWS if "SHARED" in statics and _width(statics) == WIDE else 2 * ROWS


def _memory(chip, dtype, statics, tile):
    """Held rows and streamed blocks of a key and a value, lse and delta, weights, barriers."""
    if chip.name in hopper.ELSEWHERE or dtype == "fp32":
        return {"shared": NO_MEMORY}
    key, value, of_keys, wide = _width(statics), statics["VALUE"], "SHARED" in statics, _width(statics) == WIDE
    stages = _WIDE_STAGES if wide else _STAGES
    value_stages = 1 if wide and not of_keys else stages
    rows = tile_rows(statics) * (key + value) + ROWS * (stages * key + value_stages * value)
    own = stages * 3 * ROWS * 4 + 4 * ROWS * ROWS if of_keys else 0
    return {"shared": 2 * rows + own + 1024}


def _products(statics):
    """Columns that a pair of a query and a key is multiplied by: by the gradient of keys and values, or of queries."""
    width, value = _width(statics), statics["VALUE"]
    return 2 * width + (2 if "SHARED" in statics else 1) * value


def _cost(dtype, statics, sizes):
    sequences, queries, keys, heads = (sizes[name] for name in ("batch", "queries", "keys", "heads"))
    width, value, size = _width(statics), statics["VALUE"], DTYPE_BYTES[dtype]
    pairs = queries * keys - (queries * (queries - 1) / 2 if statics["CAUSAL"] else 0)
    written = keys * (width + value) if "SHARED" in statics else queries * width
    return Cost(
        flops=2.0 * sequences * heads * pairs * _products(statics),
        bytes=sequences * heads * ((queries + keys) * (width + value) + written) * size,
    )


def _work(dtype, statics, sizes, tile):
    of_keys = "SHARED" in statics
    held, streamed = (sizes[name] for name in (("keys", "queries") if of_keys else ("queries", "keys")))
    row = (_width(statics) + statics["VALUE"]) * DTYPE_BYTES[dtype]
    owned = tile_rows(statics)
    seen = math.ceil(max(streamed - (sizes["queries"] / 2 if statics["CAUSAL"] else 0), 1) / ROWS) * ROWS
    return Work(
        programs=sizes["batch"] * sizes["heads"] * -(-held // owned),
        flops=2.0 * owned * seen * _products(statics),
        bytes=(2 * owned + seen) * row,
    )


def split(statics) -> dict[str, int]:
    """KEY and ROPE of the kernels, of FIRST, REST and ROPE of the portable one: a key's own part, and its tail."""
    width = statics["FIRST"] + statics["REST"] + statics["ROPE"]
    tail = statics["ROPE"] or statics["REST"] or TAIL
    return {"KEY": width - tail, "ROPE": tail}


def _cases(of_keys: bool, wide: bool):
    def case(name, carried, heads, causal=True, dtypes=("bf16",)):
        statics = dict(zip(("FIRST", "REST", "ROPE"), carried))
        own = split(statics) | {"VALUE": carried[3], "CAUSAL": causal}
        own |= {"SHARED": int(statics["ROPE"] > 0)} if of_keys else {}
        return Case(name, own, {"heads": heads, "batch": 1, "queries": 4096, "keys": 4096}, dtypes)

    glm, v3 = (128, 64, 64, 256), (128, 0, 64, 128)
    if wide:
        cases = (
            case("glm5", glm, 64, dtypes=("bf16", "fp16")),
            case("glm5_bidirectional", glm, 64, causal=False),
            case("expanded_glm5", (256, 0, 0, 256), 64),
            case("values_of_128", (128, 64, 64, 128), 16),
        )
        return cases if of_keys else (*cases[:2], cases[3])  # for queries an expanded key is as any other
    cases = (
        case("v3", v3, 128, dtypes=("bf16", "fp16")),
        case("bidirectional", v3, 128, causal=False),
        case("minicpm3", (64, 0, 32, 64), 40),
        case("no_rope", (128, 0, 0, 128), 16),
    )
    expanded = (case("expanded_rope", (128, 64, 0, 128), 16), case("expanded_minicpm3", (64, 32, 0, 64), 40))
    return cases + expanded if of_keys else cases


_TILES = ("q_tiles", "q_rope_tiles", "k_tiles", "rope_tiles", "v_tiles", "grad_tiles")
_NUMBERS = (
    "q_row", "q_column", "k_row", "k_column", "rope_row", "rope_column", "rope_first", "v_row", "v_column", "grad_row",
    "grad_column", "heads", "queries", "tokens", "max_queries", "max_keys", "tiles", "together", "zero",
)  # fmt: skip
_INPUTS = {
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
    "stats_ptr": "*fp32",
    **dict.fromkeys(_TILES, TILE),
    "softmax_scale": "fp32",
    **dict.fromkeys(_NUMBERS, "i32"),
}
_WIDE_INPUTS = {name: kind for name, kind in _INPUTS.items() if name != "q_rope_tiles"}
_KEY_OUTPUTS = {"k_grad_ptr": "*T", "rope_grad_ptr": "*fp32", "v_grad_ptr": "*T"}
_QUERY_OUTPUTS = {"q_grad_ptr": "*T"}


def _declared(name: str, of_keys: bool, wide: bool) -> GluonKernel:
    outputs = _KEY_OUTPUTS if of_keys else _QUERY_OUTPUTS
    return GluonKernel(
        f"mla_kernels.hopper.prefill{'_wide' if wide else ''}_gradients_kernel",
        name,
        arguments=outputs | (_WIDE_INPUTS if wide else _INPUTS),
        statics=("KEY", "ROPE", "VALUE", "CAUSAL", *(("SHARED",) if of_keys else ())),
        boxes=_wide_boxes if wide else _boxes,
        worker_warps=8,
        tiles={"REGISTERS": (168,), "num_warps": (4,)},
        rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 168, "num_warps": 4},
        memory=_memory,
        cost=_cost,
        work=_work,
        cases=_cases(of_keys, wide),
        uses_dot=True,
        unsupported=hopper.ELSEWHERE,
    )


HOPPER_MLA_PREFILL_KEY_GRADIENT = _declared("hopper_mla_prefill_key_gradient_kernel", True, False)
HOPPER_MLA_PREFILL_QUERY_GRADIENT = _declared("hopper_mla_prefill_query_gradient_kernel", False, False)
HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT = _declared("hopper_mla_prefill_wide_key_gradient_kernel", True, True)
HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT = _declared("hopper_mla_prefill_wide_query_gradient_kernel", False, True)
_OF_KEYS = (HOPPER_MLA_PREFILL_KEY_GRADIENT, HOPPER_MLA_PREFILL_WIDE_KEY_GRADIENT)
_OF_QUERIES = (HOPPER_MLA_PREFILL_QUERY_GRADIENT, HOPPER_MLA_PREFILL_WIDE_QUERY_GRADIENT)


class Choice(NamedTuple):
    """What is compiled and launched in place of a portable kernel."""

    kernel: GluonKernel
    statics: dict
    tile: dict
    form: frozenset  # as it was chosen


def choose(of_keys: bool, chip, dtype, statics) -> Choice | None:
    """What a call of this form launches for the gradients of keys and values, or for that of queries; see
    :func:`mla_kernels.hopper.chosen`.

    ``statics``: FIRST, REST, ROPE, VALUE and CAUSAL of the portable kernel.
    """
    name = DTYPE_NAMES[dtype]
    form = {"dtype": name, **statics}
    wide = statics["FIRST"] + statics["REST"] + statics["ROPE"] == WIDE
    kernel = (_OF_KEYS if of_keys else _OF_QUERIES)[wide]
    if not hopper.chosen(kernel, chip, form, lambda: refusal(name, statics)):
        return None
    own = split(statics) | {"VALUE": statics["VALUE"], "CAUSAL": statics["CAUSAL"]}
    own |= {"SHARED": int(statics["ROPE"] > 0)}
    own = {constant: own[constant] for constant in kernel.statics}
    return Choice(kernel, own, kernel.rule(chip, name, own, {}), hopper.frozen(form))


def refusal(dtype: str, statics) -> str:
    """Why the kernels do not serve a form, or nothing."""
    if dtype not in ("bf16", "fp16"):
        return f"gradients of {dtype}; bf16 and fp16 are carried"
    key, rest, rope, value = (statics[name] for name in ("FIRST", "REST", "ROPE", "VALUE"))
    if (key, rest, rope, value) not in CARRIED:
        return f"gradients of keys of {key + rest} + {rope} and values of {value}; {widths(CARRIED)} are carried"
    return ""


class Reading(NamedTuple):
    """The tensors of a call as matrices."""

    q: Matrix
    k: Matrix
    rope: Matrix
    v: Matrix
    out_grad: Matrix


def read(choice: Choice, tensors: tuple, softmax_scale: float) -> Reading | None:
    """How a call of the chosen form is launched, ``tensors`` being q, k, rope, v and out_grad; None where it cannot be:
    by its scale, or how its tensors lie.

    Raises:
        NotImplementedError: it cannot, and the kernel is asked for by name.
    """
    reason = ""
    if not softmax_scale >= SMALLEST_SCALE:
        reason = f"softmax_scale {softmax_scale}; {SMALLEST_SCALE} and more is carried"
    *inputs, out_grad = tensors
    if matrix(out_grad) is None:  # autograd's, and in whatever form it made it
        out_grad = out_grad.clone(memory_format=torch.contiguous_format)
    matrices, unreadable = readable(zip(Reading._fields, (*inputs, out_grad)))
    reason = reason or unreadable
    return Reading(**matrices) if hopper.served(choice.kernel, choice.form, reason) else None


def launch(chip, choice: Choice, reading: Reading, outputs, bounds, stats, numbers) -> None:
    """Launch in place of the portable kernel, for at least one query and one key of at least one sequence.

    Args:
        outputs: (k_grad, rope_grad, v_grad), with rope_grad [heads, tokens, rope] in float32, or (q_grad,).
        bounds: (cu_seqlens_q, cu_seqlens_k).
        stats: [2, heads, queries]: lse in base 2, and delta.
        numbers: (softmax_scale, max_seqlen_q, max_seqlen_k).
    """
    q, k, rope, v, out_grad = reading
    _, heads, queries = stats.shape
    softmax_scale, max_queries, max_keys = numbers
    of_keys = choice.kernel in _OF_KEYS
    held, streamed = (max_keys, max_queries) if of_keys else (max_queries, max_keys)
    tiles = -(-held // tile_rows(choice.statics))
    pairs = heads * (bounds[0].shape[0] - 1)
    key, tail, value = (choice.statics[name] for name in ("KEY", "ROPE", "VALUE"))
    together = KEPT_TOGETHER // max(1, 2 * streamed * (key + tail + value))
    tokens = v.tiles.base.shape[0]
    q_tiles = (q.tiles,) * ("q_rope_tiles" in choice.kernel.arguments) + (q.tiles,)
    rope_first = key if rope.tiles.base is k.tiles.base else 0  # the tail of an expanded key
    args = (
        *outputs, *bounds, stats, *q_tiles, k.tiles, rope.tiles, v.tiles, out_grad.tiles, softmax_scale,
        q.row, q.column, k.row, k.column, rope.row, rope.column, rope_first, v.row, v.column, out_grad.row,
        out_grad.column, heads, queries, tokens, max_queries, max_keys, tiles,
        max(1, min(together, pairs)), 0,
    )  # fmt: skip
    choice.kernel.launch(chip, pairs * tiles, args, choice.statics, choice.tile)
