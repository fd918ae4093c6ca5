"""What the experts' two grouped matrix products, gate_up and down, share: tiles of weights, tile rule, memory, cost.

Symbols: P rows in expert order (pairs), E experts, H hidden size, I intermediate size. ``products`` is the number of
result columns an item computes for every column it writes: 2 for gate_up (the gate's and up's), 1 for down.
"""

from typing import NamedTuple

import torch

from mla_kernels.invariance import FIXED_TOKENS
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, Case, Cost, Work
from mla_kernels.moe.experts.schedule import block_m

LARGEST_BLOCK_K = 128  # EVEN_K says that a row is a multiple of this, hence of every BLOCK_K


class Rows(NamedTuple):
    """Rows in expert order: row r belongs to token order[r] // top_k; expert e owns offsets[e] to offsets[e + 1] - 1.

    With top_k 1, ``order`` holds tokens themselves.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    top_k: int


WEIGHT_PLACES = ("input", "activation", "output")


class Places(NamedTuple):
    """Which kernel multiplies by the slots' weights, and where: gate_up at the "input" (of its sums) or at the
    "activation", down at the "activation" (of its sums) or at the "output", or "none"; or ``combine`` all results."""

    gate_up: str
    down: str
    combine: bool


def places(weight_at: str, dtype: torch.dtype, activation_dtype: torch.dtype | None = None) -> Places:
    """The places for ``weight_at``, given the dtypes that results and activations (None: the same) are stored in.

    float16 ends at 65504, so weights multiply before results are rounded to it: what a small weight keeps below that
    does not overflow. Elsewhere they multiply sums of products, or the rows that are added up anyway.
    """
    if weight_at == "input":
        return Places("input", "none", False)
    if weight_at == "activation":
        early = (activation_dtype or dtype) == torch.float16
        return Places("activation", "none", False) if early else Places("none", "activation", False)
    return Places("none", "output", False) if dtype == torch.float16 else Places("none", "none", True)


@triton.jit
def weight_tile(weight, out, k, stride, mask, TRANSPOSED: tl.constexpr):
    """A tile [K, OUT] of a weight stored as [out, in], or with TRANSPOSED as [in, out]; ``mask`` is [OUT]."""
    if TRANSPOSED:
        tile = tl.load(weight + k[:, None] * stride + out[None, :], mask=mask[None, :], other=0.0)
    else:
        tile = tl.trans(tl.load(weight + out[:, None] * stride + k[None, :], mask=mask[:, None], other=0.0))
    return tile


@triton.jit
def last_weight_tile(weight, out, k, stride, mask, k_mask, TRANSPOSED: tl.constexpr):
    """:func:`weight_tile` at the end of a row: where ``k_mask`` [K] does not hold, it is 0."""
    if TRANSPOSED:
        inside = k_mask[:, None] & mask[None, :]
        tile = tl.load(weight + k[:, None] * stride + out[None, :], mask=inside, other=0.0)
    else:
        inside = mask[:, None] & k_mask[None, :]
        tile = tl.trans(tl.load(weight + out[:, None] * stride + k[None, :], mask=inside, other=0.0))
    return tile


@triton.jit
def gathered_product(
    x_rows, weight, n, mask, depth, stride,
    TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: the rows at ``x_rows`` [BLOCK_M, 1] times columns ``n`` of an expert's weight, 0 where
    not ``mask``.

    Rows are read unmasked; the end of a row that BLOCK_K does not divide is its last BLOCK_K values, with the weights
    of those already counted masked.
    """
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    whole = depth // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        k = start + lane
        x = tl.load(x_rows + k[None, :])  # [BLOCK_M, BLOCK_K]
        w = weight_tile(weight, n, k, stride, mask, TRANSPOSED)  # [BLOCK_K, BLOCK_N]
        total = tl.dot(x, w, total, input_precision="ieee")
    if not EVEN_K:
        k = depth - BLOCK_K + lane
        x = tl.load(x_rows + k[None, :])
        w = last_weight_tile(weight, n, k, stride, mask, k >= whole, TRANSPOSED)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


