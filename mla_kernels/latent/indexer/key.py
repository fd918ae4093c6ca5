"""write_indexer_key: what the lightning indexer does to projected keys.

Symbols: T tokens, d head_dim, D rope_dim.
"""

import torch

from mla_kernels.checks import FLOATS, INDICES, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import indexer as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.heads import check_rotation
from mla_kernels.latent.indexer.cache import (
    IndexerCache,
    check_indexer_cache,
    launched_parts,
    page_size_of,
)
from mla_kernels.latent.rotate import hadamard_row, join_pairs, pair_lanes, rotate_pairs, signs
from mla_kernels.latent.write import token_is_written
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.fp8 import quantise_e4m3
from mla_kernels.shim import define_op


@triton.jit
def rotate_row(
    x,  # [HEAD_DIM] fp32
    cos_row, sin_row,  # pointers to this token's rows of the tables
    row_signs, column_signs,  # of the Hadamard matrix, which is their Kronecker product
    HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, START: tl.constexpr, HADAMARD: tl.constexpr,
):  # fmt: skip
    """RoPE on the ROPE values from START on, then the Hadamard transform if asked: [HEAD_DIM] fp32."""
    HALF: tl.constexpr = ROPE // 2
    lane = tl.arange(0, HEAD_DIM).to(tl.float32) - START
    first_lane, second_lane = pair_lanes(HALF, MODE)
    first, second = rotate_pairs(x, lane, first_lane, second_lane, cos_row, sin_row, HALF)
    if MODE == "interleaved_to_half":
        first_lane, second_lane = pair_lanes(HALF, "half")
    rotated = join_pairs(first, second, lane, first_lane, second_lane)
    x = tl.where((lane >= 0.0) & (lane < ROPE), rotated, x)
    if HADAMARD:
        x = hadamard_row(x, row_signs, column_signs, HEAD_DIM)
    return x


@triton.jit
def store_codes(x, codes, scale_at, HEAD_DIM: tl.constexpr):
    """Write x [HEAD_DIM] fp32 as e4m3 codes and their one scale, through pointers to the first of each."""
    code, scale = quantise_e4m3(tl.reshape(x, [1, HEAD_DIM]))
    tl.store(codes + tl.arange(0, HEAD_DIM), tl.reshape(code, [HEAD_DIM]))
    tl.store(scale_at + tl.arange(0, 1), scale)


@triton.jit(do_not_specialize=["tokens"])
def write_indexer_key_kernel(
    k_ptr,  # [tokens, HEAD_DIM]
    norm_weight, norm_bias,  # [HEAD_DIM]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    values, codes, scales,  # the cache, as what its layout holds
    tokens, table_rows, num_slots, page_size,
    k_stride, cos_stride, sin_stride, page_stride, scale_stride,
    eps,
    HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, START: tl.constexpr, HADAMARD: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    COLUMNS: tl.constexpr = 16 if HEAD_DIM >= 128 else 8
    ROWS: tl.constexpr = HEAD_DIM // COLUMNS
    row_signs = signs(ROWS, ROWS)
    column_signs = signs(COLUMNS, COLUMNS)
    lane = tl.arange(0, HEAD_DIM)
    weight = tl.load(norm_weight + lane).to(tl.float32)
    bias = tl.load(norm_bias + lane).to(tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            x = tl.load(k_ptr + tl.cast(token, tl.int64) * k_stride + lane).to(tl.float32)  # [HEAD_DIM]
            x = x - tl.sum(x, 0) / HEAD_DIM
            x = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)) * weight + bias
            x = rotate_row(
                x, cos + position * cos_stride, sin + position * sin_stride, row_signs, column_signs,
                HEAD_DIM, ROPE, MODE, START, HADAMARD,
            )  # fmt: skip
            page = slot // page_size
            offset = slot - page * page_size
            out = page * page_stride + offset * HEAD_DIM
            if FP8:
                store_codes(x, codes + out, scales + page * scale_stride + offset, HEAD_DIM)
            else:
                tl.store(values + out + lane, x.to(values.dtype.element_ty))


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    for name, size in _memory(chip, dtype, statics, tile).items():
        if size > chip.memory[name]:
            raise NotImplementedError(
                f"the indexer's keys on {chip.name}: head_dim {statics['HEAD_DIM']} with rope_dim "
                f"{statics['ROPE']} needs about {size:,} bytes of {name}, a program has {chip.memory[name]:,}"
            )
    return tile


