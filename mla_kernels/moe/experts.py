"""expert_ffn: each expert's feed-forward network on its rows, as two grouped matrix products.

Symbols: T tokens, K slots of a token, P = T * K rows in expert order, E experts, H hidden size, I intermediate size.
"""

import torch

from mla_kernels.checks import check_int, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import moe as cpu
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.moe.dispatch import MAX_PAIRS, Dispatch
from mla_kernels.moe.schedule import block_m, num_slots, rows_of_slot, tile_of_item
from mla_kernels.shim import define_op

LARGEST_BLOCK_K = 128  # EVEN_K says that a row is a multiple of this, hence of every BLOCK_K


@triton.jit
def moe_gate_up_kernel(
    hidden,
    gate_up,
    activation,
    row_tokens,
    offsets,
    tokens,
    pairs,
    experts,
    hidden_size,
    intermediate,
    hidden_stride,
    expert_stride,
    weight_stride,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """activation[row] = silu(x @ gate.T) * (x @ up.T) with x = hidden[row_tokens[row]]: one item is a tile
    [BLOCK_M, BLOCK_N]. Rows are gathered unmasked (an out-of-range token is clamped), since a masked gather reads every
    row on Ascend; the end of a row that BLOCK_K does not divide is the last BLOCK_K columns, with the weights of those
    already counted masked."""
    columns = tl.cdiv(intermediate, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    lane_k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            row = first + tl.arange(0, BLOCK_M)
            token = tl.load(row_tokens + row, mask=row < end, other=0)
            token = tl.minimum(tl.maximum(token, 0), tokens - 1)
            if WIDE:
                token = token.to(tl.int64)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = (n < intermediate)[:, None]
            x_rows = hidden + token[:, None] * hidden_stride
            gate = gate_up + tl.cast(expert, tl.int64) * expert_stride
            up = gate + tl.cast(intermediate, tl.int64) * weight_stride
            n_rows = n[:, None] * weight_stride
            gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            whole = hidden_size // BLOCK_K * BLOCK_K
            for start in range(0, whole, BLOCK_K):
                k = start + lane_k
                x = tl.load(x_rows + k[None, :])  # [BLOCK_M, BLOCK_K]
                w_gate = tl.load(gate + n_rows + k[None, :], mask=n_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
                w_up = tl.load(up + n_rows + k[None, :], mask=n_mask, other=0.0)
                gate_sum = tl.dot(x, tl.trans(w_gate), gate_sum, input_precision="ieee")
                up_sum = tl.dot(x, tl.trans(w_up), up_sum, input_precision="ieee")
            if not EVEN_K:
                k = hidden_size - BLOCK_K + lane_k
                x = tl.load(x_rows + k[None, :])
                mask = n_mask & (k >= whole)[None, :]
                w_gate = tl.load(gate + n_rows + k[None, :], mask=mask, other=0.0)
                w_up = tl.load(up + n_rows + k[None, :], mask=mask, other=0.0)
                gate_sum = tl.dot(x, tl.trans(w_gate), gate_sum, input_precision="ieee")
                up_sum = tl.dot(x, tl.trans(w_up), up_sum, input_precision="ieee")
            y = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum
            out = activation + tl.cast(first, tl.int64) * intermediate
            m = tl.arange(0, BLOCK_M)
            tl.store(
                out + m[:, None] * intermediate + n[None, :],
                y.to(activation.dtype.element_ty),
                mask=(m < end - first)[:, None] & (n < intermediate)[None, :],
            )


@triton.jit
def moe_down_kernel(
    activation,
    down,
    rows,
    offsets,
    pairs,
    experts,
    hidden_size,
    intermediate,
    expert_stride,
    weight_stride,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """rows[row] = activation[row] @ down.T: one item is a tile [BLOCK_M, BLOCK_N] of contiguous rows."""
    columns = tl.cdiv(hidden_size, BLOCK_N)
    slots = tl.minimum(pairs, pairs // BLOCK_M + experts)
    lane_k = tl.arange(0, BLOCK_K)
    for item in range(tl.program_id(0), slots * columns, tl.num_programs(0)):
        slot, column = tile_of_item(item, slots, columns, GROUP_M)
        expert, first, end = rows_of_slot(offsets, slot, experts, pairs, BLOCK_M, BLOCK_E)
        if (first >= 0) & (first < end):
            m = tl.arange(0, BLOCK_M)
            m_mask = (m < end - first)[:, None]
            x_rows = activation + tl.cast(first, tl.int64) * intermediate + m[:, None] * intermediate
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = (n < hidden_size)[:, None]
            w_rows = down + tl.cast(expert, tl.int64) * expert_stride + n[:, None] * weight_stride
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            whole = intermediate // BLOCK_K * BLOCK_K
            for start in range(0, whole, BLOCK_K):
                k = start + lane_k
                x = tl.load(x_rows + k[None, :], mask=m_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(w_rows + k[None, :], mask=n_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
                total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
            if not EVEN_K:
                k = whole + lane_k
                k_mask = (k < intermediate)[None, :]
                x = tl.load(x_rows + k[None, :], mask=m_mask & k_mask, other=0.0)
                w = tl.load(w_rows + k[None, :], mask=n_mask & k_mask, other=0.0)
                total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
            out = rows + tl.cast(first, tl.int64) * hidden_size
            tl.store(
                out + m[:, None] * hidden_size + n[None, :],
                total.to(rows.dtype.element_ty),
                mask=(m < end - first)[:, None] & (n < hidden_size)[None, :],
            )


def _rule(products):
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


def _memory(products):
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


def _cost(products):
    def cost(dtype, statics, sizes):
        pairs, hidden, inner = sizes["pairs"], sizes["hidden"], sizes["intermediate"]
        width_in, width_out = (hidden, inner) if products == 2 else (inner, hidden)
        read = min(pairs, sizes["tokens"]) if products == 2 else pairs
        weights = _filled(sizes) * products * hidden * inner
        moved = (read * width_in + weights + pairs * width_out) * DTYPE_BYTES[dtype]
        workspace = pairs * inner * DTYPE_BYTES[dtype] if products == 2 else 0  # the activation between the two kernels
        return Cost(flops=2.0 * products * pairs * hidden * inner, bytes=moved, workspace=workspace)

    return cost


def _work(products):
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


def _statics(experts, inner, wide=None):
    statics = {"EVEN_K": inner % LARGEST_BLOCK_K == 0}
    if wide is not None:
        statics["WIDE"] = wide
    return statics | {"BLOCK_E": max(16, 1 << (experts - 1).bit_length())}


_MODELS = {  # experts, top_k, hidden, intermediate
    "v2_lite": (64, 6, 2048, 1408),
    "v3": (256, 8, 7168, 2048),
    "v3_tp8": (256, 8, 7168, 256),
}


def _cases(gate_up):
    return tuple(
        Case(
            f"{model}_{tokens}",
            _statics(experts, hidden, False) if gate_up else _statics(experts, inner),
            {"tokens": tokens, "pairs": tokens * top_k, "experts": experts, "hidden": hidden, "intermediate": inner},
        )
        for model, (experts, top_k, hidden, inner) in _MODELS.items()
        for tokens in (1, 256, 4096)
    )


_TILES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128),
    "GROUP_M": (1, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
_SIZES = {"experts": "i32", "hidden_size": "i32:16", "intermediate": "i32:16"}
_WEIGHT_STRIDES = {"expert_stride": "i32:16", "weight_stride": "i32:16"}

GATE_UP = Kernel(
    moe_gate_up_kernel,
    arguments={"hidden": "*T", "gate_up": "*T", "activation": "*T", "row_tokens": "*i32", "offsets": "*i32"}
    | {"tokens": "i32", "pairs": "i32", **_SIZES, "hidden_stride": "i32:16", **_WEIGHT_STRIDES},
    statics=("EVEN_K", "WIDE", "BLOCK_E"),
    tiles=_TILES,
    rule=_rule(2),
    memory=_memory(2),
    cost=_cost(2),
    work=_work(2),
    cases=_cases(gate_up=True),
    uses_dot=True,
)

DOWN = Kernel(
    moe_down_kernel,
    arguments={"activation": "*T", "down": "*T", "rows": "*T", "offsets": "*i32", "pairs": "i32"}
    | {**_SIZES, **_WEIGHT_STRIDES},
    statics=("EVEN_K", "BLOCK_E"),
    tiles=_TILES,
    rule=_rule(1),
    memory=_memory(1),
    cost=_cost(1),
    work=_work(1),
    cases=_cases(gate_up=False),
    uses_dot=True,
)


def _fit(tile, row):
    """The tile with BLOCK_K no longer than a row, which a table's entry for other sizes may exceed."""
    longest = 1 << (row.bit_length() - 1)
    return tile if tile["BLOCK_K"] <= longest else tile | {"BLOCK_K": max(16, longest)}


def launch_expert_ffn(hidden, gate_up, down, row_tokens, offsets):
    """Device implementation of the op: two launches, workspace P * I elements."""
    (tokens, width), pairs = hidden.shape, row_tokens.shape[0]
    experts, _, inner = down.shape
    activation, rows = hidden.new_empty(pairs, inner), hidden.new_empty(pairs, width)
    if pairs == 0:
        return rows
    chip, dtype = chip_of(hidden.device), DTYPE_NAMES[hidden.dtype]
    sizes = {"tokens": tokens, "pairs": pairs, "experts": experts, "hidden": width, "intermediate": inner}

    statics = _statics(experts, width, tokens * hidden.stride(0) >= 1 << 31)
    tile = _fit(GATE_UP.tile_for(chip, dtype, statics, sizes), width)
    args = (
        hidden, gate_up, activation, row_tokens, offsets, tokens, pairs, experts, width, inner,
        hidden.stride(0), gate_up.stride(0), gate_up.stride(1),
    )  # fmt: skip
    work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-inner // tile["BLOCK_N"])
    GATE_UP.launch(chip, work, args, statics, tile)

    statics = _statics(experts, inner)
    tile = _fit(DOWN.tile_for(chip, dtype, statics, sizes), inner)
    args = (activation, down, rows, offsets, pairs, experts, width, inner, down.stride(0), down.stride(1))
    work = num_slots(pairs, experts, tile["BLOCK_M"]) * -(-width // tile["BLOCK_N"])
    DOWN.launch(chip, work, args, statics, tile)
    return rows


def _fake(hidden, gate_up, down, row_tokens, offsets):
    return hidden.new_empty(row_tokens.shape[0], hidden.shape[1])


def _check_values(hidden, gate_up, down, row_tokens, offsets):
    check_range("tokens", row_tokens, 0, hidden.shape[0], "tokens of hidden")
    check_range("offsets", offsets, 0, row_tokens.shape[0] + 1, "rows")


_op = define_op(
    "expert_ffn",
    "(Tensor hidden, Tensor gate_up, Tensor down, Tensor tokens, Tensor offsets) -> Tensor",
    cpu=cpu.expert_ffn,
    device=launch_expert_ffn,
    fake=_fake,
    check_values=_check_values,
)


def check_weights(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """Refuse hidden [T, H], gate_up [E, 2I, H] and down [E, H, I] that do not go together."""
    check_tensor("hidden", hidden, rank=2)
    width = hidden.shape[1]
    check_int("hidden size (hidden.shape[1])", width, 16)
    check_tensor("gate_up", gate_up, shape=(None, None, width), like=hidden)
    experts, doubled, _ = gate_up.shape
    check_int("number of experts (gate_up.shape[0])", experts, 1, 1024)
    if doubled % 2 or doubled == 0:
        raise ValueError(f"gate_up: got {doubled} rows an expert, an even number is accepted (gate rows, then up rows)")
    check_tensor("down", down, shape=(experts, width, doubled // 2), like=hidden)


def expert_ffn(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """Each expert's feed-forward network on its rows: down(silu(gate(x)) * up(x)). Two kernel launches.

    SwiGLU experts as in DeepSeekMoE (arXiv 2401.06066) and Hugging Face's ``DeepseekV3Experts``.

    Args:
        hidden: [T, H] bf16, fp16 or fp32, contiguous rows, H at least 16.
        gate_up: [E, 2I, H] in hidden's dtype, each expert's gate rows before its up rows.
        down: [E, H, I] in hidden's dtype.
        dispatched: from :func:`mla_kernels.dispatch` with E experts.

    Returns:
        rows [T * K, H] in expert order and hidden's dtype: rows[row] belongs to token dispatched.tokens[row]. Rows from
        dispatched.offsets[E] on belong to no expert and are left undefined.

    Raises:
        ValueError: a wrong rank, shape or device. TypeError: a wrong dtype. NotImplementedError: an input that requires
        grad.
    """
    check_weights(hidden, gate_up, down)
    experts = gate_up.shape[0]
    check_tensor("dispatched.tokens", dispatched.tokens, rank=1, dtypes=(torch.int32,), device=hidden.device)
    check_int("number of rows (dispatched.tokens.numel())", dispatched.tokens.shape[0], 0, MAX_PAIRS - 1)
    offsets = dispatched.offsets
    check_tensor("dispatched.offsets", offsets, shape=(experts + 1,), dtypes=(torch.int32,), device=hidden.device)
    check_no_grad("expert_ffn", hidden=hidden, gate_up=gate_up, down=down)
    return _op(hidden, gate_up, down, dispatched.tokens, offsets)
