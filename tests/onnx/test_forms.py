"""The forms as torch functions: exact numbers against the references, and what must not be read, or has no number."""

import pytest
import torch

import mla_kernels as mk
from mla_kernels import launch
from mla_kernels.attention.decode.forward import NO_WINDOW
from mla_kernels.catalogue.calls import rope_tables
from mla_kernels.onnx import numbers
from mla_kernels.onnx.forms import FORMS
from mla_kernels.reference import latent, quant
from tests.support import assert_close


@pytest.fixture(autouse=True)
def _torch_mode():
    with launch.on_cpu("torch"):
        yield


def same(got, want):
    """Equal, NaN in the same places."""
    assert got.dtype == want.dtype and got.isnan().equal(want.isnan())
    assert got.nan_to_num(7.0).equal(want.nan_to_num(7.0))


def values():
    """Of all magnitudes: around every code and every tie of e4m3, subnormal, infinite, NaN."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    codes = latent.decode_e4m3(codes)[:127]
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)))
    bits = torch.randint(-(2**31), 2**31, (50000,)).to(torch.int32).view(torch.float32)
    special = torch.tensor(
        [0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**127, 3.4e38, 1e9, torch.inf, -torch.inf, torch.nan]
    )
    return torch.cat((near, -near, torch.randn(50000) * 50, torch.where(bits.isnan(), 0.0, bits), special))


def test_codes():
    x = values()
    codes = latent.encode_e4m3(x)
    assert numbers.encode_e4m3(x).equal(codes)
    same(numbers.decode_e4m3(codes), latent.decode_e4m3(codes))
    same(numbers.round_to_e4m3(x), latent.decode_e4m3(codes))
    same(numbers.power_of_two_scale(x.abs()), latent.power_of_two_scale(x.abs()))
    packed = torch.randint(0, 16, (5, 160)).to(torch.uint8)
    assert numbers.nibbles(quant.pack_nibbles(packed, torch.full_like(packed, 8)), 160).equal(packed.long())


def test_bytes():
    x = torch.where(values().isnan(), 0.0, values())
    held = x.view(torch.uint8)
    assert numbers.bytes_of_floats(x).equal(held)
    assert numbers.floats_of_bytes(held).equal(x)
    short = x.to(torch.bfloat16)
    assert numbers.bytes_of_bfloat16(x).equal(short.view(torch.uint8))
    assert numbers.bfloat16_of_bytes(short.view(torch.uint8)).equal(short.float())
    scales = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    assert numbers.e8m0(scales)[:255].equal(torch.exp2(scales[:255].double() - 127).float())
    assert numbers.e8m0(scales)[255].isnan()


@pytest.mark.parametrize("causal", [True, False])
def test_decode_reads_no_other_rows(causal):
    data = torch.full((6, 4, 48), torch.nan)
    data[5], data[2, :2] = torch.randn(4, 48), torch.randn(2, 48)
    table = torch.tensor([[5, 2, 99], [-7, 99, 99]], dtype=torch.int32)
    lengths, q = torch.tensor([6, 0], dtype=torch.int32), torch.randn(2, 3, 2, 48)
    form = FORMS["mla_decode"]
    out, lse = form(q, data, table, lengths, None, 0.2, causal, NO_WINDOW, "latent_32bit", 32)
    cache = mk.LatentCache(data, 32)
    want, want_lse = mk.mla_decode(q, cache, table, lengths, softmax_scale=0.2, causal=causal)
    assert_close(out, want.double())
    assert_close(lse, want_lse.double())


@pytest.mark.parametrize("layout", ["fp8_v32", "int8", "fp8_v4"])
def test_written_bytes_of_what_has_no_number(layout):
    """Rows with NaN, infinities and zeros, a slot of -1, and pages that stay as they are."""
    width, rope = (256, 0) if layout == "fp8_v4" else (128, 16)
    cache = mk.LatentCache.allocate(3, 4, latent_dim=width, rope_dim=rope, layout=layout)
    cache.data.random_(0, 255)
    rows = torch.randn(5, width).bfloat16()
    rows[0, 3], rows[1, 70], rows[2] = torch.nan, -torch.inf, 0.0
    slots = torch.tensor([9, 2, 0, -1, 7])
    keys = torch.randn(5, rope).bfloat16()
    new = FORMS["scatter_tokens"](rows, keys, slots, cache.data, layout, width)
    mk.scatter_tokens(rows, keys, slots, cache)
    apart = (new.int() - cache.data.int()).ne(0)
    assert not apart.any()
    same(FORMS["gather_tokens"](cache.data, layout, width, slots, torch.float32),
         mk.gather_tokens(cache, slots, dtype=torch.float32))  # fmt: skip


def test_masked_writes():
    """Windows of several sequences, one without a slot, one without new tokens."""
    kv, gate = torch.randn(2, 9, 64)
    tables = rope_tables()
    state = torch.randn(4, 9, 2, 64)
    slots, bounds = torch.tensor([2, -1, 0], dtype=torch.int32), torch.tensor([0, 5, 9, 9], dtype=torch.int32)
    lengths, table = torch.tensor([7, 4, 6], dtype=torch.int32), torch.arange(6, dtype=torch.int32).view(3, 2)
    cache = mk.IndexerCache.allocate(6, 4, head_dim=32, layout="fp8")
    cache.data.random_(0, 255)
    norm, bias = torch.rand(32), torch.randn(4, 64)
    new_state, new_cache = FORMS["write_windows"](
        kv, gate, bias, norm, *tables.values(), state, slots, bounds, lengths, table, cache.data, "indexer", 4, True, 9
    )
    mk.write_windows(kv, gate, bias, norm, *tables.values(), state, slots, bounds, lengths, table, cache, ratio=4,
                     overlap=True, max_tokens=9)  # fmt: skip
    assert new_state.equal(state)
    assert (new_cache.int() - cache.data.int()).abs().le(1).all()
