"""Which ops a server of a model calls, at which sizes: what a bundle covers.

The public ops as :mod:`mla_kernels.autotune.problems` builds them, and the layers of :mod:`mla_kernels.nn`, which call
ops in forms of their own (shared experts among the routed ones, views of stacked projections, chunks of prompts). All
on ``meta``, so that a call costs a millisecond and no memory.

A launch is compiled anew where an integer becomes 1, or divisible by 16, or a tile changes. So every number of tokens
of a decoding step is called, and of prompts one in each class: multiples of 16, other even numbers, odd ones.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from mla_kernels.autotune.making import PAGE, Make
from mla_kernels.autotune.models import Geometry
from mla_kernels.autotune.problems import OPERATIONS
from mla_kernels.bundling import layers

PLAIN = "plain"
"""The layout of caches in the model's own dtype."""
CACHES = (PLAIN, "fp8_v32", "fp8_v4", "int8")
TRAINING = ("compress_windows", "hyper backward")
"""Operations that no server calls."""
POOLS = (0, 1 << 14, 4 << 20)
"""Tokens of caches: as many as the tables name, or more; the last above 2 GiB, which AMD's buffer instructions do not
reach. Each is also taken with one page more, as the number of pages may be divisible by 16 or not."""
STRIDE = 64
"""Of numbers of tokens beyond a decoding step's; tiles change at far larger steps."""


@dataclass(frozen=True)
class Limits:
    """What a server asks for: sequences of a decoding step, new tokens of each, tokens of a prompt or of a chunk of
    one, the longest contexts that tables of pages have room for, and tokens of a page."""

    batch: int = 512
    queries: tuple[int, ...] = (1, 2)
    tokens: int = 8192
    contexts: tuple[int, ...] = (4096, 32768, 131072)
    pages: tuple[int, ...] = (PAGE,)

    def __post_init__(self):
        for name, values in asdict(self).items():
            values = values if isinstance(values, tuple) else (values,)
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise ValueError(f"{name}: got {values}, integers from 1 are accepted")

    def counts(self) -> list[int]:
        """Numbers of tokens that are called."""
        found = set(range(1, min(self.batch, self.tokens) + 1)) | {self.tokens}
        for start in range(0, self.tokens, STRIDE):
            found |= {count for count in (start, start + 1, start + 2) if 0 < count <= self.tokens}
        return sorted(found)


@dataclass(frozen=True)
class Step:
    """One op, or a layer's call, and the sizes that it is called with."""

    name: str
    call: Callable[[dict], object]
    sizes: tuple[dict, ...]


class Long(Make):
    """Positions and slots in int64, as some servers keep them."""

    def integers(self, *shape: int, below: int) -> torch.Tensor:
        return super().integers(*shape, below=below).long()

    def counting(self, *shape: int) -> torch.Tensor:
        return super().counting(*shape).long()


def default_caches(g: Geometry) -> tuple[str, ...]:
    """The layouts of cache that a model is served with."""
    if not g.latent:
        return PLAIN, "fp8_v4"
    return (PLAIN, "fp8_v32") if g.index_heads else (PLAIN,)


def steps(
    g: Geometry, dtype: torch.dtype, limits: Limits, *, formats: Iterable[str], caches: Iterable[str], device="meta"
) -> Iterator[Step]:
    """Every call of one device's share of a model. ``formats``: of experts' weights, "plain" for ``dtype`` itself."""
    formats = tuple(formats)
    wanted = replace(g, formats=tuple(format for format in formats if format != PLAIN))
    make, long = Make(device, dtype), Long(device, dtype)
    for name, operation in OPERATIONS.items():
        plain_experts = name == "fused_moe" and PLAIN not in formats
        if name in TRAINING or plain_experts or not operation.applies(wanted):
            continue
        sizes = tuple(_sizes(name, wanted, limits))
        yield Step(name, functools.partial(_run, operation.build, wanted, make), sizes)
        if name in INDEXED:
            yield Step(f"{name}, int64", functools.partial(_run, operation.build, wanted, long), sizes)
        if name not in CACHED:
            continue
        for layout in caches:
            if layout == PLAIN or not _holds(wanted, layout):
                continue
            build = functools.partial(operation.build, layout=layout)
            yield Step(f"{name}, {layout}", functools.partial(_run, build, wanted, make), sizes)
            if name in INDEXED:
                yield Step(f"{name}, {layout}, int64", functools.partial(_run, build, wanted, long), sizes)
    held = [layout for layout in caches if _holds(wanted, layout)]
    for name, call, sizes in layers.calls(wanted, make, limits, formats, held):
        yield Step(name, call, tuple(sizes))


