"""LatentCache: the paged cache of multi-head latent attention, and its byte layouts."""

import enum
from dataclasses import dataclass

import torch

from mla_kernels.checks import check_int


class CacheLayout(enum.Enum):
    """How the bytes of one token lie in a page: ``latent_dim`` values, then ``rope_dim`` values, of one element type.

    ``LATENT_16BIT`` holds bfloat16 or float16, ``LATENT_32BIT`` float32. DeepSeek-V3 (512 + 64) in bfloat16 takes
    (512 + 64) x 2 = 1,152 bytes a token and layer; multi-head K and V would take 128 x (192 + 128) x 2 = 81,920.
    """

    LATENT_16BIT = "latent_16bit"
    LATENT_32BIT = "latent_32bit"

    @classmethod
    def of(cls, dtype: torch.dtype) -> "CacheLayout":
        """The layout of a cache with this element type; TypeError names the accepted ones."""
        for layout in cls:
            if dtype in layout.dtypes:
                return layout
        raise TypeError(
            f"dtype: got {str(dtype).removeprefix('torch.')} for a latent cache, accepted: bfloat16, float16, float32"
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Element types that this layout stores."""
        return (torch.bfloat16, torch.float16) if self is CacheLayout.LATENT_16BIT else (torch.float32,)

    @property
    def element_bytes(self) -> int:
        return 2 if self is CacheLayout.LATENT_16BIT else 4

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes of one token in one layer."""
        return (latent_dim + rope_dim) * self.element_bytes

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
    1,024 bytes later.

    Args:
        data: ``[num_pages, page_size, latent_dim + rope_dim]``, bfloat16, float16 or float32, dense in its last
            dimension. Pages and slots may have any strides, so that a cache may be a slice of one larger allocation.
        latent_dim: width of the latent; a power of two of at least 16, and so is the rest, ``rope_dim``.

    Raises:
        TypeError: ``data`` is no tensor or has another dtype, or ``latent_dim`` is no integer.
        ValueError: rank, sizes or strides that do not fit.
    """

    data: torch.Tensor
    latent_dim: int

    def __post_init__(self):
        if not isinstance(self.data, torch.Tensor):
            raise TypeError(f"data: got {type(self.data).__name__}, a torch.Tensor is accepted")
        if self.data.dim() != 3:
            raise ValueError(
                f"data: got shape {tuple(self.data.shape)}, [num_pages, page_size, latent_dim + rope_dim] is accepted"
            )
        CacheLayout.of(self.data.dtype)
        check_int("latent_dim", self.latent_dim, 1)
        check_int("page_size", self.data.shape[1], 1)
        if self.data.stride(2) != 1:
            raise ValueError(f"data: got stride {self.data.stride(2)} in the last dimension, 1 is accepted")
        width = self.data.shape[2]
        for name, size in (("latent_dim", self.latent_dim), ("rope_dim", width - self.latent_dim)):
            if size < 16 or size & (size - 1):
                raise ValueError(
                    f"{name}: got {size} in a cache {width} wide, powers of two of at least 16 are accepted"
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
        device: torch.device | str = "cpu",
    ) -> "LatentCache":
        """A dense cache of zeros with ``num_pages`` pages of ``page_size`` tokens."""
        for name, value, low in (
            ("num_pages", num_pages, 0),
            ("page_size", page_size, 1),
            ("latent_dim", latent_dim, 1),
            ("rope_dim", rope_dim, 1),
        ):
            check_int(name, value, low)
        CacheLayout.of(dtype)
        data = torch.zeros(num_pages, page_size, latent_dim + rope_dim, dtype=dtype, device=device)
        return cls(data, latent_dim)

    @property
    def rope_dim(self) -> int:
        return self.data.shape[2] - self.latent_dim

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
    def layout(self) -> CacheLayout:
        return CacheLayout.of(self.data.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer."""
        return self.layout.bytes_per_token(self.latent_dim, self.rope_dim)
