"""How good tile choices are, against what others measured: ``python -m mla_kernels.autotune evaluate``.

Every method orders the tiles (block_m, block_n, block_k, num_warps) of :data:`mla_kernels.autotune.measured.SPACES`
that fit the chip, for each problem of the file. Scored is the place of the measured winner: ``rank_percentile`` is its
mean place in percent (0: first, 100: last; the middle of its equals where a method cannot tell them apart), and
``recall@k`` the share of problems whose winner is among the first k (equals in random order). A winner outside the
space, or one that the model calls invalid, counts as last.

    model               :mod:`mla_kernels.autotune.moe_model` alone
    model + same chip   with the winners of the chip's other shapes, near in tokens per expert, tokens and sizes
    popularity          how often a tile won for the chip's other shapes
    default             tiles near the one that SGLang and vLLM take for a shape without a file
    rule                block_m the next power of two of the rows an expert gets, the rest as in the default
    random              no order

A device's shapes are halved (:func:`mla_kernels.autotune.measured.halves`). "Other shapes" are always those of the
other half. Shapes that the constants were fitted to are never scored: of the device that they were fitted on only the
second half is. The winner is a noisy label: ``label_noise`` is how often two versions of Triton agree on one problem.
"""

import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mla_kernels.autotune import moe_model, timed
from mla_kernels.autotune.measured import (
    FORMATS,
    Candidates,
    Point,
    best_stages,
    geometry,
    halves,
    problem_terms,
    read_points,
)
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import device

RECALLS = (1, 4, 8, 16, 32)
METHODS = ("model", "model + same chip", "popularity", "default", "rule", "random")

OCTAVES = (0.5, 1.0, 1.5, 1.5)
"""Distance at which another problem's winner counts exp(-1/2): tokens per expert, tokens, intermediate, experts."""

NEIGHBOUR = 0.15
"""What a winner counts for tiles one step away in one parameter."""

FLOOR = 0.01
"""Added to the share that a tile has of the nearby winners, before its logarithm is added to the model's score."""


def _steps(tiles) -> np.ndarray:
    """[tiles, tiles]: powers of two between them, summed over the parameters."""
    log = np.log2(np.array(tiles, float))
    return np.abs(log[:, None] - log[None]).sum(-1)


def default_tile(tokens: int, experts: int) -> tuple[int, int, int, int]:
    """The tile of 16-bit problems without a file in SGLang's and vLLM's ``get_default_config``; Triton's 4 warps."""
    return (16, 32, 64, 4) if tokens <= experts else (64, 64, 32, 4)


