"""The bytes of every cache layout, by hand: each fixture says what a token becomes and why, in hex.

latent_dim is 128 and rope_dim 16 but where said. Numbers are little-endian, so that fp32 1 = 3F800000 reads 0000803F.
"""

import pytest
import torch

from mla_kernels import convert_cache, copy_pages, gather_tokens, launch, scatter_tokens
from mla_kernels.latent.cache import LatentCache
from mla_kernels.latent.compress import compress_latent
from mla_kernels.latent.write import write_latent
from mla_kernels.reference import latent as reference

LATENT, ROPE = 128, 16

# A token of scatter_tokens: latents 1, -2, 0.5, 448 and 124 zeros; keys 1.5, -1 and 14 zeros.
# bf16 is the upper half of fp32: 1 = 3F80, -2 = C000, 0.5 = 3F00, 448 = 43E0, 1.5 = 3FC0, -1 = BF80.
BF16 = "803F 00C0 003F E043" + " 0000" * 124 + " C03F 80BF" + " 0000" * 14
# fp16: 1 = 3C00, -2 = C000, 0.5 = 3800, 448 = 1.75 x 2^8 = 5F00 (exponent 8 + 15 = 10111, mantissa 11...), 1.5 = 3E00,
# -1 = BC00.
FP16 = "003C 00C0 0038 005F" + " 0000" * 124 + " 003E 00BC" + " 0000" * 14
FP32 = (
    "0000803F 000000C0 0000003F 0000E043" + " 00000000" * 124 + " 0000C03F 000080BF" + " 00000000" * 14
)  # fmt: skip

# fp8_v32. amax 448 / 448 = 1, so the scale is 2^0, fp32 3F800000, and codes are e4m3 of the values, s eeee mmm:
# 1 = 2^0: e = 7, 0 0111 000 = 38; -2 = 1 1000 000 = C0; 0.5 = 0 0110 000 = 30; 448 = 1.75 x 2^8: 0 1111 110 = 7E.
# One scale (latent_dim / 128), 12 zero bytes up to 16, then the 16 bf16 keys.
FP8 = "38 C0 30 7E" + " 00" * 124 + " 0000803F" + " 00" * 12 + " C03F 80BF" + " 0000" * 14

# int8. The scale is 448 / 127 = 3.52755905... = 1.763779527... x 2^1. The mantissa is .763779527... x 2^23 = 6407046.6,
# rounded 6407047 = 61C387, so 0 10000000 11000011100001110000111 = 4061C387. Codes: 1 / 3.5276 = 0.28 -> 0;
# -2 -> -0.57 -> -1 = FF; 0.5 -> 0.14 -> 0; 448 -> 127 = 7F.
INT8 = "00 FF 00 7F" + " 00" * 124 + " 87C36140" + " 00" * 12 + " C03F 80BF" + " 0000" * 14

LAYOUTS = {
    "latent_16bit-bf16": ("latent_16bit", torch.bfloat16, BF16, 288),
    "latent_16bit-fp16": ("latent_16bit", torch.float16, FP16, 288),
    "latent_32bit": ("latent_32bit", torch.float32, FP32, 576),
    "fp8_v32": ("fp8_v32", torch.bfloat16, FP8, 176),
    "int8": ("int8", torch.bfloat16, INT8, 176),
}
each_layout = pytest.mark.parametrize("name", LAYOUTS)


def token(dtype):
    values = torch.zeros(LATENT + ROPE)
    values[:4], values[128:130] = torch.tensor([1.0, -2.0, 0.5, 448.0]), torch.tensor([1.5, -1.0])
    return values.to(dtype)


def make(name, device="cpu", *, latent=LATENT, rope=ROPE):
    """A cache of 3 pages of 2 tokens with every byte 0xA5, and the bytes expected at a token."""
    layout, dtype, expected, size = LAYOUTS[name]
    cache = LatentCache.allocate(3, 2, latent_dim=latent, rope_dim=rope, dtype=dtype, layout=layout, device=device)
    cache.data.view(torch.uint8).fill_(0xA5)
    expected = bytes.fromhex(expected)
    assert len(expected) == size == cache.bytes_per_token or latent != LATENT
    return cache, expected


def at(cache, slot):
    return bytes(cache.data.cpu().view(torch.uint8).flatten(0, 1)[slot].tolist())


@each_layout
def test_reference_has_these_bytes(name):
    layout, _, expected, _ = LAYOUTS[name]
    cache, _ = make(name)
    values = token(torch.float64)[None]
    reference.scatter_tokens(
        values[:, :LATENT], values[:, LATENT:], torch.tensor([4]), cache.data, latent_dim=LATENT, layout=layout
    )
    assert at(cache, 4) == bytes.fromhex(expected)


