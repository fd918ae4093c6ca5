"""copy_pages, gather_tokens, scatter_tokens and convert_cache on every backend, in every layout."""

import pytest
import torch

from mla_kernels import convert_cache, copy_pages, gather_tokens, launch, scatter_tokens
from mla_kernels.latent.cache import CacheLayout, LatentCache
from mla_kernels.latent.tools import copy, gather, scatter
from mla_kernels.reference import latent as reference
from tests.latent.problems import QUANTISED, bits, random_bits
from tests.support import not_on

LATENT, ROPE, PAGES, PAGE_SIZE = 128, 32, 7, 3
KINDS = {
    "bf16": ("latent_16bit", torch.bfloat16),
    "fp16": ("latent_16bit", torch.float16),
    "fp32": ("latent_32bit", torch.float32),
    "fp8_v32": ("fp8_v32", torch.bfloat16),
    "int8": ("int8", torch.bfloat16),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def filled(kind, device="cpu", *, pages=PAGES, page_size=PAGE_SIZE, latent=LATENT, rope=ROPE, strided=False):
    """A cache of random tokens: dense, or a layer of a larger allocation with random bytes around it."""
    layout, dtype = KINDS[kind]
    cache = LatentCache.allocate(
        pages, page_size, latent_dim=latent, rope_dim=rope, dtype=dtype, layout=layout, device=device
    )
    values = torch.randn(pages, page_size, latent + rope) * torch.logspace(-2, 2, page_size)[:, None]
    data = reference.pack_tokens(values, latent, layout) if layout in QUANTISED else values.to(dtype)
    if strided:
        whole = random_bits(pages, 2, page_size + 1, data.shape[2] + 16, dtype=data.dtype).to(device)
        cache = LatentCache(whole[:, 1, 1:, 16:], latent, layout)
    cache.data.copy_(data)
    return cache


def exact(cache):
    """Every token [num_slots, width] in float64, by the reference."""
    values = reference.dequantise_cache(cache.data.cpu(), cache.latent_dim, cache.layout.value, dtype=torch.float64)
    return values.flatten(0, 1)


# copy_pages


@pytest.mark.quick("copy_pages")
@each_kind
@pytest.mark.parametrize("strided", [False, True])
def test_copy_pages(backend, device, kind, strided):
    cache = filled(kind, device, strided=strided)
    before = cache.data.clone()
    sources, targets = torch.tensor([5, 2, -1, 5, 4]).to(device), torch.tensor([0, 6, 1, 3, -1]).int().to(device)
    copy_pages(cache, sources, targets)
    expected = before.clone()
    expected[[0, 6, 3]] = before[[5, 2, 5]]
    assert torch.equal(bits(cache.data), bits(expected))


def test_copy_pages_of_every_bit_pattern(backend, device):
    """NaN, infinities and denormals keep their bits."""
    cache = LatentCache(random_bits(4, 16, 48, dtype=torch.bfloat16).to(device), 32)
    before = cache.data.clone()
    copy_pages(cache, torch.tensor([1], device=device), torch.tensor([3], device=device))
    assert torch.equal(bits(cache.data[3]), bits(before[1]))
    assert torch.equal(bits(cache.data[:3]), bits(before[:3]))


@pytest.mark.parametrize(
    ("sources", "targets", "error", "words"),
    [
        ([0, 1], [2, 2], ValueError, r"target_pages: got \[2\] more than once"),
        ([0, 1], [2, 0], ValueError, r"target_pages: got \[0\], which are in source_pages, too"),
        ([3], [3], ValueError, r"target_pages: got \[3\], which are in source_pages, too"),
        ([0, 7], [1, 2], ValueError, "source_pages: got values from 0 to 7, accepted: -1 to 6 .*the cache has 7 pages"),
        ([0], [-2], ValueError, "target_pages: got values from -2"),
        ([0, 1], [2], ValueError, r"target_pages: got shape \(1,\), \(2\) is accepted"),
        ([[0]], [[1]], ValueError, "source_pages: got 2 dimensions"),
        ([0.0], [1], TypeError, "source_pages: got dtype float32, accepted: int32, int64"),
    ],
)
def test_copy_pages_refuses_and_writes_nothing(sources, targets, error, words):
    cache = filled("int8")
    before = cache.data.clone()
    with pytest.raises(error, match=words):
        copy_pages(cache, torch.tensor(sources), torch.tensor(targets))
    assert torch.equal(cache.data, before)


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_launch_of_copy_pages_skips_what_is_out_of_range(mode):
    cache = filled("fp8_v32")
    before = cache.data.clone()
    sources = torch.tensor([-2, PAGES, 0, 1, 1 << 40])
    targets = torch.tensor([0, 1, -(1 << 63), PAGES, 2])
    with launch.on_cpu(mode):
        copy._launch(cache.data, sources, targets)
    assert torch.equal(cache.data, before)


# gather_tokens


@pytest.mark.quick("gather_tokens")
@each_kind
@pytest.mark.parametrize("strided", [False, True])
def test_gather_tokens(backend, device, kind, strided):
    cache = filled(kind, device, strided=strided)
    slots = torch.tensor([4, 20, -1, 0, 4, -(1 << 31), 11], dtype=torch.int32, device=device)
    rows = gather_tokens(cache, slots)
    expected = exact(cache)[slots.cpu().clamp_min(0)]
    expected[slots.cpu() < 0] = 0.0
    assert rows.dtype == cache.dtype and rows.is_contiguous()
    # one rounding; int8's product is rounded to float32 before
    torch.testing.assert_close(rows.cpu(), expected.to(cache.dtype), rtol=2.0**-8 if kind == "int8" else 0, atol=0)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("latent", "rope"), [(128, 0), (256, 16), (512, 64)])
