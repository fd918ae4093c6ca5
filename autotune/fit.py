"""Fits the constants of :mod:`mla_kernels.autotune.moe_model` to a file of measured winners.

The winner of a problem is one draw among the valid tiles of its space, with log odds linear in the features
(conditional logit). The weights maximise the likelihood of the winners' shapes, plus STAGES_SHARE of that of their
stages, less RIDGE of their squares in units of a feature's spread; those of costs are held at or below zero. Fitted on
half of the file's (experts, intermediate) shapes (:func:`mla_kernels.autotune.measured.halves`); the other half is
never looked at. Of a store of timed tiles (:mod:`mla_kernels.autotune.timed`) the fastest is a draw among those that
were timed. ``seconds`` maps scores to the terms' scale: the straight line that gives log seconds their mean and
spread.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mla_kernels.autotune import moe_model, timed
from mla_kernels.autotune.measured import Candidates, Point, halves, problem_terms, read_points
from mla_kernels.checks import output_file
from mla_kernels.targets.chips import Chip
from mla_kernels.targets.devices import device

STAGES_SHARE = 0.3
RIDGE = 2e-3
STEPS = 200

FEWEST = 12
"""Timed problems of a store that a fit takes at least; fewer say too little of its weights."""


@dataclass(frozen=True)
class Samples:
    """Points of one chip: features [points, tiles, FEATURES], validity, the rows of the winners, log seconds."""

    features: np.ndarray
    fits: np.ndarray
    winner: np.ndarray  # row of the named tile
    stages: np.ndarray  # column of its stages, -1 unknown
    log_seconds: np.ndarray  # of the terms, over the ideal


def samples(chip: Chip, points: Sequence[Point]) -> Samples:
    """Points whose winner lies in the chip's space, and is valid there."""
    space = Candidates.of(chip)
    row = {tile: index for index, tile in enumerate(space.named)}
    kept = []
    for point in points:
        if point.tile not in row:
            continue
        parts = problem_terms(chip, point, space.tiles)
        fits = moe_model.valid(parts).reshape(len(space.named), -1)
        if not fits[row[point.tile]].any():
            continue
        stages = space.stages.index(point.stages) if point.stages in space.stages else -1
        if not fits[row[point.tile], stages]:
            stages = -1
        core, l2, start = (sum(part.seconds[name] for part in parts) for name in ("core", "l2", "start"))
        least = moe_model.ideal(parts)
        log_seconds = np.log((np.maximum(np.maximum(core, l2), least) + start) / least)
        features = moe_model.features(space.tiles, parts)
        kept.append((features, fits, row[point.tile], stages, log_seconds))
    return Samples(*(np.array(column) for column in zip(*kept)))


