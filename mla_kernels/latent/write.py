"""write_latent: RMSNorm and RoPE of already projected kv_a, written to the paged latent cache in one launch.

:mod:`mla_kernels.latent.compress` holds the variant with the projection inside.
"""

import torch

from mla_kernels.checks import INDICES, any_requires_grad, check_choice, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.rotate import join_pairs, pair_lanes, rotate_pairs
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import ALIGNMENT, QUANTISED, SCALE_BLOCK, V4_BLOCK, launched_parts
from mla_kernels.quant.fp8 import quantise_e4m3, ue8m0_codes
from mla_kernels.quant.int8 import quantise_int8
from mla_kernels.shim import define_op

_FP32 = (torch.float32,)
ROPE_MODES = ("interleaved_to_half", "interleaved", "half")
SCALED_TOGETHER = tl.constexpr(SCALE_BLOCK)
UNIT = tl.constexpr(ALIGNMENT)  # bytes that every token and every part of one begins at a multiple of
SCALE_BYTES = tl.constexpr(4)  # of a scale of a quantised token, in whose storage offsets count bytes
KEY_BYTES = tl.constexpr(2)  # of a value of its rotated key
ROTATED = tl.constexpr(V4_BLOCK)  # values under one scale in fp8_v4, and its rotated ones


@triton.jit
def token_is_written(slot, position, num_slots, table_rows):
    """Whether a token has a slot in the cache and a row in the tables."""
    return ((slot >= 0) & (slot < num_slots)) & ((position >= 0) & (position < table_rows))