@each_layout
def test_scatter_writes_these_bytes(backend, device, name):
    cache, expected = make(name, device)
    values = token(cache.dtype).to(device)[None]
    scatter_tokens(values[:, :LATENT], values[:, LATENT:], torch.tensor([4], device=device), cache)
    assert at(cache, 4) == expected
    assert all(set(at(cache, slot)) == {0xA5} for slot in (0, 1, 2, 3, 5))


@each_layout
def test_these_bytes_are_read_back(backend, device, name):
    cache, expected = make(name, device)
    raw = torch.tensor(list(expected), dtype=torch.uint8, device=device)
    cache.data.view(torch.uint8)[1, 1] = raw
    (values,) = gather_tokens(cache, torch.tensor([3], device=device)).cpu()
    expected = token(torch.float32)
    if name == "int8":  # codes 0, -1, 0, 127 times 448 / 127 = 3.52755905, in bf16 3.53125
        expected[:4] = torch.tensor([0.0, -3.53125, 0.0, 448.0])
    assert torch.equal(values.float(), expected)
    by_reference = reference.gather_tokens(
        cache.data.cpu(), torch.tensor([3]), latent_dim=LATENT, layout=cache.layout.value
    )
    assert torch.equal(by_reference[0].to(values.dtype), values)


@each_layout
def test_pages_move_with_their_bytes(backend, device, name):
    cache, expected = make(name, device)
    cache.data.view(torch.uint8)[1, 1] = torch.tensor(list(expected), dtype=torch.uint8, device=device)
    copy_pages(cache, torch.tensor([1], device=device), torch.tensor([2], device=device))
    assert at(cache, 5) == expected and set(at(cache, 4)) == {0xA5}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "latent_32bit"])
@pytest.mark.no_launch("torch casts", when=lambda name: name.startswith("latent_16bit"))
def test_conversion_from_fp32_gives_these_bytes(backend, device, name):
    source, raw = make("latent_32bit", device)
    source.data.zero_()
    source.data.view(torch.uint8)[1, 1] = torch.tensor(list(raw), dtype=torch.uint8, device=device)
    layout, dtype, expected, _ = LAYOUTS[name]
    converted = convert_cache(source, layout, dtype=dtype)
    assert at(converted, 3) == bytes.fromhex(expected)
    # a token of zeros: scale 2^-13 = 39000000 in fp8_v32, 1 = 3F800000 in int8
    scale = {"fp8_v32": "00000039", "int8": "0000803F"}.get(name, "")
    zero = bytes(LATENT) + bytes.fromhex(scale) + bytes(12 + 2 * ROPE) if scale else bytes(len(at(converted, 0)))
    assert at(converted, 0) == zero


# write_latent and compress_latent. Latents are 1 and -1 in turns; their mean square is 1 and eps 0, so that the norm
# leaves them as they are. The weights are 1, but for latent 0 (448), 1 (0.25) and 2 (17). Keys 1, 2, ... 16 are turned
# by 90 degrees, (x, y) -> (-y, x), in mode "half", pairs (1, 9), (2, 10), ...: -9, -10, ... -16, then 1, 2, ... 8.
WRITTEN_KEYS = (
    "10C1 20C1 30C1 40C1 50C1 60C1 70C1 80C1"  # bf16 -9 = C110, -10 = C120, ... -15 = C170, -16 = C180
    " 803F 0040 4040 8040 A040 C040 E040 0041"  # 1 = 3F80, 2 = 4000, 3 = 4040, 4 = 4080, 5 = 40A0, 6, 7, 8 = 4100
)
# fp8_v32: scale 1. 448 = 7E; -0.25 = 1 0101 000 = A8; 17 lies in the middle of 16 = 0 1011 000 = 58 and 18 = 59 and
# goes to the even one, 58; then -1 = B8 and 1 = 38 in turns.
WRITTEN_FP8 = "7E A8 58 B8" + " 38 B8" * 62 + " 0000803F" + " 00" * 12 + WRITTEN_KEYS
# int8 with 127 and 0.5, 2.5 and 3.5 instead of 448, 0.25, 17 and 1 for latent 3: scale 1; -0.5 -> -0 = 00;
# 2.5 -> 2; -3.5 -> -4 = FC; then 1 and -1.
WRITTEN_INT8 = "7F 00 02 FC" + " 01 FF" * 62 + " 0000803F" + " 00" * 12 + WRITTEN_KEYS
# bf16 with 448, 0.25, 17: 43E0, -0.25 = BE80, 17 = 4188, then BF80 and 3F80 in turns
WRITTEN_BF16 = "E043 80BE 8841 80BF" + " 803F 80BF" * 62 + WRITTEN_KEYS
WRITTEN = {
    "latent_16bit-bf16": (WRITTEN_BF16, (448.0, 0.25, 17.0, 1.0)),
    "fp8_v32": (WRITTEN_FP8, (448.0, 0.25, 17.0, 1.0)),
    "int8": (WRITTEN_INT8, (127.0, 0.5, 2.5, 3.5)),
}


