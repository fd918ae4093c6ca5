"""quantisation_error: how far quantised weights are from those they were made of."""

from typing import NamedTuple

import torch

from mla_kernels.checks import FLOATS, check_tensor
from mla_kernels.moe.quantised.formats import dequantise_weight, weight_shape
from mla_kernels.moe.quantised.weights import ExpertWeights


class WeightError(NamedTuple):
    """What rounding cost one weight, gate_up or down.

    relative_rms: root of the summed squared errors of all experts over that of the summed squared weights.
    largest: the largest error of a weight, over the largest magnitude of the weight's own expert.
    worst_expert, worst_relative_rms: the expert with the largest relative RMS error of its own, and that error.
    """

    relative_rms: float
    largest: float
    worst_expert: int
    worst_relative_rms: float


def quantisation_error(gate_up: torch.Tensor, down: torch.Tensor, experts: ExpertWeights) -> dict[str, WeightError]:
    """Compare quantised weights with the originals, in fp32 and one expert at a time.

    Args:
        gate_up: [E, 2I, H] bf16, fp16 or fp32, on experts' device. down: [E, H, I].
        experts: what was made of them.

    Returns:
        {"gate_up": WeightError, "down": WeightError}. Experts that are 0 throughout count as without error if they are
        restored as 0.

    Raises:
        ValueError: shapes or devices that differ from those of experts. TypeError: a wrong dtype.
    """
    report = {}
    for name, original in (("gate_up", gate_up), ("down", down)):
        shape = experts.num_experts, *weight_shape(experts, name)
        check_tensor(name, original, shape=shape, dtypes=FLOATS, device=experts.device)
        rows = [_compare(original[expert].float(), experts, name, expert) for expert in range(experts.num_experts)]
        squares, energies, largest = torch.tensor(rows, dtype=torch.float64).unbind(1)
        ratios = (squares / energies).nan_to_num(0.0).sqrt()  # of experts that are 0: 0 / 0
        worst = int(ratios.argmax())
        total = squares.sum() / energies.sum() if energies.sum() > 0 else squares.sum()
        report[name] = WeightError(float(total.sqrt()), float(largest.max()), worst, float(ratios[worst]))
    return report


def _compare(original, experts, name, expert) -> tuple[float, float, float]:
    """Sum of squared errors, sum of squares, and largest error over largest magnitude, of one expert."""
    error = dequantise_weight(experts, name, expert, torch.float32) - original
    scale = original.abs().max().item() or 1.0
    square, energy = (torch.linalg.vector_norm(values).item() ** 2 for values in (error, original))
    return square, energy, error.abs().max().item() / scale
