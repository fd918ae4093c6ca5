"""Tile choice: reads the declarations that kernels carry, ranks tiles by a stated model, keeps what compiles.

Nothing here runs inside a model call. ``python -m mla_kernels.autotune tune`` writes the tables that
:meth:`mla_kernels.launch.Kernel.tile_for` looks up; ``show`` prints them.
"""

from mla_kernels.autotune.model import seconds
from mla_kernels.autotune.search import Choice, candidates, choose
from mla_kernels.autotune.store import TABLES, load_table, write_table

__all__ = ["TABLES", "Choice", "candidates", "choose", "load_table", "seconds", "write_table"]
