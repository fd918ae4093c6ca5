"""What the tests of compat.deep_gemm share: DeepGEMM's tolerance, its casts, and caches with poison around them."""

import torch

E4M3 = torch.float8_e4m3fn
POISON = 0x7F  # NaN as e4m3; four of them are a NaN in fp32


def calc_diff(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>): the measure of DeepGEMM's tests."""
    x, y = actual.cpu().double(), expected.cpu().double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum().clamp_min(1e-300))


def hold(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    """The same -inf, and elsewhere within DeepGEMM's tolerance."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert torch.equal(actual == -torch.inf, expected == -torch.inf)
    diff = calc_diff(actual.masked_fill(actual == -torch.inf, 0), expected.masked_fill(expected == -torch.inf, 0))
    assert diff < tolerance, diff


def cast_rows(x: torch.Tensor, gran_k: int = 128, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., K], fp32 [..., K / gran_k]) with a scale for gran_k columns of each row."""
    depth = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -depth % gran_k)).unflatten(-1, (-1, gran_k))
    scales = groups.abs().amax(-1).clamp_min(1e-4) / 448
    if power_of_two:
        scales = torch.exp2(scales.log2().ceil())
    codes = (groups / scales[..., None]).to(E4M3).flatten(-2)[..., :depth]
    return codes.contiguous(), scales


def cast_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., N, K], fp32 [..., N / 128, K / 128]) with a scale for 128 x 128 values."""
    rows, depth = x.shape[-2:]
    padded = torch.nn.functional.pad(x.float(), (0, -depth % 128, 0, -rows % 128))
    blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    scales = blocks.abs().amax((-3, -1)).clamp_min(1e-4) / 448
    codes = (blocks / scales[..., None, :, None]).to(E4M3).flatten(-4, -3).flatten(-2)
    return codes[..., :rows, :depth].contiguous(), scales


def random_words(*shape: int) -> torch.Tensor:
    """int32 of four exponents, of 2^-6 to 2^5."""
    return torch.randint(121, 133, (*shape, 4)).to(torch.uint8).view(torch.int32)[..., 0]


def random_codes(form: str, *shape: int) -> torch.Tensor:
    """Codes of a tensor of this shape: e4m3 of normal numbers, or every pair of e2m1."""
    if form != "mxfp4":
        return torch.randn(*shape).to(E4M3)
    return torch.randint(-128, 128, (*shape[:-1], shape[-1] // 2), dtype=torch.int8)


def fill_pages(keys: torch.Tensor, scales: torch.Tensor, page_size: int, tables: list[list[int]], lengths: list[int]):
    """DeepGEMM's cache, uint8 [pages, page_size, 1, bytes + 4], with poison where no key stands: of each page first its
    codes, then its scales. keys [S, bytes] of all sequences one behind the other, scales [S] of four bytes."""
    pages = max(max(table) for table in tables if table) + 2
    width = keys.shape[1]
    cache = torch.full((pages, page_size * (width + 4)), POISON, dtype=torch.uint8)
    keys, scales = keys.view(torch.uint8), scales.contiguous().view(torch.uint8).view(-1, 4)
    first = 0
    for table, length in zip(tables, lengths):
        for position in range(length):
            page, offset = table[position // page_size], position % page_size
            cache[page, offset * width : (offset + 1) * width] = keys[first + position]
            start = page_size * width + 4 * offset
            cache[page, start : start + 4] = scales[first + position]
        first += length
    return cache.view(pages, page_size, 1, width + 4)
