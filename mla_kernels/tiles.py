"""Which tile a launch takes: looked up, never tuned.

In this order: what the user says (:func:`override`); the user's store, which ``python -m mla_kernels.autotune tune``
fills; the table that ships for the device; the kernel's closed-form rule. A store or table answers for the same kernel
source, dtype and constants, the same static sizes (heads, experts, hidden sizes, top-k) and dynamic sizes (tokens,
pairs, rows, ...) that are near on a logarithmic scale. The store of the device itself is asked first, then that of one
of its vendor, architecture, cores and memory size; of shipped tables, then those of its architecture.

Every answer is kept, mostly with all else that its launch needs (:meth:`mla_kernels.launch.Kernel.keep`), so that a
launch costs one dictionary lookup; files are read at a kernel's first launch. :func:`reload` forgets what was read.
"""

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mla_kernels import tile_files
from mla_kernels.placement import cpu_mode
from mla_kernels.targets import devices
from mla_kernels.targets.chips import Chip
from mla_kernels.tile_files import BadFile, Entry

LOG = logging.getLogger("mla_kernels.tiles")

KERNELS: dict[str, "object"] = {}
"""Every declared :class:`mla_kernels.launch.Kernel` by name."""

DYNAMIC = frozenset(
    (
        "tokens",
        "pairs",
        "rows",
        "parts",
        "batch",
        "queries",
        "keys",
        "window",
        "sequences",
        "columns",
        "chunks",
        "picks",
    )
)
"""Sizes that change from call to call. All others are the model's, and match exactly."""

FARTHEST = 1.5
"""How far on a scale of base 2 an entry's dynamic size may lie from the call's, each by itself: a factor of 2.8."""

GPU_OPTIONS = ("num_warps", "num_stages")
"""Launch options of the GPU compilers; they mean nothing on Ascend."""


@dataclass(frozen=True)
class Found:
    """A tile, and where it comes from: "override", "store", "table" or "rule"."""

    tile: dict[str, int]
    origin: str
    device: str = ""  # whose store or table
    entry: Entry | None = None


@dataclass(frozen=True)
class Problem:
    """What a launch looked up: a kernel with its constants and sizes."""

    kernel: "object"  # a launch.Kernel; launch imports this module
    dtype: str
    statics: Mapping
    sizes: Mapping[str, int]

    @property
    def key(self) -> tuple:
        return self.kernel.name, self.dtype, tuple(self.statics.items()), tuple(self.sizes.items())


class Launch(NamedTuple):
    """What an op of ``meta`` tensors would have launched, but for the grid."""

    kernel: "object"  # a launch.Kernel
    chip: Chip
    args: tuple
    statics: Mapping
    tile: Mapping[str, int]


class Kept:
    """What a kernel's launches found: tiles by problem (:meth:`mla_kernels.launch.Kernel.tile_for`), and plans by what
    a launcher makes them from (:meth:`mla_kernels.launch.Kernel.keep`)."""

    __slots__ = ("plans", "tiles")

    def __init__(self, tiles: dict | None = None, plans: dict | None = None):
        self.tiles = {} if tiles is None else tiles
        self.plans = {} if plans is None else plans


class _Forgetful(dict):
    def __setitem__(self, key, value):
        pass


_overrides: dict = {}  # kernel -> tile values
_override_kept: dict = {}  # (kernel, what is overridden) -> Kept under it
_recorded: list[list[Problem]] = []  # open recordings
_launched: list[list[Launch]] = []  # open recordings of launches
_told: set = set()  # misses and bad files that were logged
_silent = contextvars.ContextVar("silent", default=False)


def look_up(kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping) -> Found:
    """The tile that a launch of ``kernel`` (a :class:`mla_kernels.launch.Kernel`) takes on ``chip``, and its origin.

    Raises:
        NotImplementedError: the kernel has no path on this chip, or no tile for these constants.
        ValueError: an override that does not fit the chip.
    """
    for recording in _recorded:
        recording.append(Problem(kernel, dtype, dict(statics), dict(sizes)))
    if chip.name in kernel.unsupported:
        raise NotImplementedError(f"{kernel.name} on {chip.name}: {kernel.unsupported[chip.name]}")
    if said := _overrides.get(kernel):
        return _overridden(kernel, chip, dtype, statics, sizes, said)
    found = _stored(kernel, chip, dtype, statics, sizes)
    if found is None:
        found = Found(dict(kernel.rule(chip, dtype, statics, sizes)), "rule")
        _tell_miss(kernel, chip, dtype, statics, sizes)
    return found


