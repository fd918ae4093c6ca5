"""compress_latent: down-projection, RMSNorm, RoPE and the write to the paged latent cache in one kernel, one launch.

:mod:`mla_kernels.latent.write` holds the variant that starts after the projection.
"""

import torch

from mla_kernels.checks import any_requires_grad, check_no_grad, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import (
    CACHE_ARGUMENTS,
    PLACE_ARGUMENTS,
    STRIDE_ARGUMENTS,
    WRITE_LATENT,
    cache_parts,
    cache_statics,
    check_cache,
    check_fits,
    check_latent_arguments,
    check_quantised_dtype,
    check_slots,
    model_statics,
    store_token,
    token_bytes,
    token_is_written,
)
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def project(x, weight, acc, stride, depth, inside, ROWS: tl.constexpr):
    """acc + x @ w.T, where w is ROWS rows of BLOCK_K values, ``stride`` apart, the first at ``weight``."""
    w = tl.load(weight + tl.arange(0, ROWS)[:, None] * stride + depth[None, :], mask=inside[None, :], other=0.0)
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")  # [BLOCK_T, BLOCK_K] x [BLOCK_K, ROWS]


@triton.jit
def compress_latent_kernel(
    hidden,  # [tokens, hidden_size]
    weight,  # [LATENT + ROPE, hidden_size]
    norm_weight,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    values, codes, scales, keys,  # the cache's parts, see cache_parts
    tokens, hidden_size, table_rows, num_slots, page_size,
    hidden_stride, weight_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Item: BLOCK_T tokens, with all LATENT columns in one program, since the norm runs over them.

    The slots are arbitrary rows of the cache, and a store with a loaded mask is
    a scalar loop on Ascend: each row is picked out of the tile by a masked sum and stored on its own.
    """
    rows = tl.arange(0, BLOCK_T)
    depth = tl.arange(0, BLOCK_K)
    norm = tl.load(norm_weight + tl.arange(0, LATENT)).to(tl.float32)  # [LATENT]
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        start = block * BLOCK_T
        x_rows = hidden + tl.cast(start, tl.int64) * hidden_stride
        latent = tl.zeros([BLOCK_T, LATENT], tl.float32)
        if ROPE > 0:
            rope = tl.zeros([BLOCK_T, ROPE], tl.float32)
        for offset in range(0, hidden_size, BLOCK_K):
            inside = depth < hidden_size - offset
            x = tl.load(
                x_rows + rows[:, None] * hidden_stride + (offset + depth)[None, :],
                mask=(rows[:, None] < tokens - start) & inside[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_K]
            w = weight + offset
            latent = project(x, w, latent, weight_stride, depth, inside, LATENT)
            if ROPE > 0:
                w += LATENT * tl.cast(weight_stride, tl.int64)
                rope = project(x, w, rope, weight_stride, depth, inside, ROPE)
        for row in range(0, tl.minimum(BLOCK_T, tokens - start)):
            slot = tl.load(slot_mapping + start + row).to(tl.int64)
            position = tl.load(positions + start + row).to(tl.int64)
            if token_is_written(slot, position, num_slots, table_rows):
                chosen = (rows.to(tl.float32) == tl.cast(row, tl.float32))[:, None]  # [BLOCK_T, 1]
                latent_row = tl.sum(tl.where(chosen, latent, 0.0), 0)  # [LATENT]
                rope_row = tl.sum(tl.where(chosen, rope, 0.0), 0) if ROPE > 0 else latent_row  # [ROPE]
                store_token(
                    latent_row, rope_row, norm, cos + position * cos_stride, sin + position * sin_stride,
                    values, codes, scales, keys, slot, page_size, page_stride, slot_stride,
                    eps, LATENT, ROPE, MODE, LAYOUT,
                )  # fmt: skip


def _rule(chip, dtype, statics, sizes):
    """16 tokens: their 576 sums stay in registers on GPUs (8 warps) and in L0C and UB on Ascend.

    BLOCK_K is 64, or 16 for fp32 on GPUs, whose products without matrix units hold the operands in registers; it is
    halved until the operands fit (32 on gfx942).
    """
    tile = {"BLOCK_T": 16, "BLOCK_K": 16 if chip.is_gpu and dtype == "fp32" else 64, "num_warps": 8, "num_stages": 2}
    operands = "shared" if chip.is_gpu else "L1"
    while tile["BLOCK_K"] > 16 and _memory(chip, dtype, statics, tile)[operands] > chip.memory[operands]:
        tile["BLOCK_K"] //= 2
    check_quantised_dtype("compress_latent", dtype, statics)
    check_fits("compress_latent", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    """Operand tiles in shared memory or L1 (twice there, for double buffering), sums in L0C, two copies of them in UB
    beside what :func:`store_token` takes."""
    width = statics["LATENT"] + statics["ROPE"]
    sums = 4 * tile["BLOCK_T"] * width
    operands = (tile["BLOCK_T"] + width) * tile["BLOCK_K"] * DTYPE_BYTES[dtype]
    if chip.is_gpu:
        return {"shared": operands * max(1, tile["num_stages"] - 1)}
    beside = 104 if statics["LAYOUT"] == "fp8_v32" else 52
    tokens = WRITE_LATENT.memory(chip, dtype, statics, {})["UB"]
    return {"L1": 2 * operands, "L0C": sums, "UB": max(2 * sums + beside * 1024, tokens)}


def _cost(dtype, statics, sizes):
    width, size = statics["LATENT"] + statics["ROPE"], DTYPE_BYTES[dtype]
    weights = (width * sizes["hidden_size"] + statics["LATENT"]) * size
    a_token = sizes["hidden_size"] * size + token_bytes(dtype, statics)
    return Cost(flops=2 * sizes["tokens"] * sizes["hidden_size"] * width, bytes=weights + sizes["tokens"] * a_token)


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {**sizes, "tokens": tile["BLOCK_T"]})
    return Work(programs=-(-sizes["tokens"] // tile["BLOCK_T"]), flops=one.flops, bytes=one.bytes)


_V3_SIZES = {"tokens": 1024, "hidden_size": 7168}

COMPRESS_LATENT = Kernel(
    compress_latent_kernel,
    arguments={
        "hidden": "*T",
        "weight": "*T",
        "norm_weight": "*T",
        **PLACE_ARGUMENTS,
        **CACHE_ARGUMENTS,
        "tokens": "i32",
        "hidden_size": "i32:16",
        "table_rows": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "hidden_stride": "i32:16",
        "weight_stride": "i32:16",
        **STRIDE_ARGUMENTS,
        "eps": "fp32",
    },
    statics=("LATENT", "ROPE", "MODE", "LAYOUT"),
    tiles={"BLOCK_T": (16, 32), "BLOCK_K": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v3", model_statics(512, 64, "interleaved_to_half"), _V3_SIZES),
        Case("v2_lite", model_statics(512, 64, "interleaved"), {"tokens": 1024, "hidden_size": 2048}),
        Case("minicpm3", model_statics(256, 32, "half"), {"tokens": 1024, "hidden_size": 2560}),
        Case("v32_fp8", model_statics(512, 64, "interleaved", "fp8_v32"), _V3_SIZES, ("bf16",)),
        Case("v3_int8", model_statics(512, 64, "interleaved_to_half", "int8"), _V3_SIZES, ("bf16",)),
    ),
    uses_dot=True,
)


def _launch(
    hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps,
    batch_invariant=False,
):  # fmt: skip
    (tokens, hidden_size), width, chip = hidden.shape, weight.shape[0], chip_of(hidden.device)
    key = chip.device, hidden.dtype, tokens, hidden_size, width, latent_dim, layout, rope, batch_invariant
    plan = COMPRESS_LATENT.kept.plans.get(key)
    if plan is None:
        statics = cache_statics(layout, latent_dim, width - latent_dim, rope)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens, "hidden_size": hidden_size}
        tile = COMPRESS_LATENT.tile_for(chip, DTYPE_NAMES[hidden.dtype], statics, sizes)
        plan = COMPRESS_LATENT.keep(key, (-(-tokens // tile["BLOCK_T"]), statics, tile))
    work, statics, tile = plan
    pages, page_size, _ = cache.shape
    page_stride, slot_stride, _ = cache.stride()
    args = (
        hidden, weight, norm_weight, cos, sin,
        positions, slot_mapping, *cache_parts(cache, layout, latent_dim, cos),
        tokens, hidden_size, cos.shape[0], pages * page_size, page_size,
        hidden.stride()[0], weight.stride()[0], cos.stride()[0], sin.stride()[0], page_stride, slot_stride, eps,
    )  # fmt: skip
    COMPRESS_LATENT.launch(chip, work, args, statics, tile)


def _check_values(hidden, weight, norm_weight, cos, sin, positions, slot_mapping, cache, *_):
    check_slots(positions, slot_mapping, cos, cache)


def _fake(*_):
    return None


_compress_latent = define_op(
    "compress_latent",
    "(Tensor hidden, Tensor weight, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor slot_mapping, Tensor(a!) cache, str layout, int latent_dim, str rope, float eps=1e-06, "
    "bool batch_invariant=False) -> ()",
    cpu=by_row(cpu_latent.compress_latent, 0, 5, 6),
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def compress_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LatentCache,
    *,
    rope: str,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Down-project hidden states, normalise and rotate them, and write them to their cache slots, in place.

    The same as :func:`mla_kernels.latent.write.write_latent` of ``hidden @ weight.T``, quantised caches included, in
    one launch and without rounding the projection. A program holds whole rows, 16 or 32 tokens of them, so few tokens
    keep few cores busy: in decode a separate projection followed by ``write_latent`` spreads over more of them.

    Args:
        hidden: ``[tokens, hidden_size]``, in ``cache.dtype``. Rows may have any stride.
        weight: ``[latent_dim + rope_dim, hidden_size]``, ``kv_a_proj_with_mqa.weight``, in ``cache.dtype``.
        norm_weight: ``[latent_dim]``, in ``cache.dtype``.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ: of two tokens with one slot either may win, or parts of both.
        cache: the :class:`LatentCache` written to. Slots that are not named keep their bits.
        rope: ``"interleaved_to_half"`` (DeepSeek-V3), ``"interleaved"`` (DeepSeek-V2) or ``"half"`` (MiniCPM3); see
            ``write_latent``.
        eps: added to the mean square.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or the widths do not fit the chip.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2; Hugging Face ``DeepseekV3Attention.forward``.
    """
    check_cache(cache, "compress_latent")
    taken = {"dtypes": (cache.dtype,), "device": cache.data.device}
    check_tensor("hidden", hidden, rank=2, **taken)
    check_tensor("weight", weight, shape=(cache.width, hidden.shape[1]), **taken)
    check_latent_arguments(hidden.shape[0], norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps)
    data = cache.data
    if any_requires_grad((hidden, weight, norm_weight, cos, sin, data)):
        given = {"hidden": hidden, "weight": weight, "norm_weight": norm_weight, "cos": cos, "sin": sin, "cache": data}
        check_no_grad("compress_latent", **given)
    _compress_latent(
        hidden, weight, norm_weight, cos, sin, positions, slot_mapping, data, cache.layout_name, cache.latent_dim, rope,
        float(eps), wanted(batch_invariant),
    )  # fmt: skip
