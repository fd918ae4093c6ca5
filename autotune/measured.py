"""Files of measured tiles: what others found fastest for a fused mixture of experts, one row a token count.

A file is CSV with the columns of :data:`COLUMNS`: ``device`` as SGLang and vLLM write it in the names of their tile
files (``NVIDIA_H100_80GB_HBM3``), ``experts`` and ``intermediate`` of one rank, ``dtype`` (empty: bf16),
``block_shape``, ``gemm`` (``down``: the second product only, ``up``: the first, empty: both), the version of Triton,
``tokens``, and the winner: ``block_m``, ``block_n``, ``block_k``, ``group_m``, ``num_warps``, ``num_stages``. Times are
not in it.
"""

import csv
import functools
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_kernels.autotune.moe_model import Product, Terms, Tiles, terms
from mla_kernels.targets.chips import Chip

COLUMNS = (
    "device", "experts", "intermediate", "dtype", "block_shape", "gemm", "triton", "tokens",
    "block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages",
)  # fmt: skip

SIZES = (
    "experts", "intermediate", "tokens", "block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages",
)  # fmt: skip
"""Columns that hold numbers."""

GEOMETRIES = (  # model, experts, intermediate size, hidden size, experts a token
    ("DeepSeek-V2-Lite", 64, 1408, 2048, 6),
    ("DeepSeek-V2", 160, 1536, 5120, 6),
    ("DeepSeek-V3", 256, 2048, 7168, 8),
    ("Kimi-K2", 384, 2048, 7168, 8),
    ("Qwen3-Coder-480B-A35B", 160, 2560, 6144, 8),
    ("MiniMax-M2", 256, 1536, 3072, 8),
    ("Mixtral-8x7B", 8, 14336, 4096, 2),
    ("Mixtral-8x22B", 8, 16384, 6144, 2),
    ("DBRX", 16, 10752, 6144, 4),
    ("Phi-3.5-MoE", 16, 6400, 4096, 2),
    ("Jamba-1.5", 16, 14336, 4096, 2),
    ("Llama-4-Scout", 16, 8192, 5120, 1),
    ("Llama-4-Maverick", 128, 8192, 5120, 1),
    ("Qwen1.5-MoE-A2.7B", 60, 1408, 2048, 4),
    ("Qwen3-30B-A3B", 128, 768, 2048, 8),
    ("Qwen3-235B-A22B", 128, 1536, 4096, 8),
    ("Qwen3-Next-80B-A3B", 512, 512, 2048, 10),
    ("Qwen3.5-35B-A3B", 256, 512, 2048, 8),
    ("Qwen3.5-397B-A17B", 512, 1024, 4096, 10),
    ("LFM2-8B-A1B", 32, 1792, 2048, 4),
    ("GLM-4.7-Flash", 64, 1536, 2048, 4),
    ("GLM-4.5-Air", 128, 1408, 4096, 8),
    ("GLM-4.5", 160, 1536, 5120, 8),
    ("Gemma-4-26B-A4B", 128, 704, 2816, 8),
    ("Nemotron-3-Nano", 128, 1856, 2688, 6),
    ("Nemotron-3-Super", 512, 2688, 1024, 22),
    ("gpt-oss-20b", 32, 2880, 2880, 4),
    ("gpt-oss-120b", 128, 2880, 2880, 4),
)
SPLITS = (1, 2, 4, 8, 16)  # of the intermediate size, by tensor parallelism
EXPERT_SPLITS = (1, 2, 4, 8, 16)

