import pytest
import torch

from mla_kernels.reference.latent import (
    ROPE_MODES,
    apply_rope,
    compress_latent,
    convert_cache,
    copy_pages,
    decode_e4m3,
    dequantise_cache,
    dequantise_latent,
    encode_e4m3,
    gather_tokens,
    pack_tokens,
    power_of_two_scale,
    quantise_latent,
    rms_norm,
    scatter_tokens,
    write_latent,
)
from tests.support import poisoned

TOKENS, HIDDEN, LATENT, ROPE = 11, 24, 16, 8


def inputs(dtype=torch.float64):
    angles = torch.rand(40, ROPE // 2) * 6
    kv_a = torch.randn(TOKENS, LATENT + ROPE, dtype=dtype)
    norm_weight = torch.randn(LATENT, dtype=dtype)
    positions = torch.randint(0, 40, (TOKENS,))
    return kv_a, norm_weight, angles.cos(), angles.sin(), positions


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    weight = torch.tensor([1.0, 2.0])
    expected = torch.tensor([[3.0, 8.0], [0.0, 0.0]]) / 12.5**0.5
    torch.testing.assert_close(rms_norm(x, weight, eps=0.0).nan_to_num(0.0), expected)
    assert torch.equal(rms_norm(x, weight)[1], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_against_torch(dtype):
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    actual = rms_norm(x, weight)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))


def test_rope_orders():
    """a a' b b' and a b a' b' name the same two pairs."""
    pairs = torch.tensor([[1.0, 10.0], [2.0, 20.0]], dtype=torch.float64)  # (a, a'), (b, b')
    interleaved, half = pairs.flatten(), pairs.T.flatten()
    turn = torch.polar(torch.ones(2, dtype=torch.float64), torch.tensor([0.3, 1.1], dtype=torch.float64))
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    cos, sin = turn.real, turn.imag
    torch.testing.assert_close(apply_rope(interleaved, cos, sin, rope="interleaved"), turned.flatten())
    torch.testing.assert_close(apply_rope(interleaved, cos, sin, rope="interleaved_to_half"), turned.T.flatten())
    torch.testing.assert_close(apply_rope(half, cos, sin, rope="half"), turned.T.flatten())


@pytest.mark.parametrize("rope", ROPE_MODES)
def test_rope_scores_depend_on_distance_alone(rope):
    q, k = torch.randn(2, ROPE, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def score(i, j):
        rotate = [
            apply_rope(x, (p * frequencies).cos(), (p * frequencies).sin(), rope=rope) for x, p in ((q, i), (k, j))
        ]
        return rotate[0] @ rotate[1]

    torch.testing.assert_close(score(9, 4), score(105, 100))


def test_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="rope 'neox'"):
        apply_rope(torch.zeros(4), torch.zeros(2), torch.zeros(2), rope="neox")


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("rope", ROPE_MODES)
def test_each_token_goes_to_its_slot(rope, index):
    kv_a, norm_weight, cos, sin, positions = inputs()
    pages, page_size = 5, 7
    slots = torch.randperm(pages * page_size)[:TOKENS]
    slots[3] = -1
    cache = poisoned(pages, page_size, LATENT + ROPE, dtype=torch.float64)
    result = write_latent(
        kv_a, norm_weight, cos, sin, positions.to(index), slots.to(index), cache, latent_dim=LATENT, rope=rope
    )
    assert result is None
    rows = cache.flatten(0, 1)
    written = [token for token in range(TOKENS) if token != 3]
    at = slots[written]
    torch.testing.assert_close(rows[at, :LATENT], rms_norm(kv_a[written, :LATENT], norm_weight))
    expected = apply_rope(kv_a[written, LATENT:], cos[positions[written]], sin[positions[written]], rope=rope)
    torch.testing.assert_close(rows[at, LATENT:], expected)
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[at] = False
    assert rows[untouched].isnan().all()


