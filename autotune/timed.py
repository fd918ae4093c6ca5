"""Grouped products of experts whose tiles ``tune`` has timed: what a store says that files of winners do not.

A file of winners (:mod:`.measured`) names the fastest tile of each problem. A store has the times of all tiles that
were tried, so an order of tiles can be held against all of them, and what its first tile loses can be said. Times are
of the whole op, of which the product is a part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_kernels import tile_files
from mla_kernels.autotune import model, moe_model
from mla_kernels.autotune.session import current
from mla_kernels.launch import KERNELS, Tile
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import device


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
    """Whether a file is a store of tiles, by its first line."""
    try:
        tile_files.device_of_store(path)
    except tile_files.BadFile:
        return False
    return True


def read(path: Path) -> tuple[Chip, list[Timed]]:
    """A store's device, and its grouped products whose tiles were timed with today's kernels.

    ValueError names the path, and says where there is none.
    """
    chip = device(tile_files.device_of_store(path))
    found = []
    for entry in current(tile_files.read_store(path, chip.device)).values():
        times = entry.detail.get("times", ())
        if entry.provenance != "measured" or entry.kernel not in model.GROUPED or len(times) < 2:
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
