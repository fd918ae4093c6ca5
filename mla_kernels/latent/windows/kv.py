"""write_kv: DeepSeek-V4's raw tokens, whose one row is key and value, into a paged cache; with them, if asked, the norm
of the latents that queries start from."""

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
    q_a, q_norm, q_latent,  # [tokens, Q], [Q], [tokens, Q]
    tokens, table_rows, num_slots, page_size,
    kv_stride, cos_stride, sin_stride, page_stride, slot_stride, q_stride,
    eps,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, LAYOUT: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Item: one token; with Q, the norm of its query's latent, too."""
    norm = load_row(norm_weight, WIDTH)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        if Q > 0:
            first = tl.cast(token, tl.int64)
            q_columns = tl.arange(0, BLOCK_Q)
            q_scale = tl.load(q_norm + q_columns, mask=q_columns < Q, other=0.0).to(tl.float32)  # [BLOCK_Q]
            q = tl.load(q_a + first * q_stride + q_columns, mask=q_columns < Q, other=0.0).to(tl.float32)  # [BLOCK_Q]
            q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) / Q + eps)) * q_scale
            tl.store(q_latent + first * Q + q_columns, q.to(q_latent.dtype.element_ty), mask=q_columns < Q)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        position = tl.load(positions + token).to(tl.int64)
        if token_is_written(slot, position, num_slots, table_rows):
            x = load_row(kv + tl.cast(token, tl.int64) * kv_stride, WIDTH)
            row = normalise(x, norm, cos + position * cos_stride, sin + position * sin_stride, eps, WIDTH, ROPE)
            store_row(
                row, values, codes, scales, keys, slot, page_size, page_stride, slot_stride, 0, WIDTH, LAYOUT
            )  # fmt: skip


def _rule(chip, dtype, statics, sizes):
    tile = {"num_warps": 4 if statics["Q"] else 2}
    check_fits("write_kv", chip, _named(statics), _memory(chip, dtype, statics, tile))
    return tile


def _named(statics):
    """The constants as write_latent's estimates name them: the row is a latent without a key of its own."""
    return {"LATENT": statics["WIDTH"], "ROPE": 0, "LAYOUT": statics["LAYOUT"]}


def _memory(chip, dtype, statics, tile):
    """Ascend: ten buffers of a row in fp32 and 18 of ROPE / 2 x ROPE; the 2-D steps of fp8, at another time; the latent
    and its scale, two buffers of which are kept."""
    if chip.is_gpu:
        return {"shared": 64 * tile["num_warps"] + 4 * statics["WIDTH"]}
    blocks = 192 * statics["WIDTH"] if statics["LAYOUT"].startswith("fp8") else 0
    return {"UB": max(40 * statics["WIDTH"] + 36 * statics["ROPE"] ** 2, blocks) + 8 * statics["BLOCK_Q"]}


