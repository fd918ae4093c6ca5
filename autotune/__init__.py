"""Tile choice: reads the declarations that kernels carry, ranks tiles by a stated model, keeps what compiles.

Nothing here runs inside a model call. ``python -m mla_kernels.autotune`` tunes, with or without a device, and writes
the tables and stores that :mod:`mla_kernels.tiles` looks up.
"""

from mla_kernels.autotune.model import seconds
from mla_kernels.autotune.search import candidates, shortlist

__all__ = ["candidates", "seconds", "shortlist"]