def _overridden(kernel, chip, dtype, statics, sizes, said) -> Found:
    rule = _rule(kernel, chip, dtype, statics, sizes)
    stored = None if said.keys() >= needed(kernel, chip) else _stored(kernel, chip, dtype, statics, sizes)
    tile = dict(rule if stored is None else stored.tile) | said
    if problem := misfit(kernel, chip, dtype, statics, tile, rule):
        raise ValueError(f"override of {kernel.name} on {chip.name}: {problem}")
    return Found(tile, "override")


@contextlib.contextmanager
def override(kernel, tile: Mapping[str, int]) -> Iterator[None]:
    """Within the block, launches of ``kernel`` take these values of its tile, whatever stores and tables say.

    Args:
        kernel: a kernel's name (``python -m mla_kernels info`` lists them) or its declaration.
        tile: values by name, ``{"BLOCK_M": 64, "num_warps": 8}``; what is not named stays as it would be. An inner
            block adds to an outer one. It holds for the whole process: backward passes run in threads of their own.

    Raises:
        ValueError: an unknown kernel or name, with those that are accepted; at the launch, a value that the kernel does
            not declare, or a tile that the chip's memories do not hold.
        TypeError: a value is not an int.
    """
    kernel = _kernel(kernel)
    for name, value in tile.items():
        if name not in kernel.tiles:
            raise ValueError(f"tile: {kernel.name} has no {name!r}, accepted are {', '.join(kernel.tiles)}")
        if type(value) is not int:
            raise TypeError(f"tile: got {name}={value!r} for {kernel.name}, an int is accepted")
    before, kept = _overrides.get(kernel, {}), kernel.kept
    said = before | dict(tile)
    _overrides[kernel] = said
    kernel.kept = _override_kept.setdefault((kernel, tuple(sorted(said.items()))), Kept())
    try:
        yield
    finally:
        _overrides[kernel], kernel.kept = before, kept


@contextlib.contextmanager
def record() -> Iterator[list[Problem]]:
    """Within the block, the list gets every :class:`Problem` that is looked up, and ops of ``meta`` tensors go as far
    as their launches without running anything: so a model's problems are found without its memory."""
    recording: list[Problem] = []
    kept = {kernel: kernel.kept for kernel in KERNELS.values()}
    for kernel in kept:
        kernel.kept = Kept(_Forgetful(), _Forgetful())
    _recorded.append(recording)
    try:
        yield recording
    finally:
        _recorded.remove(recording)
        for kernel, before in kept.items():
            kernel.kept = before


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """As :func:`record`; the list gets every :class:`Launch` of ``meta`` tensors. Empty it when it grows long."""
    launches: list[Launch] = []
    with record():
        _launched.append(launches)
        try:
            yield launches
        finally:
            _launched.pop()


def keep_launch(*launch) -> None:
    """Add a launch, the fields of :class:`Launch`, to the open recordings."""
    for launches in _launched:
        launches.append(Launch(*launch))


def recording() -> bool:
    """Whether a :func:`record` block is open."""
    return bool(_recorded)


def reload() -> None:
    """Forget every tile that was looked up and every file that was read."""
    _entries.cache_clear()
    _override_kept.clear()
    _told.clear()
    for kernel in KERNELS.values():
        kernel.kept = Kept()


def needed(kernel, chip: Chip) -> set[str]:
    """Names that a tile must give on ``chip``."""
    return {name for name in kernel.tiles if chip.is_gpu or name not in GPU_OPTIONS}


def misfit(kernel, chip: Chip, dtype: str, statics: Mapping, tile: Mapping[str, int], rule: Mapping = {}) -> str:
    """Why ``chip`` cannot take this tile, by its names, its values (candidates of the declaration, or ``rule``'s) and
    its closed-form on-chip memory; else ''."""
    if missing := needed(kernel, chip) - tile.keys():
        return f"a tile without {', '.join(sorted(missing))}"
    for name, value in tile.items():
        if name not in kernel.tiles:
            return f"a tile with {name!r}; accepted are {', '.join(kernel.tiles)}"
        if type(value) is not int or value not in (*kernel.tiles[name], rule.get(name)):
            return f"{name}={value!r}; accepted are {', '.join(map(str, kernel.tiles[name]))}"
    unused = {name: values[0] for name, values in kernel.tiles.items()}  # memory() may name GPU options on Ascend
    for memory, used in kernel.memory(chip, dtype, statics, unused | dict(tile)).items():
        if used > chip.memory[memory]:
            return f"the tile needs about {used:,} bytes of {memory}, a program has {chip.memory[memory]:,}"
    return ""


def distance(entry: Mapping[str, int], sizes: Mapping[str, int]) -> float | None:
    """Sum over an entry's dynamic sizes of their distance to a call's on a scale of base 2; None: too far, or none."""
    total = 0.0
    for name, value in entry.items():
        if name not in sizes:
            return None
        if name in DYNAMIC:
            apart = abs(math.log2(max(sizes[name], 1) / max(value, 1)))
            if apart > FARTHEST:
                return None
            total += apart
    return total