def fit_weights(data: Samples) -> np.ndarray:
    """Weights of FEATURES."""
    spread = data.features.std(1).mean(0) + 1e-6
    features, fits = torch.tensor(data.features / spread), torch.tensor(data.fits)
    winner = torch.tensor(data.winner)[:, None]
    stages = torch.tensor(data.stages)
    known, column = (stages >= 0).double(), stages.clamp(min=0)[:, None]
    costs = torch.tensor([name in moe_model.COSTS for name in moe_model.FEATURES])
    raw = torch.zeros(len(spread), dtype=torch.float64, requires_grad=True)

    def signed():
        return torch.where(costs, -torch.nn.functional.softplus(raw), raw)

    optimiser = torch.optim.LBFGS([raw], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        scores = (features @ signed()).view(fits.shape).masked_fill(~fits, -1e4)  # [points, named, stages]
        shape = torch.logsumexp(scores, 2)
        chosen = shape.gather(1, winner)[:, 0]
        of_stages = scores[torch.arange(len(scores)), winner[:, 0]].gather(1, column)[:, 0]
        likelihood = chosen - torch.logsumexp(shape, 1) + STAGES_SHARE * known * (of_stages - chosen)
        value = RIDGE * signed().square().sum() - likelihood.mean()
        value.backward()
        return value

    optimiser.step(loss)
    return signed().detach().numpy() / spread


def samples_of_store(chip: Chip, found: Sequence[timed.Timed]) -> Samples:
    """Timed problems; each tile stands for itself, with the stages that it has."""
    widest = max(len(one.tiles) for one in found)
    features = np.zeros((len(found), widest, len(moe_model.FEATURES)))
    log_seconds, fits = np.zeros((len(found), widest)), np.zeros((len(found), widest, 1), bool)
    for number, one in enumerate(found):
        count = len(one.tiles)
        features[number, :count], log_seconds[number, :count] = one.features(chip)
        fits[number, :count] = True
    winner = np.array([int(np.argmin(one.seconds)) for one in found])
    return Samples(features, fits, winner, np.full(len(found), -1), log_seconds)


def fit(points: Sequence[Point]) -> dict:
    """Constants from the points of one device whose shape is in the first half of its shapes."""
    fitted, left = halves(point.shape for point in points)
    name = points[0].device
    return _constants(name, samples(device(name), [point for point in points if point.shape in fitted]), fitted, left)


def fit_store(path: Path, name: str | None = None) -> dict:
    """The same from a store of timed tiles. ValueError where it holds fewer than two shapes, has fewer than
    :data:`FEWEST` problems in half of them, or is of no device ``name``."""
    chip, found = timed.read(path)
    if name is not None and name != chip.device:
        raise ValueError(f"--device: got {name!r}, the store is of {chip.device}")
    fitted, left = halves(one.shape for one in found)
    if not fitted:
        raise ValueError(f"{path}: all timed problems have one shape {left}; a fit takes half of the shapes")
    fitting = [one for one in found if one.shape in fitted]
    if len(fitting) < FEWEST:
        raise ValueError(f"{path}: {len(fitting)} timed problems in half of its shapes, {FEWEST} are needed")
    return _constants(chip.device, samples_of_store(chip, fitting), fitted, left)


def _constants(name: str, data: Samples, fitted: set, left: set) -> dict:
    weights = fit_weights(data)
    fits = data.fits.reshape(len(data.fits), -1)
    scores, log_seconds = (data.features @ weights)[fits], data.log_seconds[fits]
    slope = -log_seconds.std() / scores.std()
    offset = log_seconds.mean() - slope * scores.mean()
    return {
        "about": "Constants of mla_kernels.autotune.moe_model, written by python -m mla_kernels.autotune fit.",
        "fitted_on": {
            "device": name,
            "points": len(data.winner),
            "shapes": sorted(fitted),
            "shapes_left": len(left),
            "split": "the half of the file's (experts, intermediate) shapes that measured.halves puts first",
        },
        "weights": {name: round(float(value), 4) for name, value in zip(moe_model.FEATURES, weights)},
        "seconds": {"slope": round(float(slope), 5), "offset": round(float(offset), 4)},
    }


def add_parser(commands) -> None:
    parser = commands.add_parser("fit", help="fit the model of grouped products to measured winners or a store")
    parser.add_argument(
        "--measured", type=Path, required=True, metavar="FILE", help="measured winners (CSV) or a store of tune (jsonl)"
    )  # fmt: skip
    parser.add_argument("--device", help="fit to the rows of this device (default: the one with the most rows)")
    parser.add_argument(
        "--output", type=output_file, default=moe_model.CONSTANTS, metavar="FILE",
        help="where the constants go (default: the package's)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options) -> int:
    if timed.is_store(options.measured):
        constants = fit_store(options.measured, options.device)
    else:
        constants = fit(_points(options))
    options.output.write_text(json.dumps(constants, indent=1) + "\n")
    fitted = constants["fitted_on"]
    print(
        f"{options.output}: {len(moe_model.FEATURES)} weights from {fitted['points']} points; "
        f"{len(fitted['shapes'])} shapes; {fitted['shapes_left']} shapes are left for evaluation"
    )
    return 0


def _points(options) -> list[Point]:
    points = read_points(options.measured)
    names = [point.device for point in points]
    name = options.device or max(sorted(set(names)), key=names.count)
    if name not in names:
        raise ValueError(f"--device: got {name!r}, the file holds {', '.join(sorted(set(names)))}")
    return [point for point in points if point.device == name]
