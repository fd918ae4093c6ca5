"""Kernel: a ``@triton.jit`` function with the declaration that every tool reads, and its cached launch.

A declaration stands beside each kernel and says what its arguments are, which constants a problem fixes, which a tile
chooses, what fits, and what the work costs. The compile matrix, the autotuner, the NPU emulator, the benchmarks and the
launch all read it; nothing is listed twice.
"""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mla_kernels import tiles as tile_lookup
from mla_kernels.gpu_launch import GpuLaunch
from mla_kernels.language import HAS_TRITON
from mla_kernels.placement import CPU, chip_of, cpu_mode, on_cpu
from mla_kernels.quant.cache_layout import QUANTISED
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.emulated_npu import NpuTensor, memory
from mla_kernels.targets.source import code_of, python_function, standalone
from mla_kernels.tiles import GPU_OPTIONS, KERNELS

__all__ = [
    "DTYPE_BYTES",
    "DTYPE_NAMES",
    "GPU_OPTIONS",
    "KERNELS",
    "NO_MEMORY",
    "Case",
    "Cost",
    "Kernel",
    "Tile",
    "Work",
    "chip_of",
    "cpu_mode",
    "on_cpu",
]

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NO_MEMORY = 1 << 30
"""More bytes than a program of any chip has: what a kernel's ``memory`` says of a tile that does not exist."""
MOST_KEPT = 65536
"""Tiles, and plans, that a kernel keeps; sizes that never repeat fill it, and it starts again."""

Tile = dict[str, int]


@dataclass(frozen=True)
class Cost:
    """Compulsory cost of a problem, whatever the tile: ``bytes`` counts each input and each output once."""

    flops: float
    bytes: float
    workspace: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a tile makes of a problem: programs launched, and FLOPs (padding included) and bytes requested by each."""

    programs: int
    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """A named problem that the compile matrix, the tuner and the benchmarks use: its constants and its sizes."""

    name: str
    statics: Mapping[str, int | str | bool] = field(hash=False)
    sizes: Mapping[str, int] = field(hash=False)
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")


def _latent_type(dtype: str, statics: Mapping) -> str:
    return "i8" if statics.get("LAYOUT") in QUANTISED else dtype


TYPES = {
    "T": lambda dtype, statics: dtype,
    "O": lambda dtype, statics: statics.get("OUT", dtype),
    "L": _latent_type,
}
"""Letters that stand for types of a kernel's arguments: letter -> (dtype, statics) -> Triton type."""


def _hash_callees(fn, seen: set[int]) -> None:
    """Have Triton hash what a function calls, leaves first, and then the function."""
    seen.add(id(fn))
    python = python_function(fn)
    names, scope = python.__code__.co_names, python.__globals__ | inspect.getclosurevars(python).nonlocals
    found = [scope.get(name) for name in names]
    modules = [value for value in found if isinstance(value, types.ModuleType)]
    found += [getattr(module, name, None) for module in modules for name in names]
    for value in found:
        # the type is asked, since asking the function for its key would hash it
        if hasattr(type(value), "cache_key") and hasattr(value, "fn") and id(value) not in seen:
            _hash_callees(value, seen)
    _ = fn.cache_key


