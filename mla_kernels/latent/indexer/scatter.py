"""scatter_indexer_keys: finished index keys into a paged cache, quantised where it is; no norm, no rotation.

Symbols: T tokens, d head_dim.
"""

import torch

from mla_kernels.checks import FLOATS, INDICES, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import indexer as cpu
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import IndexerCache, check_indexer_cache, launched_parts, page_size_of
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.fp8 import encode_e4m3
from mla_kernels.shim import define_op

LEAST = tl.constexpr(1e-4)


@triton.jit
def quantise_key(x):
    """fp32 [1, HEAD_DIM] -> (codes int8 [1, HEAD_DIM], scale fp32 [1]): 2 ^ ceil(log2(max(amax, 1e-4) / 448)).

    448 is 1.75 x 2^8: adding 0x1FFFFF to the bits of amax carries into its exponent where its mantissa is above 1.75.
    """
    poison = tl.sum(x * 0.0, 1)  # [1]: 0, or NaN
    bits = tl.maximum(tl.max(tl.abs(x), 1), LEAST).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return encode_e4m3(x * (inverse + poison)[:, None]), scale + poison


@triton.jit(do_not_specialize=["tokens"])
def scatter_indexer_keys_kernel(
    k_ptr,  # [tokens, HEAD_DIM]
    slot_mapping,  # [tokens]
    values, codes, scales,  # the cache, as what its layout holds
    tokens, num_slots, page_size,
    k_stride, page_stride, scale_stride,
    HEAD_DIM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Item: one token."""
    lane = tl.arange(0, HEAD_DIM)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            x = tl.load(k_ptr + tl.cast(token, tl.int64) * k_stride + lane)  # [HEAD_DIM]
            page = slot // page_size
            offset = slot - page * page_size
            out = page * page_stride + offset * HEAD_DIM
            if FP8:
                code, scale = quantise_key(tl.reshape(x.to(tl.float32), [1, HEAD_DIM]))
                tl.store(codes + out + lane, tl.reshape(code, [HEAD_DIM]))
                tl.store(scales + page * scale_stride + offset + tl.arange(0, 1), scale)
            else:
                tl.store(values + out + lane, x)


def _rule(chip, dtype, statics, sizes):
    return {"num_warps": 2}


def _memory(chip, dtype, statics, tile):
    """Ascend: some copies of a row in float32."""
    return {"shared": 64 * tile["num_warps"]} if chip.is_gpu else {"UB": 192 * statics["HEAD_DIM"]}


def _cost(dtype, statics, sizes):
    width = statics["HEAD_DIM"]
    written = width + 4 if statics["FP8"] else width * DTYPE_BYTES[dtype]
    return Cost(
        flops=sizes["tokens"] * 3 * width * statics["FP8"],
        bytes=sizes["tokens"] * (width * DTYPE_BYTES[dtype] + 8 + written),
    )


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"tokens": 1})
    return Work(programs=sizes["tokens"], flops=one.flops, bytes=one.bytes)


SCATTER_INDEXER_KEYS = Kernel(
    scatter_indexer_keys_kernel,
    arguments={
        "k_ptr": "*T",
        "slot_mapping": "*i64",
        "values": "*T",
        "codes": "*i8",
        "scales": "*fp32",
        **dict.fromkeys(("tokens", "num_slots", "page_size"), "i32"),
        **dict.fromkeys(("k_stride", "page_stride", "scale_stride"), "i32:16"),
    },
    statics=("HEAD_DIM", "FP8"),
    tiles={"num_warps": (1, 2, 4)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        Case("v32_fp8", {"HEAD_DIM": 128, "FP8": True}, {"tokens": 4096}),
        Case("bf16", {"HEAD_DIM": 128, "FP8": False}, {"tokens": 4096}, ("bf16",)),
    ),
    uses_dot=False,
)


def _launch(k, slot_mapping, cache):
    (tokens, width), chip, parts = k.shape, chip_of(k.device), launched_parts(cache, k.shape[1])
    key = chip.device, k.dtype, tokens, width, parts is None
    plan = SCATTER_INDEXER_KEYS.kept.plans.get(key)
    if plan is None:
        statics = {"HEAD_DIM": width, "FP8": parts is not None}
        tile = SCATTER_INDEXER_KEYS.tile_for(chip, DTYPE_NAMES[k.dtype], statics, {"tokens": tokens})
        plan = SCATTER_INDEXER_KEYS.keep(key, (statics, tile))
    # what a layout does not use has the right type
    lent = (cache, cache.view(torch.int8), slot_mapping.view(torch.float32)) if parts is None else (k, *parts)
    page_size = page_size_of(cache, width)
    args = (
        k, slot_mapping, *lent, tokens, cache.shape[0] * page_size, page_size,
        k.stride()[0], cache.stride()[0], lent[2].stride()[0],
    )  # fmt: skip
    SCATTER_INDEXER_KEYS.launch(chip, tokens, args, *plan)


def _check_values(k, slot_mapping, cache):
    slots = cache.shape[0] * page_size_of(cache, k.shape[1])
    check_range("slot_mapping", slot_mapping, -1, slots, f"the cache has {slots} slots, -1 writes nothing")


def _fake(k, slot_mapping, cache):
    return None


_scatter_indexer_keys = define_op(
    "scatter_indexer_keys",
    "(Tensor k, Tensor slot_mapping, Tensor(a!) cache) -> ()",
    cpu=cpu.scatter_keys,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def scatter_indexer_keys(k: torch.Tensor, slot_mapping: torch.Tensor, cache: IndexerCache) -> None:
    """Write finished index keys, quantised where the cache is, to their slots, in place, in one launch.

    For models whose norm and rotation are done: what :func:`mla_kernels.write_indexer_key` does behind them. Token t
    goes to slot ``slot_mapping[t]``. An ``"fp8"`` cache gets the codes of ``k / scale``, where
    ``scale = 2 ** ceil(log2(max(amax, 1e-4) / 448))``: bit for bit what vLLM's ``indexer_k_quant_and_cache`` and
    DeepGEMM's tests choose. ``write_indexer_key`` chooses no scale below 2^-13, so that keys whose largest magnitude is
    below 0.055 have finer codes here. The scale is stored, so that readers take either.

    Example: the key [896, 3.5, 0, ...] has scale 2 and codes of [448, 1.75, 0, ...]; one of zeros has scale 2^-22.

    Args:
        k: [T, d]: in the cache's dtype, or bfloat16, float16 or float32 for an ``"fp8"`` cache. Rows may have any
            stride.
        slot_mapping: [T] int32 or int64, ``page * page_size + offset``; -1 writes nothing. All slots of a call other
            than -1 must differ.
        cache: the :class:`IndexerCache` written to. Slots that are not named keep their bits.

    On ``cuda`` and ``npu`` values are not read back: a token whose slot is out of range writes nothing. A key with a
    NaN or an infinity gets codes 0x7F and scale NaN.

    Raises:
        TypeError: a dtype that is not accepted, or ``cache`` is no IndexerCache.
        ValueError: a shape, device or stride that is not accepted; on CPU tensors also a slot below -1 or past the
            cache. Nothing was written then.
        NotImplementedError: k requires grad (there is no backward).

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, and the ``Indexer`` of its inference code.
    """
    check_indexer_cache(cache)
    dtypes = FLOATS if cache.quantised else (cache.data.dtype,)
    check_tensor("k", k, shape=(None, cache.head_dim), dtypes=dtypes, device=cache.data.device)
    check_tensor("slot_mapping", slot_mapping, shape=(k.shape[0],), dtypes=INDICES, device=k.device)
    if torch.is_grad_enabled():
        check_no_grad("scatter_indexer_keys", k=k)
    _scatter_indexer_keys(k, slot_mapping, cache.data)