def _cost(dtype, statics, sizes):
    width, rope, q_rank, size = statics["WIDTH"], statics["ROPE"], statics["Q"], DTYPE_BYTES[dtype]
    a_token = (width + 2 * q_rank) * size + row_bytes(dtype, _named(statics)) + 4 * rope + 16
    return Cost(
        flops=sizes["tokens"] * (4 * (width + q_rank) + 3 * rope),
        bytes=sizes["tokens"] * a_token + (width + q_rank) * size,
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


def _statics(width, rope_dim, layout, q_rank=0):
    return {
        "WIDTH": width,
        "ROPE": rope_dim,
        "LAYOUT": layout if layout in QUANTISED else "unquantised",
        "Q": q_rank,
        "BLOCK_Q": 1 << (q_rank - 1).bit_length() if q_rank else 0,
    }


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
        **dict.fromkeys(("q_a", "q_norm", "q_latent"), "*T"),
        **dict.fromkeys(("tokens", "table_rows", "num_slots", "page_size"), "i32"),
        **dict.fromkeys(("kv_stride", "cos_stride", "sin_stride", "page_stride", "slot_stride", "q_stride"), "i32:16"),
        "eps": "fp32",
    },
    statics=tuple(_statics(16, 16, "unquantised")),
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
        Case("v4_latent", _statics(512, 64, "latent_16bit", 1024), {"tokens": 64}),
        Case("v4_pro_latent_fp8", _statics(512, 64, "fp8_v4", 1536), {"tokens": 64}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch_with_latent(q_a, q_norm, *arguments):
    q_latent = q_a.new_empty(q_a.shape)
    _launch(*arguments, q_a, q_norm, q_latent)
    return q_latent


def _launch(
    kv, norm_weight, cos, sin, positions, slot_mapping, cache, layout, eps, batch_invariant=False,
    q_a=None, q_norm=None, q_latent=None,
):  # fmt: skip
    """``q_a`` None: rows alone."""
    (tokens, width), chip = kv.shape, chip_of(kv.device)
    q_rank = 0 if q_a is None else q_a.shape[1]
    key = chip.device, kv.dtype, tokens, width, cos.shape[1], layout, q_rank, batch_invariant
    plan = WRITE_KV.kept.plans.get(key)
    if plan is None:
        statics = _statics(width, 2 * cos.shape[1], layout, q_rank)
        sizes = {"tokens": FIXED_TOKENS if batch_invariant else tokens}
        plan = WRITE_KV.keep(key, (statics, WRITE_KV.tile_for(chip, DTYPE_NAMES[kv.dtype], statics, sizes)))
    if batch_invariant:
        kv, q_a = canonical(kv), None if q_a is None else canonical(q_a)
    if q_a is None:
        q_a, q_norm, q_latent = kv, norm_weight, kv
    pages, page_size, _ = cache.shape
    *parts, slot_stride, _ = stored_parts(cache, layout, width, cos)
    args = (
        kv, norm_weight, cos, sin, positions, slot_mapping, *parts, q_a, q_norm, q_latent,
        tokens, cos.shape[0], pages * page_size, page_size,
        kv.stride()[0], cos.stride()[0], sin.stride()[0], cache.stride()[0], slot_stride, q_a.stride()[0], eps,
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

_write_kv_with_latent = define_op(
    "write_kv_with_latent",
    "(Tensor q_a, Tensor q_norm, Tensor kv, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor slot_mapping, Tensor(a!) cache, str layout, float eps=1e-06, bool batch_invariant=False) -> Tensor",
    cpu=by_row(cpu.write_kv_with_latent, 0, 2, 6, 7),
    device=_launch_with_latent,
    fake=lambda q_a, *_: q_a.new_empty(q_a.shape),
    check_values=lambda q_a, q_norm, *rest: _check_values(*rest),
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
    q_a: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    batch_invariant: bool | None = None,
) -> torch.Tensor | None:
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
        q_a: ``[T, Q]``, the output of ``q_a_proj``, in kv's dtype, rows of any stride; with ``q_norm``. The norm of the
            queries' latents is then taken in the same launch.
        q_norm: ``[Q]``, in kv's dtype or float32.
        eps: added to the mean squares.
        batch_invariant: whether a token's bits must not depend on the others; None: as the block
            :class:`mla_kernels.batch_invariant` says.

    Returns:
        ``RMSNorm(q_a) * q_norm``, ``[T, Q]``, of every token, whatever its slot, rounded once; None without q_a.

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
    if (q_a is None) != (q_norm is None):
        raise ValueError("q_norm: got None beside q_a or a tensor without it, both or none are accepted")
    if any_requires_grad((kv, norm_weight, cos, sin, data)):
        check_no_grad("write_kv", kv=kv, norm_weight=norm_weight, cos=cos, sin=sin, cache=data)
    arguments = (
        kv, norm_weight, cos, sin, positions, slot_mapping, data, cache.layout_name, float(eps), wanted(batch_invariant)
    )  # fmt: skip
    if q_a is None:
        return _write_kv(*arguments)
    check_tensor("q_a", q_a, shape=(kv.shape[0], None), like=kv)
    if q_a.shape[1] == 0:
        raise ValueError(f"q_a: got shape {tuple(q_a.shape)}, at least one column is accepted")
    check_tensor("q_norm", q_norm, shape=(q_a.shape[1],), dtypes=(kv.dtype, torch.float32), device=data.device)
    if any_requires_grad((q_a, q_norm)):
        check_no_grad("write_kv", q_a=q_a, q_norm=q_norm)
    return _write_kv_with_latent(q_a, q_norm, *arguments)
