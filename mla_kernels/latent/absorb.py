"""absorb_query and expand_output: the products by W_UK and W_UV, head by head, on either side of latent attention.

Absorption of W_UK into the query and of W_UV into the output: DeepSeek-V2 report (arXiv 2405.04434), section 2.1.2.

Symbols: T tokens, H heads, N nope_dim, D rope_dim, R latent_dim, V v_dim.
"""

import torch

from mla_kernels.checks import INDICES, check_choice, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import prolog as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, wanted
from mla_kernels.language import TRITON_VERSION, tl, triton
from mla_kernels.latent.write import ROPE_MODES
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def lanes_of(start, stride, ROPE: tl.constexpr, PAIRS: tl.constexpr):
    """One-hot [ROPE, PAIRS]: a product by it takes lane ``start + stride * pair`` to column pair.

    The comparison is of floats, because the 910 compares integers one by one.
    """
    lane = tl.arange(0, ROPE).to(tl.float32)
    wanted = start + stride * tl.arange(0, PAIRS).to(tl.float32)
    return tl.where(lane[:, None] == wanted[None, :], 1.0, 0.0)


@triton.jit
def absorb_query_kernel(
    q,  # [T, H, N + D]
    w_uk,  # [H, N, R]
    cos, sin,  # [table_rows, D / 2]
    positions,  # [T]
    out,  # [T, H, R + D]
    tokens, heads, table_rows,
    q_token, q_head, w_head, w_row, cos_stride, sin_stride,
    NOPE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Two kinds of item, one loop each. First a tile [BLOCK_T, BLOCK_R] of one head's product by W_UK. Then the
    rotation of BLOCK_H heads of one token, which share its cos and sin: one-hot products take the pairs apart (and put
    them side by side again), exactly, on the matrix units. Loads with stride 2, split and join do not compile
    everywhere. A value that is not finite spreads over the rotated part of its head."""
    HALF: tl.constexpr = ROPE // 2
    PAIRS: tl.constexpr = HALF if HALF > 32 else 32  # the 950's compiler has no product 16 columns wide
    WIDTH: tl.constexpr = LATENT + ROPE
    columns: tl.constexpr = LATENT // BLOCK_R
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    row = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_R)
    depth = tl.arange(0, BLOCK_N)
    for item in range(tl.program_id(0), token_tiles * heads * columns, tl.num_programs(0)):
        start = item % token_tiles * BLOCK_T
        head = item // token_tiles // columns
        first = item // token_tiles % columns * BLOCK_R
        inside = row < tokens - start
        x_rows = q + (tl.cast(start, tl.int64) * q_token + tl.cast(head, tl.int64) * q_head)
        w_rows = w_uk + (tl.cast(head, tl.int64) * w_head + first)
        total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for offset in range(0, NOPE, BLOCK_N):
            known = depth < NOPE - offset
            x = tl.load(
                x_rows + row[:, None] * q_token + (offset + depth)[None, :],
                mask=inside[:, None] & known[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_N]
            w = tl.load(
                w_rows + (offset + depth)[:, None] * w_row + column[None, :], mask=known[:, None], other=0.0
            )  # [BLOCK_N, BLOCK_R]
            total = tl.dot(x, w, total, input_precision="ieee")
        target = out + ((tl.cast(start, tl.int64) * heads + head) * WIDTH + first)
        tl.store(
            target + row[:, None] * (heads * WIDTH) + column[None, :],
            total.to(out.dtype.element_ty),
            mask=inside[:, None],
        )

    head_tiles = tl.cdiv(heads, BLOCK_H)
    lane = tl.arange(0, ROPE)
    pair = tl.arange(0, PAIRS)
    head_row = tl.arange(0, BLOCK_H)
    kind: tl.constexpr = q.dtype.element_ty
    if MODE == "half":
        take_first = lanes_of(0.0, 1.0, ROPE, PAIRS)
        take_second = lanes_of(float(HALF), 1.0, ROPE, PAIRS)
    else:
        take_first = lanes_of(0.0, 2.0, ROPE, PAIRS)
        take_second = lanes_of(1.0, 2.0, ROPE, PAIRS)
    for item in range(tl.program_id(0), tokens * head_tiles, tl.num_programs(0)):
        token = item // head_tiles
        start = item % head_tiles * BLOCK_H
        inside = head_row < heads - start
        position = tl.minimum(tl.maximum(tl.load(positions + token).to(tl.int64), 0), table_rows - 1)
        x = tl.load(
            q + (tl.cast(token, tl.int64) * q_token + tl.cast(start, tl.int64) * q_head + NOPE)
            + head_row[:, None] * q_head + lane[None, :],
            mask=inside[:, None],
            other=0.0,
        )  # [BLOCK_H, ROPE]  # fmt: skip
        known = pair < HALF
        c = tl.load(cos + position * cos_stride + pair, mask=known, other=0.0)  # [PAIRS]
        s = tl.load(sin + position * sin_stride + pair, mask=known, other=0.0)
        one = tl.dot(x, take_first.to(kind), input_precision="ieee")  # [BLOCK_H, PAIRS]
        two = tl.dot(x, take_second.to(kind), input_precision="ieee")
        turned_one = (one * c[None, :] - two * s[None, :]).to(kind)
        turned_two = (two * c[None, :] + one * s[None, :]).to(kind)
        target = out + ((tl.cast(token, tl.int64) * heads + start) * WIDTH + LATENT)
        if MODE == "interleaved":
            turned = tl.dot(turned_one, tl.trans(take_first).to(kind), input_precision="ieee")  # [BLOCK_H, ROPE]
            turned = tl.dot(turned_two, tl.trans(take_second).to(kind), turned, input_precision="ieee")
            tl.store(target + head_row[:, None] * WIDTH + lane[None, :], turned.to(kind), mask=inside[:, None])
        else:
            target_pair = target + head_row[:, None] * WIDTH + pair[None, :]
            tl.store(target_pair, turned_one, mask=inside[:, None] & known[None, :])
            tl.store(target_pair + HALF, turned_two, mask=inside[:, None] & known[None, :])


@triton.jit
def expand_output_kernel(
    x, w_uv, out,  # [T, H, R], [H, V, R], [T, H, V]
    tokens, heads, values, x_token, x_head, w_head, w_row,
    LATENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Item: a tile [BLOCK_T, BLOCK_V] of one head's product by W_UV."""
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    columns = tl.cdiv(values, BLOCK_V)
    row = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_R)
    for item in range(tl.program_id(0), token_tiles * heads * columns, tl.num_programs(0)):
        start = item % token_tiles * BLOCK_T
        head = item // token_tiles // columns
        first = item // token_tiles % columns * BLOCK_V
        inside = row < tokens - start
        known = column < values - first
        x_rows = x + (tl.cast(start, tl.int64) * x_token + tl.cast(head, tl.int64) * x_head)
        w_rows = w_uv + (tl.cast(head, tl.int64) * w_head + tl.cast(first, tl.int64) * w_row)
        total = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for offset in range(0, LATENT, BLOCK_R):
            a = tl.load(
                x_rows + row[:, None] * x_token + (offset + depth)[None, :], mask=inside[:, None], other=0.0
            )  # [BLOCK_T, BLOCK_R]
            w = tl.load(
                w_rows + column[:, None] * w_row + (offset + depth)[None, :], mask=known[:, None], other=0.0
            )  # [BLOCK_V, BLOCK_R]
            total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
        target = out + ((tl.cast(start, tl.int64) * heads + head) * values + first)
        tl.store(
            target + row[:, None] * (heads * values) + column[None, :],
            total.to(out.dtype.element_ty),
            mask=inside[:, None] & known[None, :],
        )


