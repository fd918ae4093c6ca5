"""gather_tokens: rows of a paged latent cache in any layout, dequantised, as one dense matrix."""

import torch

from mla_kernels.checks import FLOATS, INDICES, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.write import (
    KEY_BYTES,
    ROTATED,
    SCALE_BYTES,
    SCALED_TOGETHER,
    check_cache,
    check_fits,
    row_bytes,
    token_offsets,
)
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import QUANTISED, launched_parts
from mla_kernels.quant.decode import ue8m0_values
from mla_kernels.quant.fp8 import decode_e4m3
from mla_kernels.shim import define_op


@triton.jit
def gather_tokens_kernel(
    values, codes, scales, keys,  # the cache's parts
    slots,  # [tokens]
    out,  # [tokens, LATENT + ROPE]
    tokens, num_slots, page_size, page_stride, slot_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slots + token).to(tl.int64)
        row = out + tl.cast(token, tl.int64) * (LATENT + ROPE)
        if (slot >= 0) & (slot < num_slots):
            offset, scale_offset = token_offsets(slot, page_size, page_stride, slot_stride, LATENT, LAYOUT)
            if LAYOUT == "unquantised":
                columns = tl.arange(0, LATENT)
                tl.store(row + columns, tl.load(values + offset + columns))
                if ROPE > 0:
                    columns = LATENT + tl.arange(0, ROPE)
                    tl.store(row + columns, tl.load(values + offset + columns))
            elif LAYOUT == "fp8_v4":
                GROUPS: tl.constexpr = LATENT // ROTATED
                group = tl.arange(0, GROUPS)
                tile = group[:, None] * ROTATED + tl.arange(0, ROTATED)[None, :]
                coded = group < GROUPS - 1
                scale = tl.load(codes + scale_offset + group, mask=coded, other=0)  # [GROUPS]
                code = tl.load(codes + offset + tile, mask=coded[:, None], other=0)
                latent = decode_e4m3(code).to(tl.float32) * ue8m0_values(scale)[:, None]
                latent = latent.to(tl.bfloat16).to(tl.float32).to(out.dtype.element_ty)
                tl.store(row + tile, latent, mask=coded[:, None])
                key = tl.load(keys + offset // KEY_BYTES + tl.arange(0, ROTATED)).to(tl.float32)
                tl.store(row + (LATENT - ROTATED) + tl.arange(0, ROTATED), key.to(out.dtype.element_ty))
            else:
                if LAYOUT == "int8":
                    columns = tl.arange(0, LATENT)
                    latent = tl.load(codes + offset + columns).to(tl.float32) * tl.load(scales + offset // SCALE_BYTES)
                else:
                    BLOCKS: tl.constexpr = LATENT // SCALED_TOGETHER
                    columns = tl.arange(0, BLOCKS)[:, None] * SCALED_TOGETHER + tl.arange(0, SCALED_TOGETHER)[None, :]
                    scale = tl.load(scales + offset // SCALE_BYTES + tl.arange(0, BLOCKS))  # [BLOCKS]
                    latent = decode_e4m3(tl.load(codes + offset + columns)).to(tl.float32) * scale[:, None]
                tl.store(row + columns, latent.to(out.dtype.element_ty))
                if ROPE > 0:
                    key = tl.load(keys + offset // KEY_BYTES + tl.arange(0, ROPE)).to(tl.float32)
                    tl.store(row + LATENT + tl.arange(0, ROPE), key.to(out.dtype.element_ty))
        else:
            tl.store(row + tl.arange(0, LATENT), tl.zeros([LATENT], out.dtype.element_ty))
            if ROPE > 0:
                tl.store(row + LATENT + tl.arange(0, ROPE), tl.zeros([ROPE], out.dtype.element_ty))


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    check_fits("gather_tokens", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    return {"shared": 0} if chip.is_gpu else {"UB": 24 * (statics["LATENT"] + statics["ROPE"])}


def _cost(dtype, statics, sizes):
    width = statics["LATENT"] + statics["ROPE"]
    a_token = row_bytes(dtype, statics) + width * DTYPE_BYTES[dtype] + 8
    flops = 0 if statics["LAYOUT"] == "unquantised" else statics["LATENT"]
    return Cost(flops=sizes["tokens"] * flops, bytes=sizes["tokens"] * a_token)


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def tool_statics(latent_dim: int, rope_dim: int, layout: str = "unquantised") -> dict[str, int | str]:
    """Constants of the kernels that gather and scatter tokens."""
    return {"LATENT": latent_dim, "ROPE": rope_dim, "LAYOUT": layout}


GATHER_TOKENS = Kernel(
    gather_tokens_kernel,
    arguments={
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        "keys": "*bf16",
        "slots": "*i64",
        "out": "*T",
        "tokens": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "page_stride": "i32:16",
        "slot_stride": "i32:16",
    },
    statics=("LATENT", "ROPE", "LAYOUT"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("fp8", tool_statics(512, 64, "fp8_v32"), {"tokens": 4096}),
        Case("fp8_v4", tool_statics(512, 0, "fp8_v4"), {"tokens": 4096}),
        Case("int8", tool_statics(512, 64, "int8"), {"tokens": 4096}, ("bf16",)),
        Case("bf16", tool_statics(512, 64), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
)


def tool_parts(
    cache: torch.Tensor, layout: str, latent_dim: int, values: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What kernels find a cache's data through: (values, codes as int8, scales, keys), views of its one storage.

    An unquantised cache is the first of them, a quantised one the others. What is not used has the right type:
    ``values`` of a quantised cache, and ``indices`` read as fp32.
    """
    if layout in QUANTISED:
        return values, *launched_parts(cache, layout, latent_dim)
    return cache, cache.view(torch.int8), indices.view(torch.float32), cache.view(torch.bfloat16)


def tool_widths(cache: torch.Tensor, layout: str, latent_dim: int) -> tuple[int, str]:
    """(rope_dim, LAYOUT) of a cache's data."""
    rope_dim = CacheLayout(layout).rope_dim(cache.shape[2], latent_dim)
    return rope_dim, layout if layout in QUANTISED else "unquantised"


def _launch(cache, layout, latent_dim, slots, dtype):
    (pages, page_size, elements), chip, count = cache.shape, chip_of(slots.device), slots.shape[0]
    held = dtype if layout in QUANTISED else cache.dtype
    plan = GATHER_TOKENS.kept.plans.get(key := (chip.device, held, count, latent_dim, elements, layout))
    if plan is None:
        rope_dim, kind = tool_widths(cache, layout, latent_dim)
        statics = tool_statics(latent_dim, rope_dim, kind)
        tile = GATHER_TOKENS.tile_for(chip, DTYPE_NAMES[held], statics, {"tokens": count})
        plan = GATHER_TOKENS.keep(key, (latent_dim + rope_dim, statics, tile))
    width, statics, tile = plan
    out = torch.empty((count, width), dtype=held, device=slots.device)
    page_stride, slot_stride, _ = cache.stride()
    args = (
        *tool_parts(cache, layout, latent_dim, out, slots), slots, out,
        count, pages * page_size, page_size, page_stride, slot_stride,
    )  # fmt: skip
    GATHER_TOKENS.launch(chip, count, args, statics, tile)
    return out if held is dtype else out.to(dtype)


def _check_values(cache, layout, latent_dim, slots, dtype):
    count = cache.shape[0] * cache.shape[1]
    check_range(
        "slots", slots, torch.iinfo(slots.dtype).min, count, f"the cache has {count} slots, below 0 is no token"
    )


def _fake(cache, layout, latent_dim, slots, dtype):
    width = latent_dim + CacheLayout(layout).rope_dim(cache.shape[2], latent_dim)
    return torch.empty(slots.shape[0], width, dtype=dtype, device=cache.device)


_gather_tokens = define_op(
    "gather_tokens",
    "(Tensor cache, str layout, int latent_dim, Tensor slots, ScalarType dtype) -> Tensor",
    cpu=cpu_latent.gather_tokens,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def gather_tokens(cache: LatentCache, slots: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The named tokens of a cache in any layout, dequantised, one row each.

    For what attends to cached tokens outside the paged kernels: chunked prefill expands these rows to keys and values
    of every head. Row i is ``[latent, rotated key]`` of slot ``slots[i]``. With ``page_size`` 4, ``slots = [9, -1, 2]``
    gives the tokens ``data[2, 1]``, zeros, and ``data[0, 2]``. One launch. Values are decoded in float32 and
    rounded once, which loses nothing of ``fp8_v32`` in bfloat16: a code has 4 significant bits, a scale one.
    Those of ``fp8_v4`` are bfloat16, whatever ``dtype`` is.

    Args:
        cache: the :class:`LatentCache` read.
        slots: ``[n]`` int32 or int64, ``page * page_size + offset``, in any order, repeated or not. Below 0: zeros.
        dtype: bfloat16, float16 or float32; None is ``cache.dtype``.

    Returns:
        ``[n, latent_dim + rope_dim]`` in ``dtype``, dense.

    Raises:
        TypeError: ``cache`` is no LatentCache, ``slots`` or ``dtype`` has a type that is not accepted.
        ValueError: a shape or device that is not accepted; on CPU tensors also a slot past the cache, which gives
            zeros on ``cuda`` and ``npu``, where values are not read back.
        NotImplementedError: the cache requires grad (there is no backward).

    Source: the layouts of :class:`CacheLayout`; FlashMLA's and vLLM's gather before prefill over an MLA cache.
    """
    check_cache(cache)
    check_tensor("slots", slots, rank=1, dtypes=INDICES, device=cache.data.device)
    dtype = cache.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}, accepted: bfloat16, float16, float32")
    if cache.data.requires_grad:
        check_no_grad("gather_tokens", cache=cache.data)
    return _gather_tokens(cache.data, cache.layout_name, cache.latent_dim, slots, dtype)
