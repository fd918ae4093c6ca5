"""Which tile of an expert's grouped matrix product is fast on a GPU: physical terms, weighed by a few fitted constants.

Each of T tokens is sent to K different experts of E, each set of K as likely as any other, so an expert's rows are
binomial(T, K / E), and the row tiles of a product are ``E * mean(ceil(rows / BLOCK_M))``: half-empty tiles cost like
full ones. From them follow, in seconds for the whole product (``programs`` = row tiles x column tiles):

    core      the busiest of a core's three pipes: multiply-adds at the rate of the tile's instruction (wgmma and
              tcgen05 take 64 rows at least; what is left for smaller tiles on such chips, mma.sync, is slower), shared
              memory (operand tiles written once, read as often as the warps' layout asks), and issue of instructions
    l2        operand tiles fetched by every program, at L2_BYTES a clock and core
    latency   rounds of programs x trips of the loop x what is left of a fetch's latency with so many stages in flight
    start     rounds of programs x PROGRAM_CLOCKS

``ideal`` is the larger of the arithmetic at full rate and the compulsory bytes at the memory's rate. The features of a
tile are log(1 + term / ideal), so a term counts only where it is not hidden, the share of idle cores, registers and
shared memory as parts of the chip's limits, and a few terms in the tile's shape alone (accumulators a warp, BLOCK_K,
stages), some of them scaled by ``bound``, the share of arithmetic in ideal / (ideal + bytes): what compilers make of a
shape is not known in closed form. The score is linear in them. Weights: ``moe_model.json``, written by
``python -m mla_kernels.autotune fit``; those of costs are held at or below zero.

The model knows a chip by its figures only (cores, rates, clock, shared memory, registers).
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_kernels.targets.chips import Chip

CONSTANTS = Path(__file__).parent / "moe_model.json"

L2_BYTES = 32  # bytes a clock and core that the last shared cache delivers when every core asks
SHARED_BYTES = 128
ISSUED = 4  # instructions a clock and core
SYNC_PRODUCTS = 1270  # multiply-adds a clock and core that mma.sync reaches at most, 16 bit
FETCH_CLOCKS = 700  # latency of device memory
TRIP_CLOCKS = 60  # barrier and bookkeeping of a trip of the loop
PROGRAM_CLOCKS = 2000  # start, first fetch and last store of a program that nothing overlaps
OTHER_REGISTERS = 40  # addresses and counters of a thread
SPILL_LIMIT = 1.6  # registers over the limit from which a tile counts as invalid

COSTS = ("core", "l2", "latency", "start", "idle", "registers", "shared_share")
"""Features whose weights are at or below zero: more of them is never better."""

SHAPES = ("warps", "warp_tile", "block_k", "block_k2", "block_n", "tile", "tile2", "stages", "stages2")
GATED = ("warp_tile", "block_k", "tile2", "stages")
"""Shape terms that count differently where arithmetic is the bound."""

FEATURES = (*COSTS, *SHAPES, *(f"{name} x bound" for name in GATED))


@dataclass(frozen=True)
class Product:
    """One grouped product: ``tokens * top_k`` rows of length ``inner`` times each expert's [inner, columns]."""

    tokens: int
    top_k: float
    experts: int
    columns: int
    inner: int
    row_bytes: float = 2.0  # an element of the rows
    weight_bytes: float = 2.0  # an element of the weights, scales aside
    rate: float = 0.0  # operations a second of the whole chip; 0: its 16-bit rate

    @property
    def pairs(self) -> float:
        return self.tokens * self.top_k


@dataclass(frozen=True)
class Tiles:
    """Candidate tiles, one array a parameter. A trip's product is ``dots`` products of [m, k] and [k, n / dots]."""

    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    warps: np.ndarray
    stages: np.ndarray
    dots: float = 1.0

    @classmethod
    def of(cls, rows, dots: int = 1) -> "Tiles":
        """From rows of (block_m, block_n, block_k, warps, stages)."""
        return cls(*np.asarray(rows, float).reshape(-1, 5).T, dots)


