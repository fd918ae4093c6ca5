"""Functions that engines call by name, batch-invariant where the engine was asked to be."""

import functools
import types
from collections.abc import Callable

from mla_kernels.invariance import batch_invariant


def invariant(function: Callable) -> Callable:
    """``function`` within a block :class:`mla_kernels.batch_invariant`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with batch_invariant():
            return function(*args, **kwargs)

    return call


@functools.cache
def invariant_module(module: types.ModuleType) -> types.ModuleType:
    """A module of the same names, whose functions are :func:`invariant`; the same one on every call."""
    copy = types.ModuleType(module.__name__, module.__doc__)
    for name, value in vars(module).items():
        setattr(copy, name, invariant(value) if isinstance(value, types.FunctionType) else value)
    return copy
