"""Gradients of sparse_mla_prefill for Hopper: the kernels' declarations, and their launch beside the portable ones'.

The kernels, :mod:`mla_kernels.hopper.sparse_gradients_kernel`, import Gluon, and are imported by a first launch.
"""

import math
from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import TILE, GluonKernel, Tiles
from mla_kernels.hopper.decode import tma_strides
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, NO_MEMORY, Case, Cost, Work
from mla_kernels.quant.cache_layout import ALIGNMENT

HEADS = 64
"""Heads of a group of warps, and of a box of queries."""
MOST_HEADS = 2 * HEADS
PICKS = 128
"""Picks of a block of weights, to whole ones of which they are padded in memory."""
SHARE = 512
"""Picks of a program that makes weights: with fewer q and dO are loaded oftener, with more fewer programs share the
multiprocessors."""
WIDTH = 192
"""Columns of queries that are summed up together."""
_COLUMNS = 64  # of a box: 128 bytes
_UNIT = ALIGNMENT // 2  # elements of 16 bits
_PIECE_STAGES, _STAGES = 5, 4
_LATENTS = (128, 256, 512)


def _pieces(statics) -> int:
    """Of a row, 64 columns each."""
    return statics["LATENT"] // _COLUMNS + (statics["ROPE"] > 0)


def _parts(statics) -> int:
    """Programs for the columns of queries."""
    return _ceil(statics["LATENT"] + statics["ROPE"], WIDTH)


def _carried(chip, dtype, used: int):
    return {"shared": NO_MEMORY if chip.name in hopper.ELSEWHERE or dtype == "fp32" else used + 2048}


def _weights_memory(chip, dtype, statics, tile):
    """Queries and gradients of 64 heads, the ring of pieces, barriers."""
    parts = 2 * _pieces(statics) - (statics["ROPE"] > 0)
    return _carried(chip, dtype, 2 * _COLUMNS * (HEADS * parts + _PIECE_STAGES * PICKS))


def _query_memory(chip, dtype, statics, tile):
    return _carried(chip, dtype, 2 * _STAGES * (2 * HEADS * HEADS + HEADS * WIDTH))


def _pick_memory(chip, dtype, statics, tile):
    """Weights, the ring of heads, and sums of 16 bits on their way to memory."""
    ring = _STAGES * HEADS * min(256, statics["LATENT"])
    return _carried(chip, dtype, 2 * (2 * MOST_HEADS * PICKS + ring + 2 * HEADS * HEADS))


def _pairs(sizes) -> float:
    return float(sizes["heads"] * sizes["top_k"])


def _widths(statics) -> tuple[int, int]:
    return statics["LATENT"], statics["LATENT"] + statics["ROPE"]


def _weights_of(sizes) -> float:
    """Elements of dS and P of a token."""
    return 2 * _pairs(sizes)


def _weights_cost(dtype, statics, sizes):
    latent, whole = _widths(statics)
    read = sizes["heads"] * (latent + whole) + sizes["top_k"] * whole
    return _cost(dtype, sizes, latent + whole, read + _weights_of(sizes), _weights_of(sizes))


def _query_cost(dtype, statics, sizes):
    _, whole = _widths(statics)
    return _cost(dtype, sizes, whole, (sizes["top_k"] + sizes["heads"]) * whole + _weights_of(sizes) / 2)


def _pick_cost(dtype, statics, sizes):
    latent, whole = _widths(statics)
    written = sizes["top_k"] * whole
    moved = sizes["heads"] * (latent + whole) + _weights_of(sizes) + written
    return _cost(dtype, sizes, latent + whole, moved, written)


def _cost(dtype, sizes, products: int, moved: float, workspace: float = 0.0):
    """Of a token's pairs of head and pick, multiplied by ``products`` columns, and ``moved`` elements."""
    tokens, size = sizes["tokens"], DTYPE_BYTES[dtype]
    return Cost(
        flops=2.0 * tokens * _pairs(sizes) * products, bytes=tokens * moved * size, workspace=tokens * workspace * size
    )


def _work(cost, programs):
    """Work of a kernel whose ``programs(statics, sizes)`` share its cost."""

    def work(dtype, statics, sizes, tile):
        whole, count = cost(dtype, statics, sizes), sizes["tokens"] * programs(statics, sizes)
        return Work(programs=count, flops=whole.flops / count, bytes=whole.bytes / count)

    return work


