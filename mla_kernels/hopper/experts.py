"""The experts' grouped products for Hopper: the declaration of their kernel, and its launch in place of portable ones.

The kernel, :mod:`mla_kernels.hopper.experts_kernel`, imports Gluon, and is imported by a first launch.
"""

from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.hopper.decode import EXCHANGED, tma_strides
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work

PANEL = 128
"""Rows of weights that one TMA copy brings, of which a program takes two."""
FORMATS = ("fp8_block", "plain")
MANY = 128
"""Rows of x of a program with many; fewer are the columns of its products."""
TOKENS = (8, 16, 32, 64, MANY)
_STEP_BYTES = 128  # of a row, in shared memory
_UNIT = 16  # bytes of which rows of x and of weights are multiples
_BARRIERS = 256
_MOST_ROWS = 1 << 31  # coordinates of TMA have 32 bits


def _step(statics) -> int:
    """Elements of a step."""
    return _STEP_BYTES // (1 if statics["FORMAT"] == "fp8_block" else 2)


def _boxes(statics):
    return {"x_tiles": (statics["TOKENS"], _step(statics)), "w_tiles": (1, PANEL, _step(statics))}


def _element(dtype, statics) -> str:
    return "fp8e4nv" if statics["FORMAT"] == "fp8_block" else dtype


def _result(dtype, statics) -> str:
    return _element(dtype, statics) if statics["GATED"] else dtype