def _memory(chip, dtype, statics, tile):
    """Ascend: the one-hot tiles and the products of the Hadamard transform, a few copies of each."""
    width, half = statics["HEAD_DIM"], statics["ROPE"] // 2
    return {"shared": 8 * width + 64 * tile["num_warps"]} if chip.is_gpu else {"UB": 36 * width * half + 64 * width}


def _key_cost(dtype, statics, sizes):
    width, rope = statics["HEAD_DIM"], statics["ROPE"]
    written = width + 4 if statics["FP8"] else width * DTYPE_BYTES[dtype]
    a_token = width * DTYPE_BYTES[dtype] + 4 * rope + 16 + written
    return Cost(
        flops=sizes["tokens"] * (8 * width + 3 * rope + 24 * width * statics["HADAMARD"]),
        bytes=sizes["tokens"] * a_token + 2 * width * DTYPE_BYTES[dtype],
    )


def _key_work(dtype, statics, sizes, tile):
    one = _key_cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def _statics(width, rope_dim, rope, rope_first, hadamard):
    start = 0 if rope_first else width - rope_dim
    return {"HEAD_DIM": width, "ROPE": rope_dim, "MODE": rope, "START": start, "HADAMARD": hadamard}


_TABLES = {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"}

WRITE_INDEXER_KEY = Kernel(
    write_indexer_key_kernel,
    arguments={
        "k_ptr": "*T",
        "norm_weight": "*T",
        "norm_bias": "*T",
        **_TABLES,
        "slot_mapping": "*i64",
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        **dict.fromkeys(("tokens", "table_rows", "num_slots", "page_size"), "i32"),
        **dict.fromkeys(("k_stride", "cos_stride", "sin_stride", "page_stride", "scale_stride"), "i32:16"),
        "eps": "fp32",
    },
    statics=("HEAD_DIM", "ROPE", "MODE", "START", "HADAMARD", "FP8"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_key_cost,
    work=_key_work,
    cases=(
        Case("v32_fp8", {**_statics(128, 64, "half", True, True), "FP8": True}, {"tokens": 4096}),
        Case("glm", {**_statics(128, 64, "interleaved", True, False), "FP8": False}, {"tokens": 4096}),
    ),
    uses_dot=False,
)


def _launch_write(
    k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, rope_dim, rope, rope_first, hadamard, eps,
    batch_invariant=False,
):  # fmt: skip
    (tokens, width), chip, parts = k.shape, chip_of(k.device), launched_parts(cache, k.shape[1])
    options = rope_dim, rope, rope_first, hadamard, parts is None, batch_invariant
    plan = WRITE_INDEXER_KEY.kept.plans.get(key := (chip.device, k.dtype, tokens, width, options))
    if plan is None:
        statics = {**_statics(width, rope_dim, rope, rope_first, hadamard), "FP8": parts is not None}
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        tile = WRITE_INDEXER_KEY.tile_for(chip, DTYPE_NAMES[k.dtype], statics, sizes)
        plan = WRITE_INDEXER_KEY.keep(key, (statics, tile))
    k = canonical(k) if batch_invariant else k
    values, codes, scales = (cache, cos.view(torch.int8), cos) if parts is None else (k, *parts)
    page_size = page_size_of(cache, width)
    args = (
        k, norm_weight, norm_bias, cos, sin, positions, slot_mapping,
        values, codes, scales, tokens, cos.shape[0], cache.shape[0] * page_size, page_size,
        k.stride()[0], cos.stride()[0], sin.stride()[0], cache.stride()[0], scales.stride()[0], eps,
    )  # fmt: skip
    WRITE_INDEXER_KEY.launch(chip, tokens, args, *plan)


def _fake_write(*arguments):
    return None


def _check_write_values(k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache, *options):
    slots = cache.shape[0] * page_size_of(cache, k.shape[1])
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")
    check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")


_write_indexer_key = define_op(
    "write_indexer_key",
    "(Tensor k, Tensor norm_weight, Tensor norm_bias, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) cache, int rope_dim, str rope, bool rope_first=True, bool hadamard=False, float eps=1e-06, "
    "bool batch_invariant=False) -> ()",
    cpu=by_row(cpu.write_indexer_key, 0, 5, 6),
    device=_launch_write,
    fake=_fake_write,
    check_values=_check_write_values,
)


def write_indexer_key(
    k: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: IndexerCache,
    *,
    rope_dim: int,
    rope: str,
    rope_first: bool = True,
    hadamard: bool = False,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Normalise, rotate and quantise projected index keys and write them to their cache slots, in place, in one launch.

    Token t goes to slot ``slot_mapping[t]``: ``LayerNorm(k[t]) * norm_weight + norm_bias``, RoPE of its first (else
    last) ``rope_dim`` values by row ``positions[t]`` of the tables, then, if asked, the Hadamard transform times
    ``d ** -0.5``. The arithmetic is float32 and is rounded once: to the cache's dtype, or to e4m3 with one power-of-two
    scale a key (:class:`IndexerCache`).

    Args:
        k: [T, d], the output of ``wk``: in the cache's dtype, or bfloat16, float16 or float32 for a ``"fp8"`` cache.
            Rows may have any stride.
        norm_weight, norm_bias: [d], in k's dtype or float32, both in the same.
        cos, sin: [positions, rope_dim / 2] float32 tables.
        positions: [T] int32 or int64, each token's row of the tables.
        slot_mapping: [T] int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call other
            than -1 must differ.
        cache: the :class:`IndexerCache` written to. Slots that are not named keep their bits.
        rope_dim: how many values are rotated, a power of two from 16 to d.
        rope: where the pairs stand before and after: ``"half"`` (DeepSeek-V3.2), ``"interleaved"`` or
            ``"interleaved_to_half"`` (GLM-MoE-DSA as Hugging Face has it); see :func:`mla_kernels.write_latent`.
        rope_first: whether the first values are rotated, or the last.
        hadamard: apply the transform, as DeepSeek's fp8 code does; queries must have it, too.
        eps: added to the variance.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no IndexerCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward).

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, and the ``Indexer`` of its inference code.
    """
    check_indexer_cache(cache)
    dtypes = FLOATS if cache.quantised else (cache.data.dtype,)
    check_tensor("k", k, shape=(None, cache.head_dim), dtypes=dtypes, device=cache.data.device)
    check_tensor("norm_weight", norm_weight, shape=k.shape[1:], dtypes=(k.dtype, torch.float32), device=k.device)
    check_tensor("norm_bias", norm_bias, shape=k.shape[1:], like=norm_weight)
    check_rotation(k.shape[0], k.shape[1], cos, sin, positions, rope_dim, rope, k.device, rope_first, hadamard)
    check_tensor("slot_mapping", slot_mapping, shape=(k.shape[0],), dtypes=INDICES, device=k.device)
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps!r}, a finite number of at least 0 is accepted")
    if torch.is_grad_enabled():
        check_no_grad("write_indexer_key", k=k, norm_weight=norm_weight, norm_bias=norm_bias, cos=cos, sin=sin)
    _write_indexer_key(
        k, norm_weight, norm_bias, cos, sin, positions, slot_mapping, cache.data, rope_dim, rope, rope_first, hadamard,
        float(eps), wanted(batch_invariant),
    )  # fmt: skip
