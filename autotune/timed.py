"""Grouped products of experts whose tiles ``tune`` has timed: what a store says that files of winners do not.

A file of winners (:mod:`.measured`) names the fastest tile of each problem. A store has the times of all tiles that
were tried, so an order of tiles can be held against all of them, and what its first tile loses can be said. Times are
of the whole op, of which the product is a part.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_kernels import tile_files
from mla_kernels.autotune import model, moe_model, online
from mla_kernels.autotune.session import current
from mla_kernels.launch import KERNELS, Tile
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import device
from mla_kernels.tile_files import Entry

SAID = ("part", "date", "versions", "times", "control", "error")
"""What ``tune`` writes beside each problem that it has timed."""


@dataclass(frozen=True)
class Timed:
    """A problem, the tiles that were timed and their median seconds; ``control``: the position of the tile in use."""

    kernel: str
    dtype: str
    statics: Mapping
    sizes: Mapping[str, int]
    tiles: tuple[Tile, ...]
    seconds: np.ndarray
    control: int

    @property
    def shape(self) -> tuple[int, int]:
        """Experts and their intermediate size, by which problems are halved."""
        width = self.sizes.get("intermediate") or max(self.sizes["depth"], self.sizes["columns"])
        return self.sizes["experts"], width

    def modelled(self, chip: Chip) -> np.ndarray:
        """The cost model's seconds of the tiles."""
        return np.array(
            model.all_seconds(KERNELS[self.kernel], chip, self.dtype, self.statics, self.sizes, list(self.tiles))
        )

    def features(self, chip: Chip) -> tuple[np.ndarray, np.ndarray]:
        """([tiles, FEATURES], log seconds of the terms over the ideal)."""
        features = np.zeros((len(self.tiles), len(moe_model.FEATURES)))
        log_seconds = np.zeros(len(self.tiles))
        grouped = model.grouped(KERNELS[self.kernel], chip, self.dtype, self.statics, self.sizes, self.tiles)
        for indices, shapes, parts in grouped:
            core, l2, start = (parts.seconds[name] for name in ("core", "l2", "start"))
            least = moe_model.ideal([parts])
            features[indices] = moe_model.features(shapes, [parts])
            log_seconds[indices] = np.log((np.maximum(np.maximum(core, l2), least) + start) / least)
        return features, log_seconds


def is_store(path: Path) -> bool:
    """Whether a file is meant as a store of tiles: its first line is a JSON object. A file of winners begins with names
    of columns."""
    try:
        with open(path) as file:
            return isinstance(json.loads(file.readline()), dict)
    except (OSError, ValueError):
        return False


def entries_of(path: Path) -> tuple[Chip, list[Entry], list[Entry]]:
    """A store's device, all its entries, and those that were timed there with the kernels' present sources.

    ValueError names the path, and an entry that says it was measured and is not as ``tune`` writes it.
    """
    name = tile_files.device_of_store(path)
    try:
        chip = device(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    entries = tile_files.read_store(path, chip.device)
    fresh = [entry for entry in current(entries).values() if entry.provenance == "measured"]
    for entry in fresh:
        if why := doubt(entry, chip):
            raise ValueError(f"{path}: {entry.kernel} {dict(entry.sizes)} says that it was measured, but {why}")
    return chip, entries, fresh


def doubt(entry: Entry, chip: Chip) -> str:
    """Why an entry cannot be what ``tune`` has measured on a device; else ''."""
    kernel, said = KERNELS[entry.kernel], entry.detail
    if missing := [name for name in SAID if name not in said]:
        return f"without {', '.join(missing)}"
    if said["part"] != chip.part:
        return f"on {said['part']!r}, and the store is of {chip.part!r}"
    if not any(entry.dtype in case.dtypes for case in kernel.cases) or set(entry.statics) != set(kernel.statics):
        return f"in {entry.dtype} with {dict(entry.statics)}; the kernel takes {', '.join(kernel.statics) or 'none'}"
    if unknown := entry.sizes.keys() - kernel.cases[0].sizes.keys():
        return f"the kernel has no {', '.join(sorted(unknown))}; it has {', '.join(kernel.cases[0].sizes)}"
    try:
        tiles, seconds = [one["tile"] for one in said["times"]], [float(one["median"]) for one in said["times"]]
        right = float(said["error"]) <= online.TOLERANCE[entry.dtype]
    except (KeyError, TypeError, ValueError) as error:
        return f"its times are damaged ({error!r})"
    if tiles != [dict(tile) for tile in entry.shortlist] or said["control"] not in tiles:
        return "its tiles are not those that were timed"
    if not all(0 < one < math.inf for one in seconds):
        return f"its times are {seconds} s"
    return "" if right else f"its result was {said['error']} off, accepted {online.TOLERANCE[entry.dtype]}"


def read(path: Path) -> tuple[Chip, list[Timed]]:
    """A store's device, and its grouped products whose tiles were timed with today's kernels.

    ValueError names the path, and says where there is none.
    """
    chip, _, timed = entries_of(path)
    found = []
    for entry in timed:
        times = entry.detail["times"]
        if entry.kernel not in model.GROUPED or len(times) < 2:
            continue
        tiles = tuple(dict(one["tile"]) for one in times)
        seconds = np.array([one["median"] for one in times])
        control = tiles.index(entry.detail["control"])
        found.append(Timed(entry.kernel, entry.dtype, entry.statics, entry.sizes, tiles, seconds, control))
    if not found:
        raise ValueError(
            f"{path}: no timed problem of {', '.join(model.GROUPED)} with the kernels' present sources; tune on the "
            "device makes such"
        )
    if not chip.is_gpu:
        raise ValueError(f"{path}: the model is one of GPUs, this is a store of {chip.device}")
    return chip, found
