"""LatentCache and its layouts: the numbers of the docstring, and what is refused."""

import dataclasses

import pytest
import torch

from mla_kernels.latent.cache import CacheLayout, LatentCache


def test_bytes_of_deepseek_v3():
    cache = LatentCache.allocate(3, 64, dtype=torch.bfloat16, device="cpu")
    assert cache.layout is CacheLayout.LATENT_16BIT
    assert cache.bytes_per_token == 1152
    assert cache.layout.bytes_per_page(64, 512, 64) == 64 * 1152
    assert cache.data.nbytes == 3 * 64 * cache.bytes_per_token
    assert CacheLayout.of(torch.float32).bytes_per_token(512, 64) == 2304


def test_sizes_and_the_worked_example_of_the_docstring():
    cache = LatentCache.allocate(8, 4, dtype=torch.bfloat16)
    assert (cache.num_pages, cache.page_size, cache.num_slots, cache.latent_dim, cache.rope_dim) == (8, 4, 32, 512, 64)
    assert not cache.data.any()
    block_table, token = [7, 2], 5
    slot = block_table[token // cache.page_size] * cache.page_size + token % cache.page_size
    assert slot == 9
    row = cache.data[slot // cache.page_size, slot % cache.page_size]
    assert row.data_ptr() - cache.data.data_ptr() == 10368
    assert row[cache.latent_dim :].data_ptr() - row.data_ptr() == 1024


def test_a_cache_is_frozen_and_takes_a_slice_of_a_larger_allocation():
    layers = torch.zeros(6, 2, 16, 48)  # [pages, layers, page_size, width]
    cache = LatentCache(layers[:, 1], 32)
    assert cache.num_slots == 96
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.latent_dim = 16


@pytest.mark.parametrize(
    ("data", "latent_dim", "error", "words"),
    [
        ([[1.0]], 32, TypeError, "data: got list"),
        (torch.zeros(4, 48), 32, ValueError, r"data: got shape \(4, 48\)"),
        (torch.zeros(2, 4, 48, dtype=torch.float64), 32, TypeError, "float64.*accepted: bfloat16, float16, float32"),
        (torch.zeros(2, 4, 48, dtype=torch.int8), 32, TypeError, "int8"),
        (torch.zeros(2, 0, 48), 32, ValueError, "page_size: got 0"),
        (torch.zeros(2, 48, 4).transpose(1, 2), 32, ValueError, "data: got stride 4 in the last dimension"),
        (torch.zeros(2, 4, 48), 32.0, TypeError, "latent_dim: got float"),
        (torch.zeros(2, 4, 48), 0, ValueError, "latent_dim: got 0"),
        (torch.zeros(2, 4, 40), 24, ValueError, "latent_dim: got 24.*powers of two"),
        (torch.zeros(2, 4, 40), 32, ValueError, "rope_dim: got 8.*powers of two of at least 16"),
        (torch.zeros(2, 4, 32), 64, ValueError, "rope_dim: got -32"),
    ],
)
def test_refused(data, latent_dim, error, words):
    with pytest.raises(error, match=words):
        LatentCache(data, latent_dim)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_pages": -1}, ValueError, "num_pages: got -1"),
        ({"page_size": 0}, ValueError, "page_size: got 0"),
        ({"page_size": 2.5}, TypeError, "page_size: got float"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "float8_e4m3fn"),
        ({"latent_dim": 500}, ValueError, "latent_dim: got 500"),
        ({"rope_dim": 96}, ValueError, "rope_dim: got 96"),
    ],
)
def test_allocate_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        LatentCache.allocate(**{"num_pages": 2, "page_size": 4, "dtype": torch.float32, **arguments})


