import pytest
import torch

from mla_kernels.reference.latent import ROPE_MODES, apply_rope, compress_latent, rms_norm, write_latent
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