def test_gather_tokens_in_other_dtypes_and_widths(backend, device, kind, dtype, latent, rope):
    cache = filled(kind, device, latent=latent, rope=rope, pages=2)
    slots = torch.tensor([5, 1, -1, 2], device=device)
    expected = exact(cache)[[5, 1, 0, 2]]
    expected[2] = 0.0
    rows = gather_tokens(cache, slots, dtype=dtype).cpu()
    assert rows.dtype == dtype and not rows[2].any()
    torch.testing.assert_close(rows.double(), expected, rtol=2.0**-10 if dtype == torch.float16 else 1e-7, atol=1e-6)


def test_gather_reads_no_other_token(backend, device):
    cache = LatentCache(torch.full((3, 4, 48), float("nan"), device=device), 32)
    cache.data[1, 2] = 7.0
    rows = gather_tokens(cache, torch.tensor([6, -1, 6], device=device)).cpu()
    assert rows[0].eq(7.0).all() and not rows[1].any() and rows[2].eq(7.0).all()


def test_nothing_to_gather_and_an_empty_cache(backend, device):
    cache = filled("bf16", device)
    assert gather_tokens(cache, torch.zeros(0, dtype=torch.int32, device=device)).shape == (0, LATENT + ROPE)
    empty = LatentCache.allocate(0, 4, layout="fp8_v32", device=device)
    assert not gather_tokens(empty, torch.tensor([-1, -1], device=device)).any()


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_launch_of_gather_gives_zeros_for_what_is_out_of_range(mode):
    cache = filled("int8")
    slots = torch.tensor([-1, cache.num_slots, 1 << 40, -(1 << 63), 3])
    with launch.on_cpu(mode):
        rows = gather._launch(cache.data, "int8", LATENT, slots, torch.bfloat16)
    assert not rows[:4].any() and rows[4].any()


