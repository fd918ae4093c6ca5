"""Experts in every format, for the tests of formats."""

import torch

from mla_kernels import ExpertWeights

SIZES = [(3, 192, 160), (2, 320, 128), (1, 128, 288)]
"""Experts, hidden size, intermediate size: blocks of 128 whole and cut off."""

VARIANTS = {
    "plain": ("plain", {}),
    "fp8_block": ("fp8_block", {}),
    "fp8_block, powers of two": ("fp8_block", {"power_of_two": True}),
    "int8": ("int8", {}),
    "int8_w8a8": ("int8_w8a8", {}),
    "int4": ("int4", {"group_size": 32}),
    "int4 with zeros": ("int4", {"group_size": 32, "symmetric": False}),
    "int4 with zeros, scales in bf16": ("int4", {"group_size": 32, "symmetric": False, "scale_dtype": torch.bfloat16}),
    "int4, searched": ("int4", {"group_size": 32, "search": True}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4, searched": ("mxfp4", {"search": True}),
}
"""Format and options of ExpertWeights.quantise."""


def weights(experts, hidden, intermediate, dtype=torch.float32):
    """gate_up and down, with rows of zeros, of one sign and of very different sizes among them."""
    gate_up = torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    for weight in (gate_up, down):
        weight[0, 3] = 0.0
        weight[0, 4] = weight[0, 4].abs()
        weight[-1, 5] *= 1000.0
        weight[-1, 6] *= 1e-6
    return gate_up.to(dtype), down.to(dtype)


def quantised(variant, sizes=SIZES[0], dtype=torch.float32, biases=False) -> ExpertWeights:
    gate_up, down = weights(*sizes, dtype)
    format, options = VARIANTS[variant]
    if biases:
        options = options | {
            name: torch.randn(weight.shape[:2]).to(dtype)
            for name, weight in (("gate_up_bias", gate_up), ("down_bias", down))
        }
    return ExpertWeights.quantise(gate_up, down, format, **options)