def test_slots_and_positions_out_of_range_write_nothing():
    kv_a, norm_weight, cos, sin, _ = inputs()
    cache = poisoned(2, 4, LATENT + ROPE, dtype=torch.float64)
    slots = torch.tensor([-1, -2, 8, 2**31, -(2**31), 5, 6, 7, -1, -1, -1])
    positions = torch.tensor([0, 0, 0, 0, 0, 40, -1, 2**31, 0, 0, 0])
    write_latent(kv_a, norm_weight, cos, sin, positions, slots, cache, latent_dim=LATENT, rope="half")
    assert cache.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compress_is_projection_then_write(dtype):
    _, norm_weight, cos, sin, positions = inputs(dtype)
    hidden, weight = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(LATENT + ROPE, HIDDEN, dtype=dtype)
    slots = torch.randperm(24)[:TOKENS]
    fused, apart = torch.zeros(2, 3, 8, LATENT + ROPE, dtype=dtype)
    options = {"latent_dim": LATENT, "rope": "interleaved", "eps": 1e-3}
    compress_latent(hidden, weight, norm_weight, cos, sin, positions, slots, fused, **options)
    write_latent(hidden @ weight.T, norm_weight, cos, sin, positions, slots, apart, **options)
    torch.testing.assert_close(fused, apart)


def test_no_tokens():
    cache = torch.zeros(1, 4, LATENT + ROPE)
    empty = torch.zeros(0, dtype=torch.int64)
    tables = torch.zeros(4, ROPE // 2)
    kv_a, hidden = torch.zeros(0, LATENT + ROPE), torch.zeros(0, HIDDEN)
    options = {"latent_dim": LATENT, "rope": "half"}
    write_latent(kv_a, torch.ones(LATENT), tables, tables, empty, empty, cache, **options)
    weight = torch.zeros(LATENT + ROPE, HIDDEN)
    compress_latent(hidden, weight, torch.ones(LATENT), tables, tables, empty, empty, cache, **options)
    assert not cache.any()


def test_e4m3_by_the_formula():
    """(-1)^s 2^(e - 7) (1 + m / 8), and 2^-6 m / 8 where e is 0; 0x7F and 0xFF are NaN."""
    values = decode_e4m3(torch.arange(256, dtype=torch.uint8), torch.float64).tolist()
    for code, value in enumerate(values):
        sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
        if code & 0x7F == 0x7F:
            assert value != value
        else:
            assert value == sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-9 * mantissa)