@pytest.mark.parametrize(
    ("slots", "dtype", "error", "words"),
    [
        ([0, 21], None, ValueError, "slots: got values from 0 to 21, .*the cache has 21 slots"),
        ([[0]], None, ValueError, "slots: got 2 dimensions"),
        ([0.5], None, TypeError, "slots: got dtype float32"),
        ([0], torch.float64, TypeError, "dtype: got torch.float64, accepted: bfloat16, float16, float32"),
    ],
)
def test_gather_refuses(slots, dtype, error, words):
    with pytest.raises(error, match=words):
        gather_tokens(filled("bf16"), torch.tensor(slots), dtype=dtype)


# scatter_tokens


@pytest.mark.quick("scatter_tokens")
@each_kind
@pytest.mark.parametrize("strided", [False, True])
def test_scatter_tokens(backend, device, kind, strided):
    cache = filled(kind, device, strided=strided)
    before = cache.data.clone()
    wide = torch.randn(4, 2 * (LATENT + ROPE)).to(cache.dtype).to(device)
    latent, rope = wide[:, :LATENT], wide[:, -ROPE:]
    slots = torch.tensor([17, -1, 0, 8], dtype=torch.int32, device=device)
    scatter_tokens(latent, rope, slots, cache)
    values = torch.cat((latent, rope), -1)[[0, 2, 3]].cpu()
    packed = reference.pack_tokens(values.float(), LATENT, kind) if kind in QUANTISED else values
    expected = before.cpu().flatten(0, 1)
    expected[[17, 0, 8]] = packed
    assert torch.equal(bits(cache.data.cpu().flatten(0, 1)), bits(expected))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scatter_quantises_wider_dtypes(backend, device, kind, dtype):
    cache = filled(kind, device)
    latent, rope = (torch.randn(3, width).to(dtype) for width in (LATENT, ROPE))
    scatter_tokens(latent.to(device), rope.to(device), torch.tensor([2, 1, 5], device=device), cache)
    expected = reference.pack_tokens(torch.cat((latent, rope), -1), LATENT, kind)
    assert torch.equal(cache.data.cpu().flatten(0, 1)[[2, 1, 5]], expected)


@pytest.mark.parametrize("kind", ["bf16", *QUANTISED])
def test_gather_returns_what_scatter_wrote(backend, device, kind):
    """A quantised token written back is the same token: its values are codes times its scale."""
    cache = filled(kind, device)
    before = cache.data.clone()
    slots = torch.arange(cache.num_slots, device=device)
    tokens = gather_tokens(cache, slots, dtype=torch.float32 if kind in QUANTISED else None)
    scatter_tokens(tokens[:, :LATENT], tokens[:, LATENT:], slots, cache)
    if kind == "int8":  # amax is rounded once more
        torch.testing.assert_close(exact(cache), exact(LatentCache(before, LATENT, kind)), rtol=1e-6, atol=0)
    else:
        assert torch.equal(bits(cache.data), bits(before))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"latent": torch.zeros(2, LATENT)}, TypeError, "latent: got dtype float32, accepted: bfloat16"),
        ({"latent": torch.zeros(2, 64).bfloat16()}, ValueError, r"latent: got shape \(2, 64\), \(any, 128\)"),
        ({"rope": torch.zeros(3, ROPE).bfloat16()}, ValueError, r"rope: got shape \(3, 32\), \(2, 32\)"),
        ({"rope": torch.zeros(2, ROPE)}, TypeError, "rope: got dtype float32, accepted: bfloat16"),
        ({"slots": torch.tensor([0, 21])}, ValueError, "slot_mapping: got values from 0 to 21, accepted: -1 to 20"),
        ({"slots": torch.tensor([0, -2])}, ValueError, "slot_mapping: got values from -2"),
        ({"slots": torch.tensor([0])}, ValueError, r"slot_mapping: got shape \(1,\)"),
        ({"cache": torch.zeros(2, 2, 160)}, TypeError, "cache: got Tensor, a LatentCache"),
    ],
)
def test_scatter_refuses_and_writes_nothing(changes, error, words):
    cache = filled("bf16")
    before = cache.data.clone()
    given = {
        "latent": torch.zeros(2, LATENT).bfloat16(),
        "rope": torch.zeros(2, ROPE).bfloat16(),
        "slots": torch.tensor([0, 1]),
        "cache": cache,
        **changes,
    }
    with pytest.raises(error, match=words):
        scatter_tokens(*given.values())
    assert torch.equal(bits(cache.data), bits(before))


