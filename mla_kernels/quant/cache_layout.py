"""How the bytes of cached latents lie: CacheLayout, and typed views of the parts of tokens in pages."""

import enum
from dataclasses import dataclass, field

import torch

SCALE_BLOCK = 128  # latent values that share a scale in FP8_V32
ALIGNMENT = 16  # bytes; scales are followed by zeros up to it
V4_BLOCK = 64  # latent values that share a scale in FP8_V4, and the rotated ones behind them, which have none
QUANTISED = ("fp8_v32", "fp8_v4", "int8")  # layouts of codes and scales, in bytes


class CacheLayout(enum.Enum):
    """How the bytes of one token lie in a page; R is ``latent_dim``, D is ``rope_dim``.

    ================  ==========  =========================================================  ===========
    layout            data dtype  bytes of a token, in order                                 512 + 64
    ================  ==========  =========================================================  ===========
    ``LATENT_16BIT``  bf16, fp16  R values, D rotated values                                 1,152 bytes
    ``LATENT_32BIT``  fp32        R values, D rotated values                                 2,304 bytes
    ``FP8_V32``       uint8       R e4m3 codes, R / 128 fp32 scales, D rotated bf16          656 bytes
    ``FP8_V4``        uint8       R - 64 e4m3 codes, 64 rotated bf16; scales see below       584 bytes
    ``INT8``          uint8       R int8 codes, 1 fp32 scale, 12 zero bytes, D rotated bf16  656 bytes
    ================  ==========  =========================================================  ===========

    ``FP8_V32`` is FlashMLA's and DeepSeek-V3.2's: latent value i is ``e4m3(code_i) * scale[i // 128]``, where the
    writer picks ``scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))``, amax being the largest magnitude of the 128 values.
    e4m3 is the OCP "fn" kind on every chip, MI300 included. ``INT8`` is for chips without fp8: latent value i is
    ``code_i * scale`` with ``scale = amax / 127`` (1 where that is no normal number: an all-zero latent, above all).
    A block with a NaN or an infinity gets the scale NaN. Zero bytes keep every part on 16 bytes; ``FP8_V32`` needs
    them where R is 128 or 256. Multi-head K and V of DeepSeek-V3 would take 128 x (192 + 128) x 2 = 81,920 bytes.

    ``FP8_V4`` is FlashMLA's and DeepSeek-V4's, whose key is its value: D is 0, and the last 64 of the R values are the
    rotated ones. A page holds first R + 64 bytes of every token (576 at R = 512), THEN R / 64 bytes of every token's
    scales: 8 at R = 512, one ue8m0 (2 ** (byte - 127), 255 is NaN) for each 64 of the 448 codes, and a zero. Scales are
    picked as in ``FP8_V32``. Value i is ``bf16(bf16(e4m3(code_i)) * bf16(scale[i // 64]))``. A page is followed by
    bytes of no meaning up to a multiple of R + 64. With page_size 4 a page takes 4 * 584 = 2,336 bytes, 2,880 with what
    follows; of slot 9 (page 2, token 1) the codes begin at byte 2 * 2,880 + 576 = 6,336, the rotated values at 6,336 +
    448, the scales at 2 * 2,880 + 4 * 576 + 8 = 8,072.
    """

    quantised: bool  # whether tokens are codes and scales

    LATENT_16BIT = "latent_16bit"
    LATENT_32BIT = "latent_32bit"
    FP8_V32 = "fp8_v32"
    FP8_V4 = "fp8_v4"
    INT8 = "int8"

    @classmethod
    def of(cls, dtype: torch.dtype) -> "CacheLayout":
        """The unquantised layout with this element type; TypeError names the accepted ones."""
        for layout in (cls.LATENT_16BIT, cls.LATENT_32BIT):
            if dtype in layout.dtypes:
                return layout
        raise TypeError(
            f"dtype: got {str(dtype).removeprefix('torch.')} for a latent cache, accepted: bfloat16, float16, float32 "
            "(and uint8 with layout fp8_v32, fp8_v4 or int8)"
        )

    @classmethod
    def named(cls, value: "CacheLayout | str") -> "CacheLayout":
        """The layout with this value; ValueError names the accepted ones."""
        if isinstance(value, cls):  # torch 2.11 does not trace the look-up of a member
            return value
        try:
            return cls(value)
        except ValueError:
            accepted = ", ".join(layout.value for layout in cls)
            raise ValueError(f"layout: got {value!r}, accepted: {accepted}") from None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Element types of ``LatentCache.data`` in this layout."""
        if self.quantised:
            return (torch.uint8,)
        return (torch.bfloat16, torch.float16) if self is CacheLayout.LATENT_16BIT else (torch.float32,)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of ``LatentCache.data``."""
        return self.dtypes[0].itemsize

    def rope_start(self, latent_dim: int) -> int:
        """Where a token's rotated key begins, in elements of ``LatentCache.data``."""
        if not self.quantised:
            return latent_dim
        if self is CacheLayout.FP8_V4:  # a key of its own would stand behind everything, which has none
            return latent_dim + V4_BLOCK + latent_dim // V4_BLOCK
        scales = 4 * (latent_dim // SCALE_BLOCK if self is CacheLayout.FP8_V32 else 1)
        return latent_dim + -(-scales // ALIGNMENT) * ALIGNMENT

    # methods are called through the class where a cache is made inside torch.compile: torch 2.11 traces no member's own

    def rope_dim(self, elements: int, latent_dim: int) -> int:
        """Width of the rotated key of tokens that take so many elements of ``LatentCache.data``."""
        return (elements - CacheLayout.rope_start(self, latent_dim)) // (2 if self.quantised else 1)

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes of one token in one layer."""
        rope = rope_dim * (2 if self.quantised else 1)
        return (CacheLayout.rope_start(self, latent_dim) + rope) * self.element_bytes

    def bytes_per_page(self, page_size: int, latent_dim: int, rope_dim: int) -> int:
        """Bytes from one page to the next in one layer of a dense cache."""
        size, unit = page_size * CacheLayout.bytes_per_token(self, latent_dim, rope_dim), 1
        if self is CacheLayout.FP8_V4:
            unit = latent_dim + V4_BLOCK
        return -(-size // unit) * unit


for _layout in CacheLayout:  # once, and not in __init__, which torch 2.11 would trace
    _layout.quantised = _layout.value in QUANTISED


@dataclass(frozen=True, eq=False)
class PagedTokens:
    """Typed views of tokens in pages; nothing is checked. :class:`mla_kernels.LatentCache` is what users hold.

    What follows from ``data``'s type and the sizes of a page is computed once, when the object is made.
    """

    data: torch.Tensor
    latent_dim: int
    layout: CacheLayout
    layout_name: str = field(init=False, repr=False)  # its value, as ops take it
    page_size: int = field(init=False, repr=False)
    rope_dim: int = field(init=False, repr=False)
    width: int = field(init=False, repr=False)  # values of a token: latent_dim + rope_dim
    dtype: torch.dtype = field(init=False, repr=False)  # of queries and new tokens; bfloat16 for quantised layouts

    def __post_init__(self):
        self._derive()

    def _derive(self):
        data, layout = self.data, self.layout
        rope_dim = CacheLayout.rope_dim(layout, data.shape[2], self.latent_dim)
        object.__setattr__(self, "layout_name", layout.value)
        object.__setattr__(self, "page_size", data.shape[1])
        object.__setattr__(self, "rope_dim", rope_dim)
        object.__setattr__(self, "width", self.latent_dim + rope_dim)
        object.__setattr__(self, "dtype", torch.bfloat16 if layout.quantised else data.dtype)

    @property
    def latents(self) -> torch.Tensor:
        """View ``[num_pages, page_size, latent_dim]``: values; e4m3 codes as uint8 (``fp8_v4``: without the 64 rotated
        values); int8 codes as int8."""
        if self.layout is CacheLayout.FP8_V4:
            return split_pages(self.data, self.latent_dim)[0][..., : self.latent_dim - V4_BLOCK]
        codes = self.data[..., : self.latent_dim]
        return codes.view(torch.int8) if self.layout is CacheLayout.INT8 else codes

    @property
    def scales(self) -> torch.Tensor | None:
        """fp32 view ``[num_pages, page_size, count]``: latent_dim / 128 (``fp8_v32``) or 1 (``int8``); ue8m0 as uint8,
        latent_dim / 64 - 1 (``fp8_v4``); else None."""
        if not self.layout.quantised:
            return None
        if self.layout is CacheLayout.FP8_V4:
            return split_pages(self.data, self.latent_dim)[1][..., :-1]
        count = self.latent_dim // SCALE_BLOCK if self.layout is CacheLayout.FP8_V32 else 1
        return self.data[..., self.latent_dim : self.latent_dim + 4 * count].view(torch.float32)

    @property
    def rope(self) -> torch.Tensor:
        """View ``[num_pages, page_size, rope_dim]`` of the rotated keys, in :attr:`dtype`; of ``fp8_v4`` the last 64
        values of each token."""
        if self.layout is CacheLayout.FP8_V4:
            return split_pages(self.data, self.latent_dim)[0][..., self.latent_dim - V4_BLOCK :].view(torch.bfloat16)
        return self.data[..., CacheLayout.rope_start(self.layout, self.latent_dim) :].view(self.dtype)

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def num_slots(self) -> int:
        return self.data.shape[0] * self.data.shape[1]


def split_pages(data: torch.Tensor, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 views of an ``fp8_v4`` cache's data: [num_pages, page_size, latent_dim + 64] of codes and rotated values,
    and [num_pages, page_size, latent_dim / 64] of scales and the zero behind them."""
    (pages, page_size, _), start, page = data.shape, data.storage_offset(), data.stride(0)
    token, scales = latent_dim + V4_BLOCK, latent_dim // V4_BLOCK
    tokens = data.as_strided((pages, page_size, token), (page, token, 1), start)
    return tokens, data.as_strided((pages, page_size, scales), (page, scales, 1), start + page_size * token)


def launched_parts(data: torch.Tensor, layout: str, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes as int8, fp32 scales, bf16 keys) of a quantised cache's data, views of its one storage that begin at the
    first token's, which is what kernels take. In ``fp8_v4`` scales are found through the codes.

    Refuses bytes that do not lie on 16, where :class:`mla_kernels.LatentCache` could not look: in torch.compile.
    """
    page_stride, slot_stride, _ = data.stride()
    split = layout == "fp8_v4"
    if (page_stride | (0 if split else slot_stride) | data.storage_offset()) % ALIGNMENT:
        raise misaligned(layout, page_stride, slot_stride, data.storage_offset())
    if split:
        return data.view(torch.int8), data.view(torch.float32), data.view(torch.bfloat16)[..., (latent_dim - 64) // 2 :]
    keys = -(-(latent_dim + (4 * (latent_dim // SCALE_BLOCK) if layout == "fp8_v32" else 4)) // ALIGNMENT) * ALIGNMENT
    scales = data.view(torch.float32)[..., latent_dim // 4 :]
    return data.view(torch.int8), scales, data.view(torch.bfloat16)[..., keys // 2 :]


def misaligned(layout: str, *places: int) -> ValueError:
    return ValueError(f"data: got strides and offset {places}, {layout} accepts multiples of 16 bytes")