def test_e4m3_takes_the_nearest_code():
    """Of every value and every middle between two; the middle goes to the even code; beyond 448 it saturates."""
    codes = torch.arange(127, dtype=torch.uint8)  # up to 448
    values = decode_e4m3(codes, torch.float64)
    assert torch.equal(encode_e4m3(values), codes)
    middles = (values[1:] + values[:-1]) / 2
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    assert torch.equal(encode_e4m3(middles), even)
    assert torch.equal(encode_e4m3(middles * (1 + 1e-6)), codes[1:])
    assert torch.equal(encode_e4m3(middles * (1 - 1e-6)), codes[:-1])
    assert torch.equal(encode_e4m3(-values[1:]), codes[1:] | 0x80)
    beyond = torch.tensor([449.0, 1e30, float("inf"), float("-inf"), float("nan")], dtype=torch.float64)
    assert encode_e4m3(beyond).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_scales(dtype):
    """Exact at 448 x 2^k, where log2 is a whole number, and one double above it; never below 2^-13."""
    powers = torch.arange(-13, 90, dtype=dtype)
    amax = 448 * 2.0**powers
    assert torch.equal(power_of_two_scale(amax), 2.0**powers)
    above = torch.nextafter(amax, torch.full_like(amax, float("inf")))
    assert torch.equal(power_of_two_scale(above), 2.0 ** (powers + 1))
    assert power_of_two_scale(torch.tensor([0.0, 0.01, 0.0448], dtype=dtype)).tolist() == [2.0**-13] * 3
    assert power_of_two_scale(torch.tensor([float("inf"), float("nan")], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantisers_are_within_half_a_step(layout, dtype):
    latent = torch.randn(50, 256, dtype=dtype) * torch.logspace(-8, 8, 50)[:, None]
    codes, scales = quantise_latent(latent, layout)
    assert scales.shape == ((50, 2) if layout == "fp8_v32" else (50, 1)) and scales.dtype == torch.float32
    values = dequantise_latent(codes, scales, layout, dtype=torch.float64)
    step = scales.double().repeat_interleave(256 // scales.shape[1], 1)
    if layout == "fp8_v32":
        step = torch.maximum(latent.abs() / 8, step * 2.0**-9)
    assert ((values - latent).abs() <= step / 2 * (1 + 1e-6)).all()
    assert codes.view(torch.int8).abs().amax() == 127 if layout == "int8" else codes.max() <= 0xFE


def test_int8_scales():
    latent = torch.tensor([[0.0, 0.0], [127.0, -0.5], [0.0, -254.0], [1e-45, 0.0]]).repeat(1, 8)
    codes, scales = quantise_latent(latent, "int8")
    assert scales.flatten().tolist() == [1.0, 1.0, 2.0, 1.0]
    assert codes[:, :2].tolist() == [[0, 0], [127, 0], [0, -127], [0, 0]]  # -0.5 goes to the even 0
    spoiled, scales = quantise_latent(torch.tensor([[1.0, float("nan")]]), "int8")
    assert spoiled.tolist() == [[0, 0]] and scales.isnan().all()


@pytest.mark.parametrize(("layout", "width"), [("fp8_v32", 128 + 16 + 2 * ROPE), ("int8", 128 + 16 + 2 * ROPE)])
def test_tools_of_quantised_caches(layout, width):
    values = torch.randn(2, 3, 128 + ROPE)
    cache = pack_tokens(values, 128, layout)
    assert cache.shape == (2, 3, width)
    options = {"latent_dim": 128, "layout": layout}
    exact = dequantise_cache(cache, 128, layout).flatten(0, 1)
    gathered = gather_tokens(cache, torch.tensor([4, -1, 6, 0]), **options)
    assert torch.equal(gathered, torch.stack([exact[4], exact[4] * 0, exact[4] * 0, exact[0]]))
    latent, rope = values[1].split((128, ROPE), -1)
    scatter_tokens(latent, rope, torch.tensor([0, -1, 2]), cache, **options)
    assert torch.equal(dequantise_cache(cache, 128, layout).flatten(0, 1)[[0, 2]], exact[[3, 5]])
    copy_pages(cache, torch.tensor([0, -1]), torch.tensor([1, 0]))
    assert torch.equal(cache[0], cache[1])
    back = convert_cache(cache, "latent_32bit", latent_dim=128, cache_layout=layout, dtype=torch.float32)
    assert torch.equal(back, dequantise_cache(cache, 128, layout))
    assert torch.equal(convert_cache(back, layout, latent_dim=128, cache_layout="latent_32bit"), cache)


def test_write_to_a_quantised_cache_is_the_norm_quantised():
    _, _, cos, sin, positions = inputs()
    kv_a, norm_weight = torch.randn(TOKENS, 128 + ROPE), torch.rand(128)
    slots = torch.randperm(24)[:TOKENS]
    plain, cache = torch.zeros(3, 8, 128 + ROPE), torch.zeros(3, 8, 128 + 16 + 2 * ROPE, dtype=torch.uint8)
    arguments = (kv_a, norm_weight, cos, sin, positions, slots)
    write_latent(*arguments, plain, latent_dim=128, rope="half")
    write_latent(*arguments, cache, latent_dim=128, layout="fp8_v32", rope="half")
    written = plain.flatten(0, 1)[slots]
    assert torch.equal(cache.flatten(0, 1)[slots], pack_tokens(written, 128, "fp8_v32"))