def _tile(chip, dtype, tokens, depth, columns):
    """BLOCK of tokens, columns and depth of a head's product.

    Tokens are padded to 16, and taken 64 at a time where there are so many. fp32 on GPUs, whose products without matrix
    units hold the operands in registers, takes small tiles.
    """
    tokens = min(max(16, 1 << (tokens - 1).bit_length()), 64)
    columns = min(128, max(16, 1 << (columns - 1).bit_length()))
    depth = min(64, max(16, 1 << (depth - 1).bit_length()))
    if chip.is_gpu and dtype == "fp32":
        return min(tokens, 32), min(columns, 64), 16
    return tokens, columns, depth


def _head_memory(chip, dtype, tokens, columns, depth, stages):
    """Operand tiles in shared memory (one less than the stages, at least one) or L1 (twice, for double buffering)."""
    operands = (tokens + columns) * depth * DTYPE_BYTES[dtype]
    if chip.is_gpu:
        return {"shared": operands * max(1, stages - 1)}
    return {"L1": 2 * operands, "L0C": 4 * tokens * columns, "UB": 4 * tokens * columns}


def _absorb_rule(chip, dtype, statics, sizes):
    tokens, columns, depth = _tile(chip, dtype, sizes["tokens"], statics["NOPE"], statics["LATENT"])
    tile = {"BLOCK_T": tokens, "BLOCK_R": columns, "BLOCK_N": depth, "BLOCK_H": 16, "num_warps": 4, "num_stages": 3}
    needed = _absorb_memory(chip, dtype, statics, tile)
    for name, size in needed.items():
        if size > chip.memory[name]:
            raise NotImplementedError(
                f"absorb_query on {chip.name}: rope_dim {statics['ROPE']} needs about {size:,} bytes of {name}, a "
                f"program has {chip.memory[name]:,}"
            )
    return tile


