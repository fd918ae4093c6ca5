"""gate_up of few rows: its reduction over the hidden size split over programs, and their sums added in order.

One token of DeepSeek-V3 cut in eight has 8 experts of 512 rows of gate_up: 32 tiles for the 132 cores of an H200, each
going through 7,168 columns one step after another. Split over the columns, the products store fp32 sums, [splits, rows,
2 I], and :data:`ACTIVATION` adds a row's splits in one order, which follows from their number alone, and applies bias,
clamp, activation and weight as gate_up's own epilogue would.

Symbols: P rows in expert order (pairs), E experts, I intermediate size.
"""

from typing import NamedTuple

import torch

from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work
from mla_kernels.moe.experts.activation import Activation, activate
from mla_kernels.moe.experts.grouped import MODELS, Rows, block_e
from mla_kernels.moe.experts.schedule import block_m, num_slots, rows_of_slot
from mla_kernels.targets.chips import CHIPS, Chip

SPLIT_STEP = 128
"""Columns of the hidden size that a split is a multiple of."""

ROWS = 16
"""Rows of a tile of the products that are split, and the most that an expert has on average where they are."""

WIDTH = 128
"""Rows of weights of such a tile, of 16 bits."""

TOGETHER = 4
"""Programs that a GPU's core runs side by side. A tile of four-bit weights has 16 KiB in flight, and an H200's core
needs about 40 for its share of the bandwidth; so many programs of four warps fill its registers at 128 a thread."""

STARTED, ADDED, MERGED = 4, 4, 1 / 16
"""What a program costs beside its columns, the launch that adds the sums, and each split of a row there: in steps of
128 columns. Estimates: no device has timed a split."""

WORTH = 3 / 4
"""Share of the estimate without splits that one with them must stay below: estimates are no finer."""

MOST_SPLITS = 64


