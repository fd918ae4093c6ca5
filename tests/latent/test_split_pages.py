"""fp8_v4, whose pages hold every token's codes and then every token's scales: bytes by hand, tools, refusals.

latent_dim is 256 and page_size 3 but where said: 192 codes and 64 rotated values are 320 bytes a token, 3 scales and a
zero 4 bytes; a page is 3 x 324 = 972 bytes, 1,280 (a multiple of 320) with those behind it.
"""

import pytest
import torch

from mla_kernels import convert_cache, copy_pages, gather_tokens, launch, mla_decode, scatter_tokens
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.tools import gather, scatter
from mla_kernels.latent.write import write_latent
from mla_kernels.reference import latent as reference
from tests.support import not_on

LATENT, PAGES, PAGE_SIZE = 256, 4, 3
DATA, SCALES, PAGE = 320, 4, 1280

# A token: 1, -2, 0.5, 448 and 60 zeros; 896, 2 and 62 zeros; 64 zeros; rotated 1.5, -1 and 62 zeros.
# e4m3, s eeee mmm: 1 = 0 0111 000 = 38; -2 = C0; 0.5 = 30; 448 = 1.75 x 2^8 = 7E. bf16: 1.5 = 3FC0, -1 = BF80.
# Block 0 has amax 448, scale 2^0, byte 127 = 7F. Block 1 has 896, scale 2^1, byte 80, and codes of 448 and 1. Block 2
# has the least scale, 2^-13, byte 114 = 72.
BYTES = "38 C0 30 7E" + " 00" * 60 + " 7E 38" + " 00" * 62 + " 00" * 64 + " C03F 80BF" + " 0000" * 62
SCALE_BYTES = "7F 80 72 00"


def token(dtype=torch.float32):
    values = torch.zeros(LATENT)
    values[:4], values[64:66] = torch.tensor([1.0, -2.0, 0.5, 448.0]), torch.tensor([896.0, 2.0])
    values[192:194] = torch.tensor([1.5, -1.0])
    return values.to(dtype)


def allocate(pages=PAGES, page_size=PAGE_SIZE, latent=LATENT, device="cpu"):
    return LatentCache.allocate(pages, page_size, latent_dim=latent, rope_dim=0, layout="fp8_v4", device=device)


def whole(cache):
    """All bytes [num_pages, bytes from page to page] of a dense cache, those behind pages among them."""
    return cache.data.as_strided((cache.num_pages, cache.data.stride(0)), (cache.data.stride(0), 1), 0)


def poisoned(device="cpu", **sizes):
    cache = allocate(device=device, **sizes)
    whole(cache).fill_(0xA5)
    return cache


def filled(device="cpu", *, strided=False, **sizes):
    """A cache of random tokens: dense, or a layer of a larger allocation with random bytes around it."""
    cache = allocate(device=device, **sizes)
    if strided:
        layers = torch.randint(0, 256, (cache.num_pages, 2, cache.data.stride(0) + 16), dtype=torch.uint8).to(device)
        data = layers[:, 1, : cache.page_size * cache.bytes_per_token].unflatten(1, (cache.page_size, -1))
        cache = LatentCache(data, cache.latent_dim, "fp8_v4")
    values = torch.randn(cache.num_pages, cache.page_size, cache.latent_dim)
    values *= torch.logspace(-2, 2, cache.page_size)[:, None]
    cache.data.copy_(torch.stack([reference.pack_page(page) for page in values]))
    return cache


def exact(cache, dtype=torch.float64):
    values = reference.dequantise_cache(cache.data.cpu(), cache.latent_dim, "fp8_v4", dtype=dtype)
    return values.flatten(0, 1)


def empty_keys(latent):
    return latent[:, :0]


def expected_bytes(slot):
    """All bytes of a poisoned cache with the token above in ``slot``."""
    expected = torch.full((PAGES, PAGE), 0xA5, dtype=torch.uint8)
    page, within = divmod(slot, PAGE_SIZE)
    expected[page, within * DATA : (within + 1) * DATA] = torch.tensor(list(bytes.fromhex(BYTES)), dtype=torch.uint8)
    first = PAGE_SIZE * DATA + within * SCALES
    expected[page, first : first + SCALES] = torch.tensor(list(bytes.fromhex(SCALE_BYTES)), dtype=torch.uint8)
    return expected


