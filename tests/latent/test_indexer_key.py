"""The indexer's cache and what is written to it: bytes, layouts, refusals, and parity on every backend."""

import pytest
import torch

from mla_kernels.latent.heads import rotate_indexer_query
from mla_kernels.latent.indexer.cache import IndexerCache
from mla_kernels.latent.indexer.key import write_indexer_key
from mla_kernels.reference import indexer as reference
from tests.support import assert_close, not_on

TABLE_ROWS = 9
SHAPES = [  # head_dim, rope_dim, rope, rope_first, hadamard
    (128, 64, "half", True, True),
    (64, 16, "interleaved", False, True),
    (32, 32, "interleaved_to_half", True, False),
]


def arguments(head_dim, rope_dim, dtype, tokens=7, slots=15):
    """Arguments of write_indexer_key but the cache: one token without a slot, rows of k a slice."""
    angles = torch.rand(TABLE_ROWS, rope_dim // 2) * 6
    slot_mapping = torch.randperm(slots)[:tokens]
    slot_mapping[2] = -1
    return {
        "k": (torch.randn(tokens, 2 * head_dim) * 3).to(dtype)[:, :head_dim],
        "norm_weight": (torch.rand(head_dim) + 0.5).to(dtype),
        "norm_bias": torch.randn(head_dim).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, TABLE_ROWS, (tokens,)),
        "slot_mapping": slot_mapping,
    }


def options(rope_dim, rope, rope_first, hadamard):
    return {"rope_dim": rope_dim, "rope": rope, "rope_first": rope_first, "hadamard": hadamard}


def doubled(values: dict) -> dict:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def on(device, values: dict) -> dict:
    return {name: value.to(device) for name, value in values.items()}


