"""Element types of the Gluon emulator: how NumPy arrays carry them, their bits in memory, conversions.

Floats of 8 and 16 bits are carried as float32 of their values.
"""

import numpy as np
import torch

from mla_kernels.language import tl
from mla_kernels.targets.gluon.errors import EmulationError

_SMALL = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
"""Conversions to these saturate, as Triton's do."""

_CARRIERS = {
    "int1": np.bool_, "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16, "int32": np.int32,
    "uint32": np.uint32, "int64": np.int64, "uint64": np.uint64, "fp32": np.float32, "fp64": np.float64,
    **dict.fromkeys(_SMALL, np.float32),
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def torch_to_triton(dtype: torch.dtype):
    """Triton's element type of a torch dtype."""
    names = {
        torch.bool: "int1", torch.int8: "int8", torch.uint8: "uint8", torch.int16: "int16", torch.int32: "int32",
        torch.int64: "int64", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32",
        torch.float64: "float64", torch.float8_e4m3fn: "float8e4nv", torch.float8_e5m2: "float8e5",
    }  # fmt: skip
    if dtype not in names:
        raise EmulationError(f"tensors of {dtype} are not emulated; accepted are {', '.join(map(str, names))}")
    return getattr(tl, names[dtype])


def carrier(dtype) -> type:
    """NumPy type that carries elements of ``dtype``."""
    if dtype.is_ptr():
        return np.int64
    if dtype.name not in _CARRIERS:
        raise NotImplementedError(f"elements of {dtype} are not emulated")
    return _CARRIERS[dtype.name]


def itemsize(dtype) -> int:
    return max(1, dtype.primitive_bitwidth // 8)


def rounded(values: np.ndarray, dtype) -> np.ndarray:
    """``values`` in the carrier of ``dtype``, rounded to it where it is narrower than its carrier."""
    small = _SMALL.get(dtype.name)
    if small is None:
        return np.asarray(values, carrier(dtype))
    values = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
    if dtype.name in _LARGEST:
        values = np.asarray(np.clip(values, -_LARGEST[dtype.name], _LARGEST[dtype.name]))
    return torch.from_numpy(values).to(small).float().numpy()


def encode(values: np.ndarray, dtype) -> np.ndarray:
    """Carried values as the unsigned integers that memory holds."""
    small = _SMALL.get(dtype.name)
    if small is not None:
        bits = torch.from_numpy(np.ascontiguousarray(values).reshape(values.shape)).to(small)
        return bits.view(torch.uint8 if itemsize(dtype) == 1 else torch.uint16).numpy()
    return np.ascontiguousarray(values).reshape(values.shape).view(BITS[itemsize(dtype)])


def decode(bits: np.ndarray, dtype) -> np.ndarray:
    """What memory holds, as carried values."""
    if dtype.name == "bf16":
        return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)
    if dtype.name == "int1":
        return np.asarray(bits != 0)
    small = _SMALL.get(dtype.name)
    if small is not None:
        return torch.from_numpy(np.ascontiguousarray(bits).reshape(bits.shape)).view(small).float().numpy()
    return bits.view(carrier(dtype))


def convert(values: np.ndarray, source, target) -> np.ndarray:
    """The values of ``source`` as those of ``target``: floats to integers towards zero, integers wrap."""
    if source == target:
        return values
    if target.name == "int1":
        return np.asarray(values != 0)
    if target.is_floating():
        return rounded(values.astype(np.float64 if target.name == "fp64" else np.float32), target)
    return np.asarray(values).astype(carrier(target))