@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_launch_of_scatter_skips_what_is_out_of_range(mode):
    cache = filled("fp8_v32")
    before = cache.data.clone()
    slots = torch.tensor([-2, cache.num_slots, 1 << 40])
    with launch.on_cpu(mode):
        scatter._launch(torch.ones(3, LATENT), torch.ones(3, ROPE), slots, cache.data, "fp8_v32", LATENT)
    assert torch.equal(cache.data, before)


# convert_cache


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.leave_out(
    "the other backends cover it; the interpreter is slow",
    when=lambda backend, source, target: backend == "interpret" and "fp16" in (source, target),
)
@pytest.mark.no_launch(
    "torch casts and copies", when=lambda source, target: source == target or not {source, target} & {"fp8_v32", "int8"}
)
def test_convert_cache(device, source, target):
    cache = filled(source, device, strided=source == "int8", pages=2)
    layout, dtype = KINDS[target]
    converted = convert_cache(cache, layout, dtype=dtype)
    assert (converted.layout.value, converted.dtype, converted.num_slots) == (layout, dtype, cache.num_slots)
    assert converted.data.is_contiguous() and converted.data.data_ptr() != cache.data.data_ptr()
    if source == target:
        assert torch.equal(bits(converted.data), bits(cache.data))
        return
    before, after = exact(cache), exact(converted)
    worst = before[:, :LATENT].abs().amax(1, keepdim=True)
    allowed = {
        "fp8_v32": before.abs() * 2.0**-4 + worst * 2.0**-9 / 448,
        "int8": worst * (0.5 / 127 + 1e-6) + before.abs() * 2.0**-9,
        "fp32": before.abs() * 1e-7,
        "bf16": before.abs() * 2.0**-8,
        "fp16": before.abs() * 2.0**-11 + 2.0**-24,
    }[target]
    assert ((after - before).abs() <= allowed).all()


def test_convert_takes_many_tokens_in_parts(monkeypatch):
    from mla_kernels.latent.tools import convert as tools

    cache = filled("bf16", pages=9)
    whole = convert_cache(cache, CacheLayout.FP8_V32)
    monkeypatch.setattr(tools, "TOKENS_AT_ONCE", 5)
    assert torch.equal(convert_cache(cache, "fp8_v32").data, whole.data)
    assert torch.equal(whole.data, reference.pack_tokens(cache.data.float(), LATENT, "fp8_v32"))


def test_convert_chooses_the_dtype():
    assert convert_cache(filled("fp16"), "latent_16bit").dtype == torch.float16
    assert convert_cache(filled("fp32"), "latent_16bit").dtype == torch.bfloat16
    assert convert_cache(filled("fp16"), "int8").dtype == torch.bfloat16
    assert convert_cache(filled("int8"), "latent_32bit").dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "layout", "dtype", "error", "words"),
    [
        ("bf16", "fp8", None, ValueError, "layout: got 'fp8', accepted: latent_16bit, latent_32bit, fp8_v32, fp8_v4"),
        ("bf16", "fp8_v4", None, ValueError, "rope_dim: got 32, fp8_v4 accepts 0"),
        ("bf16", "latent_32bit", torch.float16, TypeError, "dtype: got float16 for layout latent_32bit"),
        ("bf16", "int8", torch.float32, TypeError, "dtype: got float32 for layout int8, accepted: bfloat16"),
    ],
)
def test_convert_refuses(kind, layout, dtype, error, words):
    with pytest.raises(error, match=words):
        convert_cache(filled(kind), layout, dtype=dtype)


def test_convert_refuses_widths_that_the_layout_does_not_take():
    cache = LatentCache.allocate(2, 4, latent_dim=64, rope_dim=16)
    with pytest.raises(ValueError, match="latent_dim: got 64, fp8_v32 accepts multiples of 128"):
        convert_cache(cache, "fp8_v32")


