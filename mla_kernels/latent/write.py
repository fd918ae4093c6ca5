"""write_latent: RMSNorm and RoPE of already projected kv_a, written to the paged latent cache; one kernel, one launch.

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
def store_token(
    latent,  # [LATENT] fp32, before the norm
    first,  # [ROPE / 2] fp32, first values of the rope pairs
    second,  # [ROPE / 2] fp32, their second values
    weight,  # [LATENT] fp32
    cos_row, sin_row,  # this token's rows of the tables
    latent_out, first_out, second_out,  # where the token's latent, first and second rotated values go
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate one token and write it to its slot."""
    columns = tl.arange(0, LATENT)
    pairs = tl.arange(0, ROPE // 2)
    scale = 1.0 / tl.sqrt(tl.sum(latent * latent, 0) / LATENT + eps)
    tl.store(latent_out + columns, (latent * scale * weight).to(latent_out.dtype.element_ty))
    cos = tl.load(cos_row + pairs)  # [ROPE / 2]
    sin = tl.load(sin_row + pairs)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if MODE == "interleaved":
        # One-hot sums put the values side by side: a store with stride 2 overflows the buffers of the 910's compiler.
        # They compare as floats, because the 910 compares integers one by one.
        place = tl.arange(0, ROPE).to(tl.float32)[None, :]  # [1, ROPE]
        even = (2 * pairs).to(tl.float32)[:, None]  # [ROPE / 2, 1]
        rotated = tl.where(place == even, rotated_first[:, None], 0.0)  # [ROPE / 2, ROPE]
        rotated += tl.where(place == even + 1.0, rotated_second[:, None], 0.0)
        tl.store(first_out + tl.arange(0, ROPE), tl.sum(rotated, 0).to(first_out.dtype.element_ty))
    else:
        tl.store(first_out + pairs, rotated_first.to(first_out.dtype.element_ty))
        tl.store(second_out + pairs, rotated_second.to(first_out.dtype.element_ty))


@triton.jit
def write_latent_kernel(
    kv_a,  # [tokens, LATENT + ROPE]
    first_in, second_in,  # kv_a from the first and from the second value of the first rope pair on
    norm_weight,  # [LATENT]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    cache,  # [pages, page_size, LATENT + ROPE]
    first_out, second_out,  # the cache from the first and second rotated values of slot 0 on
    tokens, table_rows, num_slots, page_size,
    kv_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    LATENT: tl.constexpr, ROPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, LATENT)
    pairs = tl.arange(0, ROPE // 2)
    weight = tl.load(norm_weight + columns).to(tl.float32)  # [LATENT]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if ((slot >= 0) & (slot < num_slots)) & ((position >= 0) & (position < table_rows)):
            page = slot // page_size
            target = page * page_stride + (slot - page * page_size) * slot_stride
            source = token.to(tl.int64) * kv_stride
            latent = tl.load(kv_a + source + columns).to(tl.float32)  # [LATENT]
            if MODE == "half":
                first = tl.load(first_in + source + pairs).to(tl.float32)  # [ROPE / 2]
                second = tl.load(second_in + source + pairs).to(tl.float32)
            else:
                first = tl.load(first_in + source + 2 * pairs).to(tl.float32)
                second = tl.load(second_in + source + 2 * pairs).to(tl.float32)
            store_token(
                latent, first, second, weight, cos + position * cos_stride, sin + position * sin_stride,
                cache + target, first_out + target, second_out + target, eps, LATENT, ROPE, MODE,
            )  # fmt: skip