def _ceil(number: int, step: int) -> int:
    return -(-number // step)


def _case(name, heads, *, latent=512, rope=64, lengths=False, sink=False, dtypes=("bf16",)):
    statics = {"LATENT": latent, "ROPE": rope, "LENGTHS": lengths, "SINK": sink}
    return Case(name, statics, {"heads": heads, "tokens": 64, "top_k": 2048}, dtypes)


_CASES = (
    _case("v32", 128, dtypes=("bf16", "fp16")),
    _case("lengths_and_sink", 16, lengths=True, sink=True),
    _case("no_rope", 128, rope=0),
    _case("narrow", 64, latent=128, rope=16, dtypes=("fp16",)),
)


def _declare(name: str, arguments: dict, numbers: tuple, statics: tuple, **declaration) -> GluonKernel:
    cases = tuple(
        Case(case.name, {constant: case.statics[constant] for constant in statics}, case.sizes, case.dtypes)
        for case in _CASES
    )
    return GluonKernel(
        "mla_kernels.hopper.sparse_gradients_kernel",
        f"hopper_sparse_mla_{name}_kernel",
        worker_warps=8,
        arguments=arguments | dict.fromkeys(numbers, "i32"),
        boxes=lambda chosen: {argument: _BOXES[argument] for argument in arguments if argument in _BOXES},
        statics=statics,
        tiles={"REGISTERS": (168,), "num_warps": (4,)},
        rule=lambda chip, dtype, statics, sizes: {"REGISTERS": 168, "num_warps": 4},
        cases=cases,
        uses_dot=True,
        unsupported=hopper.ELSEWHERE,
        **declaration,
    )


_BOXES = {
    **dict.fromkeys(("q_tiles", "grad_tiles"), (1, HEADS, _COLUMNS)),
    "weight_tiles": (HEADS, _COLUMNS),
}
_PICKED = {"kv_ptr": "*T", "indices_ptr": "*i32", "lengths_ptr": "*i32"}

HOPPER_SPARSE_MLA_WEIGHTS = _declare(
    "weights",
    {
        "weights_ptr": "*T", **_PICKED, **dict.fromkeys(("lse_ptr", "gate_ptr", "shift_ptr"), "*fp32"),
        "q_tiles": TILE, "grad_tiles": TILE, "scale": "fp32", "score_scale": "fp32",
    },
    (
        "token_stride", "index_stride", "heads", "num_rows", "top_k", "padded_heads", "pick_blocks", "share", "splits",
        "zero",
    ),
    ("LATENT", "ROPE", "LENGTHS", "SINK"),
    memory=_weights_memory,
    cost=_weights_cost,
    work=_work(_weights_cost, lambda statics, sizes: _ceil(sizes["heads"], HEADS) * _ceil(sizes["top_k"], SHARE)),
)  # fmt: skip

HOPPER_SPARSE_MLA_QUERY_GRADIENT = _declare(
    "query_gradient",
    {"q_grad_ptr": "*T", **_PICKED, "weight_tiles": TILE},
    ("token_stride", "index_stride", "heads", "num_rows", "top_k", "padded_heads", "parts"),
    ("LATENT", "ROPE", "LENGTHS"),
    memory=_query_memory,
    cost=_query_cost,
    work=_work(_query_cost, lambda statics, sizes: _parts(statics)),
)

HOPPER_SPARSE_MLA_PICK_GRADIENT = _declare(
    "pick_gradient",
    {"picks_ptr": "*T", "lengths_ptr": "*i32", **dict.fromkeys(("weight_tiles", "q_tiles", "grad_tiles"), TILE)},
    ("heads", "top_k", "padded_heads"),
    ("LATENT", "ROPE", "LENGTHS"),
    memory=_pick_memory,
    cost=_pick_cost,
    work=_work(_pick_cost, lambda statics, sizes: _ceil(sizes["top_k"], PICKS)),
)

KERNELS = HOPPER_SPARSE_MLA_WEIGHTS, HOPPER_SPARSE_MLA_QUERY_GRADIENT, HOPPER_SPARSE_MLA_PICK_GRADIENT


class Choice(NamedTuple):
    """What is compiled and launched in place of the portable kernels: all three kernels, or none."""

    statics: dict  # but for what a call adds: LENGTHS, SINK
    tile: dict
    form: frozenset  # as it was chosen


def choose(chip, dtype, heads: int, statics) -> Choice | None:
    """What a backward of this form launches; see :func:`mla_kernels.hopper.chosen`.

    ``statics``: LATENT and ROPE of the portable kernels.
    """
    name = DTYPE_NAMES[dtype]
    own = {constant: statics[constant] for constant in ("LATENT", "ROPE")}
    form = {"dtype": name, **own}
    if not all(hopper.chosen(kernel, chip, form, lambda: refusal(name, heads, own)) for kernel in KERNELS):
        return None
    return Choice(own, KERNELS[0].rule(chip, name, own, {}), hopper.frozen(form))


def refusal(dtype: str, heads: int, statics) -> str:
    """Why the kernels do not serve a form, or nothing."""
    latent, rope = statics["LATENT"], statics["ROPE"]
    if dtype not in ("bf16", "fp16"):
        return f"gradients of {dtype}; bf16 and fp16 are carried"
    if latent not in _LATENTS:
        return (
            f"gradients with latent_dim {latent}; {', '.join(map(str, _LATENTS[:-1]))} and {_LATENTS[-1]} are carried"
        )
    if rope > _COLUMNS:
        return f"gradients with rope_dim {rope}; at most {_COLUMNS} is carried"
    if heads > MOST_HEADS:
        return f"gradients of {heads} heads; at most {MOST_HEADS} are carried"
    return ""


def serves(choice: Choice, kv) -> bool:
    """Whether rows of the chosen form lie where they can be copied from.

    Raises:
        NotImplementedError: they do not, and the kernels are asked for by name.
    """
    at, stride, reason = kv.data_ptr() % ALIGNMENT, kv.stride(0), ""
    if at or stride % _UNIT:
        reason = f"kv at byte {at} of 16 with stride {stride}; rows are copied from multiples of 16 bytes"
    return all([hopper.served(kernel, choice.form, reason) for kernel in KERNELS])  # a list: each is noted


def weights_shape(heads: int, top_k: int) -> tuple[int, int, int]:
    """Of a token's weights: dS and P, heads padded to boxes, picks to blocks."""
    return 2, _ceil(heads, HEADS) * HEADS, _ceil(top_k, PICKS) * PICKS


def tiles_of(tensor) -> Tiles:
    """A tensor [tokens, heads, width] as TMA copies boxes from it; of a copy where it lies at an odd place."""
    shape = tensor.shape
    strides = tma_strides(tensor.data_ptr(), shape, tensor.stride(0), tensor.stride(1))
    if strides is None:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        strides = shape[1] * shape[2], shape[2], 1
    return Tiles(tensor, tuple(shape), strides)


class Call(NamedTuple):
    """Some tokens of a call over rows that :func:`serves`.

    ``given``: (q, kv, indices, topk_length, out_grad, lse, gate, shift), as the portable kernels take them.
    ``weights``: [tokens, 2, heads, picks] as :func:`weights_shape` says, for nobody else.
    ``statics``: LENGTHS and SINK, whether there are such.
    """

    given: tuple
    weights: torch.Tensor
    statics: dict
    softmax_scale: float


def launch(chip, choice: Choice, call: Call, q_grad, picks) -> None:
    """Launch in place of the two portable kernels, to q_grad [tokens, heads, width], picks [tokens, top_k, width]."""
    if call.given[2].shape[1] == 0:
        q_grad.zero_()
        return
    q, out_grad = (tiles_of(call.given[place]) for place in (0, 4))
    launch_weights(chip, choice, call, q, out_grad)
    launch_query_gradient(chip, choice, call, q_grad)
    launch_pick_gradient(chip, choice, call, q, out_grad, picks)


def launch_weights(chip, choice: Choice, call: Call, q: Tiles, out_grad: Tiles) -> None:
    """dS and P of all heads and picks, to ``call.weights``."""
    _, kv, indices, lengths, _, lse, gate, shift = call.given
    tokens, heads, _ = q.shape
    _, padded_heads, padded_picks = call.weights.shape[1:]
    top_k, scale = indices.shape[1], call.softmax_scale
    splits = _ceil(top_k, SHARE)
    args = (
        call.weights, kv, indices, lengths, lse, gate, shift, q, out_grad, scale, scale / math.log(2.0),
        kv.stride(0) // _UNIT, indices.stride(0), heads, kv.shape[0], top_k, padded_heads, padded_picks // PICKS,
        SHARE // PICKS, splits, 0,
    )  # fmt: skip
    work = tokens * splits * (padded_heads // HEADS)
    HOPPER_SPARSE_MLA_WEIGHTS.launch(chip, work, args, choice.statics | call.statics, choice.tile)


def launch_query_gradient(chip, choice: Choice, call: Call, q_grad) -> None:
    """From ``call.weights``."""
    _, kv, indices, lengths, *_ = call.given
    tokens, heads, _ = q_grad.shape
    args = (
        q_grad, kv, indices, lengths, _matrix(call.weights), kv.stride(0) // _UNIT, indices.stride(0), heads,
        kv.shape[0], indices.shape[1], call.weights.shape[2], _parts(choice.statics),
    )  # fmt: skip
    statics = choice.statics | {"LENGTHS": call.statics["LENGTHS"]}
    HOPPER_SPARSE_MLA_QUERY_GRADIENT.launch(chip, tokens * _parts(statics), args, statics, choice.tile)


def launch_pick_gradient(chip, choice: Choice, call: Call, q: Tiles, out_grad: Tiles, picks) -> None:
    """From ``call.weights``."""
    _, _, indices, lengths, *_ = call.given
    tokens, top_k = indices.shape
    args = picks, lengths, _matrix(call.weights), q, out_grad, q.shape[1], top_k, call.weights.shape[2]
    statics = choice.statics | {"LENGTHS": call.statics["LENGTHS"]}
    HOPPER_SPARSE_MLA_PICK_GRADIENT.launch(chip, tokens * _ceil(top_k, PICKS), args, statics, choice.tile)


def _matrix(weights) -> Tiles:
    """A row for each head of dS, then of P, of each token."""
    tokens, both, heads, picks = weights.shape
    return Tiles(weights, (tokens * both * heads, picks), (picks, 1))