# all of them


def test_no_access_outside_the_tensors():
    from mla_kernels.targets import emulator

    for kind in ("bf16", "fp8_v32", "int8"):
        cache = filled(kind, strided=True)
        before, values = cache.data.clone(), exact(cache)
        with launch.on_cpu("npu-emulated"), emulator.guarded():
            slots = torch.tensor([cache.num_slots - 1, 0])
            rows = gather_tokens(cache, slots)
            scatter_tokens(rows[:, :LATENT], rows[:, LATENT:], slots.flip(0), cache)
            copy_pages(cache, torch.tensor([PAGES - 1]), torch.tensor([1]))
        torch.testing.assert_close(rows.double(), values[slots], rtol=2.0**-8, atol=0)
        assert torch.equal(bits(cache.data[2:-1]), bits(before[2:-1]))


@pytest.mark.parametrize("kind", ["bf16", "fp8_v32"])
@not_on("the interpreter copies whole tensors", "interpret")
def test_offsets_past_two_to_the_31(backend, device, kind):
    layout, _ = KINDS[kind]
    small = filled(kind, device, pages=1)
    width = small.data.shape[2]
    pages = (1 << 31) // (PAGE_SIZE * width) + 3
    data = torch.empty(pages, PAGE_SIZE, width, dtype=small.data.dtype, device=device)  # untouched pages cost nothing
    large = LatentCache(data, LATENT, layout)
    data[-1] = small.data[0]
    slots = torch.arange(PAGE_SIZE, device=device)
    rows = gather_tokens(large, slots + (pages - 1) * PAGE_SIZE)
    assert torch.equal(bits(rows), bits(gather_tokens(small, slots)))
    copy_pages(large, torch.tensor([pages - 1], device=device), torch.tensor([pages - 2], device=device))
    assert torch.equal(bits(data[-2]), bits(small.data[0]))
    scatter_tokens(rows[:1, :LATENT] * 2, rows[:1, LATENT:], slots[:1] + (pages - 1) * PAGE_SIZE, large)
    scatter_tokens(rows[:1, :LATENT] * 2, rows[:1, LATENT:], slots[:1], small)
    assert torch.equal(bits(data[-1]), bits(small.data[0]))


def op_arguments():
    cache = filled("fp8_v32")
    pages, slots = torch.tensor([0, 1]), torch.tensor([3, -1])
    rows = torch.randn(2, LATENT + ROPE).bfloat16()
    named = ("fp8_v32", LATENT)
    return {
        "copy_pages": (cache.data, pages, pages + 3),
        "gather_tokens": (cache.data, *named, slots, torch.bfloat16),
        "scatter_tokens": (rows[:, :LATENT], rows[:, LATENT:], slots, cache.data, *named),
    }


@pytest.mark.parametrize("name", ["copy_pages", "gather_tokens", "scatter_tokens"])
def test_opcheck(name):
    with launch.on_cpu("torch"):
        torch.library.opcheck(getattr(torch.ops.mla_kernels, name).default, op_arguments()[name])


def test_torch_compile_takes_them_whole():
    cache = filled("int8")
    plain = LatentCache(cache.data.clone(), LATENT, "int8")
    slots, pages = torch.tensor([3, 0]), torch.tensor([0, 1])

    def step(data, slots, pages):
        cache = LatentCache(data, LATENT, "int8")
        rows = gather_tokens(cache, slots)
        scatter_tokens(rows[:, :LATENT] + 1, rows[:, LATENT:], slots, cache)
        copy_pages(cache, pages, pages + 4)
        return rows, convert_cache(cache, "latent_16bit").data

    with launch.on_cpu("torch"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(cache.data, slots, pages)
        expected = step(plain.data, slots, pages)
    assert torch.equal(cache.data, plain.data)
    assert all(map(torch.equal, compiled, expected))