def _absorb_memory(chip, dtype, statics, tile):
    """The larger of the two kinds of item: the product, and the rotation with its one-hot operands (made in fp32)."""
    need = _head_memory(chip, dtype, tile["BLOCK_T"], tile["BLOCK_R"], tile["BLOCK_N"], tile["num_stages"])
    rope, pairs, heads = statics["ROPE"], max(32, statics["ROPE"] // 2), tile["BLOCK_H"]
    if chip.is_gpu:
        need["shared"] = max(need["shared"], (heads + pairs) * rope * DTYPE_BYTES[dtype])
    else:
        need["UB"] = max(need["UB"], 4 * (3 * rope * pairs + 6 * heads * pairs + 2 * heads * rope))
    return need


def _absorb_cost(dtype, statics, sizes):
    nope, latent, rope = statics["NOPE"], statics["LATENT"], statics["ROPE"]
    pairs, size = sizes["tokens"] * sizes["heads"], DTYPE_BYTES[dtype]
    moved = pairs * (nope + latent + 2 * rope) + sizes["heads"] * nope * latent
    return Cost(flops=pairs * (2 * nope * latent + 3 * rope), bytes=moved * size + sizes["tokens"] * (4 * rope + 8))


def _absorb_items(tokens: int, heads: int, statics, tile) -> int:
    """Tiles of the product; the rotations are fewer, or shared out among the programs of these."""
    return -(-tokens // tile["BLOCK_T"]) * heads * (statics["LATENT"] // tile["BLOCK_R"])


def _absorb_work(dtype, statics, sizes, tile):
    programs = _absorb_items(sizes["tokens"], sizes["heads"], statics, tile)
    operands = (tile["BLOCK_T"] + tile["BLOCK_R"]) * statics["NOPE"] + tile["BLOCK_T"] * tile["BLOCK_R"]
    rotations = 2 * sizes["tokens"] * sizes["heads"] * statics["ROPE"] / programs
    return Work(
        programs=programs,
        flops=2 * tile["BLOCK_T"] * tile["BLOCK_R"] * statics["NOPE"] + rotations * 2 * statics["ROPE"],
        bytes=(operands + rotations) * DTYPE_BYTES[dtype],
    )


def absorb_statics(nope_dim: int, latent_dim: int, rope_dim: int, rope: str) -> dict[str, int | str]:
    """Constants of the absorption."""
    return {"NOPE": nope_dim, "LATENT": latent_dim, "ROPE": rope_dim, "MODE": rope}


ABSORB_QUERY = Kernel(
    absorb_query_kernel,
    arguments={
        "q": "*T",
        "w_uk": "*T",
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "out": "*T",
        "tokens": "i32",
        "heads": "i32",
        "table_rows": "i32",
        "q_token": "i32:16",
        "q_head": "i32:16",
        "w_head": "i32:16",
        "w_row": "i32:16",
        "cos_stride": "i32:16",
        "sin_stride": "i32:16",
    },
    statics=("NOPE", "LATENT", "ROPE", "MODE"),
    tiles={
        "BLOCK_T": (16, 32, 64, 128),
        "BLOCK_R": (16, 32, 64, 128, 256),
        "BLOCK_N": (16, 32, 64, 128),
        "BLOCK_H": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    rule=_absorb_rule,
    memory=_absorb_memory,
    cost=_absorb_cost,
    work=_absorb_work,
    cases=(
        Case("v3", absorb_statics(128, 512, 64, "interleaved_to_half"), {"tokens": 64, "heads": 128}),
        Case("v2_lite", absorb_statics(128, 512, 64, "interleaved"), {"tokens": 4096, "heads": 16}),
        Case("minicpm3", absorb_statics(64, 256, 32, "half"), {"tokens": 1, "heads": 40}),
    ),
    uses_dot=True,
)


def _expand_rule(chip, dtype, statics, sizes):
    tokens, columns, depth = _tile(chip, dtype, sizes["tokens"], statics["LATENT"], sizes["values"])
    newest = chip.generation in ("90", "100") and TRITON_VERSION >= (3, 9)
    spills = newest and tokens * columns <= 1024  # with a third stage
    return {"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_R": depth, "num_warps": 4, "num_stages": 2 if spills else 3}


def _expand_memory(chip, dtype, statics, tile):
    return _head_memory(chip, dtype, tile["BLOCK_T"], tile["BLOCK_V"], tile["BLOCK_R"], tile["num_stages"])


def _expand_cost(dtype, statics, sizes):
    pairs, latent, values = sizes["tokens"] * sizes["heads"], statics["LATENT"], sizes["values"]
    moved = pairs * (latent + values) + sizes["heads"] * values * latent
    return Cost(flops=2 * pairs * latent * values, bytes=moved * DTYPE_BYTES[dtype])


def _expand_items(tokens: int, heads: int, values: int, tile) -> int:
    return -(-tokens // tile["BLOCK_T"]) * heads * -(-values // tile["BLOCK_V"])


def _expand_work(dtype, statics, sizes, tile):
    moved = (tile["BLOCK_T"] + tile["BLOCK_V"]) * statics["LATENT"] + tile["BLOCK_T"] * tile["BLOCK_V"]
    return Work(
        programs=_expand_items(sizes["tokens"], sizes["heads"], sizes["values"], tile),
        flops=2 * tile["BLOCK_T"] * tile["BLOCK_V"] * statics["LATENT"],
        bytes=moved * DTYPE_BYTES[dtype],
    )


EXPAND_OUTPUT = Kernel(
    expand_output_kernel,
    arguments={
        "x": "*T",
        "w_uv": "*T",
        "out": "*T",
        "tokens": "i32",
        "heads": "i32",
        "values": "i32:16",
        "x_token": "i32:16",
        "x_head": "i32:16",
        "w_head": "i32:16",
        "w_row": "i32:16",
    },
    statics=("LATENT",),
    tiles={
        "BLOCK_T": (16, 32, 64, 128),
        "BLOCK_V": (16, 32, 64, 128, 256),
        "BLOCK_R": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    rule=_expand_rule,
    memory=_expand_memory,
    cost=_expand_cost,
    work=_expand_work,
    cases=(
        Case("v3", {"LATENT": 512}, {"tokens": 64, "heads": 128, "values": 128}),
        Case("v2_lite", {"LATENT": 512}, {"tokens": 4096, "heads": 16, "values": 128}),
        Case("minicpm3", {"LATENT": 256}, {"tokens": 1, "heads": 40, "values": 64}),
    ),
    uses_dot=True,
)


def within_tiles(x: torch.Tensor, tile_rows: int = 256) -> torch.Tensor:
    """``x``, or a dense copy where 32 bits do not hold an offset between rows or columns of one tile.

    A stride of 2**31 and more reaches the kernel in 64 bits; ``tile_rows`` is the longest side of a tile.
    """
    for size, stride in zip(x.shape[:-1], x.stride()):
        if stride < 1 << 31 <= (min(size, tile_rows) - 1) * stride:
            return x.contiguous()
    return x


def launch_absorb(q, w_uk, cos, sin, positions, rope, batch_invariant=False):
    """The launcher of absorb_query; the prolog's fourth launch."""
    if not (q.is_contiguous() and w_uk.is_contiguous()):
        q, w_uk = within_tiles(q), within_tiles(w_uk)
    (tokens, heads, width), (_, nope, latent) = q.shape, w_uk.shape
    out = q.new_empty((tokens, heads, latent + width - nope))
    chip = chip_of(q.device)
    key = chip.device, q.dtype, tokens, heads, width, nope, latent, rope, batch_invariant
    plan = ABSORB_QUERY.kept.plans.get(key)
    if plan is None:
        statics = absorb_statics(nope, latent, width - nope, rope)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens, "heads": heads}
        tile = ABSORB_QUERY.tile_for(chip, DTYPE_NAMES[q.dtype], statics, sizes)
        plan = ABSORB_QUERY.keep(key, (_absorb_items(tokens, heads, statics, tile), statics, tile))
    work, statics, tile = plan
    args = (
        q, w_uk, cos, sin, positions, out, tokens, heads, cos.shape[0],
        *q.stride()[:2], *w_uk.stride()[:2], cos.stride()[0], sin.stride()[0],
    )  # fmt: skip
    ABSORB_QUERY.launch(chip, work, args, statics, tile)
    return out


def _launch_expand(x, w_uv, batch_invariant=False):
    if not (x.is_contiguous() and w_uv.is_contiguous()):
        x, w_uv = within_tiles(x), within_tiles(w_uv)
    (tokens, heads, latent), values, chip = x.shape, w_uv.shape[1], chip_of(x.device)
    out = x.new_empty((tokens, heads * values))
    key = chip.device, x.dtype, tokens, heads, values, latent, batch_invariant
    plan = EXPAND_OUTPUT.kept.plans.get(key)
    if plan is None:
        statics = {"LATENT": latent}
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens, "heads": heads, "values": values}
        tile = EXPAND_OUTPUT.tile_for(chip, DTYPE_NAMES[x.dtype], statics, sizes)
        plan = EXPAND_OUTPUT.keep(key, (_expand_items(tokens, heads, values, tile), statics, tile))
    work, statics, tile = plan
    args = (x, w_uv, out, tokens, heads, values, *x.stride()[:2], *w_uv.stride()[:2])
    EXPAND_OUTPUT.launch(chip, work, args, statics, tile)
    return out


def check_positions(positions: torch.Tensor, cos: torch.Tensor) -> None:
    """Refuse positions outside the tables. Reads the values."""
    check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")


_absorb_query = define_op(
    "absorb_query",
    "(Tensor q, Tensor w_uk, Tensor cos, Tensor sin, Tensor positions, str rope, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.absorb_query, 0, 4),
    device=launch_absorb,
    fake=lambda q, w_uk, *_: q.new_empty(q.shape[0], q.shape[1], w_uk.shape[2] + q.shape[2] - w_uk.shape[1]),
    check_values=lambda q, w_uk, cos, sin, positions, *_: check_positions(positions, cos),
)

_expand_output = define_op(
    "expand_output",
    "(Tensor out, Tensor w_uv, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.expand_output, 0),
    device=_launch_expand,
    fake=lambda out, w_uv, *_: out.new_empty(out.shape[0], out.shape[1] * w_uv.shape[1]),
)


def check_power_of_two(name: str, value: int) -> None:
    """The widths of a latent and of a rotated key."""
    if value < 16 or value & (value - 1):
        raise ValueError(f"{name}: got {value}, powers of two of at least 16 are accepted")


def absorb_query(
    q: torch.Tensor,
    w_uk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope: str,
    batch_invariant: bool | None = None,
) -> torch.Tensor:
    """Queries as the latent cache is asked: each head's nope part through W_UK, its rope part rotated. One launch.

    ``out[t, h] = (q[t, h, :nope] @ w_uk[h], RoPE(q[t, h, nope:]))`` side by side, so that its product with a cached
    token (latent, rotated key) is the score of the un-absorbed form: q . (W_UK c) = (q W_UK) . c. Sums and rotations
    are float32 and rounded once.

    Args:
        q: ``[tokens, heads, nope + rope_dim]``, bfloat16, float16 or float32; tokens and heads may have any stride (on
            devices a q whose 256 tokens or heads spread over 2^31 elements or more is copied first).
        w_uk: ``[heads, nope, latent]`` in q's dtype, latent a power of two of at least 16. The first rows of each head
            in ``kv_b_proj.weight``: ``weight.view(heads, nope + v, latent)[:, :nope]``, taken as it lies.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them; rope_dim is a power of
            two of at least 16.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        rope: ``"interleaved_to_half"``, ``"interleaved"`` or ``"half"``, as in ``write_latent``.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` positions are not read back: those outside the tables are brought to their ends.

    Returns:
        ``[tokens, heads, latent + rope_dim]`` in q's dtype.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape, device, stride or option that is not accepted; on
        CPU tensors also a position outside the tables. NotImplementedError: an input requires grad (there is no
        backward), or rope_dim does not fit the chip.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2.
    """
    check_choice("rope", rope, ROPE_MODES)
    check_tensor("q", q, rank=3)
    check_tensor("w_uk", w_uk, shape=(q.shape[1], None, None), like=q)
    check_power_of_two("w_uk's latent dimension", w_uk.shape[2])
    rope_dim = q.shape[2] - w_uk.shape[1]
    check_power_of_two("rope_dim (q's last dimension less w_uk's rows)", rope_dim)
    check_tensor("cos", cos, shape=(None, rope_dim // 2), dtypes=(torch.float32,), device=q.device)
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=q.device)
    check_tensor("positions", positions, shape=(q.shape[0],), dtypes=INDICES, device=q.device)
    check_no_grad("absorb_query", q=q, w_uk=w_uk, cos=cos, sin=sin)
    return _absorb_query(q, w_uk, cos, sin, positions, rope, wanted(batch_invariant))


def expand_output(out: torch.Tensor, w_uv: torch.Tensor, *, batch_invariant: bool | None = None) -> torch.Tensor:
    """Attended latents through each head's W_UV, the heads side by side, as ``o_proj`` takes them. One launch.

    ``result[t, h * v : (h + 1) * v] = w_uv[h] @ out[t, h]``: the sum of p_j W_UV c_j is W_UV times the sum of p_j c_j.
    Sums are float32 and rounded once.

    Args:
        out: ``[tokens, heads, latent]``, bfloat16, float16 or float32, as ``mla_decode`` returns it (its first two
            dimensions flattened); latent is a power of two of at least 16; strides as for :func:`absorb_query`'s q.
        w_uv: ``[heads, v, latent]`` in out's dtype. The last rows of each head in ``kv_b_proj.weight``:
            ``weight.view(heads, nope + v, latent)[:, nope:]``, taken as it lies.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        ``[tokens, heads * v]`` in out's dtype.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape, device or stride that is not accepted.
        NotImplementedError: an input requires grad (there is no backward).

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2.
    """
    check_tensor("out", out, rank=3)
    check_tensor("w_uv", w_uv, shape=(out.shape[1], None, out.shape[2]), like=out)
    check_power_of_two("out's latent dimension", out.shape[2])
    check_no_grad("expand_output", out=out, w_uv=w_uv)
    return _expand_output(out, w_uv, wanted(batch_invariant))