class Kernel:
    """One Triton kernel and what is known about it. ``language``: which of Triton's languages it is written in.

    Args:
        fn: the ``@triton.jit`` function. Its run-time arguments come first, its ``tl.constexpr`` arguments after them.
        arguments: run-time argument -> type, in order: ``"*T"`` (pointer to the element type), ``"*fp32"``, ``"*i32"``,
            ``"i32"``, ``"fp32"``; ``"*O"`` (pointer to results of the type that the constant OUT names: "fp32", "bf16",
            "fp16", else the element type); ``"*L"`` (pointer to cached latents: int8 codes where the constant LAYOUT is
            a quantised one, else the element type); and the letters of ``types``. A type may end in ``":16"``:
            offline compiles assume divisibility by 16, as the launch finds it on real sizes. Pointers are always
            assumed aligned offline.
        statics: constexpr names that the problem fixes.
        tiles: constexpr or GPU option -> candidate values. Every other constexpr name is in ``statics``.
        rule: ``(chip, dtype, statics, sizes) -> tile``: the closed-form choice used where no table has an entry; it
            must fit every chip.
        memory: ``(chip, dtype, statics, tile) -> {memory: bytes}``: closed-form estimate of on-chip use, for pruning.
        cost: ``(dtype, statics, sizes) -> Cost``.
        work: ``(dtype, statics, sizes, tile) -> Work``.
        cases: the problems that tools use.
        uses_dot: whether programs run on the matrix units (cube cores on Ascend).
        unsupported: chip name -> reason, for chips that this kernel has no path on.
        types: letter -> ``(dtype, statics) -> Triton type``, for arguments whose type the constants fix.
    """

    language = "triton"

    def __init__(
        self,
        fn,
        *,
        arguments: Mapping[str, str],
        statics: tuple[str, ...],
        tiles: Mapping[str, tuple[int, ...]],
        rule: Callable[[Chip, str, Mapping, Mapping], Tile],
        memory: Callable[[Chip, str, Mapping, Mapping], dict[str, int]],
        cost: Callable[[str, Mapping, Mapping], Cost],
        work: Callable[[str, Mapping, Mapping, Mapping], Work],
        cases: tuple[Case, ...],
        uses_dot: bool,
        unsupported: Mapping[str, str] = {},
        types: Mapping[str, Callable[[str, Mapping], str]] = {},
    ):
        self.fn = fn
        self.name = python_function(fn).__name__
        self.arguments = dict(arguments)
        self.types = TYPES | dict(types)
        self.statics = tuple(statics)
        self.tiles = {name: tuple(values) for name, values in tiles.items()}
        self.tile_constants = tuple(name for name in self.tiles if name not in GPU_OPTIONS)
        self.rule, self.memory, self.cost, self.work = rule, memory, cost, work
        self.cases, self.uses_dot, self.unsupported = tuple(cases), uses_dot, dict(unsupported)
        self._gpu = GpuLaunch(self)
        self._launch_gpu = self._gpu.launch
        self.kept = tile_lookup.Kept()
        KERNELS[self.name] = self
        if HAS_TRITON:
            code = python_function(fn).__code__
            declared = (*self.arguments, *self.statics, *self.tile_constants)
            self._constexprs = code.co_varnames[len(self.arguments) : code.co_argcount]
            if set(declared) != set(code.co_varnames[: code.co_argcount]) or list(self.arguments) != list(
                code.co_varnames[: len(self.arguments)]
            ):
                raise TypeError(f"{self.name}: the declaration does not name the kernel's arguments in order")

    @property
    def launches_known(self) -> int:
        """Entries of the launch cache."""
        return len(self._gpu.known)

    @functools.cached_property
    def jit(self):
        """Triton's function, whose key in caches on disk no longer depends on what this process launched before.

        Triton 3.6 and 3.7 take into a function's hash the constants of those callees alone that were hashed before it
        (3.9 hashes them first): the kernel's key would be another where a kernel with the same helpers came before
        (``findings/triton_cache_key_depends_on_order.sh``).
        """
        fn = getattr(self.fn, "loaded", self.fn)
        _hash_callees(fn, set())
        return fn

    @functools.cached_property
    def source(self) -> str:
        """The kernel and its helpers as a module of their own."""
        return standalone(self.fn)

    @functools.cached_property
    def source_hash(self) -> str:
        """Of the kernel's code; a comment or a docstring changes nothing."""
        return hashlib.sha256(code_of(self.source).encode()).hexdigest()[:16]

    def signature(self, dtype: str, statics: Mapping) -> dict[str, str]:
        """Run-time argument -> Triton type for offline compiles, ``:16`` suffixes kept."""
        known = {letter: of(dtype, statics) for letter, of in self.types.items()}
        parts = {name: kind.lstrip("*").partition(":") for name, kind in self.arguments.items()}
        return {
            name: "*" * self.arguments[name].startswith("*") + known.get(letter, letter) + colon + divisor
            for name, (letter, colon, divisor) in parts.items()
        }

    def options(self, chip: Chip, tile: Mapping) -> dict[str, int | bool]:
        """Launch options that mean something on ``chip``.

        A product and the sum that it enters are fused on every GPU, whatever Triton's version takes by default: an
        instruction and a rounding less, and the same roundings with all of them.
        """
        if not chip.is_gpu:
            return {}
        return {name: tile[name] for name in GPU_OPTIONS if name in tile} | {"enable_fp_fusion": True}

    def constexprs(self, statics: Mapping, tile: Mapping) -> dict:
        """Constant arguments of the kernel, in its order."""
        return {name: tile[name] if name in self.tiles else statics[name] for name in self._constexprs}

    def described(self, args: tuple, statics: Mapping) -> tuple | list:
        """``args`` as Triton's JIT takes them."""
        return args

    def programs(self, chip: Chip, work: int) -> int:
        """Grid size: one program an item on GPUs, a persistent grid of one program a core on Ascend."""
        if chip.is_gpu:
            return work
        return min(work, chip.dot_cores if self.uses_dot else chip.vector_cores)

    def tile_for(self, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping) -> Tile:
        """The tile to launch; see :func:`mla_kernels.tiles.look_up`. An answer is kept."""
        key = (chip.device, dtype, *statics.values(), *sizes.values())
        tiles = self.kept.tiles
        tile = tiles.get(key)
        if tile is None:
            if len(tiles) >= MOST_KEPT:
                tiles.clear()
            tile = tiles[key] = tile_lookup.look_up(self, chip, dtype, statics, sizes).tile
        return tile

    def keep(self, key: tuple, plan):
        """Keep what a launcher worked out from ``key`` alone, mostly tile, constants and grid; returns ``plan``.

        A launcher asks ``kept.plans`` for its key first: then a call costs one lookup. The key holds the chip's
        ``device``, the dtype, and all constants and sizes that the plan follows from. Overrides, recordings and
        :func:`mla_kernels.tiles.reload` put other ``kept`` in place, as for tiles.
        """
        plans = self.kept.plans
        if len(plans) >= MOST_KEPT:
            plans.clear()
        plans[key] = plan
        return plan

    def launch(self, chip: Chip, work: int, args: tuple, statics: Mapping, tile: Mapping) -> None:
        """Run ``work`` items. ``args`` follow the declared order; tensors must lie on one device.

        Nothing here waits for the device, allocates, or tunes. CPU tensors go where ``on_cpu`` says.
        """
        if work == 0:
            return
        first = args[0]
        if first.is_cuda or (CPU.mode == "cuda" and first.is_cpu):
            self._launch_gpu(chip, work, args, statics, tile)
            return
        grid = self.programs(chip, work)
        device = first.device
        kind = device.type
        if kind == "cpu" and cpu_mode() in ("interpret", "hopper-emulated"):
            self._interpret(grid, args, statics, tile)
        elif kind == "cpu" and cpu_mode() == "npu-emulated":
            from mla_kernels.targets import emulator

            emulator.launch(self, chip, grid, args, self.constexprs(statics, tile))
        elif isinstance(first, NpuTensor):
            from mla_kernels.targets import emulator

            args = memory(self.name, dict(zip(self.arguments, args)))
            emulator.launch(self, chip, grid, args, self.constexprs(statics, tile))
        elif kind == "npu":
            self.fn[(grid,)](*args, **self.constexprs(statics, tile))
        elif kind == "meta" and tile_lookup.recording():
            tile_lookup.keep_launch(self, chip, args, statics, tile)
        else:
            raise NotImplementedError(f"{self.name}: no launch for tensors on {device}; cuda, npu and cpu have one")

    def _interpret(self, grid: int, args: tuple, statics: Mapping, tile: Mapping) -> None:
        """Run on CPU tensors in Triton's interpreter."""
        from mla_kernels.targets import interpreter

        interpreter.prepare()
        self.fn[(grid,)](*args, **self.constexprs(statics, tile))
