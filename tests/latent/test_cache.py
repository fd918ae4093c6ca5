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