SPACES = {  # what the tuners of SGLang and vLLM try: block_m, block_n, block_k, num_warps; num_stages
    "nvidia": (((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (4, 8)), (2, 3, 4, 5)),
    "amd": (((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (1, 2, 4, 8)), (2,)),
}

FORMATS = {  # dtype as the files write it -> bytes of a row's and of a weight's element, rate over the 16-bit rate
    "bf16": (2, 2, 1),
    "fp16": (2, 2, 1),
    "fp8_w8a8": (1, 1, 2),
    "int8_w8a8": (1, 1, 2),
    "int8_w8a16": (2, 1, 1),
    "int4_w4a16": (2, 0.5, 1),
}


@dataclass(frozen=True)
class Point:
    """One row of a file: a problem, and the tile that was measured as its fastest."""

    device: str
    experts: int
    intermediate: int
    gemm: str
    version: str
    tokens: int
    tile: tuple[int, int, int, int]  # block_m, block_n, block_k, num_warps
    stages: int
    group_m: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.experts, self.intermediate

    @property
    def problem(self) -> tuple:
        return (*self.shape, self.tokens, self.gemm.removesuffix("up"))


def read_points(path: Path, dtype: str = "bf16") -> list[Point]:
    """Rows of ``dtype``; those without ``num_warps`` or ``num_stages`` name no whole tile and are left out.

    ValueError names the path and what is wrong with it.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype: got {dtype!r}, accepted: {', '.join(FORMATS)}")
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from error
    if missing:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; accepted: {', '.join(COLUMNS)}")
    points = []
    for line, row in enumerate(rows, 2):
        found = (row["dtype"] or "bf16").removesuffix("_down")
        if found != dtype or not (row["num_warps"] and row["num_stages"]):
            continue
        try:
            points.append(_point(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {line}: {error}") from error
    if not points:
        held = sorted({row["dtype"] or "bf16" for row in rows})
        raise ValueError(f"{path}: no row of dtype {dtype}; it holds {', '.join(held) or 'no row at all'}")
    return points


def _point(row: dict[str, str]) -> Point:
    gemm = "down" if row["dtype"].endswith("_down") else row["gemm"]
    if gemm not in ("", "up", "down"):
        raise ValueError(f"gemm: got {gemm!r}, accepted: up, down or nothing")
    sizes = {name: int(row[name]) for name in SIZES}
    for name, size in sizes.items():
        if size < (name not in ("group_m", "num_stages")):
            raise ValueError(f"{name}: got {size}, accepted: positive numbers")
    tile = tuple(sizes[name] for name in ("block_m", "block_n", "block_k", "num_warps"))
    shape = sizes["experts"], sizes["intermediate"]
    return Point(
        row["device"], *shape, gemm, row["triton"], sizes["tokens"], tile, sizes["num_stages"], sizes["group_m"]
    )


@functools.cache
def geometry(experts: int, intermediate: int) -> tuple[int, int]:
    """(hidden size, experts a token) of a rank's shape, which files do not record.

    The model of :data:`GEOMETRIES` whose experts, or a part of them, and whose intermediate size, or a part of it, are
    the shape's; one more expert is a shared one that every token chooses. The fewest expert splits win, then the order
    of the table. A shape of no known model is taken as (6144, 2) with up to 8 experts, (4096, 4) with up to 32, (4096,
    8) with more, (4096, 1) with one.
    """
    found = []
    for order, (_, whole, wide, hidden, top_k) in enumerate(GEOMETRIES):
        for split, parts, shared in itertools.product(EXPERT_SPLITS, SPLITS, (0, 1)):
            if whole == (experts - shared) * split and wide == intermediate * parts:
                found.append((split, shared, order, parts, (hidden, top_k + shared)))
    if found:
        return min(found)[-1]
    if experts == 1:
        return 4096, 1
    return (6144, 2) if experts <= 8 else (4096, 4) if experts <= 32 else (4096, 8)


def halves(shapes) -> tuple[set, set]:
    """Two halves of the (experts, intermediate) shapes, by the order of their SHA-256; the first is never larger."""

    def key(shape):
        return hashlib.sha256(f"E={shape[0]},N={shape[1]}".encode()).hexdigest()

    ordered = sorted(set(shapes), key=key)
    return set(ordered[: len(ordered) // 2]), set(ordered[len(ordered) // 2 :])


@dataclass(frozen=True)
class Candidates:
    """The tiles of a chip's space: ``named[i]`` with each number of stages is rows ``i * S`` to ``i * S + S - 1``."""

    named: list[tuple[int, int, int, int]]
    stages: tuple[int, ...]
    tiles: Tiles

    @classmethod
    def of(cls, chip: Chip) -> "Candidates":
        shape, stages = SPACES[chip.vendor]
        named = list(itertools.product(*shape))
        return cls(named, stages, Tiles.of([(*tile, count) for tile in named for count in stages]))


def problem_terms(chip: Chip, point: Point, tiles: Tiles, dtype: str = "bf16") -> list[Terms]:
    """Terms of the products that a point was measured on: both, the first or the second."""
    hidden, top_k = geometry(*point.shape)
    row_bytes, weight_bytes, faster = FORMATS[dtype]
    rate = faster * chip.flops["bf16"]
    common = {"tokens": point.tokens, "top_k": top_k, "experts": point.experts}
    common |= {"row_bytes": row_bytes, "weight_bytes": weight_bytes, "rate": rate}
    products = []
    if point.gemm != "down":
        products.append(Product(columns=2 * point.intermediate, inner=hidden, **common))
    if point.gemm != "up":
        products.append(Product(columns=hidden, inner=point.intermediate, **common))
    return [terms(chip, product, tiles) for product in products]


def best_stages(scores: np.ndarray, fits: np.ndarray, stages: int) -> np.ndarray:
    """Scores of the named tiles, each at its best number of stages; -inf for those that fit with none."""
    return np.where(fits, scores, -np.inf).reshape(-1, stages).max(1)
