"""The kernel that joins the partial results of a sparse decode step, whose picks several programs share."""

from mla_kernels.attention.merge import merge_end, merge_part, sink_factor
from mla_kernels.language import tl, triton
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work


@triton.jit
def sparse_merge_kernel(
    partial_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, tokens, heads, parts, work,
    WIDTH: tl.constexpr, SINK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial [parts, tokens, heads, WIDTH] -> out [tokens, heads, WIDTH], the lse alike. Item: heads of a token."""
    line = tl.arange(0, BLOCK_R)
    tile = line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    head_tiles = tl.cdiv(heads, BLOCK_R)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        token = item // head_tiles
        head = (item % head_tiles) * BLOCK_R
        inside = line < heads - head
        acc = tl.zeros([BLOCK_R, WIDTH], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for part in range(parts):
            first = tl.cast(part * tokens + token, tl.int64) * heads + head
            lse = tl.load(partial_lse_ptr + first + line, mask=inside, other=float("-inf"))
            values = tl.load(partial_ptr + first * WIDTH + tile, mask=inside[:, None], other=0.0)  # [BLOCK_R, WIDTH]
            acc, total, largest = merge_part(acc, total, largest, values, lse)
        acc, lse = merge_end(acc, total, largest)
        if SINK:
            sink = tl.load(sink_ptr + head + line, mask=inside, other=0.0)
            acc *= sink_factor(lse, sink)[:, None]
        first = tl.cast(token, tl.int64) * heads + head
        tl.store(out_ptr + first * WIDTH + tile, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(lse_ptr + first + line, lse, mask=inside)


def _merge_rule(chip, dtype, statics, sizes):
    """Rows enough to feed every core on GPUs, and to make each transfer a few tens of KB on Ascend."""
    width = statics["WIDTH"]
    return {"BLOCK_R": max(1, (1024 if chip.is_gpu else 4096) // width), "num_warps": 4, "num_stages": 2}


def _merge_memory(chip, dtype, statics, tile):
    """Nothing shared on GPUs but a few bytes; on Ascend about nine copies of a tile in fp32."""
    return {"shared": 0} if chip.is_gpu else {"UB": 9 * tile["BLOCK_R"] * statics["WIDTH"] * 4}


def _merge_cost(dtype, statics, sizes):
    rows, parts, width = sizes["tokens"] * sizes["heads"], sizes["parts"], statics["WIDTH"]
    return Cost(
        flops=3.0 * parts * rows * width, bytes=rows * (parts * (width + 1) * 4 + width * DTYPE_BYTES[dtype] + 4)
    )


def _merge_work(dtype, statics, sizes, tile):
    cost = _merge_cost(dtype, statics, sizes)
    programs = sizes["tokens"] * -(-sizes["heads"] // tile["BLOCK_R"])
    return Work(programs=programs, flops=cost.flops / programs, bytes=cost.bytes / programs)


SPARSE_MERGE = Kernel(
    sparse_merge_kernel,
    arguments={
        "partial_ptr": "*fp32",
        "partial_lse_ptr": "*fp32",
        "sink_ptr": "*fp32",
        "out_ptr": "*T",
        "lse_ptr": "*fp32",
        **dict.fromkeys(("tokens", "heads", "parts", "work"), "i32"),
    },
    statics=("WIDTH", "SINK"),
    tiles={"BLOCK_R": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2, 3)},
    rule=_merge_rule,
    memory=_merge_memory,
    cost=_merge_cost,
    work=_merge_work,
    cases=(Case("v32", {"WIDTH": 512, "SINK": False}, {"tokens": 64, "heads": 128, "parts": 8}),),
    uses_dot=False,
)


def launch_merge(chip, partial, partial_lse, sink, sizes, out, lse):
    """Merge partial [parts, tokens, heads, width] and its lse into out and lse, all of any shape; ``sizes``: tokens,
    heads, parts, width."""
    tokens, heads, parts, width = sizes
    plan = SPARSE_MERGE.kept.plans.get(key := (chip.device, out.dtype, sizes, sink is None))
    if plan is None:
        constants, problem = {"WIDTH": width, "SINK": False}, {"tokens": tokens, "heads": heads, "parts": parts}
        tile = SPARSE_MERGE.tile_for(chip, DTYPE_NAMES[out.dtype], constants, problem)
        statics = {"WIDTH": width, "SINK": sink is not None}
        plan = SPARSE_MERGE.keep(key, (tokens * -(-heads // tile["BLOCK_R"]), statics, tile))
    work, statics, tile = plan
    args = (partial, partial_lse, lse if sink is None else sink, out, lse, tokens, heads, parts, work)
    SPARSE_MERGE.launch(chip, work, args, statics, tile)