def test_reference_has_these_bytes():
    cache = poisoned()
    values = token(torch.float64)[None]
    slots = torch.tensor([7])
    reference.scatter_tokens(values, empty_keys(values), slots, cache.data, latent_dim=LATENT, layout="fp8_v4")
    assert torch.equal(whole(cache), expected_bytes(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scatter_writes_these_bytes_and_no_others(backend, device, dtype):
    cache = poisoned(device)
    values = token(dtype).to(device)[None]
    scatter_tokens(values, empty_keys(values), torch.tensor([7], device=device), cache)
    assert torch.equal(whole(cache).cpu(), expected_bytes(7))


def test_these_bytes_are_read_back(backend, device):
    cache = poisoned(device)
    whole(cache).copy_(expected_bytes(7))
    (values,) = gather_tokens(cache, torch.tensor([7], device=device)).cpu()
    assert values.dtype == torch.bfloat16 and torch.equal(values.float(), token())
    assert torch.equal(exact(cache)[7], token(torch.float64))


def test_where_the_parts_lie_at_512():
    """The numbers of the docstring, and of DeepSeek-V4: 584 bytes a token in pages of a multiple of 576."""
    cache = allocate(pages=3, page_size=4, latent=512)
    assert (cache.bytes_per_token, cache.data.shape, cache.data.stride()) == (584, (3, 4, 584), (2880, 584, 1))
    assert (cache.rope_dim, cache.width, cache.dtype, cache.num_slots) == (0, 512, torch.bfloat16, 12)
    assert CacheLayout.FP8_V4.bytes_per_page(64, 512, 0) == 37440 == 65 * 576
    start = cache.data.data_ptr()
    assert cache.latents[2, 1].data_ptr() - start == 6336 and cache.latents.shape == (3, 4, 448)
    assert cache.rope[2, 1].data_ptr() - start == 6336 + 448 and cache.rope.shape == (3, 4, 64)
    assert cache.scales[2, 1].data_ptr() - start == 8072 and cache.scales.shape == (3, 4, 7)
    assert (cache.latents.dtype, cache.rope.dtype, cache.scales.dtype) == (torch.uint8, torch.bfloat16, torch.uint8)


@pytest.mark.quick(
    "gather_tokens", when=lambda latent, page_size, strided: (latent, page_size, strided) == (256, 3, True)
)
@pytest.mark.parametrize(("latent", "page_size"), [(256, 1), (256, 3), (512, 64)])
@pytest.mark.parametrize("strided", [False, True])
def test_scatter_and_gather(backend, device, latent, page_size, strided):
    cache = filled(device, latent=latent, page_size=page_size, strided=strided)
    before = exact(cache)
    slots = torch.randperm(cache.num_slots)[:3]
    rows = torch.randn(3, latent + 8)[:, 8:] * 3
    mapping = torch.cat((slots, torch.tensor([-1]))).to(device)
    rows_and_more = torch.cat((rows, torch.full_like(rows[:1], float("nan")))).to(device)
    scatter_tokens(rows_and_more, empty_keys(rows_and_more), mapping, cache)
    expected = before.clone()
    expected[slots] = exact_of(rows)
    assert torch.equal(exact(cache), expected)
    asked = torch.cat((torch.tensor([-1, -(1 << 31)]), slots, torch.tensor([0]))).int().to(device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = gather_tokens(cache, asked, dtype=dtype).cpu()
        wanted = expected[asked.cpu().clamp_min(0)].to(dtype)
        wanted[:2] = 0.0
        assert torch.equal(got, wanted)


def exact_of(rows):
    """float64 values of rows [n, latent] as the layout holds them."""
    return reference.dequantise_cache(reference.pack_page(rows)[None], rows.shape[1], "fp8_v4", dtype=torch.float64)[0]


def test_what_is_not_finite_stays_in_its_block(backend, device):
    cache = poisoned(device)
    values = token(torch.bfloat16)[None].repeat(3, 1)
    values[0, 70], values[1, 2], values[2, 255] = float("nan"), float("inf"), float("nan")
    slots = torch.tensor([0, 4, 11], device=device)
    scatter_tokens(values.to(device), empty_keys(values).to(device), slots, cache)
    assert cache.scales[0, 0].tolist() == [0x7F, 0xFF, 0x72] and cache.scales[1, 1].tolist() == [0xFF, 0x80, 0x72]
    assert cache.latents[0, 0, 64:128].eq(0x7F).all() and cache.scales[3, 2].tolist() == [0x7F, 0x80, 0x72]
    rows = gather_tokens(cache, slots).cpu().isnan()
    assert rows[0].nonzero().flatten().tolist() == list(range(64, 128))
    assert rows[1].nonzero().flatten().tolist() == list(range(64))
    assert rows[2].nonzero().flatten().tolist() == [255]


def test_scales_that_no_writer_here_picks(backend, device):
    """Any power of two is read; a value is rounded to bfloat16, and the byte behind the scales is not looked at."""
    cache = allocate(device=device)
    cache.latents.fill_(0x39)  # 1.125
    cache.scales[0, 0] = torch.tensor([1, 254, 255], dtype=torch.uint8)
    data = whole(cache)
    data[0, 3 * DATA + 3] = 0xFF
    (row,) = gather_tokens(cache, torch.tensor([0], device=device), dtype=torch.float32).cpu()
    assert row[:64].eq(1.125 * 2.0**-126).all() and row[64:128].eq(1.125 * 2.0**127).all()
    assert row[128:192].isnan().all() and not row[192:].any()


@pytest.mark.parametrize("strided", [False, True])
def test_pages_move_with_their_bytes(backend, device, strided):
    cache = filled(device, strided=strided)
    before = cache.data.clone()
    copy_pages(cache, torch.tensor([1, -1], device=device), torch.tensor([3, 0], device=device))
    before[3] = before[1]
    assert torch.equal(cache.data, before)


@pytest.mark.parametrize("other", ["latent_16bit", "latent_32bit", "fp8_v32", "int8"])
def test_conversion_to_and_from(backend, device, other):
    cache = filled(device)
    values = gather_tokens(cache, torch.arange(cache.num_slots, device=device), dtype=torch.float32).cpu()
    there = convert_cache(cache, other)
    options = {"latent_dim": LATENT, "layout": other, "dtype": torch.float64}
    held = reference.dequantise_cache(there.data.cpu(), LATENT, other, dtype=torch.float64).flatten(0, 1)
    if other.startswith("latent"):
        assert torch.equal(held, values.double())
    else:
        plain = torch.zeros(there.data.shape, dtype=torch.uint8)
        slots = torch.arange(there.num_slots)
        reference.scatter_tokens(values, empty_keys(values), slots, plain, latent_dim=LATENT, layout=other)
        assert torch.equal(plain, there.data.cpu()), options
    back = convert_cache(there, "fp8_v4")
    assert torch.equal(exact(back), exact_of(held).view_as(exact(back)))
    same = convert_cache(cache, CacheLayout.FP8_V4)
    assert same.data.data_ptr() != cache.data.data_ptr() and torch.equal(same.data, cache.data)


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_launches_skip_slots_out_of_range(mode):
    cache = filled()
    before, rows = cache.data.clone(), torch.randn(3, LATENT)
    slots = torch.tensor([-2, cache.num_slots, 1 << 40])
    with launch.on_cpu(mode):
        scatter._launch(rows, empty_keys(rows), slots, cache.data, "fp8_v4", LATENT)
        assert not gather._launch(cache.data, "fp8_v4", LATENT, slots, torch.bfloat16).any()
    assert torch.equal(cache.data, before)


def test_guarded_emulator_writes_these_bytes():
    """No access outside the tensors, the last token's page among them."""
    from mla_kernels.targets import emulator

    cache = poisoned()
    values = token(torch.bfloat16)[None]
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        scatter_tokens(values, empty_keys(values), torch.tensor([11]), cache)
        (row,) = gather_tokens(cache, torch.tensor([11]))
    assert torch.equal(whole(cache), expected_bytes(11)) and torch.equal(row.float(), token())


@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_31_bits(backend, device):
    pages = (1 << 31) // PAGE + 2
    data = torch.empty(pages, PAGE, dtype=torch.uint8, device=device)[:, :972].unflatten(1, (3, 324))
    cache = LatentCache(data, LATENT, "fp8_v4")
    values, slots = token(torch.bfloat16)[None].to(device), torch.tensor([cache.num_slots - 1], device=device)
    scatter_tokens(values, empty_keys(values), slots, cache)
    assert cache.scales[-1, -1].tolist() == [0x7F, 0x80, 0x72]
    assert torch.equal(gather_tokens(cache, slots).cpu()[0].float(), token())


def test_nothing_to_gather_and_an_empty_cache(backend, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert gather_tokens(filled(device), none).shape == (0, LATENT)
    scatter_tokens(torch.zeros(0, LATENT, device=device), torch.zeros(0, 0, device=device), none, filled(device))
    assert not gather_tokens(allocate(pages=0, device=device), torch.tensor([-1], device=device)).any()


WIDE = torch.zeros(2, 2880, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "latent_dim", "error", "words"),
    [
        (
            WIDE[:, :2336].unflatten(1, (4, 584)),
            128,
            ValueError,
            "latent_dim: got 128, fp8_v4 accepts powers of two of",
        ),
        (WIDE[:, :2400].unflatten(1, (4, 600)), 512, ValueError, "got 600 bytes a token, fp8_v4 .* accepts 584"),
        (WIDE[:, :2400].unflatten(1, (4, 600))[..., :584], 512, ValueError, "stride 600 between the rows of a page"),
        (WIDE[:, 8:2344].unflatten(1, (4, 584)), 512, ValueError, "fp8_v4 accepts multiples of 16 bytes"),
        (torch.zeros(2, 3, 584).byte(), 512, ValueError, "fp8_v4 accepts multiples of 16 bytes"),
        (torch.zeros(2, 4, 584), 512, TypeError, "data: got dtype float32 for layout fp8_v4, accepted: uint8"),
    ],
)
def test_data_that_is_refused(data, latent_dim, error, words):
    with pytest.raises(error, match=words):
        LatentCache(data, latent_dim, "fp8_v4")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "rope_dim: got 64, fp8_v4 accepts 0: rotated values are the latent's last 64"),
        ({"rope_dim": 0, "latent_dim": 128}, ValueError, "latent_dim: got 128, fp8_v4 accepts"),
        ({"rope_dim": 0, "dtype": torch.float16}, TypeError, "dtype: got float16 for layout fp8_v4"),
    ],
)
def test_allocations_that_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        LatentCache.allocate(2, 4, layout="fp8_v4", **arguments)


