"""The cost model that ranks tiles. It orders candidates of one kernel on one chip; it is no prediction of a time.

Grouped matrix products of experts on GPUs are ranked by :mod:`mla_kernels.autotune.moe_model`, which was held against
what others measured. For every other launch, P programs each ask for F operations (padding included) and B bytes of a
chip with C cores:

    arithmetic  waves * F / (peak / C),        waves = ceil(P / C)
    cache       P * B / (CACHE_FACTOR * bandwidth)
    memory      compulsory bytes / bandwidth
    start       waves * PROGRAM_SECONDS

    seconds = max(arithmetic, cache, memory) + start

``peak`` is the dense rate of the element type. :class:`mla_kernels.launch.Work` counts padded rows, so a tile
that is half empty costs double, and the splits of a sequence's keys; row tiles of experts are those expected under
uniform routing. Rates are data-sheet values (:mod:`mla_kernels.targets.chips`).

Of a compiled attention kernel whose main loop has clock bounds (:mod:`mla_kernels.targets.bounds`), ``arithmetic`` is
waves * turns of the loop * clocks of a turn, see :func:`loop_seconds`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mla_kernels.autotune import moe_model
from mla_kernels.launch import DTYPE_BYTES, Cost, Kernel, Work
from mla_kernels.targets.chips import Chip

CACHE_FACTOR = 3.0
"""Bandwidth of the shared cache over that of device memory; between 2 and 4 on the chips listed."""

PROGRAM_SECONDS = 1.5e-6
"""Start, first loads and last stores of a program that nothing overlaps."""

GROUPED = {
    "moe_gate_up_kernel": 2, "moe_down_kernel": 1, "moe_project_kernel": 1,
    "eb_gate_up_kernel": 2, "eb_down_kernel": 1, "wo_gate_up_kernel": 2, "wo_down_kernel": 1,
}  # fmt: skip
"""Kernels that multiply each expert's rows with its weights -> result columns computed for one that is written."""

_FORMAT_BYTES = {"fp8_block": (1, 1), "int8_w8a8": (1, 1), "int8": (2, 1), "int4": (2, 0.5), "mxfp4": (2, 0.5)}
"""Quantised format -> bytes of a row's and of a weight's element."""


def _latent_products(statics, tile):
    products = statics["LATENT"] + statics["ROPE"] + statics["LATENT"] // tile.get("VALUE_TILES", 1)
    return products + (statics["ROPE"] if statics["LAYOUT"] == "fp8_v4" else 0)


PAIR_PRODUCTS = {
    "mla_decode_kernel": _latent_products,
    "sparse_mla_kernel": _latent_products,
    "sparse_mla_pair_kernel": _latent_products,
    "mla_prefill_kernel": lambda statics, tile: sum(statics[name] for name in ("FIRST", "REST", "ROPE", "VALUE")),
}
"""Attention kernels whose main loop takes BLOCK_N keys a turn -> multiply-adds for a query row and a key."""


