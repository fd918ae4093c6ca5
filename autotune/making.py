"""What a problem is made of: arguments of an op on a device or without one, the call, and the reference's result."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_kernels.autotune.models import Geometry

PAGE, CONTEXT = 64, 4096
CHECKED = 4  # tokens or sequences of a result that are held against the reference


@dataclass(frozen=True)
class Call:
    """One op with its arguments. ``expected`` is the reference's result in float32 for the first rows of the op's, or
    of what ``seen`` makes of them; None: the tile in use stands for a reference."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    expected: Callable[[], tuple[torch.Tensor, ...]] | None
    seen: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] = lambda results: results


@dataclass(frozen=True)
class Operation:
    """A public op as models call it."""

    name: str
    applies: Callable[[Geometry], bool]
    sizes: tuple[dict[str, int], ...]
    build: Callable[[Geometry, dict[str, int], "Make"], Call]


class Make:
    """Arguments on one device in one dtype: random numbers, or on ``meta`` shapes alone."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.bare = self.device.type == "meta"

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return made if self.bare else made.normal_(0.0, scale)

    def integers(self, *shape: int, below: int) -> torch.Tensor:
        if self.bare:
            return torch.empty(shape, dtype=torch.int32, device=self.device)
        return torch.randint(below, shape, dtype=torch.int32, device=self.device)

    def choices(self, rows: int, count: int, below: int) -> torch.Tensor:
        """[rows, count] of different numbers below ``below``."""
        if self.bare:
            return self.integers(rows, count, below=below)
        chunks = torch.arange(rows, device=self.device).split(4096)
        found = [torch.rand(len(c), below, device=self.device).topk(count).indices for c in chunks]
        return torch.cat(found).int()

    def counting(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, dtype=torch.int32, device=self.device).view(shape)

    def full(self, *shape: int, value: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=self.device)

    def angles(self, rope: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.normal(CONTEXT, rope // 2, dtype=torch.float32)
        return table.cos(), table.sin()


def each(name: str, *values: int, **more: int) -> tuple[dict[str, int], ...]:
    return tuple({name: value} | more for value in values)
