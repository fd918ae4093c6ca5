"""write_latent: RMSNorm and RoPE of already projected kv_a, written to the paged latent cache in one launch.

:mod:`mla_kernels.latent.compress` holds the variant with the projection inside.
"""

import torch

from mla_kernels.checks import INDICES, check_choice, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op

ROPE_MODES = ("interleaved_to_half", "interleaved", "half")


@triton.jit
def token_is_written(slot, position, num_slots, table_rows):
    """Whether a token has a slot in the cache and a row in the tables."""
    return ((slot >= 0) & (slot < num_slots)) & ((position >= 0) & (position < table_rows))


@triton.jit
def store_token(
    latent,  # [LATENT] fp32, before the norm
    rope,  # [ROPE] fp32, before the rotation
    norm,  # [LATENT] fp32
    cos_row, sin_row,  # pointers to this token's rows of the tables
    cache, slot, page_size, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate one token and write it to its slot (int64).

    One-hot sums take the rope pairs apart and put them side by side. Loads and stores with stride 2 would not do on
    Ascend: such a load reads past the end of its tensor, such a store overflows the compiler's buffers, and split and
    join crash the 950's compiler. The comparisons are of floats, because the 910 compares integers one by one.
    """
    HALF: tl.constexpr = ROPE // 2
    columns = tl.arange(0, LATENT)
    pairs = tl.arange(0, HALF)
    page = slot // page_size
    out = cache + (page * page_stride + (slot - page * page_size) * slot_stride)
    scale = 1.0 / tl.sqrt(tl.sum(latent * latent, 0) / LATENT + eps)
    tl.store(out + columns, (latent * scale * norm).to(cache.dtype.element_ty))

    lane = tl.arange(0, ROPE).to(tl.float32)
    pair = pairs.to(tl.float32)
    if MODE == "half":
        first_lane = pair
        second_lane = pair + HALF
    else:
        first_lane = 2.0 * pair
        second_lane = 2.0 * pair + 1.0
    first = tl.sum(tl.where(lane[:, None] == first_lane[None, :], rope[:, None], 0.0), 0)  # [ROPE, HALF] -> [HALF]
    second = tl.sum(tl.where(lane[:, None] == second_lane[None, :], rope[:, None], 0.0), 0)
    cos = tl.load(cos_row + pairs)  # [HALF]
    sin = tl.load(sin_row + pairs)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if MODE == "interleaved":
        rotated = tl.where(first_lane[:, None] == lane[None, :], rotated_first[:, None], 0.0)  # [HALF, ROPE]
        rotated += tl.where(second_lane[:, None] == lane[None, :], rotated_second[:, None], 0.0)
        tl.store(out + LATENT + tl.arange(0, ROPE), tl.sum(rotated, 0).to(cache.dtype.element_ty))
    else:
        tl.store(out + LATENT + pairs, rotated_first.to(cache.dtype.element_ty))
        tl.store(out + (LATENT + HALF) + pairs, rotated_second.to(cache.dtype.element_ty))


@triton.jit
def write_latent_kernel(
    kv_a,  # [tokens, LATENT + ROPE]
    norm_weight,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    cache,  # [pages, page_size, LATENT + ROPE]
    tokens, table_rows, num_slots, page_size,
    kv_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    columns = tl.arange(0, LATENT)
    norm = tl.load(norm_weight + columns).to(tl.float32)  # [LATENT]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            source = tl.cast(token, tl.int64) * kv_stride
            latent = tl.load(kv_a + source + columns).to(tl.float32)  # [LATENT]
            rope = tl.load(kv_a + source + LATENT + tl.arange(0, ROPE)).to(tl.float32)  # [ROPE]
            store_token(
                latent, rope, norm, cos + position * cos_stride, sin + position * sin_stride,
                cache, slot, page_size, page_stride, slot_stride, eps, LATENT, ROPE, MODE,
            )  # fmt: skip


def check_fits(op, chip, statics, needed) -> None:
    """Refuse widths whose tiles no choice makes fit the chip. ``needed``: the kernel's estimate, memory -> bytes."""
    for name, size in needed.items():
        if size > chip.memory[name]:
            raise NotImplementedError(
                f"{op} on {chip.name}: latent_dim {statics['LATENT']} with rope_dim {statics['ROPE']} needs about "
                f"{size:,} bytes of {name}, a program has {chip.memory[name]:,}"
            )


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    check_fits("write_latent", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    """Ascend: as the 910's compiler plans it, six buffers of a row in fp32 and ten or 18 of ROPE / 2 x ROPE."""
    if chip.is_gpu:
        return {"shared": 64 * tile["num_warps"]}
    one_hot = 36 if statics["MODE"] == "interleaved" else 20
    return {"UB": 24 * statics["LATENT"] + one_hot * statics["ROPE"] ** 2}


def token_bytes(dtype, statics) -> int:
    """Bytes that a token costs whatever comes in: its cache row, its rows of cos and sin, its position and slot."""
    width = statics["LATENT"] + statics["ROPE"]
    return width * DTYPE_BYTES[dtype] + 4 * statics["ROPE"] + 16


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


def model_statics(latent_dim: int, rope_dim: int, rope: str) -> dict[str, int | str]:
    """Constants of the latent kernels."""
    return {"LATENT": latent_dim, "ROPE": rope_dim, "MODE": rope}


WRITE_LATENT = Kernel(
    write_latent_kernel,
    arguments={
        "kv_a": "*T",
        "norm_weight": "*T",
        "cos": "*fp32",
        "sin": "*fp32",
        "positions": "*i64",
        "slot_mapping": "*i64",
        "cache": "*T",
        "tokens": "i32",
        "table_rows": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "kv_stride": "i32:16",
        "cos_stride": "i32:16",
        "sin_stride": "i32:16",
        "page_stride": "i32:16",
        "slot_stride": "i32:16",
        "eps": "fp32",
    },
    statics=("LATENT", "ROPE", "MODE"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v3", model_statics(512, 64, "interleaved_to_half"), {"tokens": 4096}),
        Case("v2", model_statics(512, 64, "interleaved"), {"tokens": 4096}),
        Case("minicpm3", model_statics(256, 32, "half"), {"tokens": 4096}),
    ),
    uses_dot=False,
)


def _launch(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, latent_dim, rope, eps):
    tokens, rope_dim = kv_a.shape[0], cache.shape[2] - latent_dim
    statics = model_statics(latent_dim, rope_dim, rope)
    chip = chip_of(cache.device)
    tile = WRITE_LATENT.tile_for(chip, DTYPE_NAMES[cache.dtype], statics, {"tokens": tokens})
    page_stride, slot_stride, _ = cache.stride()
    args = (
        kv_a, norm_weight, cos, sin, positions, slot_mapping, cache,
        tokens, cos.shape[0], cache.shape[0] * cache.shape[1], cache.shape[1],
        kv_a.stride(0), cos.stride(0), sin.stride(0), page_stride, slot_stride, eps,
    )  # fmt: skip
    WRITE_LATENT.launch(chip, tokens, args, statics, tile)


def check_slots(positions: torch.Tensor, slot_mapping: torch.Tensor, cos: torch.Tensor, cache: torch.Tensor) -> None:
    """Refuse slots outside the cache (-1 is a padding token) and positions outside the tables. Reads the values."""
    slots = cache.shape[0] * cache.shape[1]
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")
    check_range("positions", positions, 0, cos.shape[0], "rows of cos and sin")


def _check_values(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, latent_dim, rope, eps):
    check_slots(positions, slot_mapping, cos, cache)


def _fake(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, latent_dim, rope, eps):
    return None


_write_latent = define_op(
    "write_latent",
    "(Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) cache, int latent_dim, str rope, float eps) -> ()",
    cpu=cpu_latent.write_latent,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def check_latent_arguments(tokens, norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps) -> None:
    """Checks that write_latent and compress_latent share; the cache first, since the others are measured by it."""
    check_choice("rope", rope, ROPE_MODES)
    if not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps!r}, a finite number of at least 0 is accepted")
    data = cache.data
    check_tensor("norm_weight", norm_weight, shape=(cache.latent_dim,), like=data)
    check_tensor("cos", cos, shape=(None, cache.rope_dim // 2), dtypes=(torch.float32,), device=data.device)
    check_tensor("sin", sin, shape=tuple(cos.shape), dtypes=(torch.float32,), device=data.device)
    check_tensor("positions", positions, shape=(tokens,), dtypes=INDICES, device=data.device)
    check_tensor("slot_mapping", slot_mapping, shape=(tokens,), dtypes=INDICES, device=data.device)


def check_cache(cache) -> None:
    if not isinstance(cache, LatentCache):
        raise TypeError(f"cache: got {type(cache).__name__}, a LatentCache is accepted")


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
) -> None:
    """Normalise and rotate projected tokens and write them to their cache slots, in place.

    Token t goes to slot ``slot_mapping[t]``: ``RMSNorm(kv_a[t, :latent_dim]) * norm_weight``, then RoPE of
    ``kv_a[t, latent_dim:]`` by row ``positions[t]`` of the tables. Pair i of the rope part, (x, y), becomes
    (x cos_i - y sin_i, y cos_i + x sin_i). The arithmetic is float32 and is rounded once, to the cache's dtype.

    Args:
        kv_a: ``[tokens, latent_dim + rope_dim]``, the output of ``kv_a_proj_with_mqa``, in the cache's dtype. Rows may
            have any stride.
        norm_weight: ``[latent_dim]``, in the cache's dtype.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them.
        positions: ``[tokens]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ: of two tokens with one slot either may win, or parts of both.
        cache: the :class:`LatentCache` written to. Slots that are not named keep their bits.
        rope: where the pairs stand before and after: ``"interleaved_to_half"`` (a a' b b' in, a b a' b' out:
            DeepSeek-V3), ``"interleaved"`` (a a' b b' both: DeepSeek-V2) or ``"half"`` (a b a' b' both: MiniCPM3).
        eps: added to the mean square. The models use 1e-6 here whatever their ``rms_norm_eps`` says.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or the widths do not fit the chip.

    Source: DeepSeek-V2 report (arXiv 2405.04434) section 2.1.2; Hugging Face ``DeepseekV3Attention.forward``.
    """
    check_cache(cache)
    check_tensor("kv_a", kv_a, shape=(None, cache.data.shape[2]), like=cache.data)
    check_latent_arguments(kv_a.shape[0], norm_weight, cos, sin, positions, slot_mapping, cache, rope, eps)
    check_no_grad("write_latent", kv_a=kv_a, norm_weight=norm_weight, cos=cos, sin=sin, cache=cache.data)
    _write_latent(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache.data, cache.latent_dim, rope, float(eps))
