"""write_kv: DeepSeek-V4's raw tokens, whose one row is key and value, into a paged cache."""

import torch

from mla_kernels.checks import INDICES, any_requires_grad, check_no_grad, check_tensor
from mla_kernels.cpu import windows as cpu
from mla_kernels.cpu.alone import by_row
from mla_kernels.invariance import FIXED_TOKENS, canonical, wanted
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.windows.parts import (
    check_eps,
    check_tables,
    check_whole_keys,
    normalise,
    store_row,
    stored_parts,
)
from mla_kernels.latent.write import check_cache, check_fits, check_slots, load_row, row_bytes, token_is_written
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.cache_layout import QUANTISED
from mla_kernels.shim import define_op


@triton.jit(do_not_specialize=["tokens"])
def write_kv_kernel(
    kv,  # [tokens, WIDTH]
    norm_weight,  # [WIDTH]
    cos, sin,  # [table_rows, ROPE / 2]
    positions, slot_mapping,  # [tokens]
    values, codes, scales, keys,  # the cache's parts
    tokens, table_rows, num_slots, page_size,
    kv_stride, cos_stride, sin_stride, page_stride, slot_stride,
    eps,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    norm = load_row(norm_weight, WIDTH)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            x = load_row(kv + tl.cast(token, tl.int64) * kv_stride, WIDTH)
            row = normalise(x, norm, cos + position * cos_stride, sin + position * sin_stride, eps, WIDTH, ROPE)
            store_row(
                row, values, codes, scales, keys, slot, page_size, page_stride, slot_stride, 0, WIDTH, LAYOUT
            )  # fmt: skip


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 2}
    check_fits("write_kv", chip, _named(statics), _memory(chip, dtype, statics, tile))
    return tile


def _named(statics):
    """The constants as write_latent's estimates name them: the row is a latent without a key of its own."""
    return {"LATENT": statics["WIDTH"], "ROPE": 0, "LAYOUT": statics["LAYOUT"]}


def _memory(chip, dtype, statics, tile):
    """Ascend: ten buffers of a row in fp32 and 18 of ROPE / 2 x ROPE; the 2-D steps of fp8, at another time."""
    if chip.is_gpu:
        return {"shared": 64 * tile["num_warps"] + 4 * statics["WIDTH"]}
    blocks = 192 * statics["WIDTH"] if statics["LAYOUT"].startswith("fp8") else 0
    return {"UB": max(40 * statics["WIDTH"] + 36 * statics["ROPE"] ** 2, blocks)}


