"""Quotients by fp32, and pages whose size no tile divides."""

import pytest
import torch

from mla_kernels.attention.indexer.op import paged_indexer_logits
from mla_kernels.attention.paging import MAX_QUOTIENT, quotient
from mla_kernels.language import tl, triton
from mla_kernels.latent.indexer.cache import IndexerCache


@triton.jit
def quotients_kernel(out_ptr, divisor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, quotient(at, divisor))


@pytest.mark.parametrize("divisor", [1, 3, 7, 61, 127, 641, 4097, 65537, (1 << 19) - 1])
def test_quotients_are_exact_in_their_range(divisor):
    out = torch.empty(MAX_QUOTIENT, dtype=torch.int32)
    quotients_kernel[(16,)](out, divisor, BLOCK=MAX_QUOTIENT // 16)
    assert torch.equal(out, torch.arange(MAX_QUOTIENT, dtype=torch.int32) // divisor)


@pytest.mark.parametrize("divisor", [3, 61, 641, 65537])
def test_quotients_are_exact_with_a_reciprocal_two_units_off(divisor):
    """As GPUs compute it: what a reciprocal of the docstring's error gives at worst."""
    x = torch.arange(MAX_QUOTIENT).to(torch.float32) + 0.5
    reciprocal = torch.tensor(1.0) / divisor
    for way in (-torch.inf, torch.inf):
        one = reciprocal
        for _ in range(2):
            one = torch.nextafter(one, torch.tensor(way))
        assert torch.equal((x * one).int(), torch.arange(MAX_QUOTIENT, dtype=torch.int32) // divisor)


def test_the_indexer_refuses_odd_large_pages():
    cache = IndexerCache(torch.empty(1, (1 << 19) + 8, 128, dtype=torch.bfloat16), 128)  # never read
    q, weights = torch.zeros(1, 1, 4, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 4)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_size: got 524,296, less than 524,288 and multiples of 256 are accepted"):
        paged_indexer_logits(q, cache, weights, table, lengths)