@pytest.mark.parametrize("layout", ["fp8_v32", "int8"])
def test_quantised_sizes_and_parts(layout):
    cache = LatentCache.allocate(8, 4, layout=layout)
    assert (cache.data.shape, cache.data.dtype, cache.dtype) == ((8, 4, 656), torch.uint8, torch.bfloat16)
    assert (cache.rope_dim, cache.width, cache.bytes_per_token) == (64, 576, 656)
    assert cache.latents.dtype == (torch.int8 if layout == "int8" else torch.uint8)
    count = 1 if layout == "int8" else 4
    assert (cache.scales.shape, cache.scales.dtype) == ((8, 4, count), torch.float32)
    assert (cache.rope.shape, cache.rope.dtype) == ((8, 4, 64), torch.bfloat16)
    row = cache.data[2, 1].data_ptr()
    assert row - cache.data.data_ptr() == 5904
    assert cache.latents[2, 1].data_ptr() == row
    assert cache.scales[2, 1].data_ptr() - row == 512
    assert cache.rope[2, 1].data_ptr() - row == 528
    cache.rope.fill_(1.0)
    assert cache.data[..., 528:].any() and not cache.data[..., :528].any()


@pytest.mark.parametrize(
    ("layout", "latent_dim", "rope_dim", "size"),
    [
        ("fp8_v32", 128, 0, 128 + 16),
        ("fp8_v32", 256, 32, 256 + 16 + 64),
        ("fp8_v32", 1024, 64, 1024 + 32 + 128),
        ("int8", 16, 16, 16 + 16 + 32),
        ("int8", 512, 0, 512 + 16),
        ("latent_16bit", 512, 0, 1024),
    ],
)
def test_bytes_of_other_widths(layout, latent_dim, rope_dim, size):
    cache = LatentCache.allocate(2, 3, latent_dim=latent_dim, rope_dim=rope_dim, layout=layout)
    assert cache.bytes_per_token == size == cache.data.nbytes // 6
    assert cache.layout is CacheLayout(layout) and cache.rope_dim == rope_dim


@pytest.mark.parametrize(
    ("data", "latent_dim", "layout", "error", "words"),
    [
        (
            torch.zeros(2, 4, 656).byte(),
            512,
            None,
            TypeError,
            "dtype: got uint8 .* with layout fp8_v32, fp8_v4 or int8",
        ),
        (torch.zeros(2, 4, 656), 512, "int8", TypeError, "data: got dtype float32 for layout int8, accepted: uint8"),
        (torch.zeros(2, 4, 656).byte(), 512, "fp8", ValueError, "layout: got 'fp8', accepted: latent_16bit"),
        (torch.zeros(2, 4, 176).byte(), 64, "fp8_v32", ValueError, "latent_dim: got 64, fp8_v32 accepts multiples of"),
        (torch.zeros(2, 4, 528).byte(), 512, "latent_16bit", TypeError, "accepted: bfloat16, float16"),
        (torch.zeros(2, 4, 648).byte(), 512, "fp8_v32", ValueError, "rope_dim: got 60"),
        (torch.zeros(2, 4, 664).byte()[..., 8:], 512, "fp8_v32", ValueError, "data: got strides and offset"),
        (torch.zeros(2, 4, 660).byte()[..., :656], 512, "int8", ValueError, "int8 accepts multiples of 16 bytes"),
    ],
)
def test_quantised_refused(data, latent_dim, layout, error, words):
    with pytest.raises(error, match=words):
        LatentCache(data, latent_dim, layout)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"layout": "fp8_v32", "dtype": torch.float16}, TypeError, "dtype: got float16 for layout fp8_v32"),
        ({"layout": "latent_32bit"}, TypeError, "dtype: got bfloat16 for layout latent_32bit, accepted: float32"),
        ({"layout": "fp8_v3"}, ValueError, "layout: got 'fp8_v3'"),
        ({"layout": "fp8_v32", "latent_dim": 64}, ValueError, "latent_dim: got 64"),
    ],
)
def test_allocate_refuses_layouts(arguments, error, words):
    with pytest.raises(error, match=words):
        LatentCache.allocate(2, 4, **arguments)