def _cost(dtype, statics, sizes):
    width, rope = statics["WIDTH"], statics["ROPE"]
    a_token = width * DTYPE_BYTES[dtype] + row_bytes(dtype, _named(statics)) + 4 * rope + 16
    return Cost(
        flops=sizes["tokens"] * (4 * width + 3 * rope), bytes=sizes["tokens"] * a_token + width * DTYPE_BYTES[dtype]
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def _statics(width, rope_dim, layout):
    return {"WIDTH": width, "ROPE": rope_dim, "LAYOUT": layout if layout in QUANTISED else "unquantised"}


WRITE_KV = Kernel(
    write_kv_kernel,
    arguments={
        "kv": "*T",
        "norm_weight": "*T",
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        "keys": "*T",
        **dict.fromkeys(("tokens", "table_rows", "num_slots", "page_size"), "i32"),
        **dict.fromkeys(("kv_stride", "cos_stride", "sin_stride", "page_stride", "slot_stride"), "i32:16"),
        "eps": "fp32",
    },
    statics=("WIDTH", "ROPE", "LAYOUT"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v4", _statics(512, 64, "latent_16bit"), {"tokens": 4096}),
        Case("v4_fp8", _statics(512, 64, "fp8_v4"), {"tokens": 4096}, ("bf16",)),
        Case("v4_fp8_v32", _statics(512, 64, "fp8_v32"), {"tokens": 4096}, ("bf16",)),
        Case("v4_int8", _statics(512, 64, "int8"), {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch(kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps, batch_invariant=False):
    (tokens, width), chip = kv.shape, chip_of(kv.device)
    key = chip.device, kv.dtype, tokens, width, cos.shape[1], layout, batch_invariant
    plan = WRITE_KV.kept.plans.get(key)
    if plan is None:
        statics = _statics(width, 2 * cos.shape[1], layout)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        plan = WRITE_KV.keep(key, (statics, WRITE_KV.tile_for(chip, DTYPE_NAMES[kv.dtype], statics, sizes)))
    kv = canonical(kv) if batch_invariant else kv
    pages, page_size, _ = cache.shape
    *parts, slot_stride, _ = stored_parts(cache, layout, width, cos)
    args = (
        kv, norm_weight, cos, sin, positions, slot_mapping, *parts, tokens, cos.shape[0], pages * page_size, page_size,
        kv.stride()[0], cos.stride()[0], sin.stride()[0], cache.stride()[0], slot_stride, eps,
    )  # fmt: skip
    WRITE_KV.launch(chip, tokens, args, *plan)


def _fake(*_):
    return None


def _check_values(kv, norm_weight, cos, sin, positions, slot_mapping, cache, *_):
    check_slots(positions, slot_mapping, cos, cache)


_write_kv = define_op(
    "write_kv",
    "(Tensor kv, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, Tensor(a!) cache, "
    "str layout, float eps=1e-06, bool batch_invariant=False) -> ()",
    cpu=by_row(cpu.write_kv, 0, 4, 5),
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def write_kv(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: LatentCache,
    *,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> None:
    """Normalise and rotate projected tokens of DeepSeek-V4 and write them to their cache slots, in place.

    V4 has one row a token, D = 512 values, which is key and value of all heads: ``RMSNorm(kv[t]) * norm_weight`` over
    all of it, then RoPE of its trailing values by row ``positions[t]`` of the tables: of each pair of neighbours
    (x, y), pair i becomes (x cos_i - y sin_i, y cos_i + x sin_i). The arithmetic is float32 and is rounded once, to
    what the cache holds, as in :func:`mla_kernels.write_latent`.

    Args:
        kv: ``[T, D]``, the output of ``kv_proj``: bfloat16, float16 or float32, whatever the cache holds. Rows may have
            any stride.
        norm_weight: ``[D]``, in kv's dtype or float32.
        cos, sin: ``[positions, rope_dim / 2]`` float32 tables, YaRN's factor already in them; ``rope_dim``, a power of
            two from 16 to D, is how many trailing values are rotated (64).
        positions: ``[T]`` int32 or int64, each token's row of the tables.
        slot_mapping: ``[T]`` int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call
            other than -1 must differ.
        cache: the :class:`LatentCache` written to: ``latent_dim`` D and ``rope_dim`` 0. Slots that are not named keep
            their bits. ``fp8_v4`` is V4's layout, 584 bytes a token, and keeps the last 64 values in bfloat16; in
            ``int8`` and ``fp8_v32`` the rotated values are quantised, too.
        eps: added to the mean square.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot or position is out of range writes nothing.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no LatentCache.
        ValueError: a shape, device, stride or option that is not accepted; on CPU tensors also a slot below -1 or past
            the cache, or a position outside the tables. Nothing was written then.
        NotImplementedError: an input requires grad (there is no backward), or D does not fit the chip.

    Source: Hugging Face ``DeepseekV4Attention.forward``.
    """
    check_cache(cache)
    check_whole_keys(cache)
    data = cache.data
    check_tensor("kv", kv, shape=(None, cache.latent_dim), device=data.device)
    check_tensor(
        "norm_weight", norm_weight, shape=(cache.latent_dim,), dtypes=(kv.dtype, torch.float32), device=data.device
    )
    check_tables(cos, sin, cache.latent_dim, data.device)
    check_tensor("positions", positions, shape=(kv.shape[0],), dtypes=INDICES, device=data.device)
    check_tensor("slot_mapping", slot_mapping, shape=(kv.shape[0],), dtypes=INDICES, device=data.device)
    check_eps(eps)
    if any_requires_grad((kv, norm_weight, cos, sin, data)):
        check_no_grad("write_kv", kv=kv, norm_weight=norm_weight, cos=cos, sin=sin, cache=data)
    _write_kv(
        kv, norm_weight, cos, sin, positions, slot_mapping, data, cache.layout_name, float(eps), wanted(batch_invariant)
    )
