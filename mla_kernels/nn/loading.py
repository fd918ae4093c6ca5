"""Weights that a checkpoint stores in codes become numbers before ``load_state_dict`` copies them."""

import torch
from torch import nn

from mla_kernels.quant.stored import NUMBERS, StoredWeight, read_weight


def dequantise_state(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Before ``load_state_dict``: codes and their scales give way to weights in the dtypes that ``module`` has.

    A pre-hook for modules of plain parameters, whose state dict has the names of :mod:`mla_kernels.quant.stored`.
    Everything is looked at before anything is loaded, so that a refusal leaves the module as it was.

    Raises:
        TypeError: what is not in numbers, and comes without the scales that make it so. KeyError, ValueError,
        NotImplementedError: codes and scales that do not fit, or a format that is not supported.
    """
    own = [*module.named_parameters(), *module.named_buffers()]
    targets = {name: tensor.dtype for name, tensor in own if tensor.is_floating_point()}
    found = {}
    for name, dtype in targets.items():
        key = prefix + name
        stem, _, part = key.rpartition(".")
        if part == "weight":
            weight, used = read_weight(stem or key, state_dict, stem)
            if isinstance(weight, StoredWeight):
                found[key] = weight, used, dtype
        elif key in state_dict and state_dict[key].dtype not in NUMBERS:
            raise TypeError(f"{key}: got {state_dict[key].dtype}, numbers are accepted ({_names(NUMBERS)})")
    for key, (weight, used, dtype) in found.items():
        for name in used:
            del state_dict[name]
        state_dict[key] = weight.values(dtype)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
