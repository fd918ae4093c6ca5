"""indexer_logits and paged_indexer_logits for Hopper, where queries and keys are e4m3 codes: the declaration of their
kernel, and its launch in place of the portable one.

The kernel, :mod:`mla_kernels.hopper.indexer_kernel`, imports Gluon, and is imported by a first launch.
"""

from typing import NamedTuple

import torch

from mla_kernels import hopper
from mla_kernels.gluon_launch import CODE_TILE, GluonKernel, Tiles
from mla_kernels.hopper.decode import tma_strides
from mla_kernels.launch import NO_MEMORY, Case, Cost, Work

BLOCK = 64
"""Keys of a block."""
WIDTH = 128
"""Codes of a key."""
MOST_HEADS = 128
_COLUMNS = 128  # of a product at most
_HELD = 256  # query rows of a program at most, whose weights its registers hold
_MOST_TOKENS = 8
_PROGRAMS = 4  # a core
_FEWEST_BLOCKS = 4  # of a program
_UNIT = 16  # bytes of which TMA wants multiples
_CORES = 132  # of the chip that declared problems are cut for


def _boxes(statics):
    return {"q_tiles": (1, statics["ROWS"], WIDTH), "key_tiles": (1, BLOCK, WIDTH)}


def _rule(chip, dtype, statics, sizes):
    """With few query rows, where memory is the bound, four programs a multiprocessor; else two."""
    if statics["TOKENS"] * statics["ROWS"] <= 64:
        return {"STAGES": 5, "REGISTERS": 64, "num_warps": 4}
    return {"STAGES": 8, "REGISTERS": 128, "num_warps": 4}


def _memory(chip, dtype, statics, tile):
    """Queries, stages of codes and scales, barriers."""
    if chip.name in hopper.ELSEWHERE:
        return {"shared": NO_MEMORY}
    return {"shared": statics["TOKENS"] * statics["ROWS"] * WIDTH + tile["STAGES"] * BLOCK * (WIDTH + 4) + 1024}


def _cost(dtype, statics, sizes):
    sequences, tokens, keys, heads = (sizes[name] for name in ("sequences", "tokens", "keys", "heads"))
    return Cost(
        flops=2.0 * sequences * tokens * keys * heads * (WIDTH + 1),
        bytes=sequences * (keys * (WIDTH + 4) + tokens * (heads * (WIDTH + 4) + 4 * keys)),
    )


def _work(dtype, statics, sizes, tile):
    chunks, share = chunks_of(sizes["keys"], programs_of(sizes, statics["TOKENS"]), _CORES)
    keys, rows = share * BLOCK, statics["TOKENS"] * statics["ROWS"]
    return Work(
        programs=programs_of(sizes, statics["TOKENS"]) * chunks,
        flops=2.0 * rows * keys * (WIDTH + 1),
        bytes=rows * (WIDTH + 4) + keys * (WIDTH + 4 + 4 * statics["TOKENS"]),
    )