@triton.jit
def token_offsets(slot, page_size, page_stride, slot_stride, LATENT: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the token in a slot (int64) begins, in elements of the cache, and its scales, which is looked at in fp8_v4
    alone: there it counts bytes."""
    page = slot // page_size
    within = slot - page * page_size
    offset = page * page_stride + within * slot_stride
    scale_offset = offset
    if LAYOUT == "fp8_v4":
        scale_offset = page * page_stride + page_size * (LATENT + ROTATED) + within * (LATENT // ROTATED)
        offset = page * page_stride + within * (LATENT + ROTATED)
    return offset, scale_offset


@triton.jit
def store_latent(latent, values, codes, scales, keys, offset, scale_offset, LATENT: tl.constexpr, LAYOUT: tl.constexpr):
    """Write one normalised latent, [LATENT] fp32, in its layout; in fp8_v4 its last 64 values are rotated already.

    ``values``, ``codes``, ``scales`` and ``keys`` are the cache's parts (:func:`cache_parts`), the offsets those of
    :func:`token_offsets`. The zeros behind the scales are written with them.
    """
    columns = tl.arange(0, LATENT)
    if LAYOUT == "unquantised":
        tl.store(values + offset + columns, latent.to(values.dtype.element_ty))
    elif LAYOUT == "int8":
        code, scale = quantise_int8(latent)
        tl.store(codes + offset + columns, code)
        tl.store(
            scales + offset // SCALE_BYTES + tl.arange(0, 4),
            tl.where(tl.arange(0, 4).to(tl.float32) == 0.0, scale, 0.0),
        )
    elif LAYOUT == "fp8_v4":
        GROUPS: tl.constexpr = LATENT // ROTATED
        group = tl.arange(0, GROUPS)
        tile = group[:, None] * ROTATED + tl.arange(0, ROTATED)[None, :]
        grouped = tl.reshape(latent, [GROUPS, ROTATED])
        code, scale = quantise_e4m3(grouped)
        tl.store(codes + offset + tile, code, mask=(group < GROUPS - 1)[:, None])
        rotated = grouped.to(tl.bfloat16)
        out = keys + offset // KEY_BYTES + (tile - (LATENT - ROTATED))
        tl.store(out, rotated, mask=(group >= GROUPS - 1)[:, None])
        tl.store(codes + scale_offset + group, ue8m0_codes(tl.where(group.to(tl.float32) < GROUPS - 1, scale, 0.0)))
    else:
        BLOCKS: tl.constexpr = LATENT // SCALED_TOGETHER
        code, scale = quantise_e4m3(tl.reshape(latent, [BLOCKS, SCALED_TOGETHER]))
        tl.store(codes + offset + columns, tl.reshape(code, [LATENT]))
        out = scales + offset // SCALE_BYTES
        tl.store(out + tl.arange(0, BLOCKS), scale)
        if BLOCKS == 1:
            tl.store(out + 1, 0.0)
        if BLOCKS < 4:
            tl.store(out + 2 + tl.arange(0, 2), tl.zeros([2], tl.float32))


@triton.jit
def store_token(
    latent,  # [LATENT] fp32, before the norm
    rope,  # [ROPE] fp32, before the rotation
    norm,  # [LATENT] fp32
    cos_row, sin_row,  # pointers to this token's rows of the tables
    values, codes, scales, keys,  # the cache's parts, see cache_parts
    slot, page_size, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate one token and write it to its slot (int64)."""
    offset, scale_offset = token_offsets(slot, page_size, page_stride, slot_stride, LATENT, LAYOUT)
    scale = 1.0 / tl.sqrt(tl.sum(latent * latent, 0) / LATENT + eps)
    store_latent(latent * scale * norm, values, codes, scales, keys, offset, scale_offset, LATENT, LAYOUT)
    if ROPE > 0:
        out = key_row(values, keys, offset, LATENT, LAYOUT)
        HALF: tl.constexpr = ROPE // 2
        pairs = tl.arange(0, HALF)
        lane = tl.arange(0, ROPE).to(tl.float32)
        first_lane, second_lane = pair_lanes(HALF, MODE)
        rotated_first, rotated_second = rotate_pairs(rope, lane, first_lane, second_lane, cos_row, sin_row, HALF)
        if MODE == "interleaved":
            rotated = join_pairs(rotated_first, rotated_second, lane, first_lane, second_lane)
            tl.store(out + tl.arange(0, ROPE), rotated.to(out.dtype.element_ty))
        else:
            tl.store(out + pairs, rotated_first.to(out.dtype.element_ty))
            tl.store(out + HALF + pairs, rotated_second.to(out.dtype.element_ty))


@triton.jit
def key_row(values, keys, offset, LATENT: tl.constexpr, LAYOUT: tl.constexpr):
    """Pointer to the rotated key of the token that begins at ``offset``."""
    return values + offset + LATENT if LAYOUT == "unquantised" else keys + offset // KEY_BYTES


@triton.jit
def load_row(row, WIDTH: tl.constexpr):
    return tl.load(row + tl.arange(0, WIDTH)).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def write_latent_kernel(
    kv_a,  # [tokens, LATENT + ROPE]
    norm_weight,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    values, codes, scales, keys,  # the cache's parts, see cache_parts
    tokens, table_rows, num_slots, page_size,
    kv_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    norm = load_row(norm_weight, LATENT)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            source = tl.cast(token, tl.int64) * kv_stride
            latent = load_row(kv_a + source, LATENT)
            rope = load_row(kv_a + source + LATENT, ROPE) if ROPE > 0 else latent  # [ROPE]
            store_token(
                latent, rope, norm, cos + position * cos_stride, sin + position * sin_stride,
                values, codes, scales, keys, slot, page_size, page_stride, slot_stride,
                eps, LATENT, ROPE, MODE, LAYOUT,
            )  # fmt: skip


def check_fits(op, chip, statics, needed) -> None:
    """Refuse widths whose tiles no choice makes fit the chip. ``needed``: the kernel's estimate, memory -> bytes."""
    for name, size in needed.items():
        if size > chip.memory[name]:
            raise NotImplementedError(
                f"{op} on {chip.name}: latent_dim {statics['LATENT']} with rope_dim {statics['ROPE']} needs about "
                f"{size:,} bytes of {name}, a program has {chip.memory[name]:,}"
            )


def check_quantised_dtype(op, dtype, statics) -> None:
    if statics["LAYOUT"] != "unquantised" and dtype != "bf16":
        raise NotImplementedError(f"{op}: layout {statics['LAYOUT']} holds bf16 keys, got {dtype}")


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    check_quantised_dtype("write_latent", dtype, statics)
    check_fits("write_latent", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    """Ascend: as the 910's compiler plans it, six buffers of a row in fp32 and ten or 18 of ROPE / 2 x ROPE."""
    if chip.is_gpu:
        return {"shared": 64 * tile["num_warps"]}
    one_hot = 36 if statics["MODE"] == "interleaved" else 20
    blocks = 192 * statics["LATENT"] if statics["LAYOUT"] == "fp8_v32" else 0  # its 2-D steps, at another time
    return {"UB": max(24 * statics["LATENT"] + one_hot * statics["ROPE"] ** 2, blocks)}


def row_bytes(dtype, statics) -> int:
    """Bytes of a token in the cache."""
    latent, rope, layout = statics["LATENT"], statics["ROPE"], statics["LAYOUT"]
    if layout == "unquantised":
        return (latent + rope) * DTYPE_BYTES[dtype]
    return CacheLayout(layout).bytes_per_token(latent, rope)


def token_bytes(dtype, statics) -> int:
    """Bytes that a token costs whatever comes in: its cache row, its rows of cos and sin, its position and slot."""
    return row_bytes(dtype, statics) + 4 * statics["ROPE"] + 16


def _cost(dtype, statics, sizes):
    width = statics["LATENT"] + statics["ROPE"]
    a_token = width * DTYPE_BYTES[dtype] + token_bytes(dtype, statics)
    return Cost(
        flops=sizes["tokens"] * (4 * statics["LATENT"] + 3 * statics["ROPE"]),
        bytes=sizes["tokens"] * a_token + statics["LATENT"] * DTYPE_BYTES[dtype],
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def model_statics(latent_dim: int, rope_dim: int, rope: str, layout: str = "unquantised") -> dict[str, int | str]:
    """Constants of the latent kernels."""
    return {"LATENT": latent_dim, "ROPE": rope_dim, "MODE": rope, "LAYOUT": layout}


def cache_statics(layout: str, latent_dim: int, rope_dim: int, rope: str) -> dict[str, int | str]:
    return model_statics(latent_dim, rope_dim, rope, layout if layout in QUANTISED else "unquantised")


def cache_parts(cache: torch.Tensor, layout: str, latent_dim: int, fp32: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What kernels write a cache's data through: (values, codes as int8, scales, keys), views of its one storage.

    An unquantised cache is ``values`` alone, a quantised one the other three; what is not used has the right type
    (``fp32`` lends it to the scales).
    """
    if layout in QUANTISED:
        codes, scales, keys = launched_parts(cache, layout, latent_dim)
        return keys, codes, scales, keys
    return cache, cache.view(torch.int8), fp32, cache


PLACE_ARGUMENTS = {
    **dict.fromkeys(("cos", "sin"), "*fp32"),
    **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
}
CACHE_ARGUMENTS = {"values": "*T", "codes": "*i8", "scales": "*fp32", "keys": "*T"}
STRIDE_ARGUMENTS = dict.fromkeys(("cos_stride", "sin_stride", "page_stride", "slot_stride"), "i32:16")
"""Arguments that the kernels which write tokens share, in order."""

WRITE_LATENT = Kernel(
    write_latent_kernel,
    arguments={
        "kv_a": "*T",
        "norm_weight": "*T",
        **PLACE_ARGUMENTS,
        **CACHE_ARGUMENTS,
        "tokens": "i32",
        "table_rows": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "kv_stride": "i32:16",
        **STRIDE_ARGUMENTS,
        "eps": "fp32",
    },
    statics=("LATENT", "ROPE", "MODE", "LAYOUT"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v3", model_statics(512, 64, "interleaved_to_half"), {"tokens": 4096}),
        Case("v2", model_statics(512, 64, "interleaved"), {"tokens": 4096}),
        Case("minicpm3", model_statics(256, 32, "half"), {"tokens": 4096}),
        Case("v32_fp8", model_statics(512, 64, "interleaved", "fp8_v32"), {"tokens": 4096}, ("bf16",)),
        Case("v3_int8", model_statics(512, 64, "interleaved_to_half", "int8"), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
)


def launch_write(
    kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, layout, latent_dim, rope, eps, batch_invariant=False
):
    (tokens, width), chip = kv_a.shape, chip_of(kv_a.device)
    key = chip.device, kv_a.dtype, tokens, width, latent_dim, layout, rope, batch_invariant
    plan = WRITE_LATENT.kept.plans.get(key)
    if plan is None:
        statics = cache_statics(layout, latent_dim, width - latent_dim, rope)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        tile = WRITE_LATENT.tile_for(chip, DTYPE_NAMES[kv_a.dtype], statics, sizes)
        plan = WRITE_LATENT.keep(key, (statics, tile))
    kv_a = canonical(kv_a) if batch_invariant else kv_a
    pages, page_size, _ = cache.shape
    page_stride, slot_stride, _ = cache.stride()
    args = (
        kv_a, norm_weight, cos, sin, positions, slot_mapping, *cache_parts(cache, layout, latent_dim, cos),
        tokens, cos.shape[0], pages * page_size, page_size,
        kv_a.stride()[0], cos.stride()[0], sin.stride()[0], page_stride, slot_stride, eps,
    )  # fmt: skip
    WRITE_LATENT.launch(chip, tokens, args, *plan)


def check_slots(positions: torch.Tensor, slot_mapping: torch.Tensor, cos: torch.Tensor, cache: torch.Tensor) -> None:
    """Refuse slots outside the cache (-1 is a padding token) and positions outside the tables. Reads the values."""
    slots = cache.shape[0] * cache.shape[1]
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")
    check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")


def _check_values(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, *_):
    check_slots(positions, slot_mapping, cos, cache)


def _fake(*_):
    return None


_write_latent = define_op(
    "write_latent",
    "(Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) cache, str layout, int latent_dim, str rope, float eps=1e-06, bool batch_invariant=False) -> ()",
    cpu=by_row(cpu_latent.write_latent, 0, 4, 5),
    device=launch_write,
    fake=_fake,
    check_values=_check_values,
)


def check_latent_arguments(tokens, norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps) -> None:
    """Checks that write_latent and compress_latent share; the cache first, since the others are measured by it."""
    if rope not in ROPE_MODES:
        check_choice("rope", rope, ROPE_MODES)
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps!r}, a finite number of at least 0 is accepted")
    device, of_tokens = cache.data.device, (tokens,)
    check_tensor("norm_weight", norm_weight, shape=(cache.latent_dim,), dtypes=(cache.dtype,), device=device)
    check_tensor("cos", cos, shape=(None, cache.rope_dim // 2), dtypes=_FP32, device=device)
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=_FP32, device=device)
    check_tensor("positions", positions, shape=of_tokens, dtypes=INDICES, device=device)
    check_tensor("slot_mapping", slot_mapping, shape=of_tokens, dtypes=INDICES, device=device)


def check_cache(cache, own_key: str = "") -> None:
    """Refuse what is no cache; and where an op is named, which writes a key beside the latent, the layout without."""
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")
    if own_key and cache.layout is CacheLayout.FP8_V4:
        raise NotImplementedError(
            f"{own_key}: got a cache in layout fp8_v4, whose rotated values are the last 64 of the latent; layouts "
            "with a rotated key beside the latent are accepted"
        )


def write_latent(
    kv_a: torch.Tensor,
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
    """Normalise and rotate projected tokens and write them to their cache slots, in place.

    Token t goes to slot ``slot_mapping[t]``: ``RMSNorm(kv_a[t, :latent_dim]) * norm_weight``, then RoPE of
    ``kv_a[t, latent_dim:]`` by row ``positions[t]`` of the tables. Pair i of the rope part, (x, y), becomes
    (x cos_i - y sin_i, y cos_i + x sin_i). The arithmetic is float32 and is rounded once, to what the cache holds: its
    dtype, or in a quantised layout e4m3 or int8 codes (:class:`CacheLayout` has the quantisers and bytes) and bfloat16
    keys. Its error is then that of the codes: half a step, up to 2^-4 of a value in ``fp8_v32`` (2^-10 of a scale near
    zero) and 1/254 of the token's largest value in ``int8``.

    Args:
        kv_a: ``[tokens, latent_dim + rope_dim]``, the output of ``kv_a_proj_with_mqa``, in ``cache.dtype`` (bfloat16
            for a quantised cache). Rows may have any stride.
        norm_weight: ``[latent_dim]``, in ``cache.dtype``.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ: of two tokens with one slot either may win, or parts of both.
        cache: the :class:`LatentCache` written to. Slots that are not named keep their bits.
        rope: where the pairs stand before and after: ``"interleaved_to_half"`` (a a' b b' in, a b a' b' out:
            DeepSeek-V3), ``"interleaved"`` (a a' b b' both: DeepSeek-V2) or ``"half"`` (a b a' b' both: MiniCPM3).
        eps: added to the mean square. The models use 1e-6 here whatever their ``rms_norm_eps`` says.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), the widths do not fit the chip, or the cache
            is in layout ``fp8_v4``, whose rotated values are a part of the latent.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2; Hugging Face ``DeepseekV3Attention.forward``.
    """
    check_cache(cache, "write_latent")
    data = cache.data
    check_tensor("kv_a", kv_a, shape=(None, cache.width), dtypes=(cache.dtype,), device=data.device)
    check_latent_arguments(kv_a.shape[0], norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps)
    if any_requires_grad((kv_a, norm_weight, cos, sin, data)):
        check_no_grad("write_latent", kv_a=kv_a, norm_weight=norm_weight, cos=cos, sin=sin, cache=data)
    _write_latent(
        kv_a, norm_weight, cos, sin, positions, slot_mapping, data, cache.layout_name, cache.latent_dim, rope,
        float(eps), wanted(batch_invariant),
    )  # fmt: skip
