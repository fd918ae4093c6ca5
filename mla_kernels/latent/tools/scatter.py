"""scatter_tokens: ready latents and keys into a paged latent cache in any layout; no norm, no rotation."""

import torch

from mla_kernels.checks import FLOATS, INDICES, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.tools.gather import tool_parts, tool_statics, tool_widths
from mla_kernels.latent.write import (
    KEY_BYTES,
    check_cache,
    check_fits,
    load_row,
    row_bytes,
    store_latent,
    token_offsets,
)
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def scatter_tokens_kernel(
    latent,  # [tokens, LATENT]
    rope,  # [tokens, ROPE]
    slot_mapping,  # [tokens]
    values, codes, scales, keys,  # the cache's parts
    tokens, num_slots, page_size, latent_stride, rope_stride, page_stride, slot_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            offset, scale_offset = token_offsets(slot, page_size, page_stride, slot_stride, LATENT, LAYOUT)
            row = load_row(latent + tl.cast(token, tl.int64) * latent_stride, LATENT)
            store_latent(row, values, codes, scales, keys, offset, scale_offset, LATENT, LAYOUT)
            if ROPE > 0:
                key = load_row(rope + tl.cast(token, tl.int64) * rope_stride, ROPE)
                if LAYOUT == "unquantised":
                    tl.store(values + offset + LATENT + tl.arange(0, ROPE), key.to(values.dtype.element_ty))
                else:
                    tl.store(keys + offset // KEY_BYTES + tl.arange(0, ROPE), key.to(tl.bfloat16))


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    check_fits("scatter_tokens", chip, statics, _memory(chip, dtype, statics, tile))
    return tile


def _memory(chip, dtype, statics, tile):
    """Ascend: bytes a value as the 910's compiler plans it, which holds e4m3's 2-D blocks many times."""
    if chip.is_gpu:
        return {"shared": 64 * tile["num_warps"]}
    each = 192 if statics["LAYOUT"] in ("fp8_v32", "fp8_v4") else 56
    return {"UB": each * statics["LATENT"] + 16 * statics["ROPE"]}


def _cost(dtype, statics, sizes):
    width = statics["LATENT"] + statics["ROPE"]
    a_token = row_bytes(dtype, statics) + width * DTYPE_BYTES[dtype] + 8
    flops = 0 if statics["LAYOUT"] == "unquantised" else 3 * statics["LATENT"]
    return Cost(flops=sizes["tokens"] * flops, bytes=sizes["tokens"] * a_token)


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


SCATTER_TOKENS = Kernel(
    scatter_tokens_kernel,
    arguments={
        "latent": "*T",
        "rope": "*T",
        "slot_mapping": "*i64",
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        "keys": "*bf16",
        "tokens": "i32",
        "num_slots": "i32",
        "page_size": "i32",
        "latent_stride": "i32:16",
        "rope_stride": "i32:16",
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


def _launch(latent, rope, slot_mapping, cache, layout, latent_dim):
    (pages, page_size, elements), chip, tokens = cache.shape, chip_of(latent.device), latent.shape[0]
    plan = SCATTER_TOKENS.kept.plans.get(key := (chip.device, latent.dtype, tokens, latent_dim, elements, layout))
    if plan is None:
        statics = tool_statics(latent_dim, *tool_widths(cache, layout, latent_dim))
        tile = SCATTER_TOKENS.tile_for(chip, DTYPE_NAMES[latent.dtype], statics, {"tokens": tokens})
        plan = SCATTER_TOKENS.keep(key, (statics, tile))
    page_stride, slot_stride, _ = cache.stride()
    args = (
        latent, rope, slot_mapping, *tool_parts(cache, layout, latent_dim, latent, slot_mapping),
        tokens, pages * page_size, page_size, latent.stride()[0], rope.stride()[0], page_stride, slot_stride,
    )  # fmt: skip
    SCATTER_TOKENS.launch(chip, tokens, args, *plan)


def _check_values(latent, rope, slot_mapping, cache, layout, latent_dim):
    slots = cache.shape[0] * cache.shape[1]
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")


def _fake(latent, rope, slot_mapping, cache, layout, latent_dim):
    return None


_scatter_tokens = define_op(
    "scatter_tokens",
    "(Tensor latent, Tensor rope, Tensor slot_mapping, Tensor(a!) cache, str layout, int latent_dim) -> ()",
    cpu=cpu_latent.scatter_tokens,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def scatter_tokens(latent: torch.Tensor, rope: torch.Tensor, slot_mapping: torch.Tensor, cache: LatentCache) -> None:
    """Write latents and keys as they are, quantised where the layout is, to their cache slots, in place.

    What :func:`mla_kernels.write_latent` does, without its norm and rotation: for models that have done both.
    Token t goes to slot ``slot_mapping[t]``.

    Args:
        latent: ``[tokens, latent_dim]``, in ``cache.dtype``; for a quantised cache bfloat16, float16 or float32. Rows
            may have any stride.
        rope: ``[tokens, rope_dim]`` rotated keys, in the dtype of ``latent``; ``[tokens, 0]`` for ``fp8_v4``, whose
            rotated values are the last 64 of ``latent``.
        slot_mapping: ``[tokens]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ.
        cache: the :class:`LatentCache` written to. Slots that are not named keep their bits.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device or stride that is not accepted; on CPU tensors also a slot below -1 or past the
            cache. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward).

    Source: the layouts and quantisers of :class:`CacheLayout`; vLLM's ``concat_and_cache_mla``.
    """
    check_cache(cache)
    device = cache.data.device
    dtypes = FLOATS if cache.layout.quantised else (cache.dtype,)
    check_tensor("latent", latent, shape=(None, cache.latent_dim), dtypes=dtypes, device=device)
    check_tensor("rope", rope, shape=(latent.shape[0], cache.rope_dim), like=latent)
    check_tensor("slot_mapping", slot_mapping, shape=(latent.shape[0],), dtypes=INDICES, device=device)
    if torch.is_grad_enabled():
        check_no_grad("scatter_tokens", latent=latent, rope=rope, cache=cache.data)
    _scatter_tokens(latent, rope, slot_mapping, cache.data, cache.layout_name, cache.latent_dim)
