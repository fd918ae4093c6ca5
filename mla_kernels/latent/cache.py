"""LatentCache: the paged cache of multi-head latent attention."""

from dataclasses import dataclass

import torch

from mla_kernels.checks import check_int
from mla_kernels.quant.cache_layout import ALIGNMENT, SCALE_BLOCK, CacheLayout, PagedTokens, misaligned

__all__ = ["CacheLayout", "LatentCache"]

_LEAST_V4 = 256  # latent_dim of fp8_v4: scales of four bytes keep every token's on whole numbers of 32 bits


@dataclass(frozen=True, eq=False)
class LatentCache(PagedTokens):
    """Paged cache of one layer: per token the normalised latent and the rotated key shared by all heads.

    A token is addressed by its slot, ``slot = page * page_size + offset``, and lies at ``data[page, offset]``. With
    ``page_size`` 4 and the block table row ``[7, 2]``, token 5 of that sequence is token 1 of its second page, page 2:
    slot 2 * 4 + 1 = 9, at ``data[2, 1]``. There ``data[2, 1, :latent_dim]`` is the latent (keys and values of every
    head before their up-projections) and ``data[2, 1, latent_dim:]`` the rotated key. At DeepSeek-V3's 512 + 64 in
    bfloat16 a token takes 1,152 bytes; in a dense cache slot 9 starts at byte 9 * 1,152 = 10,368, its rotated key
    1,024 bytes later. In ``fp8_v32`` it takes 656 bytes: slot 9 starts at byte 5,904, its four scales at 5,904 + 512,
    its rotated key at 5,904 + 528. In ``fp8_v4`` a token's bytes do not lie together: :class:`CacheLayout` says where
    they are, and ``data[page]`` is the bytes of a page in rows of 584. ``latents``, ``scales`` and ``rope`` are typed
    views of these parts.

    Args:
        data: ``[num_pages, page_size, latent_dim + rope_dim]``, bfloat16, float16 or float32; uint8
            ``[num_pages, page_size, bytes_per_token]`` for the quantised layouts. Dense in its last dimension; pages
            and slots may have any strides, so that a cache may be a slice of one larger allocation (in the quantised
            layouts strides and offset are multiples of 16 bytes; in ``fp8_v4`` pages are dense, and their stride is).
        latent_dim: width of the latent, a power of two of at least 16 (128 in ``fp8_v32``, 256 in ``fp8_v4``). The
            rest, ``rope_dim``, is a power of two of at least 16, or 0: then the whole key is the value, too. ``fp8_v4``
            has no rest.
        layout: None for the layout of ``data``'s element type. The quantised layouts must be named, since their bytes
            do not say which one they are.

    Raises:
        TypeError: ``data`` is no tensor or has a dtype that the layout does not have, or ``latent_dim`` is no integer.
        ValueError: rank, sizes or strides that do not fit.
    """

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
        self._derive()
        width = self.data.shape[2]
        if self.latent_dim < 16 or self.latent_dim & (self.latent_dim - 1):
            raise ValueError(
                f"latent_dim: got {self.latent_dim} in a cache {width} wide, powers of two of at least 16 are accepted"
            )
        if layout is CacheLayout.FP8_V32 and self.latent_dim % SCALE_BLOCK:
            raise ValueError(f"latent_dim: got {self.latent_dim}, fp8_v32 accepts multiples of {SCALE_BLOCK}")
        if layout is CacheLayout.FP8_V4:
            self._check_split_pages()
        if self.rope_dim and (self.rope_dim < 16 or self.rope_dim & (self.rope_dim - 1)):
            raise ValueError(
                f"rope_dim: got {self.rope_dim} in a cache {width} wide, "
                "0 and powers of two of at least 16 are accepted"
            )
        if layout.quantised:
            # torch.compile cannot trace the offset; the launch makes this check again
            offset = 0 if torch.compiler.is_compiling() else self.data.storage_offset()
            strides = (self.data.stride(0), self.data.stride(1), offset)
            within = 0 if layout is CacheLayout.FP8_V4 else strides[1]
            if any(value % ALIGNMENT for value in (strides[0], within, offset)):
                raise misaligned(layout.value, *strides)

    def _check_split_pages(self):
        """What ``fp8_v4`` asks of data beside alignment: a whole page is one run of bytes."""
        (_, page_size, width), latent_dim = self.data.shape, self.latent_dim
        if latent_dim < _LEAST_V4:
            raise ValueError(f"latent_dim: got {latent_dim}, fp8_v4 accepts powers of two of at least {_LEAST_V4}")
        size = CacheLayout.bytes_per_token(self.layout, latent_dim, 0)
        if width != size:
            raise ValueError(f"data: got {width} bytes a token, fp8_v4 with latent_dim {latent_dim} accepts {size}")
        if page_size > 1 and self.data.stride(1) != size:
            raise ValueError(
                f"data: got stride {self.data.stride(1)} between the rows of a page, fp8_v4 accepts dense pages: {size}"
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
        if layout is CacheLayout.FP8_V4:
            if rope_dim:
                raise ValueError(f"rope_dim: got {rope_dim}, fp8_v4 accepts 0: rotated values are the latent's last 64")
            page = CacheLayout.bytes_per_page(layout, page_size, latent_dim, 0)
            pages = torch.zeros(num_pages * page, dtype=stored, device=device)
            data = pages.as_strided((num_pages, page_size, elements), (page, elements, 1))
        else:
            data = torch.zeros(num_pages, page_size, elements, dtype=stored, device=device)
        return cls(data, latent_dim, layout)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer."""
        return CacheLayout.bytes_per_token(self.layout, self.latent_dim, self.rope_dim)