def written_arguments(name, op, device="cpu"):
    weights = torch.ones(LATENT)
    weights[:4] = torch.tensor(WRITTEN[name][1])
    kv_a = torch.cat((torch.tensor([1.0, -1.0]).repeat(LATENT // 2), torch.arange(1.0, 17.0)))[None].bfloat16()
    cos, sin = torch.zeros(3, ROPE // 2), torch.ones(3, ROPE // 2)
    shared = (weights.bfloat16(), cos, sin, torch.tensor([2]), torch.tensor([3]))
    # hidden (1, 0, ...) times a weight whose first column is kv_a
    projected = (torch.eye(1, 16).bfloat16(), torch.nn.functional.pad(kv_a.T, (0, 15)))
    arguments = (kv_a, *shared) if op is write_latent else (*projected, *shared)
    return [value.to(device) for value in arguments]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("op", [write_latent, compress_latent])
def test_writers_write_these_bytes(backend, device, name, op):
    cache, _ = make(name, device)
    op(*written_arguments(name, op, device), cache, rope="half", eps=0.0)
    assert at(cache, 3) == bytes.fromhex(WRITTEN[name][0])
    assert all(set(at(cache, slot)) == {0xA5} for slot in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("op", ["write_latent", "compress_latent"])
def test_reference_writes_these_bytes(name, op):
    cache, _ = make(name)
    function = {"write_latent": write_latent, "compress_latent": compress_latent}[op]
    options = {"latent_dim": LATENT, "layout": cache.layout.value, "rope": "half", "eps": 0.0}
    getattr(reference, op)(*written_arguments(name, function), cache.data, **options)
    assert at(cache, 3) == bytes.fromhex(WRITTEN[name][0])


def test_where_the_parts_lie_at_512_and_64(backend, device):
    """The numbers of the docstring: 656 bytes; slot 9's scales 512 and its key 528 bytes behind its first code."""
    cache = LatentCache.allocate(3, 4, layout="fp8_v32", device=device)
    latent = torch.zeros(1, 512, dtype=torch.bfloat16)
    latent[0, [0, 128, 256, 384]] = torch.tensor([448.0, 896.0, 1.75, -224.0]).bfloat16()
    rope = torch.full((1, 64), 1.5, dtype=torch.bfloat16)
    scatter_tokens(latent.to(device), rope.to(device), torch.tensor([9], device=device), cache)
    raw = bytes(cache.data.cpu().flatten().tolist())
    assert cache.bytes_per_token == 656
    assert raw.index(b"\x7e") == 5904
    # scales 1, 2, 2^-8 and 0.5: 3F800000, 40000000, 3B800000, 3F000000
    assert raw[5904 + 512 : 5904 + 528] == bytes.fromhex("0000803F 00000040 0000803B 0000003F")
    assert [raw[5904 + 128 * block] for block in range(4)] == [0x7E, 0x7E, 0x7E, 0xFE]
    assert raw[5904 + 528 : 5904 + 656] == bytes.fromhex("C03F") * 64
    assert not any(raw[:5904]) and not any(raw[5904 + 656 :])


def test_two_scales_have_eight_zeros_behind_them(backend, device):
    cache = LatentCache.allocate(1, 1, latent_dim=256, rope_dim=0, layout="fp8_v32", device=device)
    cache.data.fill_(0xA5)
    latent = torch.cat((torch.full((1, 128), 448.0), torch.full((1, 128), 2.0)), 1).bfloat16()
    empty = torch.zeros(1, 0, dtype=torch.bfloat16)
    scatter_tokens(latent.to(device), empty.to(device), torch.tensor([0], device=device), cache)
    # 2 / 448 = 2^-7.8 -> 2^-7 = 3C000000, 2 x 2^7 = 256 = 2^8: 0 1111 000 = 78
    assert at(cache, 0) == bytes.fromhex("7E" * 128 + "78" * 128 + "0000803F 0000003C" + "00" * 8)


@pytest.mark.parametrize("name", ["fp8_v32", "int8"])
def test_guarded_emulator_writes_these_bytes_through_aliased_views(name):
    """A launch writes one storage through three typed views; copies between guard pages must keep them one storage."""
    from mla_kernels.targets import emulator

    cache, expected = make(name)
    values = token(cache.dtype)[None]
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        scatter_tokens(values[:, :LATENT], values[:, LATENT:], torch.tensor([4]), cache)
    assert at(cache, 4) == expected
    assert all(set(at(cache, slot)) == {0xA5} for slot in (0, 1, 2, 3, 5))
