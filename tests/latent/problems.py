"""Seeded problems for the latent ops: arguments, the expected cache by the reference, and the bits to keep."""

from dataclasses import dataclass

import torch

from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.write import write_latent
from mla_kernels.reference import latent as reference
from tests.support import assert_close

OPS = {"write_latent": write_latent, "compress_latent": compress_latent}
QUANTISED = ("fp8_v32", "int8")
BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
TABLE_ROWS = 11
SMALL = {"interleaved_to_half": (32, 16), "interleaved": (64, 16), "half": (32, 32)}
"""rope -> latent_dim, rope_dim. One choice each, so that tests share what the emulator compiled."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaN among them: whatever is rewritten or read shows."""
    low, high = (0, 1 << 8) if dtype == torch.uint8 else (-(1 << 15), 1 << 15)
    return torch.randint(low, high, shape, dtype=BITS[dtype]).view(dtype)


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
        cache = self.cache
        stored = cache.data.dtype if cache.layout.quantised or dtype is None else dtype
        data = torch.zeros(cache.data.shape, dtype=stored)
        options = {"latent_dim": cache.latent_dim, "layout": cache.layout.value, "rope": self.rope}
        getattr(reference, self.op)(**arguments, cache=data, **options)
        return data.flatten(0, 1)

    def written(self) -> torch.Tensor:
        slots = self.arguments["slot_mapping"].cpu().long()
        return slots[slots >= 0]

    def check(self, before: torch.Tensor) -> None:
        """The named slots hold what the reference says and all others the bits they had in ``before``."""
        slots, now = self.written(), self.cache.data.cpu().flatten(0, 1)
        others = torch.ones(len(now), dtype=torch.bool).scatter_(0, slots, False)
        assert torch.equal(bits(now[others]), bits(before.cpu().flatten(0, 1)[others])), "slots not named have changed"
        if len(slots) and self.cache.layout.quantised:
            self._check_quantised(now[slots])
        elif len(slots):
            baseline = None if now.dtype == torch.float32 else self.expected()[slots]
            assert_close(now[slots], self.expected(torch.float64)[slots], baseline)

    def _check_quantised(self, rows: torch.Tensor) -> None:
        """Scales and values as the reference quantises what it computes in float64, but for the rounding before that:
        of float32, and of bfloat16 projections on CPUs. Keys as in a bfloat16 cache; the bytes between are zero."""
        cache, slots = self.cache, self.written()
        latent_dim, layout, rope_start = cache.latent_dim, cache.layout.value, cache.layout.rope_start(cache.latent_dim)
        plain = {name: value for name, value in vars(self).items() if name != "cache"}
        values = LatentCache(torch.zeros(*cache.data.shape[:2], cache.width, dtype=cache.dtype), latent_dim)
        plain = Problem(**plain, cache=values)
        exact = plain.expected(torch.float64)[slots]
        got = reference.dequantise_cache(rows[None], latent_dim, layout, dtype=torch.float64)[0]
        if cache.rope_dim:
            assert_close(got[:, latent_dim:].bfloat16(), exact[:, latent_dim:], plain.expected()[slots][:, latent_dim:])
        latent = exact[:, :latent_dim]
        off = 2.0**-7 if self.op == "compress_latent" else 1e-5
        low, high = (reference.quantise_latent(latent * (1 + sign * off), layout)[1] for sign in (-1, 1))
        scales_end = latent_dim + 4 * low.shape[1]
        scales = rows[:, latent_dim:scales_end].contiguous().view(torch.float32)
        assert (low <= scales).all() and (scales <= high).all()
        assert not rows[:, scales_end:rope_start].any(), "bytes behind the scales are not zero"
        step = scales.double().repeat_interleave(latent_dim // scales.shape[1], 1)
        if layout == "fp8_v32":  # 3 mantissa bits, at least 2^-9 apart
            step = torch.maximum(latent.abs() * (1 + off) / 8, step * 2.0**-9)
        beyond = (got[:, :latent_dim] - latent).abs() - step / 2
        worst = beyond.max().item()
        assert worst <= off * latent.abs().max().item(), f"{worst:.3g} more than half a step from the exact value"


def make(
    op: str,
    *,
    tokens: int = 5,
    hidden_size: int = 48,
    latent_dim: int | None = None,
    rope_dim: int | None = None,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    rope: str = "interleaved_to_half",
    index_dtype: torch.dtype = torch.int64,
    skipped: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem with ``skipped`` tokens of slot -1 and the others on distinct slots, of which the cache has more."""
    layout = CacheLayout.of(dtype) if layout is None else CacheLayout(layout)
    if layout.quantised:
        dtype, latent_dim = torch.bfloat16, latent_dim or 128
    latent_dim, rope_dim = latent_dim or SMALL[rope][0], SMALL[rope][1] if rope_dim is None else rope_dim
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
    stored = torch.uint8 if layout.quantised else dtype
    elements = layout.bytes_per_token(latent_dim, rope_dim) // layout.element_bytes
    cache = LatentCache(random_bits(num_pages, page_size, elements, dtype=stored).to(device), latent_dim, layout)
    return Problem(op, {name: value.to(device) for name, value in arguments.items()}, cache, rope)