def programs_of(sizes, tokens: int) -> int:
    """Sets of up to ``tokens`` tokens of a sequence."""
    return sizes["sequences"] * -(-sizes["tokens"] // tokens)


def chunks_of(keys: int, sets: int, cores: int) -> tuple[int, int]:
    """(programs that share the keys of a set of tokens, blocks of each)."""
    blocks = -(-keys // BLOCK)
    share = max(_FEWEST_BLOCKS, -(-blocks * sets // (_PROGRAMS * cores)))
    return -(-blocks // share), share


def statics_of(heads: int, tokens: int, page_size: int, limits: bool, fill: bool, compact: bool) -> dict:
    """``tokens``: of a sequence, or the number that tiles are looked up for; ``page_size`` 0: keys in rows."""
    rows = max(16, 1 << (heads - 1).bit_length())
    together = 1 << (min(tokens, _MOST_TOKENS, _HELD // rows) - 1).bit_length()
    return {
        "ROWS": rows, "TOKENS": together, "TOGETHER": max(1, min(together, _COLUMNS // rows)), "PAGE_SIZE": page_size,
        "LIMITS": limits, "FILL": fill, "COMPACT": compact,
    }  # fmt: skip


def _case(name, heads, *, sequences=1, tokens=4096, keys=32768, page=0, limits=False, fill=True, compact=False):
    sizes = {"sequences": sequences, "tokens": tokens, "keys": keys, "heads": heads}
    return Case(name, statics_of(heads, tokens, page, limits, fill, compact), sizes, ("bf16",))


HOPPER_INDEXER_LOGITS = GluonKernel(
    "mla_kernels.hopper.indexer_kernel",
    "hopper_indexer_logits_kernel",
    worker_warps=4,
    arguments={
        **dict.fromkeys(("out_ptr", "weights_ptr", "scale_ptr"), "*fp32"),
        **dict.fromkeys(("starts_ptr", "ends_ptr", "table_ptr"), "*i32"),
        **dict.fromkeys(("q_tiles", "key_tiles"), CODE_TILE),
        **dict.fromkeys(
            (
                "weights_stride", "scale_stride", "table_stride", "out_stride", "tokens", "heads", "keys", "columns",
                "num_pages", "token_tiles", "chunks", "share",
            ),
            "i32",
        ),
    },
    boxes=_boxes,
    statics=("ROWS", "TOKENS", "TOGETHER", "PAGE_SIZE", "LIMITS", "FILL", "COMPACT"),
    tiles={"STAGES": (5, 8), "REGISTERS": (64, 128), "num_warps": (4,)},
    rule=_rule,
    memory=_memory,
    cost=_cost,
    work=_work,
    cases=(
        _case("v32_prefill", 64),
        _case("v32_prefill_compact", 64, fill=False, compact=True),
        _case("v32_decode", 64, sequences=64, tokens=1, keys=131072, page=64, fill=False),
        _case("v32_two_tokens", 64, sequences=64, tokens=2, keys=131072, page=64),
        _case("glm_two_tokens", 32, sequences=64, tokens=2, keys=131072, page=64),
        _case("glm_prefill", 32),
        _case("v4_decode", 64, sequences=64, tokens=2, page=128, limits=True),
        _case("many_heads", 128, tokens=1024),
        _case("few_heads", 12, sequences=64, tokens=3, page=64),
    ),
    uses_dot=True,
    unsupported=hopper.ELSEWHERE,
)  # fmt: skip


class Choice(NamedTuple):
    """What is compiled and launched."""

    statics: dict
    tile: dict
    form: frozenset  # as it was chosen


def choose(chip, dtype, heads: int, head_dim: int, statics) -> Choice | None:
    """What calls of this form launch; see :func:`mla_kernels.hopper.chosen`. ``statics``: of :func:`statics_of`."""
    codes = dtype == torch.float8_e4m3fn
    form = {"dtype": "e4m3" if codes else str(dtype).removeprefix("torch."), **statics}
    refused = lambda: refusal(form["dtype"], heads, head_dim, statics["PAGE_SIZE"])  # noqa: E731
    if not hopper.chosen(HOPPER_INDEXER_LOGITS, chip, form, refused):
        return None
    return Choice(statics, HOPPER_INDEXER_LOGITS.rule(chip, "bf16", statics, {}), hopper.frozen(form))


def refusal(dtype: str, heads: int, head_dim: int, page_size: int) -> str:
    """Why the kernel does not serve a form, or nothing."""
    if dtype != "e4m3":
        return f"queries of {dtype}; codes of e4m3 are carried"
    if head_dim != WIDTH:
        return f"head_dim {head_dim}; {WIDTH} is carried"
    if heads > MOST_HEADS:
        return f"{heads} index heads; up to {MOST_HEADS} are carried"
    if page_size % BLOCK:
        return f"page_size {page_size}; multiples of {BLOCK} are carried"
    return ""


class Source(NamedTuple):
    """Keys as the kernel reads them."""

    codes: torch.Tensor  # from the first key's on
    scales: torch.Tensor  # likewise, float32
    pages: int  # 1: keys in rows
    page_size: int  # or the number of rows
    page_stride: int  # bytes
    key_stride: int  # bytes
    scale_stride: int  # float32 numbers from page to page


def serves(choice: Choice, source: Source) -> bool:
    """Whether keys of the chosen form lie where TMA reads them.

    Raises:
        NotImplementedError: they do not, and the kernel is asked for by name.
    """
    reason = ""
    at = source.codes.data_ptr() % _UNIT
    if _key_strides(source) is None:
        strides = f"{source.page_stride} (pages) and {source.key_stride} (keys)"
        reason = f"keys {strides} bytes apart at byte {at} of {_UNIT}; TMA reads from multiples of {_UNIT} bytes"
    return hopper.served(HOPPER_INDEXER_LOGITS, choice.form, reason)


def _key_strides(source: Source) -> tuple[int, int, int] | None:
    shape = source.pages, source.page_size, WIDTH
    return tma_strides(source.codes.data_ptr(), shape, source.page_stride, source.key_stride, 1)


def launch(chip, choice: Choice, q, weights, source: Source, places, out, sequences: int, keys: int) -> None:
    """Launch in place of the portable kernel, over keys that :func:`serves`.

    Args:
        q: [rows, heads, 128] codes, heads 128 apart.
        weights: [rows, heads] float32.
        places: (starts or limits, ends or lengths, block_table), as the portable kernel takes them.
        out: [rows, columns] float32.
        sequences: of so many the rows are, equally many of each.
        keys: of a sequence at most.
    """
    shape = rows, heads, _ = q.shape
    strides = tma_strides(q.data_ptr(), shape, q.stride(0), WIDTH, 1)
    if strides is None:  # a slice at an odd place
        q = q.clone(memory_format=torch.contiguous_format)
        strides = heads * WIDTH, WIDTH, 1
    tokens = rows // sequences if sequences else 0
    token_tiles = -(-tokens // choice.statics["TOKENS"])
    chunks, share = chunks_of(keys, sequences * token_tiles, chip.dot_cores)
    starts, ends, table = places
    key_shape = source.pages, source.page_size, WIDTH
    args = (
        out, weights, source.scales, starts, ends, table,
        Tiles(q, shape, strides), Tiles(source.codes.view(torch.float8_e4m3fn), key_shape, _key_strides(source)),
        weights.stride(0), source.scale_stride, table.stride(0), out.stride(0), tokens, heads, keys, out.shape[1],
        source.pages, token_tiles, chunks, share,
    )  # fmt: skip
    work = sequences * token_tiles * chunks
    HOPPER_INDEXER_LOGITS.launch(chip, work, args, choice.statics, choice.tile)
