"""copy_pages: whole pages of a latent cache to other pages, bit for bit."""

import torch

from mla_kernels.checks import INDICES, check_no_grad, check_range, check_tensor
from mla_kernels.cpu import latent as cpu_latent
from mla_kernels.language import tl, triton
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.write import check_cache
from mla_kernels.launch import DTYPE_BYTES, DTYPE_NAMES, Case, Cost, Kernel, Work, chip_of
from mla_kernels.shim import define_op


@triton.jit
def copy_pages_kernel(
    cache,
    source_pages, target_pages,  # [pairs]
    pairs, num_pages,
    rows, width,  # of a page: rows of ``width`` dense elements, ``row_stride`` apart
    page_stride, row_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Item: BLOCK elements of one row of one pair of pages."""
    blocks = tl.cdiv(width, BLOCK)
    for item in range(tl.program_id(0), pairs * rows * blocks, tl.num_programs(0)):
        row = item // blocks
        pair = row // rows
        source = tl.load(source_pages + pair).to(tl.int64)
        target = tl.load(target_pages + pair).to(tl.int64)
        if ((source >= 0) & (source < num_pages)) & ((target >= 0) & (target < num_pages)):
            start = (item - row * blocks) * BLOCK
            columns = tl.arange(0, BLOCK)
            inside = columns < width - start
            within = cache + (tl.cast(row - pair * rows, tl.int64) * row_stride + start)
            values = tl.load(within + source * page_stride + columns, mask=inside)
            tl.store(within + target * page_stride + columns, values, mask=inside)


def _rule(chip, dtype, statics, sizes):
    return {"BLOCK": min(4096, max(64, 1 << (sizes["width"] - 1).bit_length())), "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    return {"shared": 0} if chip.is_gpu else {"UB": 2 * tile["BLOCK"] * DTYPE_BYTES[dtype]}


def _cost(dtype, statics, sizes):
    elements = sizes["pairs"] * sizes["rows"] * sizes["width"]
    return Cost(flops=0, bytes=2 * elements * DTYPE_BYTES[dtype] + 16 * sizes["pairs"])


def _work(dtype, statics, sizes, tile):
    programs = sizes["pairs"] * sizes["rows"] * -(-sizes["width"] // tile["BLOCK"])
    return Work(programs=programs, flops=0, bytes=_cost(dtype, statics, sizes).bytes / max(1, programs))


COPY_PAGES = Kernel(
    copy_pages_kernel,
    arguments={
        "cache": "*T",
        "source_pages": "*i64",
        "target_pages": "*i64",
        "pairs": "i32",
        "num_pages": "i32",
        "rows": "i32",
        "width": "i32:16",
        "page_stride": "i32:16",
        "row_stride": "i32:16",
    },
    statics=(),
    tiles={"BLOCK": (64, 128, 256, 512, 1024, 2048, 4096), "num_warps": (4, 8)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(Case("v3", {}, {"pairs": 64, "rows": 1, "width": 64 * 576}),),
    uses_dot=False,
)


def _launch(cache, source_pages, target_pages):
    if cache.dtype == torch.uint8:
        cache = cache.view(torch.bfloat16)  # strides of quantised caches are multiples of 16 bytes
    pages, rows, width = cache.shape
    page_stride, row_stride, _ = cache.stride()
    if row_stride == width:
        rows, width = 1, rows * width
    pairs = source_pages.shape[0]
    chip = chip_of(cache.device)
    sizes = {"pairs": pairs, "rows": rows, "width": width}
    tile = COPY_PAGES.tile_for(chip, DTYPE_NAMES[cache.dtype], {}, sizes)
    args = (cache, source_pages, target_pages, pairs, pages, rows, width, page_stride, row_stride)
    COPY_PAGES.launch(chip, pairs * rows * -(-width // tile["BLOCK"]), args, {}, tile)


def _check_values(cache, source_pages, target_pages):
    pages = cache.shape[0]
    meaning = f"the cache has {pages} pages, -1 copies nothing"
    check_range("source_pages", source_pages, -1, pages, meaning)
    check_range("target_pages", target_pages, -1, pages, meaning)
    copied = (source_pages >= 0) & (target_pages >= 0)
    targets, counts = target_pages[copied].unique(return_counts=True)
    if (counts > 1).any():
        twice = targets[counts > 1].tolist()
        raise ValueError(f"target_pages: got {twice} more than once, each page is accepted once")
    both = targets[torch.isin(targets, source_pages[copied])]
    if both.numel():
        raise ValueError(f"target_pages: got {both.tolist()}, which are in source_pages, too; others are accepted")


def _fake(cache, source_pages, target_pages):
    return None


_copy_pages = define_op(
    "copy_pages",
    "(Tensor(a!) cache, Tensor source_pages, Tensor target_pages) -> ()",
    cpu=cpu_latent.copy_pages,
    device=_launch,
    fake=_fake,
    check_values=_check_values,
)


def copy_pages(cache: LatentCache, source_pages: torch.Tensor, target_pages: torch.Tensor) -> None:
    """Copy page ``source_pages[i]`` to page ``target_pages[i]``, for every i, in place and bit for bit, in any layout.

    For copy-on-write where sequences share a prefix, and for moving pages together. Two sequences with block tables
    ``[4, 7]`` and ``[4, 7]`` part ways in their second page: copying ``[7]`` to ``[2]`` and writing 2 into one table
    lets both write on. A page is all ``page_size`` tokens of this layer, whether written or not. One launch.

    Args:
        cache: the :class:`LatentCache`, of any layout and strides.
        source_pages, target_pages: ``[n]`` int32 or int64, of one dtype or two. A pair with a -1 copies nothing.
            No page may be a target twice, or a source and a target: the order of copies is open.

    On ``cuda`` and ``npu`` values are not read back: a pair with a page out of range copies nothing.

    Raises:
        TypeError: ``cache`` is no LatentCache, or pages of another dtype.
        ValueError: a shape or device that is not accepted; on CPU tensors also a page below -1 or past the cache, or
            pages that overlap as said above. Nothing was written then.
        NotImplementedError: the cache requires grad (there is no backward).

    Source: vLLM's and SGLang's page copies (``copy_blocks_mla``).
    """
    check_cache(cache)
    device = cache.data.device
    check_tensor("source_pages", source_pages, rank=1, dtypes=INDICES, device=device)
    check_tensor("target_pages", target_pages, shape=tuple(source_pages.shape), dtypes=INDICES, device=device)
    check_no_grad("copy_pages", cache=cache.data)
    _copy_pages(cache.data, source_pages, target_pages)