@pytest.mark.parametrize("head_dim, rope_dim, rope, rope_first, hadamard", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantised_keys(backend, device, head_dim, rope_dim, rope, rope_first, hadamard, dtype):
    given, chosen = arguments(head_dim, rope_dim, dtype), options(rope_dim, rope, rope_first, hadamard)
    before = torch.randn(5, 3, head_dim).to(dtype)
    cache = IndexerCache(before.to(device, copy=True), head_dim)
    write_indexer_key(**on(device, given), cache=cache, **chosen)
    exact, own = before.double(), before.clone()
    reference.write_indexer_key(**doubled(given), cache=exact, **chosen)
    reference.write_indexer_key(**given, cache=own, **chosen)
    assert_close(cache.data.cpu(), exact, own if dtype != torch.float32 else None)
    others = torch.ones(15, dtype=torch.bool).scatter_(0, given["slot_mapping"].clamp_min(0), False)
    assert torch.equal(cache.data.cpu().flatten(0, 1)[others], before.flatten(0, 1)[others])


@pytest.mark.quick("write_indexer_key")
@pytest.mark.parametrize("head_dim, rope_dim, rope, rope_first, hadamard", SHAPES)
def test_quantised_keys(backend, device, head_dim, rope_dim, rope, rope_first, hadamard):
    given, chosen = arguments(head_dim, rope_dim, torch.bfloat16), options(rope_dim, rope, rope_first, hadamard)
    given["k"][0] = 1.0  # LayerNorm makes it 0, and the bias is all that is left
    data = torch.randint(0, 256, (5, 3 * (head_dim + 4))).to(torch.uint8)
    cache = IndexerCache(data.to(device, copy=True), head_dim)
    write_indexer_key(**on(device, given), cache=cache, **chosen)
    want = data.clone()
    reference.write_indexer_key(**given, cache=want, **chosen)
    want = IndexerCache(want, head_dim)
    slots = given["slot_mapping"]
    others = torch.ones(15, dtype=torch.bool).scatter_(0, slots.clamp_min(0), False)
    got_keys, got_scales = cache.keys.cpu().flatten(0, 1), cache.scales.cpu().flatten()
    assert torch.equal(got_keys[others], IndexerCache(data, head_dim).keys.flatten(0, 1)[others])
    written = slots[slots >= 0]
    assert torch.equal(got_scales[written], want.scales.flatten()[written])
    values = [codes.view(torch.float8_e4m3fn).float() for codes in (got_keys, want.keys.flatten(0, 1))]
    off = (values[0] - values[1])[written]
    assert (off != 0).float().mean() < 0.01  # a sum in another order may fall on the other side of a rounding boundary
    assert (off.abs() <= values[1][written].abs() / 8 + 2**-9).all()


def test_nan_and_overflow_are_kept_in_the_scale(backend, device):
    given = on(device, arguments(32, 16, torch.float32))
    given["k"][1, 5] = float("nan")
    cache = IndexerCache.allocate(5, 3, head_dim=32, layout="fp8", device=device)
    write_indexer_key(**given, cache=cache, rope_dim=16, rope="half")
    slot = int(given["slot_mapping"][1])
    assert cache.scales.flatten()[slot].isnan() and (cache.keys.flatten(0, 1)[slot] == 0x7F).all()


@pytest.mark.quick("rotate_indexer_query")
@pytest.mark.parametrize("head_dim, rope_dim, rope, rope_first, hadamard", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries(backend, device, head_dim, rope_dim, rope, rope_first, hadamard, dtype):
    given, chosen = arguments(head_dim, rope_dim, dtype), options(rope_dim, rope, rope_first, hadamard)
    angles = {name: given[name] for name in ("cos", "sin", "positions")}
    q = torch.randn(3, 7, head_dim).to(dtype).transpose(0, 1)
    got = rotate_indexer_query(q.to(device), **on(device, angles), **chosen)
    exact = reference.rotate_indexer_query(q.double(), **doubled(angles), **chosen)
    assert_close(
        got.cpu(), exact, reference.rotate_indexer_query(q, **angles, **chosen) if dtype.itemsize < 4 else None
    )


def test_products_do_not_change_under_the_hadamard_transform(backend, device):
    q, k = torch.randn(4, 1, 64, device=device), torch.randn(4, 1, 64, device=device)
    tables = {"cos": torch.ones(1, 8, device=device), "sin": torch.zeros(1, 8, device=device)}
    positions = torch.zeros(4, dtype=torch.int32, device=device)

    def turned(x):
        return rotate_indexer_query(x, **tables, positions=positions, rope_dim=16, rope="half", hadamard=True)

    torch.testing.assert_close((turned(q) * turned(k)).sum(-1), (q * k).sum(-1))
    torch.testing.assert_close(turned(turned(q)), q)


def test_bytes_by_hand(backend, device):
    """Two slots of a page of two, 32 wide: codes of both first, then both scales, little-endian."""
    cache = IndexerCache.allocate(2, 2, head_dim=32, layout="fp8", device=device)
    k = torch.zeros(2, 32, device=device)
    bias = torch.tensor([1.0, -2.0, 448.0, 0.5] + [0.0] * 28, device=device)
    tables = torch.ones(1, 8, device=device), torch.zeros(1, 8, device=device)
    zeros = torch.zeros(2, dtype=torch.int32, device=device)
    for slot, factor in ((2, 1.0), (3, 4.0)):  # page 1; the second token has amax 1792 = 4 * 448
        write_indexer_key(
            k[:1], torch.ones(32, device=device), bias * factor, *tables, zeros[:1], zeros[:1] + slot, cache,
            rope_dim=16, rope="half",
        )  # fmt: skip
    codes = "38 c0 7e 30" + " 00" * 28
    scales = "00 00 80 3f" + " 00 00 80 40"  # 1.0 and 4.0
    assert bytes(cache.data[1].cpu().tolist()) == bytes.fromhex(codes + codes + scales)
    assert not cache.data[0].any()


def test_the_example_of_the_cache():
    cache = IndexerCache.allocate(8, 4, layout="fp8")
    assert (cache.bytes_per_token, cache.page_size, cache.num_pages, cache.num_slots) == (132, 4, 8, 32)
    assert cache.data.shape == (8, 528) and cache.keys.shape == (8, 4, 128) and cache.scales.shape == (8, 4)
    page, offset = divmod(9, 4)
    assert cache.keys[page, offset].data_ptr() - cache.data.data_ptr() == 1184
    assert cache.scales[page, offset].data_ptr() - cache.data.data_ptr() == 1572
    plain = IndexerCache.allocate(8, 4)
    assert plain.bytes_per_token == 256 and plain.scales is None and plain.keys is plain.data
    assert plain.data[page, offset].data_ptr() - plain.data.data_ptr() == 2304


def test_pages_of_a_larger_allocation(backend, device):
    """Layers side by side in one allocation: the other layer's bytes stay."""
    both = torch.full((5, 2, 3 * 36), 7, dtype=torch.uint8, device=device)
    cache = IndexerCache(both[:, 1], 32)
    given = on(device, arguments(32, 16, torch.float32))
    write_indexer_key(**given, cache=cache, rope_dim=16, rope="half")
    dense = IndexerCache(torch.full((5, 3 * 36), 7, dtype=torch.uint8, device=device), 32)
    write_indexer_key(**given, cache=dense, rope_dim=16, rope="half")
    assert torch.equal(both[:, 1], dense.data) and (both[:, 0] == 7).all()


CACHES = {
    "no tensor": ([1.0], {}, TypeError, "data: got list"),
    "dtype": (torch.zeros(2, 4, 128).double(), {}, TypeError, "data: got dtype float64 for layout bf16"),
    "layout": (torch.zeros(2, 4, 128), {"layout": "int8"}, ValueError, "layout: got 'int8', accepted: 'bf16', 'fp8'"),
    "fp8 of floats": (torch.zeros(2, 528), {"layout": "fp8"}, TypeError, "got dtype float32 for layout fp8"),
    "head_dim": (torch.zeros(2, 4, 96), {"head_dim": 96}, ValueError, "head_dim: got 96, powers of two from 32"),
    "width": (torch.zeros(2, 4, 64), {}, ValueError, r"data: got shape \(2, 4, 64\), \[num_pages, page_size, 128\]"),
    "bytes": (torch.zeros(2, 500).byte(), {}, ValueError, r"data: got shape \(2, 500\), .*page_size \* 132"),
    "stride": (torch.zeros(2, 4, 256)[..., ::2], {}, ValueError, "data: got strides"),
    "gaps": (torch.zeros(2, 4, 256)[..., :128], {}, ValueError, "data: got strides .* dense"),
    "odd offset": (torch.zeros(2 * 528 + 2).byte()[2:].view(2, 528), {}, ValueError, "multiples of 4 bytes"),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_refused(name):
    data, keywords, error, words = CACHES[name]
    with pytest.raises(error, match=words):
        IndexerCache(data, **keywords)


REFUSED = {
    "cache": (lambda a: {"cache": a["cache"].data}, TypeError, "cache: got Tensor, an IndexerCache"),
    "k width": (lambda a: {"k": a["k"][:, :16]}, ValueError, r"k: got shape \(7, 16\)"),
    "k dtype": (lambda a: {"k": a["k"].half()}, TypeError, "k: got dtype float16, accepted: float32"),
    "norm_weight": (lambda a: {"norm_weight": a["norm_weight"].half()}, TypeError, "norm_weight: got dtype float16"),
    "norm_bias": (lambda a: {"norm_bias": a["norm_bias"][:3]}, ValueError, r"norm_bias: got shape \(3,\)"),
    "cos": (lambda a: {"cos": a["cos"][:, :3]}, ValueError, r"cos: got shape \(9, 3\), \(any, 8\)"),
    "positions": (lambda a: {"positions": a["positions"].float()}, TypeError, "positions: got dtype float32"),
    "slots": (lambda a: {"slot_mapping": a["slot_mapping"][:3]}, ValueError, r"slot_mapping: got shape \(3,\)"),
    "rope_dim": (lambda a: {"rope_dim": 24}, ValueError, "rope_dim: got 24, powers of two from 16 to 32"),
    "rope_dim large": (lambda a: {"rope_dim": 64}, ValueError, "rope_dim: got 64, an integer from 16 to 32"),
    "rope": (lambda a: {"rope": "yarn"}, ValueError, "rope: got 'yarn', accepted"),
    "rope_first": (lambda a: {"rope_first": 1}, TypeError, "rope_first: got int, a bool"),
    "hadamard": (lambda a: {"hadamard": None}, TypeError, "hadamard: got NoneType"),
    "eps": (lambda a: {"eps": -1.0}, ValueError, "eps: got -1.0"),
    "slot beyond": (lambda a: {"slot_mapping": a["slot_mapping"] + 15}, ValueError, "slot_mapping: got values from"),
    "position beyond": (lambda a: {"positions": a["positions"] + 9}, ValueError, "positions: got values from"),
    "gradient": (lambda a: {"k": a["k"].requires_grad_()}, NotImplementedError, "k requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, error, words = REFUSED[name]
    cache = IndexerCache.allocate(5, 3, head_dim=32, dtype=torch.float32)
    given = {**arguments(32, 16, torch.float32), "cache": cache, "rope_dim": 16, "rope": "half"}
    with pytest.raises(error, match=words):
        write_indexer_key(**{**given, **changes(given)})
    assert not cache.data.any()


@not_on("values of CPU tensors are checked", "cpu")
def test_a_device_skips_bad_slots_and_positions(backend, device):
    from mla_kernels.latent.indexer.key import _launch_write

    given = on(device, arguments(32, 16, torch.float32))
    given["slot_mapping"][0], given["slot_mapping"][1], given["positions"][3] = 15, -(2**31), 9
    cache = IndexerCache.allocate(5, 3, head_dim=32, dtype=torch.float32, device=device)
    _launch_write(*given.values(), cache.data, 16, "half", True, False, 1e-6)
    want = torch.zeros(5, 3, 32)
    reference.write_indexer_key(**on("cpu", given), cache=want, rope_dim=16, rope="half")
    torch.testing.assert_close(cache.data.cpu(), want)


def test_opcheck():
    given = arguments(32, 16, torch.float32)
    cache = IndexerCache.allocate(5, 3, head_dim=32, layout="fp8")
    write = torch.ops.mla_kernels.write_indexer_key.default
    torch.library.opcheck(write, (*given.values(), cache.data, 16, "half", True, True, 1e-6))
    angles = (given["cos"], given["sin"], given["positions"])
    rotate = torch.ops.mla_kernels.rotate_indexer_query.default
    torch.library.opcheck(rotate, (torch.randn(7, 3, 32), *angles, 16, "half", True, True))