def _holds(g: Geometry, layout: str) -> bool:
    """Whether the model's latents fit a layout: DeepSeek-V4's, which has no key beside them, or another."""
    return layout == PLAIN or (layout == "fp8_v4") == (not g.latent)


def _run(build, g: Geometry, make: Make, size: dict) -> None:
    build(g, size, make).run()


CACHED = ("mla_decode", "sparse_mla_decode", "write_latent", "norm_and_write", "write_kv", "write_paged_windows")
"""Operations whose cache has a layout."""
INDEXED = (
    "write_latent", "norm_and_write", "write_kv", "write_paged_windows", "write_indexer_key", "absorb_query",
    "rotate_heads",
)  # fmt: skip
"""Operations that take positions and slots in int32 or int64."""


def _sizes(name: str, g: Geometry, limits: Limits) -> Iterator[dict]:
    batches = range(1, limits.batch + 1)
    if name in ("mla_decode", "sparse_mla_decode", "select_slots"):
        yield from _cached(name, limits, batches)
    elif name == "mla_prefill":
        for causal in (1, 0):
            for sequences in (1, 2, 3, 16, 32):
                yield from (
                    {"tokens": tokens, "sequences": sequences, "causal": causal}
                    for tokens in limits.counts()
                    if tokens >= sequences
                )
    elif name == "write_windows":
        for ratio, width in ((128, 512), (4, 512), (4, 128)):
            rest = {"ratio": ratio, "width": width}
            yield from ({"sequences": batch, "tokens": 1} | rest for batch in batches)
            yield from ({"sequences": 1, "tokens": tokens} | rest for tokens in limits.counts())
    elif name == "write_paged_windows":
        for ratio, width in ((128, 512), (4, 512), (4, 128)):
            yield from ({"tokens": tokens, "ratio": ratio, "width": width} for tokens in limits.counts())
    elif name.endswith("_paged_mqa_logits"):
        yield from ({"batch": batch, "keys": keys} for keys in limits.contexts for batch in batches)
    elif name.endswith("_mqa_logits"):
        for keys, more in itertools.product(limits.contexts, (0, 1)):
            yield from ({"tokens": tokens, "keys": keys + more} for tokens in limits.counts())
    elif name == "fp8_gemm_nt":
        for number in range(4):  # MLA's three and the shared experts'
            yield from ({"tokens": tokens, "projection": number} for tokens in limits.counts())
    elif name == "entry_slots":
        yield from ({"sequences": batch} for batch in batches)
    else:
        yield from ({"tokens": tokens} for tokens in limits.counts())
        if name in CACHED:
            for page in limits.pages:
                for pool in _pools(page):
                    yield from ({"tokens": tokens, "pool": pool, "page": page} for tokens in _few(limits.counts()))


def _cached(name: str, limits: Limits, batches: Iterable[int]) -> Iterator[dict]:
    """Sizes of an op that reads a cache through tables of pages."""
    sweep = {"mla_decode": ("queries", limits.queries), "select_slots": ("codes", (0, 1))}
    varied, values = sweep.get(name, ("queries", (1,)))
    for page, context, value in itertools.product(limits.pages, limits.contexts, values):
        for room in (context, context + page):
            rest = {"keys" if name == "select_slots" else "context": room, varied: value, "page": page}
            yield from ({"batch": batch} | rest for batch in batches)
            for pool in _pools(page):
                yield from ({"batch": batch, "pool": pool} | rest for batch in _few(batches))


def _pools(page: int) -> Iterator[int]:
    """Tokens of caches."""
    for tokens in POOLS:
        yield from (tokens, tokens + page)


def _few(values: Iterable[int]) -> list[int]:
    """One or two of each class."""
    values = list(values)
    return [value for value in values if value <= 18 or value == values[-1]]