@functools.lru_cache(maxsize=8)
def _log_factorials(count: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])


@functools.lru_cache(maxsize=4096)
def row_tiles(tokens: int, top_k: float, experts: int, block_m: int) -> tuple[float, float]:
    """Expected row tiles of all experts, and expected experts with a row, under uniform routing."""
    share = top_k / experts
    if share >= 1:
        return experts * float(-(-tokens // block_m)), float(experts) * (tokens > 0)
    log = _log_factorials(tokens)
    rows = np.arange(tokens + 1)
    ways = log[tokens] - log - log[::-1]
    chance = np.exp(ways + rows * np.log(share) + (tokens - rows) * np.log1p(-share))
    return experts * float(chance @ -(-rows // block_m)), experts * float(1 - chance[0])


def clock(chip: Chip) -> float:
    """Clock of a GPU, from its fp32 rate: 128 multiply-adds a core, 64 on sm_80."""
    return chip.flops["fp32"] / (2 * (64 if chip.name == "sm_80" else 128) * chip.dot_cores)


def _registers(chip: Chip, tiles: Tiles, from_shared: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Registers a thread: its accumulators, its share of the operands of 16 columns, and the rest."""
    lanes = chip.warp_size
    accumulators = tiles.m * tiles.n / (lanes * tiles.warps)
    operands = (tiles.m / down + tiles.n / across) * 16 * 2 / 4 / lanes
    return accumulators + np.where(from_shared, 0, operands) + OTHER_REGISTERS


@dataclass(frozen=True)
class Terms:
    """What the tiles make of one product: seconds of each term, and their fit."""

    seconds: dict[str, np.ndarray]
    arithmetic: float
    memory: float
    idle: np.ndarray
    registers: np.ndarray  # over the chip's limit
    shared: np.ndarray  # over the chip's limit


def terms(chip: Chip, product: Product, tiles: Tiles) -> Terms:
    """See the module's formula. Arrays are as long as ``tiles``."""
    m, n, k, warps, stages = tiles.m, tiles.n, tiles.k, tiles.warps, tiles.stages
    cores = chip.dot_cores
    per_core = clock(chip) * cores  # clocks of all cores in a second
    counts = [row_tiles(product.tokens, product.top_k, product.experts, int(block)) for block in m]
    tiled, filled = np.array([tiled for tiled, _ in counts]), counts[0][1]
    programs = np.maximum(tiled * np.ceil(product.columns / n), 1e-9)
    trips = np.ceil(product.inner / k)

    halved = product.row_bytes <= 2  # tensor cores take operands of 16 bits or fewer
    from_shared = (chip.dot_from_shared and halved) & (m >= 64)
    across = np.where(m <= 16, warps, np.where(m <= 32, warps / 2, np.where((warps >= 8) & (m < n), 4, 2)))
    across = np.clip(across, 1, warps)
    down = warps / across
    fetched = (m * product.row_bytes + n * product.weight_bytes) * k
    shared = fetched * np.maximum(np.where(from_shared, stages, stages - 1), 1)
    registers = _registers(chip, tiles, from_shared, down, across)
    resident = np.minimum(
        np.floor((chip.core_shared + 1024) / (shared + 1024)),
        np.floor(chip.core_registers / (np.minimum(registers, chip.registers) * chip.warp_size * warps)),
    )
    resident = np.clip(resident, 1, np.minimum(chip.core_programs, chip.core_threads / (chip.warp_size * warps)))
    rounds = np.ceil(programs / (cores * resident))

    rate = product.rate or chip.flops["bf16"]
    peak = rate / 2 / per_core  # multiply-adds a clock and core
    sync = SYNC_PRODUCTS * rate / chip.flops["bf16"] if chip.dot_from_shared and halved else peak
    reached = np.where(from_shared, peak, min(peak, sync))
    wide = product.row_bytes  # operands are widened to the rows' type before they are multiplied
    read = np.where(from_shared, m * n / 64 + m * tiles.dots, m * across + n * down) * k * wide
    instructions = np.where(
        from_shared,
        20 * warps + m * n * k / (256 * np.minimum(n, 256)),
        20 * warps + m * n * k / 2048 + read / 512,
    )
    mma = m * n * k / reached
    shared_clocks = (read + fetched) / SHARED_BYTES
    issue = (instructions + fetched / 256) / ISSUED
    all_trips = programs * trips / per_core
    seconds = {
        "core": all_trips * np.maximum.reduce([mma, shared_clocks, issue]),
        "l2": all_trips * fetched / L2_BYTES,
        "latency": rounds * trips * (FETCH_CLOCKS / np.maximum(stages - 1, 0.7) + TRIP_CLOCKS) / clock(chip),
        "start": rounds * PROGRAM_CLOCKS / clock(chip),
    }
    weights = filled * product.columns * product.inner * product.weight_bytes
    rows = min(product.tokens, product.pairs) * product.inner * product.row_bytes
    return Terms(
        seconds,
        arithmetic=product.pairs * product.columns * product.inner * 2 / rate,
        memory=(weights + rows + product.pairs * product.columns * 2) / chip.bandwidth,
        idle=np.log(np.ceil(programs / cores) * cores / programs),
        registers=registers / chip.registers,
        shared=shared / chip.memory["shared"],
    )


def valid(parts: list[Terms]) -> np.ndarray:
    """Tiles that fit shared memory and do not spill badly."""
    return np.all([(part.shared <= 1) & (part.registers <= SPILL_LIMIT) for part in parts], 0)


def ideal(parts: list[Terms]) -> float:
    """Seconds that no tile goes below."""
    return max(sum(part.arithmetic for part in parts), sum(part.memory for part in parts))


def features(tiles: Tiles, parts: list[Terms]) -> np.ndarray:
    """[tiles, FEATURES] of one launch or of several that share a tile."""
    least = ideal(parts)
    columns = {name: np.log1p(sum(part.seconds[name] for part in parts) / least) for name in parts[0].seconds}
    columns["idle"] = np.mean([part.idle for part in parts], 0)
    columns["registers"] = np.max([part.registers for part in parts], 0)
    columns["shared_share"] = np.max([part.shared for part in parts], 0)
    columns["warps"] = np.log2(tiles.warps / 4)
    columns["tile"] = np.log2(tiles.m * tiles.n / 8192)
    columns["warp_tile"] = columns["warps"] * columns["tile"]
    columns["block_k"] = np.log2(tiles.k / 128)
    columns["block_n"] = np.log2(tiles.n / 128)
    columns["stages"] = tiles.stages - 3
    columns |= {f"{name}2": columns[name] ** 2 for name in ("block_k", "tile", "stages")}
    arithmetic, memory = (sum(getattr(part, name) for part in parts) for name in ("arithmetic", "memory"))
    bound = arithmetic / (arithmetic + memory)
    columns |= {f"{name} x bound": columns[name] * bound for name in GATED}
    return np.stack([columns[name] for name in FEATURES], 1)


@functools.cache
def constants() -> dict:
    """The fitted constants, as ``fit`` wrote them."""
    return json.loads(CONSTANTS.read_text())


@functools.cache
def weights() -> np.ndarray:
    return np.array([constants()["weights"][name] for name in FEATURES])


def score(tiles: Tiles, parts: list[Terms]) -> np.ndarray:
    """Preference for each tile; higher is better, differences are log odds of being the fastest."""
    return features(tiles, parts) @ weights()


def seconds(tiles: Tiles, parts: list[Terms]) -> np.ndarray:
    """Duration in the order of :func:`score`, at the scale of the terms. For ranking only."""
    scale = constants()["seconds"]
    return ideal(parts) * np.exp(scale["offset"] + scale["slope"] * score(tiles, parts))