def seconds(kernel: Kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping, tile: Mapping) -> float:
    """Modelled duration of one launch; see the module's formula. For ranking only."""
    products = GROUPED.get(kernel.name)
    if products and chip.is_gpu and sizes["pairs"]:
        return all_seconds(kernel, chip, dtype, statics, sizes, [tile])[0]
    work = kernel.work(dtype, statics, sizes, tile)
    if products and sizes["pairs"]:
        product = _product(products, chip, dtype, statics, sizes, tile)
        rows, _ = moe_model.row_tiles(product.tokens, product.top_k, product.experts, tile["BLOCK_M"])
        programs = round(rows * -(-product.columns // (products * tile["BLOCK_N"])))
        work = replace(work, programs=max(1, programs))
    cores = chip.dot_cores if kernel.uses_dot else chip.vector_cores
    arithmetic = work.flops / (chip.flops[dtype] / cores)
    return _launch_seconds(chip, cores, work, kernel.cost(dtype, statics, sizes), arithmetic)


def _launch_seconds(chip: Chip, cores: int, work: Work, cost: Cost, arithmetic: float) -> float:
    """The module's formula, with the seconds of arithmetic of one program."""
    waves = -(-work.programs // cores)
    cache = work.programs * work.bytes / (CACHE_FACTOR * chip.bandwidth)
    return max(waves * arithmetic, cache, cost.bytes / chip.bandwidth) + waves * PROGRAM_SECONDS


def loop_seconds(
    kernel: Kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping, tile: Mapping, bounds: Mapping
) -> float | None:
    """:func:`seconds` of a compiled attention kernel, its arithmetic from the clock bounds of its main loop; None for
    other kernels.

    A turn takes the mean of ``core`` (all units overlap) and ``serial`` (the tensor cores wait for the busiest other
    unit): queries wait for scores, the next keys do not.
    """
    if kernel.name not in PAIR_PRODUCTS or not bounds.get("tensor"):
        return None
    work = kernel.work(dtype, statics, sizes, tile)
    rows = tile.get("BLOCK_H") or tile["BLOCK_M"]
    turns = work.flops / (2 * rows * tile["BLOCK_N"] * PAIR_PRODUCTS[kernel.name](statics, tile))
    clocks = turns * (bounds["core"] + bounds["serial"]) / 2
    cost = kernel.cost(dtype, statics, sizes)
    return _launch_seconds(chip, chip.dot_cores, work, cost, clocks / moe_model.clock(chip))


def all_seconds(
    kernel: Kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping, tiles: Sequence[Mapping]
) -> list[float]:
    """:func:`seconds` of many tiles of one problem, which takes less time than one by one."""
    products = GROUPED.get(kernel.name)
    if not (products and chip.is_gpu and sizes["pairs"] and tiles):
        return [seconds(kernel, chip, dtype, statics, sizes, tile) for tile in tiles]
    found = [0.0] * len(tiles)
    for indices, shapes, parts in grouped(kernel, chip, dtype, statics, sizes, tiles):
        for index, value in zip(indices, moe_model.seconds(shapes, [parts])):
            found[index] = float(value)
    return found


def _product(products, chip, dtype, statics, sizes, tile) -> moe_model.Product:
    """The grouped product that a launch computes, with all the columns that it computes."""
    if "depth" in sizes:
        inner, columns = sizes["depth"], sizes["columns"]
    elif products == 2:
        inner, columns = sizes["hidden"], 2 * sizes["intermediate"]
    else:
        inner, columns = sizes["intermediate"], sizes["hidden"]
    tokens = sizes.get("tokens", sizes["pairs"])
    row_bytes, weight_bytes = _FORMAT_BYTES.get(statics.get("FORMAT"), (DTYPE_BYTES[dtype], DTYPE_BYTES[dtype]))
    rate = chip.flops[dtype] * (2 if tile.get("FP8") else 1)
    top_k = sizes["pairs"] / tokens
    return moe_model.Product(tokens, top_k, sizes["experts"], columns, inner, row_bytes, weight_bytes, rate)


def grouped(
    kernel: Kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping, tiles: Sequence[Mapping]
) -> Iterator[tuple[list[int], moe_model.Tiles, moe_model.Terms]]:
    """(positions, shapes, terms) of tiles of a grouped product; those that have JOINED and FP8 in common together."""
    products = GROUPED[kernel.name]
    alike: dict[tuple, list[int]] = {}
    for index, tile in enumerate(tiles):
        alike.setdefault((bool(tile.get("JOINED")), bool(tile.get("FP8"))), []).append(index)
    for (joined, _), indices in alike.items():
        some = [tiles[index] for index in indices]
        product = _product(products, chip, dtype, statics, sizes, some[0])
        rows = [
            (t["BLOCK_M"], products * t["BLOCK_N"], t.get("BLOCK_K", 128), t["num_warps"], t["num_stages"])
            for t in some
        ]
        shapes = moe_model.Tiles.of(rows, 1 if joined else products)
        yield indices, shapes, moe_model.terms(chip, product, shapes)