def rule_tile(point: Point) -> tuple[int, int, int, int]:
    """The default with block_m the next power of two of the rows an expert gets on average."""
    rows = max(1, -(-point.tokens * geometry(*point.shape)[1] // point.experts))
    block_m = min(256, max(16, 1 << (rows - 1).bit_length()))
    return (block_m, *default_tile(point.tokens, point.experts)[1:])


def _position(point: Point) -> np.ndarray:
    rows = point.tokens * geometry(*point.shape)[1] / point.experts
    return np.log2([rows, point.tokens, point.intermediate, point.experts])


class Scorer:
    """Scores of every method for the problems of one chip, over ``space.named``."""

    def __init__(self, chip: Chip, dtype: str = "bf16"):
        self.chip, self.dtype = chip, dtype
        self.space = Candidates.of(chip)
        self.row = {tile: index for index, tile in enumerate(self.space.named)}
        self.near = np.eye(len(self.row)) + NEIGHBOUR * (_steps(self.space.named) == 1)
        self._known: dict[tuple, np.ndarray] = {}

    def model(self, point: Point) -> np.ndarray:
        """Scores of the model alone; -inf for tiles that do not fit."""
        if point.problem not in self._known:
            parts = problem_terms(self.chip, point, self.space.tiles, self.dtype)
            scores = moe_model.score(self.space.tiles, parts)
            self._known[point.problem] = best_stages(scores, moe_model.valid(parts), len(self.space.stages))
        return self._known[point.problem]

    def all(self, point: Point, others: Sequence[Point]) -> dict[str, np.ndarray]:
        """Method -> scores, given the points of the chip's other shapes."""
        model = self.model(point)
        fits = np.isfinite(model)
        winners = np.array([self.row[other.tile] for other in others if other.tile in self.row], int)
        scores = {"model": model, "random": np.zeros(len(model))}
        for name, tile in ("default", default_tile(point.tokens, point.experts)), ("rule", rule_tile(point)):
            scores[name] = -_steps([tile, *self.space.named])[0, 1:]
        if len(winners):
            scores["popularity"] = np.bincount(winners, minlength=len(model)).astype(float)
            places = np.array([_position(other) for other in others if other.tile in self.row])
            apart = ((places - _position(point)) / OCTAVES) ** 2
            counts = np.exp(-apart.sum(1) / 2) + 1e-4
            nearby = np.bincount(winners, counts, len(model)) @ self.near
            scores["model + same chip"] = model + np.log(nearby / nearby.sum() + FLOOR)
        return {name: np.where(fits, score, -np.inf) for name, score in scores.items()}


def place(scores: np.ndarray, winner: int | None) -> tuple[int, int, int]:
    """(tiles before the winner, tiles equal to it and itself, valid tiles)."""
    fits = int(np.isfinite(scores).sum())
    if winner is None or not math.isfinite(scores[winner]):
        return fits, 1, fits
    return int((scores > scores[winner]).sum()), int((scores == scores[winner]).sum()), fits


def metrics(places: Sequence[tuple[int, int, int]]) -> dict:
    """Mean rank percentile and recalls of the places of one method."""
    percent = [100 * min(1, (before + (equal - 1) / 2) / max(1, fits - 1)) for before, equal, fits in places]
    recall = {
        str(k): float(np.mean([min(1, max(0, (k - before) / equal)) for before, equal, _ in places])) for k in RECALLS
    }
    return {"rank_percentile": float(np.mean(percent)), "recall": recall}


def label_noise(points: Sequence[Point]) -> dict | None:
    """How often two versions of Triton agree on the winner of one problem, None where no problem was tuned twice.

    ``tile`` counts (block_m, block_n, block_k, num_warps), ``whole`` also group_m and stages. Files that agree
    everywhere may be copies of one another; ``without_copies`` leaves them out.
    """
    files: dict[tuple, dict[str, dict[int, Point]]] = defaultdict(lambda: defaultdict(dict))
    for point in points:
        files[(*point.shape, point.gemm)][point.version][point.tokens] = point
    agreed = []  # of a pair of files: [problems, [tile, whole]]
    for versions in files.values():
        for one, other in itertools.combinations(versions.values(), 2):
            pairs = [(one[tokens], other[tokens]) for tokens in one.keys() & other.keys()]
            if pairs:
                agreed.append([(a.tile == b.tile, _whole(a) == _whole(b)) for a, b in pairs])
    if not agreed:
        return None
    distinct = [pair for pair in agreed if not all(whole for _, whole in pair)]

    def shares(pairs):
        rows = [row for pair in pairs for row in pair]
        return {"problems": len(rows)} | dict(zip(("tile", "whole"), np.mean(rows, 0).tolist())) if rows else None

    return shares(agreed) | {"without_copies": shares(distinct)}


def _whole(point: Point) -> tuple:
    return (*point.tile, point.group_m, point.stages)


def evaluate_store(path: Path) -> dict:
    """Scores by device of a store of timed tiles: of the model, of the tile in use and of no order."""
    chip, found = timed.read(path)
    fitted = moe_model.constants()["fitted_on"]
    excluded = {tuple(s) for s in fitted["shapes"]} if device(fitted["device"]).device == chip.device else set()
    scored = [one for one in found if one.shape not in excluded]
    places: dict[str, list] = defaultdict(list)
    lost: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        in_use = np.arange(len(one.tiles)) == one.control
        orders = {"model": -one.modelled(chip), "in use": in_use.astype(float), "random": np.zeros(len(one.tiles))}
        best = int(np.argmin(one.seconds))
        for name, scores in orders.items():
            places[name].append(place(scores, best))
            first = scores == scores.max()
            lost[name].append(float(np.log(one.seconds[first]).mean() - np.log(one.seconds[best])))
    return {
        "measured": str(path),
        "device": chip.device,
        "target": chip.name,
        "problems": len(found),
        "scored": len(scored),
        "tiles": float(np.mean([len(one.tiles) for one in scored])) if scored else 0.0,
        "kernels": sorted({one.kernel for one in scored}),
        "methods": {name: metrics(places[name]) | {"lost": math.expm1(float(np.mean(lost[name])))} for name in places},
        "fitted_on": fitted,
    }


def _fitted_shapes(points: Sequence[Point]) -> set:
    """Shapes of these points that the constants were fitted to."""
    fitted = moe_model.constants()["fitted_on"]
    if device(points[0].device).device != device(fitted["device"]).device:
        return set()
    return {tuple(shape) for shape in fitted["shapes"]}


def evaluate_device(points: Sequence[Point], dtype: str = "bf16") -> dict:
    """Scores of every method on the points of one device."""
    chip = device(points[0].device)
    scorer = Scorer(chip, dtype)
    parts = halves(point.shape for point in points)
    fitted = _fitted_shapes(points)
    scored = [point for point in points if point.shape not in fitted]
    others = [[other for other in points if other.shape in half] for half in reversed(parts)]
    if fitted:  # the other shapes are those of the fit
        others = [[], [other for other in points if other.shape in fitted]]
    places: dict[str, list] = defaultdict(list)
    best, outside = Counter(), 0
    for point in scored:
        known = others[1] if fitted else others[point.shape in parts[1]]
        winner = scorer.row.get(point.tile)
        outside += winner is None or not math.isfinite(scorer.model(point)[winner])
        for name, scores in scorer.all(point, known).items():
            places[name].append(place(scores, winner))
        best[scorer.space.named[int(np.argmax(scorer.model(point)))]] += 1
    return {
        "device": chip.device,
        "target": chip.name,
        "dtype": dtype,
        "points": len(points),
        "scored": len(scored),
        "shapes": len({point.shape for point in points}),
        "shapes_scored": sorted({point.shape for point in scored}),
        "outside_space": int(outside),
        "tiles": float(np.mean([fits for _, _, fits in places["model"]])) if scored else 0.0,
        "label_noise": label_noise(points),
        "methods": {name: metrics(places[name]) for name in METHODS if places[name]},
    }


def evaluate(path: Path, dtype: str = "bf16") -> dict:
    """Scores by device of a file of measured winners. Devices without known figures are listed as ``unknown``.

    Raises ValueError for a file that is none, for one without rows of ``dtype``, and where no device is known.
    """
    by_device: dict[str, list[Point]] = defaultdict(list)
    for point in read_points(path, dtype):
        by_device[point.device].append(point)
    unknown = {}
    for name in sorted(by_device):
        try:
            if not device(name).is_gpu:
                unknown[name] = "the model is one of GPUs"
        except ValueError as error:
            unknown[name] = str(error)
    known = [name for name in sorted(by_device) if name not in unknown]
    if not known:
        raise ValueError(f"{path}: {'; '.join(f'{name}: {why}' for name, why in unknown.items())}")
    return {
        "measured": str(path),
        "devices": {name: evaluate_device(by_device[name], dtype) for name in known},
        "unknown": sorted(unknown),
        "fitted_on": moe_model.constants()["fitted_on"],
    }


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="score tile choices against measured winners or a store")
    parser.add_argument(
        "--measured", type=Path, required=True, metavar="FILE", help="measured winners (CSV) or a store of tune (jsonl)"
    )  # fmt: skip
    parser.add_argument("--dtype", choices=FORMATS, help="rows of a CSV to score (default: bf16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options) -> int:
    if timed.is_store(options.measured):
        if options.dtype is not None:
            raise ValueError(f"--dtype: got {options.dtype}, it chooses rows of a CSV; a store is scored as a whole")
        result = evaluate_store(options.measured)
        print(json.dumps(result, indent=1) if options.json else _store_page(result))
        return 0
    result = evaluate(options.measured, options.dtype or "bf16")
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    for name, scores in result["devices"].items():
        print(_page(name, scores))
    for name in result["unknown"]:
        print(f"{name}: no figures are known, left out", file=sys.stderr)
    return 0


def _store_page(scores: dict) -> str:
    lines = [
        f"{scores['measured']} ({scores['device']}, {scores['target']}): {scores['scored']} of {scores['problems']} "
        f"timed problems of {', '.join(scores['kernels']) or 'no kernel'}, {scores['tiles']:.0f} tiles each",
        f"{'':<20}{'percentile':>11}{'lost':>11}" + "".join(f"{f'recall@{k}':>11}" for k in RECALLS),
    ]
    for method, found in scores["methods"].items():
        recalls = "".join(f"{found['recall'][str(k)]:>11.3f}" for k in RECALLS)
        lines.append(f"{method:<20}{found['rank_percentile']:>11.1f}{found['lost']:>11.1%}{recalls}")
    return "\n".join(lines)


def _page(name: str, scores: dict) -> str:
    lines = [
        f"{name} ({scores['device']}, {scores['target']}), {scores['dtype']}: {scores['scored']} of {scores['points']} "
        f"points, {len(scores['shapes_scored'])} of {scores['shapes']} shapes, {scores['tiles']:.0f} valid tiles a "
        f"problem, {scores['outside_space']} winners outside the space",
        f"{'':<20}{'percentile':>11}" + "".join(f"{f'recall@{k}':>11}" for k in RECALLS),
    ]
    for method, found in scores["methods"].items():
        recalls = "".join(f"{found['recall'][str(k)]:>11.3f}" for k in RECALLS)
        lines.append(f"{method:<20}{found['rank_percentile']:>11.1f}{recalls}")
    noise = scores["label_noise"]
    if noise is None:
        lines.append("label noise: no problem was tuned under two versions of Triton")
    else:
        for label, share in ("", noise), (", copied files left out", noise["without_copies"]):
            if share:
                lines.append(
                    f"label noise: two versions of Triton agree on {share['tile']:.0%} of tiles, {share['whole']:.0%} "
                    f"of whole configurations ({share['problems']} problems tuned twice{label})"
                )
    return "\n".join(lines) + "\n"