def key_of(kernel: str, dtype: str, statics: Mapping, sizes: Mapping[str, int]) -> tuple:
    """What must be the same for an entry to answer: constants and static sizes, top-k (pairs a token) among them."""
    fixed = {name: value for name, value in sizes.items() if name not in DYNAMIC}
    if "tokens" in sizes and "pairs" in sizes:
        fixed["pairs a token"] = -(-sizes["pairs"] // max(1, sizes["tokens"]))
    return kernel, dtype, frozenset(statics.items()), frozenset(fixed.items())


def _stored(kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping) -> Found | None:
    alike, family = devices.relatives(chip)
    asked = [("store", device) for device in (chip.device, *alike)]
    asked += [("table", device) for device in (chip.device, *alike, *family)]
    key = key_of(kernel.name, dtype, statics, sizes)
    for origin, device in asked:
        near = []
        for position, entry in enumerate(_entries(origin, device).get(key, ())):
            apart = distance(entry.sizes, sizes)
            if apart is not None:
                near.append((apart, entry.provenance != "measured", -position, entry))
        for *_, entry in sorted(near, key=lambda item: item[:3]):
            if entry.source != kernel.source_hash:
                _warn(
                    (origin, device, kernel.name),
                    "%s: the %s of %s was made with another version of its source and is not used",
                    kernel.name, origin, device,
                )  # fmt: skip
                continue
            rule = _rule(kernel, chip, dtype, statics, entry.sizes)
            # an entry "rule" found none better than the rule's tile, which is that of the Triton installed here
            tile = entry.tile
            if entry.provenance == "rule" and rule:
                tile = {name: value for name, value in rule.items() if name in needed(kernel, chip)}
            problem = misfit(kernel, chip, dtype, statics, tile, rule)
            if not problem:
                return Found(dict(tile), origin, device, entry)
            _warn((origin, device, key), "%s: the %s of %s is not used: %s", kernel.name, origin, device, problem)
    return None


def _rule(kernel, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping) -> Mapping[str, int]:
    """The rule's tile; empty where it has none, or where an entry's sizes do not say enough."""
    try:
        return kernel.rule(chip, dtype, statics, sizes)
    except (KeyError, NotImplementedError):
        return {}


@functools.cache
def _entries(origin: str, device: str) -> dict[tuple, list[Entry]]:
    """Entries of a device's store or table by what must match; none where the file is missing or bad."""
    try:
        if origin == "store":
            found = tile_files.read_store(tile_files.store_path(device), device)
        else:
            path = tile_files.table_path(device)
            found = tile_files.read_table(path, device) if path.exists() else []
    except BadFile as error:
        _warn(("file", str(error)), "%s; it is not used", error)
        return {}
    except (OSError, RuntimeError) as error:  # no home folder, no right to look into it
        _warn(("file", device), "the tiles of %s: %s", device, error)
        return {}
    by_key: dict[tuple, list[Entry]] = {}
    for entry in found:
        by_key.setdefault(key_of(entry.kernel, entry.dtype, entry.statics, entry.sizes), []).append(entry)
    return by_key


def command(kernel: str, chip: Chip, dtype: str, statics: Mapping, sizes: Mapping) -> str:
    """The command that makes an entry for this problem."""
    words = [f"python -m mla_kernels.autotune tune --target {chip.device} --kernel {kernel} --dtype {dtype}"]
    for option, values in (("statics", statics), ("sizes", sizes)):
        if values:
            words.append(f"--{option} " + " ".join(f"{name}={_plain(value)}" for name, value in values.items()))
    return " ".join(words)


def _plain(value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _tell_miss(kernel, chip, dtype, statics, sizes) -> None:
    """Say once for a kernel and a model's sizes that the rule's tile is launched. Under an interpreter or emulator of
    CPU tensors, where a tile changes nothing, only to those who ask for it (INFO)."""
    if all(len(values) == 1 for values in kernel.tiles.values()) or _recorded:
        return
    _warn(
        key_of(kernel.name, dtype, statics, sizes),
        "%s: no tile is stored for these sizes on %s, the closed-form rule's is launched. To choose one: %s",
        kernel.name, chip.part, command(kernel.name, chip, dtype, statics, sizes),
        level=logging.WARNING if cpu_mode() == "torch" else logging.INFO,
    )  # fmt: skip


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within the block, lookups log nothing, and what they would have said is said at the next one outside."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _warn(what, message: str, *arguments, level: int = logging.WARNING) -> None:
    if what not in _told and not _silent.get():
        _told.add(what)
        LOG.log(level, message, *arguments)


def _kernel(kernel):
    if not isinstance(kernel, str):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; known kernels: {', '.join(KERNELS)}")
    return KERNELS[kernel]
