"""LatentCache: the paged cache of multi-head latent attention, and its byte layouts."""

import enum
from dataclasses import dataclass

import torch

from mla_kernels.checks import check_int

SCALE_BLOCK = 128  # latent values that share a scale in FP8_V32
_ALIGNMENT = 16  # bytes; scales are followed by zeros up to it


class CacheLayout(enum.Enum):
    """How the bytes of one token lie in a page; R is ``latent_dim``, D is ``rope_dim``.

    ================  ==========  =========================================================  ===========
    layout            data dtype  bytes of a token, in order                                 512 + 64
    ================  ==========  =========================================================  ===========
    ``LATENT_16BIT``  bf16, fp16  R values, D rotated values                                 1,152 bytes
    ``LATENT_32BIT``  fp32        R values, D rotated values                                 2,304 bytes
    ``FP8_V32``       uint8       R e4m3 codes, R / 128 fp32 scales, D rotated bf16          656 bytes
    ``INT8``          uint8       R int8 codes, 1 fp32 scale, 12 zero bytes, D rotated bf16  656 bytes
    ================  ==========  =========================================================  ===========

    ``FP8_V32`` is FlashMLA's and DeepSeek-V3.2's: latent value i is ``e4m3(code_i) * scale[i // 128]``, where the
    writer picks ``scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))``, amax being the largest magnitude of the 128 values.
    e4m3 is the OCP "fn" kind on every chip, MI300 included. ``INT8`` is for chips without fp8: latent value i is
    ``code_i * scale`` with ``scale = amax / 127`` (1 where that is no normal number: an all-zero latent, above all).
    A block with a NaN or an infinity gets the scale NaN. Zero bytes keep every part on 16 bytes; ``FP8_V32`` needs
    them where R is 128 or 256. Multi-head K and V of DeepSeek-V3 would take 128 x (192 + 128) x 2 = 81,920 bytes.
    """

    LATENT_16BIT = "latent_16bit"
    LATENT_32BIT = "latent_32bit"
    FP8_V32 = "fp8_v32"
    INT8 = "int8"

    @classmethod
    def of(cls, dtype: torch.dtype) -> "CacheLayout":
        """The unquantised layout with this element type; TypeError names the accepted ones."""
        for layout in (cls.LATENT_16BIT, cls.LATENT_32BIT):
            if dtype in layout.dtypes:
                return layout
        raise TypeError(
            f"dtype: got {str(dtype).removeprefix('torch.')} for a latent cache, accepted: bfloat16, float16, float32 "
            "(and uint8 with layout fp8_v32 or int8)"
        )

    @classmethod
    def named(cls, value: "CacheLayout | str") -> "CacheLayout":
        """The layout with this value; ValueError names the accepted ones."""
        try:
            return cls(value)
        except ValueError:
            accepted = ", ".join(layout.value for layout in cls)
            raise ValueError(f"layout: got {value!r}, accepted: {accepted}") from None

    @property
    def quantised(self) -> bool:
        return self in (CacheLayout.FP8_V32, CacheLayout.INT8)

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
        scales = 4 * (latent_dim // SCALE_BLOCK if self is CacheLayout.FP8_V32 else 1)
        return latent_dim + -(-scales // _ALIGNMENT) * _ALIGNMENT

    # methods are called through the class where a cache is made inside torch.compile: torch 2.11 traces no member's own

    def rope_dim(self, elements: int, latent_dim: int) -> int:
        """Width of the rotated key of tokens that take so many elements of ``LatentCache.data``."""
        return (elements - CacheLayout.rope_start(self, latent_dim)) // (2 if self.quantised else 1)

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes of one token in one layer."""
        rope = rope_dim * (2 if self.quantised else 1)
        return (CacheLayout.rope_start(self, latent_dim) + rope) * self.element_bytes

    def bytes_per_page(self, page_size: int, latent_dim: int, rope_dim: int) -> int:
        """Bytes of one page in one layer."""
        return page_size * self.bytes_per_token(latent_dim, rope_dim)


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Paged cache of one layer: per token the normalised latent and the rotated key shared by all heads.

    A token is addressed by its slot, ``slot = page * page_size + offset``, and lies at ``data[page, offset]``. With
    ``page_size`` 4 and the block table row ``[7, 2]``, token 5 of that sequence is token 1 of its second page, page 2:
    slot 2 * 4 + 1 = 9, at ``data[2, 1]``. There ``data[2, 1, :latent_dim]`` is the latent (keys and values of every
    head before their up-projections) and ``data[2, 1, latent_dim:]`` the rotated key. At DeepSeek-V3's 512 + 64 in
    bfloat16 a token takes 1,152 bytes; in a dense cache slot 9 starts at byte 9 * 1,152 = 10,368, its rotated key
    1,024 bytes later. In ``fp8_v32`` it takes 656 bytes: slot 9 starts at byte 5,904, its four scales at 5,904 + 512,
    its rotated key at 5,904 + 528. ``latents``, ``scales`` and ``rope`` are typed views of these parts.

    Args:
        data: ``[num_pages, page_size, latent_dim + rope_dim]``, bfloat16, float16 or float32; uint8
            ``[num_pages, page_size, bytes_per_token]`` for the quantised layouts. Dense in its last dimension; pages
            and slots may have any strides, so that a cache may be a slice of one larger allocation (in the quantised
            layouts strides and offset are multiples of 16 bytes).
        latent_dim: width of the latent, a power of two of at least 16 (a multiple of 128 in ``fp8_v32``). The rest,
            ``rope_dim``, is a power of two of at least 16, or 0: then the whole key is the value, too.
        layout: None for the layout of ``data``'s element type. The quantised layouts must be named, since their bytes
            do not say which one they are.

    Raises:
        TypeError: ``data`` is no tensor or has a dtype that the layout does not have, or ``latent_dim`` is no integer.
        ValueError: rank, sizes or strides that do not fit.
    """

    data: torch.Tensor
    latent_dim: int
    layout: CacheLayout | None = None

    def __post_init__(self):
        if not isinstance(self.data, torch.Tensor):
            raise TypeError(f"data: got {type(self.data).__name__}, a torch.Tensor is accepted")
        if self.data.dim() != 3:
            raise ValueError(
                f"data: got shape {tuple(self.data.shape)}, [num_pages, page_size, latent_dim + rope_dim] is accepted"
            )
        layout = CacheLayout.of(self.data.dtype) if self.layout is None else CacheLayout.named(self.layout)
        object.__setattr__(self, "layout", layout)
        if self.data.dtype not in layout.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in layout.dtypes)
            got = str(self.data.dtype).removeprefix("torch.")
            raise TypeError(f"data: got dtype {got} for layout {layout.value}, accepted: {names}")
        check_int("latent_dim", self.latent_dim, 1)
        if self.data.shape[1] < 1:
            raise ValueError(f"page_size: got {self.data.shape[1]}, an integer of at least 1 is accepted")
        if self.data.stride(2) != 1:
            raise ValueError(f"data: got stride {self.data.stride(2)} in the last dimension, 1 is accepted")
        width = self.data.shape[2]
        if self.latent_dim < 16 or self.latent_dim & (self.latent_dim - 1):
            raise ValueError(
                f"latent_dim: got {self.latent_dim} in a cache {width} wide, powers of two of at least 16 are accepted"
            )
        if layout is CacheLayout.FP8_V32 and self.latent_dim % SCALE_BLOCK:
            raise ValueError(f"latent_dim: got {self.latent_dim}, fp8_v32 accepts multiples of {SCALE_BLOCK}")
        if self.rope_dim and (self.rope_dim < 16 or self.rope_dim & (self.rope_dim - 1)):
            raise ValueError(
                f"rope_dim: got {self.rope_dim} in a cache {width} wide, "
                "0 and powers of two of at least 16 are accepted"
            )
        if layout.quantised:
            # torch.compile cannot trace the offset; the launch makes this check again
            offset = 0 if torch.compiler.is_compiling() else self.data.storage_offset()
            strides = (self.data.stride(0), self.data.stride(1), offset)
            if any(value % _ALIGNMENT for value in strides):
                raise ValueError(
                    f"data: got strides and offset {strides}, {layout.value} accepts multiples of 16 bytes"
                )

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        *,
        latent_dim: int = 512,
        rope_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        layout: "CacheLayout | str | None" = None,
        device: torch.device | str = "cpu",
    ) -> "LatentCache":
        """A dense cache of zeros with ``num_pages`` pages of ``page_size`` tokens.

        ``layout`` (a :class:`CacheLayout` or its value, "fp8_v32") None means the layout of ``dtype``; the quantised
        layouts take dtype bfloat16, which is what they hold after dequantisation.
        """
        for name, value, low in (
            ("num_pages", num_pages, 0),
            ("page_size", page_size, 1),
            ("latent_dim", latent_dim, 1),
            ("rope_dim", rope_dim, 0),
        ):
            check_int(name, value, low)
        layout = CacheLayout.of(dtype) if layout is None else CacheLayout.named(layout)
        accepted = (torch.bfloat16,) if layout.quantised else layout.dtypes
        if dtype not in accepted:
            names = ", ".join(str(one).removeprefix("torch.") for one in accepted)
            got = str(dtype).removeprefix("torch.")
            raise TypeError(f"dtype: got {got} for layout {layout.value}, accepted: {names}")
        elements = CacheLayout.bytes_per_token(layout, latent_dim, rope_dim) // layout.element_bytes
        stored = torch.uint8 if layout.quantised else dtype
        return cls(torch.zeros(num_pages, page_size, elements, dtype=stored, device=device), latent_dim, layout)

    @property
    def rope_dim(self) -> int:
        return CacheLayout.rope_dim(self.layout, self.data.shape[2], self.latent_dim)

    @property
    def width(self) -> int:
        """Values of a token: ``latent_dim + rope_dim``."""
        return self.latent_dim + self.rope_dim

    @property
    def dtype(self) -> torch.dtype:
        """What queries and new tokens must be: the element type, bfloat16 for the quantised layouts."""
        return torch.bfloat16 if self.layout.quantised else self.data.dtype

    @property
    def latents(self) -> torch.Tensor:
        """View ``[num_pages, page_size, latent_dim]``: values; e4m3 codes as uint8; int8 codes as int8."""
        codes = self.data[..., : self.latent_dim]
        return codes.view(torch.int8) if self.layout is CacheLayout.INT8 else codes

    @property
    def scales(self) -> torch.Tensor | None:
        """fp32 view ``[num_pages, page_size, count]``: latent_dim / 128 (``fp8_v32``) or 1 (``int8``); else None."""
        if not self.layout.quantised:
            return None
        count = self.latent_dim // SCALE_BLOCK if self.layout is CacheLayout.FP8_V32 else 1
        return self.data[..., self.latent_dim : self.latent_dim + 4 * count].view(torch.float32)

    @property
    def rope(self) -> torch.Tensor:
        """View ``[num_pages, page_size, rope_dim]`` of the rotated keys, in :attr:`dtype`."""
        return self.data[..., CacheLayout.rope_start(self.layout, self.latent_dim) :].view(self.dtype)

    @property
    def page_size(self) -> int:
        return self.data.shape[1]

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def num_slots(self) -> int:
        return self.data.shape[0] * self.data.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer."""
        return CacheLayout.bytes_per_token(self.layout, self.latent_dim, self.rope_dim)
