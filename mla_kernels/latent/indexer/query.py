"""quantise_indexer_query: index queries as e4m3 codes, their scales folded into the heads' weights.

Symbols: T tokens, H heads, d head_dim.
"""

import torch

from mla_kernels.checks import check_no_grad, check_tensor
from mla_kernels.cpu import indexer as cpu
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import HEAD_DIMS, check_head_dim
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.quant.fp8 import quantise_e4m3
from mla_kernels.shim import define_op


@triton.jit(do_not_specialize=["rows", "work"])
def quantise_indexer_query_kernel(
    q_ptr,  # [rows, HEAD_DIM]
    weights_ptr,  # [rows]
    codes_ptr,  # [rows, HEAD_DIM]
    out_ptr,  # [rows]
    rows, work,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Item: BLOCK_R heads."""
    line = tl.arange(0, BLOCK_R)
    column = tl.arange(0, HEAD_DIM)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        first = tl.cast(item, tl.int64) * BLOCK_R
        real = line < rows - item * BLOCK_R
        place = first * HEAD_DIM + line[:, None] * HEAD_DIM + column[None, :]
        x = tl.load(q_ptr + place, mask=real[:, None], other=0.0).to(tl.float32)  # [BLOCK_R, HEAD_DIM]
        codes, scale = quantise_e4m3(x)
        weight = tl.load(weights_ptr + first + line, mask=real, other=0.0)  # [BLOCK_R]
        tl.store(codes_ptr + place, codes, mask=real[:, None])
        tl.store(out_ptr + first + line, weight * scale, mask=real)


def _rule(chip, dtype, statics, sizes):
    return {"BLOCK_R": max(4, (2048 if chip.is_gpu else 4096) // statics["HEAD_DIM"]), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    """Ascend: some copies of a tile in float32."""
    return {"shared": 64 * tile["BLOCK_R"]} if chip.is_gpu else {"UB": 44 * tile["BLOCK_R"] * statics["HEAD_DIM"]}


def _cost(dtype, statics, sizes):
    rows, width = sizes["rows"], statics["HEAD_DIM"]
    return Cost(flops=12.0 * rows * width, bytes=rows * (width * (DTYPE_BYTES[dtype] + 1) + 8.0))


def _work(dtype, statics, sizes, tile):
    one = _cost(dtype, statics, {"rows": tile["BLOCK_R"]})
    return Work(max(1, -(-sizes["rows"] // tile["BLOCK_R"])), one.flops, one.bytes)


QUANTISE_QUERY = Kernel(
    quantise_indexer_query_kernel,
    arguments={
        "q_ptr": "*T", "weights_ptr": "*fp32", "codes_ptr": "*i8", "out_ptr": "*fp32", "rows": "i32", "work": "i32",
    },
    statics=("HEAD_DIM",),
    tiles={"BLOCK_R": (4, 8, 16, 32, 64, 128), "num_warps": (2, 4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(Case("v32", {"HEAD_DIM": 128}, {"rows": 64 * 4096}), Case("v32_decode", {"HEAD_DIM": 128}, {"rows": 64})),
    uses_dot=False,
)  # fmt: skip


def _launch(q, weights):
    chip, width = chip_of(q.device), q.shape[-1]
    codes, out = _fake(q, weights)
    rows = out.numel()
    plan = QUANTISE_QUERY.kept.plans.get(key := (chip.device, q.dtype, rows, width))
    if plan is None:
        statics = {"HEAD_DIM": width}
        tile = QUANTISE_QUERY.tile_for(chip, DTYPE_NAMES[q.dtype], statics, {"rows": rows})
        plan = QUANTISE_QUERY.keep(key, (-(-rows // tile["BLOCK_R"]), statics, tile))
    work, statics, tile = plan
    args = q.contiguous(), weights.contiguous(), codes.view(torch.int8), out, rows, work
    QUANTISE_QUERY.launch(chip, work, args, statics, tile)
    return codes, out


def _fake(q, weights):
    return q.new_empty(q.shape, dtype=torch.float8_e4m3fn), weights.new_empty(weights.shape)


_quantise_indexer_query = define_op(
    "quantise_indexer_query",
    "(Tensor q, Tensor weights) -> (Tensor, Tensor)",
    cpu=cpu.quantise_query,
    device=_launch,
    fake=_fake,
)


def quantise_indexer_query(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries as e4m3 codes, one scale a head and token, which is folded into the head's weight.

    ``scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))`` over each head's values, as keys of an ``"fp8"`` cache have it;
    the codes are those of ``q / scale``, and the weight becomes ``weight * scale``, which relu lets through:
    ``weight * relu(q . k) = (weight * scale) * relu((q / scale) . k)``. One launch; a head's result depends on its own
    values alone. For :func:`mla_kernels.paged_indexer_logits`, ``indexer_logits`` and the selections, which multiply
    the codes as DeepSeek's code does. A code keeps 4 significant bits of a value, so scores are not those of ``q``.

    Example: the head [896, 3.5, 0, ...] of weight 0.5 has scale 2: codes of [448, 1.75, 0, ...], weight 1.

    Args:
        q: [..., H, d] bfloat16, float16 or float32, after RoPE and, where the keys had one, Hadamard transform; d a
            power of two from 32 to 256. Copied if not contiguous.
        weights: [..., H] float32.

    Returns:
        (codes [..., H, d] float8_e4m3fn, weights [..., H] float32). A head with a NaN or an infinity has codes 0x7F and
        weight NaN.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape or device that is not accepted.
        NotImplementedError: an input requires grad (there is no backward).

    Source: the ``Indexer`` of DeepSeek-V3.2's inference code, https://huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp.
    """
    check_tensor("q", q)
    if q.dim() < 2:
        raise ValueError(f"q: got {q.dim()} dimensions {tuple(q.shape)}, at least 2 are accepted")
    if q.shape[-1] not in HEAD_DIMS:
        check_head_dim(q.shape[-1])
    check_tensor("weights", weights, shape=tuple(q.shape[:-1]), dtypes=(torch.float32,), device=q.device, dense=False)
    check_no_grad("quantise_indexer_query", q=q, weights=weights)
    return _quantise_indexer_query(q, weights)