def split_count(programs: int, depth: int, cores: int) -> int:
    """Splits of ``depth`` columns, where ``programs`` programs would run without, on a chip that runs ``cores`` of
    them at once; 1: none.

    The least of ``waves * (steps of a split + 4) + 4 + splits / 16``, waves = ceil(programs * splits / cores), where
    that is less than three quarters of what one split costs, which has no launch more. A function of sizes alone: V3
    cut in eight on an H200 gets 14, 8, 4 and 2 splits for 1, 2, 4 and 8 tokens, and none for 16.
    """
    steps = -(-depth // SPLIT_STEP)
    best, least = 1, WORTH * -(-programs // cores) * (steps + STARTED)
    for splits in range(2, min(steps, MOST_SPLITS) + 1):
        share = -(-steps // splits)
        if -(-steps // share) < splits:
            continue  # as long as with fewer splits
        cost = -(-programs * splits // cores) * (share + STARTED) + ADDED + MERGED * splits
        if cost < least:
            best, least = splits, cost
    return best


class Split(NamedTuple):
    """How the columns of gate_up's rows are split: so many splits, of ``share`` columns but for the last."""

    splits: int
    share: int


def split_of(chip: Chip, sizes: dict[str, int], block_n: int, batch_invariant: bool) -> Split | None:
    """The split of a call with these sizes whose tiles are ``block_n`` of the 2 I rows wide, or None.

    None with ``batch_invariant`` (their number follows from that of tokens), and with more rows than a tile has. On
    Ascend, whose programs are one a core, there are splits where half of the cores or more would have no tile.
    """
    if batch_invariant or block_m(sizes["pairs"], sizes["experts"]) > ROWS:
        return None
    slots = num_slots(sizes["pairs"], sizes["experts"], ROWS)
    programs = slots * -(-2 * sizes["intermediate"] // block_n)
    splits = split_count(programs, sizes["hidden"], chip.dot_cores * (TOGETHER if chip.is_gpu else 1))
    share = -(-sizes["hidden"] // (splits * SPLIT_STEP)) * SPLIT_STEP
    split = Split(-(-sizes["hidden"] // share), share)  # none of them without columns
    return split if split.splits > 1 else None


@triton.jit
def moe_split_activation_kernel(
    sums, bias, weights, activation, order, offsets,
    pairs, experts, intermediate, splits, bias_stride, limit, alpha,
    CLAMP: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHT_AT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """activation[row] = act(sum over splits of sums[split, row]): BLOCK_N columns of a row an item. BLOCK_S splits are
    loaded together; sums of every BLOCK_S-th are added first."""
    columns = tl.cdiv(intermediate, BLOCK_N)
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    for item in range(tl.program_id(0), pairs * columns, tl.num_programs(0)):
        row = item // columns
        expert, first, end = rows_of_slot(offsets, row, experts, pairs, 1, BLOCK_E)
        if (first >= 0) & (first < end):
            n = item % columns * BLOCK_N + tl.arange(0, BLOCK_N)
            split = tl.arange(0, BLOCK_S)
            wide = 2 * intermediate
            gate = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
            up_at = 1 if INTERLEAVED else intermediate
            for start in range(0, splits, BLOCK_S):
                at = sums + ((start + split).to(tl.int64) * pairs + row)[:, None] * wide + (n * STEP)[None, :]
                mask = (start + split < splits)[:, None] & (n < intermediate)[None, :]
                gate += tl.load(at, mask=mask, other=0.0)
                up += tl.load(at + up_at, mask=mask, other=0.0)
            pair = tl.load(order + row + tl.arange(0, 1))
            of_expert = bias + tl.cast(expert, tl.int64) * bias_stride
            y = activate(
                tl.sum(gate, 0)[None, :], tl.sum(up, 0)[None, :], of_expert, weights, pair, 0, n, intermediate, limit,
                alpha, HAS_BIAS, CLAMP, INTERLEAVED, WEIGHT_AT,
            )  # fmt: skip
            out = activation + tl.cast(row, tl.int64) * intermediate + n[None, :]
            tl.store(out, y.to(activation.dtype.element_ty), mask=(n < intermediate)[None, :])


def _rule(chip, dtype, statics, sizes):
    return {"BLOCK_S": 16, "BLOCK_N": 128, "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    return {"shared": 8 * tile["BLOCK_S"] * tile["BLOCK_N"]} if chip.is_gpu else {
        "UB": 24 * tile["BLOCK_S"] * tile["BLOCK_N"]
    }  # fmt: skip


def _declared_splits(sizes):
    """Of the chip that declarations know."""
    slots = num_slots(sizes["pairs"], sizes["experts"], ROWS)
    programs = slots * -(-2 * sizes["intermediate"] // WIDTH)
    return split_count(programs, sizes["hidden"], CHIPS["sm_90"].dot_cores * TOGETHER)


def partial_bytes(sizes) -> int:
    """Bytes of the sums that the products of a problem store, on the chip that declarations know."""
    return 8 * _declared_splits(sizes) * sizes["pairs"] * sizes["intermediate"]


def _cost(dtype, statics, sizes):
    values = sizes["pairs"] * sizes["intermediate"]
    moved = partial_bytes(sizes) + values * DTYPE_BYTES[dtype]
    return Cost(2.0 * values * _declared_splits(sizes), moved, partial_bytes(sizes))


def _work(dtype, statics, sizes, tile):
    programs = sizes["pairs"] * -(-sizes["intermediate"] // tile["BLOCK_N"])
    whole = _cost(dtype, statics, sizes)
    return Work(programs, whole.flops / programs, whole.bytes / programs)


def _statics(experts, activation, has_bias, weight_at="none"):
    return {
        "CLAMP": activation.clamp.value,
        "INTERLEAVED": activation.interleaved,
        "HAS_BIAS": has_bias,
        "WEIGHT_AT": weight_at,
        "BLOCK_E": block_e(experts),
    }


def _cases():
    for model, activation, has_bias, weight_at in (
        ("v3_tp8", Activation(), False, "none"),
        ("v2_lite", Activation("gpt_oss", 7.0, interleaved=True), True, "input"),
    ):
        experts, top_k, hidden, inner = MODELS[model]
        sizes = {"tokens": 1, "pairs": top_k, "experts": experts, "hidden": hidden, "intermediate": inner}
        yield Case(f"{model}_1", _statics(experts, activation, has_bias, weight_at), sizes)


ACTIVATION = Kernel(
    moe_split_activation_kernel,
    arguments={"sums": "*fp32", "bias": "*T", "weights": "*fp32", "activation": "*T", "order": "*i32"}
    | {"offsets": "*i32", "pairs": "i32", "experts": "i32", "intermediate": "i32:16", "splits": "i32"}
    | {"bias_stride": "i32:16", "limit": "fp32", "alpha": "fp32"},
    statics=("CLAMP", "INTERLEAVED", "HAS_BIAS", "WEIGHT_AT", "BLOCK_E"),
    tiles={"BLOCK_S": (8, 16), "BLOCK_N": (64, 128, 256), "num_warps": (2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=tuple(_cases()),
    uses_dot=False,
)


def launch_activation(
    chip: Chip,
    sums: torch.Tensor,
    activated: torch.Tensor,
    rows: Rows,
    sizes: dict[str, int],
    *,
    bias: torch.Tensor | None,
    activation: Activation,
    weights: torch.Tensor,
    weight_at: str,
) -> None:
    """Write the first P rows of ``activated`` [.., I] from sums [splits, P, 2 I]; ``weights`` [T, K], contiguous. One
    launch."""
    (splits, pairs, doubled), experts = sums.shape, sizes["experts"]
    key = chip.device, activated.dtype, activation.arguments, bias is None, weight_at, *sizes.values()
    plan = ACTIVATION.kept.plans.get(key)
    if plan is None:
        statics = _statics(experts, activation, bias is not None)
        tile = ACTIVATION.tile_for(chip, DTYPE_NAMES[activated.dtype], statics, sizes)
        work = pairs * -(-(doubled // 2) // tile["BLOCK_N"])
        plan = ACTIVATION.keep(key, (work, statics | {"WEIGHT_AT": weight_at}, tile))  # which changes no tile
    work, statics, tile = plan
    args = (
        sums, activated if bias is None else bias, weights, activated, rows.order, rows.offsets,
        pairs, experts, doubled // 2, splits, 0 if bias is None else bias.stride()[0],
        activation.limit or 0.0, activation.alpha,
    )  # fmt: skip
    ACTIVATION.launch(chip, work, args, statics, tile)