def tokens_for(pairs: int, experts: int) -> int:
    """Rows of a tile: those of an expert on average twice over, so that few experts need a second tile."""
    return min(MANY, max(TOKENS[0], 1 << (2 * -(-pairs // experts) - 1).bit_length()))


def _rule(chip, dtype, statics, sizes):
    """As many stages as fit, beside the room that results of 64 rows in float32 are transposed in."""
    wide = statics["TOKENS"] == MANY or (statics["TOKENS"] == MANY // 2 and dtype == "fp32")
    return {"STAGES": 4 if wide else 5, "REGISTERS": 168, "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    """Stages of x, weights and scales; what groups exchange, and transpose results of few rows in; barriers."""
    if chip.name in hopper.ELSEWHERE or (dtype == "fp32" and statics["FORMAT"] == "plain"):
        return {"shared": NO_MEMORY}
    tokens = statics["TOKENS"]
    stage = _STEP_BYTES * (2 * PANEL + tokens) + 4 * tokens
    result = tokens * PANEL // 2 * DTYPE_BYTES.get(_result(dtype, statics), 1)
    results = EXCHANGED if tokens == MANY else 2 * result
    return {"shared": tile["STAGES"] * stage + 16 * tokens + results + _BARRIERS}


def _widths(statics, sizes):
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    return (hidden, inner) if statics["GATED"] else (inner, hidden)


def _cost(dtype, statics, sizes):
    depth, width = _widths(statics, sizes)
    size, pairs, products = DTYPE_BYTES.get(_element(dtype, statics), 1), sizes["pairs"], 1 + statics["GATED"]
    weights = min(sizes["experts"], pairs) * products * depth * width * size
    read = sizes["tokens"] if statics["GATED"] else pairs
    return Cost(
        flops=2.0 * products * pairs * depth * width,
        bytes=float(weights + read * depth * size + pairs * width * DTYPE_BYTES.get(_result(dtype, statics), 1)),
    )


def _work(dtype, statics, sizes, tile):
    depth, width = _widths(statics, sizes)
    size, tokens = DTYPE_BYTES.get(_element(dtype, statics), 1), statics["TOKENS"]
    experts = min(sizes["experts"], sizes["pairs"])
    programs = experts * -(-sizes["pairs"] // (experts * tokens)) * _columns(statics, width)
    return Work(programs, 4.0 * tokens * PANEL * depth, float((2 * PANEL + tokens) * depth * size))


def _columns(statics, width: int) -> int:
    """Tiles of columns."""
    return -(-width // (PANEL if statics["GATED"] else 2 * PANEL))


def _block_e(experts: int) -> int:
    return max(32, 1 << (experts - 1).bit_length())


_MODELS = {"v3": (256, 8, 7168, 2048), "v3_tp8": (256, 8, 7168, 256), "v2_lite": (64, 6, 2048, 1408)}


def _case(format, model, tokens, gated, dtypes=("bf16",), clamp="none", weight_at="none"):
    experts, top_k, hidden, inner = _MODELS[model]
    sizes = {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "hidden": hidden, "intermediate": inner}
    name = f"{format}_{model}_{tokens}_{'gate_up' if gated else 'down'}"
    statics = {"FORMAT": format, "GATED": gated, "CLAMP": clamp, "WEIGHT_AT": weight_at}
    statics |= {"BLOCK_E": _block_e(experts), "TOKENS": tokens_for(tokens * top_k, experts)}
    return Case(name, statics, sizes, dtypes)


HOPPER_EXPERTS = GluonKernel(
    "mla_kernels.hopper.experts_kernel",
    "hopper_experts_kernel",
    worker_warps=8,
    arguments={
        "out_ptr": "*R",
        "out_scale_ptr": "*fp32",
        "x_ptr": "*X",
        **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
        **dict.fromkeys(("order_ptr", "offsets_ptr"), "*i32"),
        "weights_ptr": "*fp32",
        **dict.fromkeys(("x_tiles", "w_tiles"), TILE),
        **dict.fromkeys(("limit", "alpha"), "fp32"),
        **dict.fromkeys(
            ("x_units", "depth_units", "width_units", "tokens", "pairs", "top_k", "experts", "items"),
            "i32",
        ),
    },
    boxes=_boxes,
    box_type=_element,
    statics=("FORMAT", "GATED", "CLAMP", "WEIGHT_AT", "BLOCK_E", "TOKENS"),
    tiles={"STAGES": (4, 5), "REGISTERS": (168,), "num_warps": (4,)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        *(
            _case("fp8_block", model, tokens, gated)
            for model, tokens in (("v3", 4096), ("v3_tp8", 1), ("v2_lite", 256))
            for gated in (True, False)
        ),
        _case("fp8_block", "v3", 1024, False, ("bf16", "fp16"), weight_at="output"),
        _case("fp8_block", "v3", 1024, True, clamp="pre", weight_at="input"),
        *(_case("plain", "v3", tokens, gated, ("bf16", "fp16")) for tokens in (4096, 16) for gated in (True, False)),
    ),
    uses_dot=True,
    unsupported=hopper.ELSEWHERE,
    types={"R": _result, "X": _element},
)  # fmt: skip


class Choice(NamedTuple):
    """What is compiled and launched."""

    statics: dict
    tile: dict
    form: frozenset  # as it was chosen


class Layer(NamedTuple):
    """The experts of a call: what its products have in common."""

    format: str
    clamp: str
    interleaved: bool
    biased: bool  # either product
    transposed: bool  # either weight, stored as [E, in, out]


def choose(chip, dtype, layer: Layer, gated: bool, weight_at: str, sizes) -> Choice | None:
    """What a product of this form launches, gate_up (``gated``) or down; see :func:`mla_kernels.hopper.chosen`.

    ``sizes``: tokens, pairs, experts, hidden and intermediate, as the portable kernel looks its tile up with them.
    """
    name = DTYPE_NAMES[dtype]
    rows, clamp = tokens_for(sizes["pairs"], sizes["experts"]), layer.clamp if gated else "none"
    if layer.format == "fp8_block" and (clamp, weight_at) != ("none", "none"):
        rows = min(rows, MANY // 2)  # 128 rows' sums leave no register for more (ptxas of Triton 3.6.0 and 3.9.0)
    form = {"dtype": name, "FORMAT": layer.format, "GATED": gated, "CLAMP": clamp}
    form |= {"WEIGHT_AT": weight_at, "TOKENS": rows}
    if not hopper.chosen(HOPPER_EXPERTS, chip, form, lambda: refusal(name, layer, sizes)):
        return None
    statics = {constant: form[constant] for constant in ("FORMAT", "GATED", "CLAMP", "WEIGHT_AT")}
    statics |= {"BLOCK_E": _block_e(sizes["experts"]), "TOKENS": rows}
    return Choice(statics, _rule(chip, name, statics, sizes), hopper.frozen(form))


def refusal(dtype: str, layer: Layer, sizes) -> str:
    """Why the kernel does not serve a form, or nothing."""
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    if layer.format not in FORMATS:
        return f"experts in {layer.format}; {' and '.join(FORMATS)} are carried"
    if layer.format == "plain" and dtype == "fp32":
        return "experts in fp32; bf16 and fp16 are carried"
    if layer.biased:
        return "experts with biases; none are carried"
    if layer.interleaved:
        return "rows of the gate and of up in turn; one half behind the other is carried"
    if layer.transposed:
        return "weights stored as [E, in, out]; [E, out, in] is carried"
    if layer.format == "fp8_block" and (hidden % 16 or inner % PANEL):
        return f"sizes {hidden} and {inner} in fp8_block; multiples of 16 and of {PANEL} are carried"
    if layer.format == "plain" and (hidden % 8 or inner % 8):
        return f"sizes {hidden} and {inner}; multiples of 8 are carried"
    return ""


class Operands(NamedTuple):
    """The tensors of a product, and how many columns it gives.

    With fp8_block, ``x`` (rows padded to whole steps) and ``weight`` hold codes as int8, and ``x_scales`` [rows,
    blocks] and ``weight_scales`` belong to them; otherwise these are None.
    """

    x: torch.Tensor
    x_scales: torch.Tensor | None
    weight: torch.Tensor  # [E, rows, K]
    weight_scales: torch.Tensor | None
    width: int


def _unreadable(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why rows of x cannot be copied or weights not read by TMA, or nothing."""
    size, at = x.element_size(), x.data_ptr() % _UNIT
    if at or x.stride(0) * size % _UNIT or x.shape[0] * x.stride(0) * size // _UNIT >= _MOST_ROWS:
        return f"rows {x.stride(0)} elements apart at byte {at} of {_UNIT}; multiples of {_UNIT} bytes are copied"
    if tma_strides(weight.data_ptr(), tuple(weight.shape), weight.stride(0), weight.stride(1), size) is None:
        at = weight.data_ptr() % _UNIT
        return f"weights with strides {weight.stride()} at byte {at} of {_UNIT}; TMA reads multiples of {_UNIT} bytes"
    return ""


def programs(chip, items: int) -> int:
    """One a multiprocessor: each stays and takes every so many-th item."""
    return min(items, chip.dot_cores)


def launch(chip, choice: Choice, operands: Operands, rows, results, weights, rule=(0.0, 0.0)) -> bool:
    """Launch in place of the portable kernel, where the tensors can be read; whether it was.

    Args:
        rows: (order [P] of pairs, offsets [E + 1], pairs a token, tokens).
        results: (out, its scales or None): of gate_up in expert order, of down in that of the pairs.
        weights: [T, K] fp32, or None with weight_at "none".
        rule: (limit, alpha) of the activation.

    Raises:
        NotImplementedError: they cannot be read, and the kernel is asked for by name.
    """
    x, x_scales, weight, weight_scales, width = operands
    if not hopper.served(HOPPER_EXPERTS, choice.form, _unreadable(x, weight)):
        return False
    order, offsets, top_k, tokens = rows
    out, out_scales = results
    statics, pairs, experts = choice.statics, order.shape[0], weight.shape[0]
    size = x.element_size()
    strides = tma_strides(weight.data_ptr(), tuple(weight.shape), weight.stride(0), weight.stride(1), size)
    if statics["FORMAT"] == "fp8_block":
        x, weight = x.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
        out = out.view(torch.float8_e4m3fn) if statics["GATED"] else out
    slots = min(pairs, pairs // statics["TOKENS"] + experts)
    items = slots * _columns(statics, width)
    depth = weight.shape[2]
    args = (
        out, offsets if out_scales is None else out_scales, x, offsets if x_scales is None else x_scales,
        offsets if weight_scales is None else weight_scales, order, offsets, offsets if weights is None else weights,
        Tiles(x, tuple(x.shape), (x.stride(0), 1)), Tiles(weight, tuple(weight.shape), strides), *rule,
        x.stride(0) * size // _UNIT, depth * size // _UNIT, width // 8, tokens, pairs, top_k, experts, items,
    )  # fmt: skip
    HOPPER_EXPERTS.launch(chip, programs(chip, items), args, statics, choice.tile)
    return True