def sizes_of_tile(sizes: dict[str, int], batch_invariant: bool) -> dict[str, int]:
    """The sizes that a tile is looked up with: the call's, or, where bits must not depend on the batch, those at which
    each expert has 64 rows. Tensor cores add a row's products in an order that follows from the tile alone."""
    if not batch_invariant:
        return sizes
    slots = max(1, -(-sizes["pairs"] // max(sizes["tokens"], 1)))
    tokens = -(-FIXED_TOKENS * sizes["experts"] // slots)
    return sizes | {"tokens": tokens, "pairs": tokens * slots}


def tile_rule(products):
    """Tile rule of a kernel with ``products`` accumulators of [BLOCK_M, BLOCK_N], which is what limits a tile: fp32
    registers of GPU threads, the vector memory that gate_up's epilogue needs on Ascend."""

    def rule(chip, dtype, statics, sizes):
        m = block_m(sizes["pairs"], sizes["experts"])
        stages = 2 if chip.vendor == "amd" else 3
        if dtype == "fp32":  # GPUs multiply fp32 on their FMA units, with operands in registers
            shape = {"BLOCK_M": min(m, 64), "BLOCK_N": 64 // products, "BLOCK_K": 32, "num_warps": 4}
            stages = 2
        elif chip.vendor == "ascend":
            fits_128 = products == 1 or chip.memory["L0C"] > 128 * 1024
            shape = {"BLOCK_M": m if fits_128 else min(m, 64), "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4}
        elif m < 64:
            shape = {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4}
        elif m == 128 and chip.dot_from_shared:
            shape = {"BLOCK_M": m, "BLOCK_N": 256 // products, "BLOCK_K": 64, "num_warps": 8}
            stages = 4
        else:
            n = 128 if chip.dot_from_shared else 128 // products
            shape = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "num_warps": m // 16}
        return shape | {"num_stages": stages, "GROUP_M": 8}

    return rule


def tile_memory(products):
    """On-chip bytes: operand tiles in flight and, on Ascend, the accumulators and what compiled epilogues were seen to
    take: 14 bytes an element of gate_up's tile, next to nothing for down's, which leaves L0C as it is."""

    def memory(chip, dtype, statics, tile):
        size = DTYPE_BYTES[dtype]
        m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
        operands = (m + products * n) * k * size
        if chip.is_gpu:  # operands read from shared memory stay there until their product is done
            held = chip.dot_from_shared and dtype != "fp32" and m >= 64
            return {"shared": operands * max(1, tile["num_stages"] - (not held))}
        accumulators, epilogue = products * m * n * 4, 14 * m * n * (products - 1)
        return {"L1": 2 * operands, "L0A": 2 * m * k * size, "L0C": accumulators, "UB": epilogue}

    return memory


def _filled(sizes):
    """Experts with a row when the pairs spread over as many as they can."""
    return min(sizes["experts"], sizes["pairs"])


def product_cost(products):
    def cost(dtype, statics, sizes):
        pairs, hidden, inner = sizes["pairs"], sizes["hidden"], sizes["intermediate"]
        width_in, width_out = (hidden, inner) if products == 2 else (inner, hidden)
        read = min(pairs, sizes["tokens"]) if products == 2 else pairs
        weights = _filled(sizes) * products * hidden * inner
        moved = (read * width_in + weights + pairs * width_out) * DTYPE_BYTES[dtype]
        workspace = pairs * inner * DTYPE_BYTES[dtype] if products == 2 else 0  # the activation between the two kernels
        return Cost(flops=2.0 * products * pairs * hidden * inner, bytes=moved, workspace=workspace)

    return cost


def product_work(products):
    def work(dtype, statics, sizes, tile):
        pairs, hidden, inner = sizes["pairs"], sizes["hidden"], sizes["intermediate"]
        m, n = tile["BLOCK_M"], tile["BLOCK_N"]
        width_in, width_out = (hidden, inner) if products == 2 else (inner, hidden)
        experts = _filled(sizes)
        tiles = experts * -(-pairs // max(1, experts * m))  # experts share the rows evenly
        programs = tiles * -(-width_out // n)
        moved = ((m + products * n) * width_in + m * n) * DTYPE_BYTES[dtype]
        return Work(programs, 2.0 * products * m * n * width_in, moved)

    return work


MODELS = {  # experts, top_k, hidden, intermediate
    "v2_lite": (64, 6, 2048, 1408),
    "v3": (256, 8, 7168, 2048),
    "v3_tp8": (256, 8, 7168, 256),
}


def product_cases(statics_of, tokens=(1, 256, 4096)):
    """Cases of every model; ``statics_of`` (experts, hidden, inner) gives the constants."""
    return tuple(
        Case(
            f"{model}_{count}",
            statics_of(experts, hidden, inner),
            {"tokens": count, "pairs": count * top_k, "experts": experts, "hidden": hidden, "intermediate": inner},
        )
        for model, (experts, top_k, hidden, inner) in MODELS.items()
        for count in tokens
    )


TILES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128),
    "GROUP_M": (1, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}


def block_e(experts: int) -> int:
    """Width of a vector over all experts; reductions narrower than 8 lose lanes on Ascend."""
    return max(16, 1 << (experts - 1).bit_length())


def fit(tile: dict, row: int) -> dict:
    """The tile with BLOCK_K no longer than a row, which a table's entry for other sizes may exceed."""
    longest = 1 << (row.bit_length() - 1)
    return tile if tile["BLOCK_K"] <= longest else tile | {"BLOCK_K": max(16, longest)}


def layout_of(weight: torch.Tensor) -> tuple[bool, int]:
    """(TRANSPOSED, stride between the other axis' elements) of a weight [E, out, in] or a transposed view of it."""
    transposed = weight.stride(2) != 1 and weight.shape[2] > 1
    return transposed, weight.stride(2 if transposed else 1)
