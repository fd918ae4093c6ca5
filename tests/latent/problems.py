"""Seeded problems for the latent ops: arguments, the expected cache by the reference, and the bits to keep."""

from dataclasses import dataclass

import torch

from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.write import write_latent
from mla_kernels.reference import latent as reference
from tests.support import assert_close

OPS = {"write_latent": write_latent, "compress_latent": compress_latent}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
TABLE_ROWS = 11
SMALL = {"interleaved_to_half": (32, 16), "interleaved": (64, 16), "half": (32, 32)}
"""rope -> latent_dim, rope_dim. One choice each, so that tests share what the emulator compiled."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaN among them: whatever is rewritten or read shows."""
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=BITS[dtype]).view(dtype)


@dataclass
class Problem:
    """Arguments of one call, by name, and the cache that it writes to."""

    op: str
    arguments: dict[str, torch.Tensor]
    cache: LatentCache
    rope: str

    def run(self, **changes) -> None:
        arguments = {**self.arguments, "cache": self.cache, "rope": self.rope, **changes}
        OPS[self.op](**arguments)

    def expected(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the reference leaves in a zeroed cache, computed in ``dtype`` (None: in the inputs' own)."""
        arguments = {
            name: value.cpu().to(dtype) if dtype and value.is_floating_point() else value.cpu()
            for name, value in self.arguments.items()
        }
        data = torch.zeros(self.cache.data.shape, dtype=dtype or self.cache.data.dtype)
        getattr(reference, self.op)(**arguments, cache=data, latent_dim=self.cache.latent_dim, rope=self.rope)
        return data.flatten(0, 1)

    def written(self) -> torch.Tensor:
        slots = self.arguments["slot_mapping"].cpu().long()
        return slots[slots >= 0]

    def check(self, before: torch.Tensor) -> None:
        """The named slots hold what the reference says and all others the bits they had in ``before``."""
        slots, now = self.written(), self.cache.data.cpu().flatten(0, 1)
        others = torch.ones(len(now), dtype=torch.bool).scatter_(0, slots, False)
        assert torch.equal(bits(now[others]), bits(before.cpu().flatten(0, 1)[others])), "slots not named have changed"
        if len(slots):
            baseline = None if now.dtype == torch.float32 else self.expected()[slots]
            assert_close(now[slots], self.expected(torch.float64)[slots], baseline)


def make(
    op: str,
    *,
    tokens: int = 5,
    hidden_size: int = 48,
    latent_dim: int | None = None,
    rope_dim: int | None = None,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    rope: str = "interleaved_to_half",
    index_dtype: torch.dtype = torch.int64,
    skipped: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem with ``skipped`` tokens of slot -1 and the others on distinct slots, of which the cache has more."""
    latent_dim, rope_dim = latent_dim or SMALL[rope][0], rope_dim or SMALL[rope][1]
    width = latent_dim + rope_dim
    num_pages = -(-(tokens + 3) // page_size) + 1
    slots = torch.randperm(num_pages * page_size)[:tokens]
    slots[torch.randperm(tokens)[:skipped]] = -1
    angles = torch.rand(TABLE_ROWS, rope_dim // 2) * 6
    arguments = {
        "norm_weight": (torch.rand(latent_dim) + 0.5).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, TABLE_ROWS, (tokens,), dtype=index_dtype),
        "slot_mapping": slots.to(torch.int64 if index_dtype == torch.int32 else torch.int32),
    }
    if op == "write_latent":
        arguments["kv_a"] = torch.randn(tokens, width).to(dtype)
    else:
        arguments["hidden"] = torch.randn(tokens, hidden_size).to(dtype)
        arguments["weight"] = (torch.randn(width, hidden_size) * hidden_size**-0.5).to(dtype)
    cache = LatentCache(random_bits(num_pages, page_size, width, dtype=dtype).to(device), latent_dim)
    return Problem(op, {name: value.to(device) for name, value in arguments.items()}, cache, rope)
