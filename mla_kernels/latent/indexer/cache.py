"""IndexerCache: the paged keys of the lightning indexer, and their byte layouts."""

from dataclasses import dataclass, field

import torch

from mla_kernels.checks import FLOATS, check_choice, check_int

LAYOUTS = ("bf16", "fp8")
HEAD_DIMS = (32, 64, 128, 256)
SCALE_BYTES = 4  # one fp32 scale a key


@dataclass(frozen=True, eq=False)
class IndexerCache:
    """Paged cache of one layer: one key per token, shared by all index heads.

    ==========  ================  ==================================================  ===============  =============
    layout      data dtype        data                                                a page           128 wide takes
    ==========  ================  ==================================================  ===============  =============
    ``"bf16"``  bf16, fp16, fp32  ``[num_pages, page_size, head_dim]``                its keys         256 bytes
    ``"fp8"``   uint8             ``[num_pages, page_size * (head_dim + 4)]``         codes, scales    132 bytes
    ==========  ================  ==================================================  ===============  =============

    A page of ``"fp8"`` holds first the e4m3 codes of its keys, ``page_size`` rows of ``head_dim`` bytes, THEN their
    scales, ``page_size`` fp32 numbers: value i of a key is ``e4m3(code_i) * scale``, where the writer picks
    ``scale = 2 ** ceil(log2(max(amax / 448, 1e-4)))``. This is DeepSeek-V3.2's (and vLLM's) indexer cache.

    A token is addressed by its slot, ``slot = page * page_size + offset``. With ``page_size`` 4, ``head_dim`` 128 and
    the block table row ``[7, 2]``, token 5 of that sequence is token 1 of its second page, page 2: slot 2 * 4 + 1 = 9.
    In a dense ``"fp8"`` cache a page takes 4 * 132 = 528 bytes; the codes of slot 9 are bytes 2 * 528 + 1 * 128 = 1,184
    to 1,311, its scale bytes 2 * 528 + 4 * 128 + 1 * 4 = 1,572 to 1,575. In ``"bf16"`` its key starts at byte
    9 * 256 = 2,304.

    Args:
        data: as in the table, dense within a page; pages may have any stride (``"fp8"``: stride and offset multiples
            of 4 bytes), so that a cache may be a slice of one larger allocation.
        head_dim: width of a key, a power of two from 16 to 256.
        layout: None for the layout of ``data``'s element type.

    Raises:
        TypeError: ``data`` is no tensor or has a dtype that the layout does not have, or ``head_dim`` is no integer.
        ValueError: rank, sizes or strides that do not fit.
    """

    data: torch.Tensor
    head_dim: int = 128
    layout: str | None = None
    quantised: bool = field(init=False, repr=False)
    page_size: int = field(init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.data, torch.Tensor):
            raise TypeError(f"data: got {type(self.data).__name__}, a torch.Tensor is accepted")
        if self.layout is None:
            object.__setattr__(self, "layout", "fp8" if self.data.dtype == torch.uint8 else "bf16")
        check_choice("layout", self.layout, LAYOUTS)
        object.__setattr__(self, "quantised", self.layout == "fp8")
        accepted = (torch.uint8,) if self.quantised else FLOATS
        if self.data.dtype not in accepted:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
            got = str(self.data.dtype).removeprefix("torch.")
            raise TypeError(f"data: got dtype {got} for layout {self.layout}, accepted: {names}")
        check_head_dim(self.head_dim)
        shape = tuple(self.data.shape)
        if self.quantised:
            token = self.head_dim + SCALE_BYTES
            if len(shape) != 2 or shape[1] == 0 or shape[1] % token:
                raise ValueError(f"data: got shape {shape}, [num_pages, page_size * {token}] is accepted")
            # torch.compile cannot trace the offset; the launch makes this check again
            place = self.data.stride(0), 0 if torch.compiler.is_compiling() else self.data.storage_offset()
            if any(value % SCALE_BYTES for value in place):
                raise misplaced(*place)
        elif len(shape) != 3 or shape[1] == 0 or shape[2] != self.head_dim:
            raise ValueError(f"data: got shape {shape}, [num_pages, page_size, {self.head_dim}] is accepted")
        if self.data.stride(-1) != 1 or (not self.quantised and shape[1] > 1 and self.data.stride(1) != self.head_dim):
            raise ValueError(f"data: got strides {self.data.stride()}, pages that are dense are accepted")
        object.__setattr__(self, "page_size", page_size_of(self.data, self.head_dim))

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        *,
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> "IndexerCache":
        """A dense cache of zeros with ``num_pages`` pages of ``page_size`` tokens; ``dtype`` is that of "bf16"."""
        check_int("num_pages", num_pages, 0)
        check_int("page_size", page_size, 1)
        check_choice("layout", layout, LAYOUTS)
        check_head_dim(head_dim)
        shape = (num_pages, page_size, head_dim)
        if layout == "fp8":
            shape, dtype = (num_pages, page_size * (head_dim + SCALE_BYTES)), torch.uint8
        return cls(torch.zeros(shape, dtype=dtype, device=device), head_dim, layout)

    @property
    def keys(self) -> torch.Tensor:
        """View ``[num_pages, page_size, head_dim]``: values, or e4m3 codes as uint8."""
        if not self.quantised:
            return self.data
        return self.data[:, : self.page_size * self.head_dim].unflatten(1, (self.page_size, self.head_dim))

    @property
    def scales(self) -> torch.Tensor | None:
        """View fp32 ``[num_pages, page_size]`` of the keys' scales, or None."""
        return self.data[:, self.page_size * self.head_dim :].view(torch.float32) if self.quantised else None

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer."""
        return self.head_dim + SCALE_BYTES if self.quantised else self.head_dim * self.data.element_size()


def page_size_of(data: torch.Tensor, head_dim: int) -> int:
    """Tokens of a page of a cache's data."""
    return data.shape[1] if data.dim() == 3 else data.shape[1] // (head_dim + SCALE_BYTES)


def launched_parts(data: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(codes as int8, fp32 scales) of an "fp8" cache's data, views of its one storage that begin at the first token's,
    which is what kernels take; None of another. Refuses bytes that do not lie on 4, where :class:`IndexerCache` could
    not look: in torch.compile."""
    if data.dim() == 3:
        return None
    place = data.stride()[0], data.storage_offset()
    if (place[0] | place[1]) % SCALE_BYTES:
        raise misplaced(*place)
    codes = data.shape[1] // (head_dim + SCALE_BYTES) * head_dim
    return data.view(torch.int8), data.view(torch.float32)[:, codes // SCALE_BYTES :]


def misplaced(*place: int, name: str = "data") -> ValueError:
    return ValueError(f"{name}: got page stride and offset {place}, fp8 accepts multiples of 4 bytes")


def check_head_dim(head_dim) -> None:
    check_int("head_dim", head_dim, HEAD_DIMS[0], HEAD_DIMS[-1])
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: got {head_dim}, powers of two from 32 to 256 are accepted")


def check_indexer_cache(cache) -> None:
    if not isinstance(cache, IndexerCache):
        raise TypeError(f"cache: got {type(cache).__name__}, an IndexerCache is accepted")