def test_a_page_of_an_even_number_of_tokens_needs_no_bytes_behind_it():
    cache = LatentCache(torch.zeros(2, 4, 584, dtype=torch.uint8), 512, "fp8_v4")  # 2,336 = 146 x 16
    assert cache.scales[1, 3].data_ptr() - cache.data.data_ptr() == 2336 + 4 * 576 + 3 * 8


def test_ops_with_a_key_beside_the_latent_refuse_it():
    cache = poisoned()
    kv_a, norm = torch.zeros(1, LATENT).bfloat16(), torch.ones(LATENT).bfloat16()
    tables, place = (torch.zeros(2, 0), torch.zeros(2, 0)), (torch.tensor([0]), torch.tensor([0]))
    calls = {
        "write_latent": lambda: write_latent(kv_a, norm, *tables, *place, cache, rope="half"),
        "compress_latent": lambda: compress_latent(
            kv_a, torch.eye(LATENT).bfloat16(), norm, *tables, *place, cache, rope="half"
        ),
        "mla_decode": lambda: mla_decode(
            kv_a.view(1, 1, 1, -1), cache, torch.zeros(1, 1).int(), torch.ones(1).int(), softmax_scale=1.0
        ),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{name}: got a cache in layout fp8_v4"):
            call()
    assert whole(cache).eq(0xA5).all()


def test_opcheck():
    cache, slots = filled(page_size=4), torch.tensor([3, -1, 5])  # dense pages are aligned: opcheck copies some
    rows = torch.randn(3, LATENT)
    arguments = (rows, empty_keys(rows), slots, cache.data, "fp8_v4", LATENT)
    torch.library.opcheck(torch.ops.mla_kernels.scatter_tokens.default, arguments)
    arguments = (cache.data, "fp8_v4", LATENT, slots, torch.bfloat16)
    torch.library.opcheck(torch.ops.mla_kernels.gather_tokens.default, arguments)
