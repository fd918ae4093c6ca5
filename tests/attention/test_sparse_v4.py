"""sparse_mla_decode as DeepSeek-V4 calls it: a window and entries in one softmax with a sink, the key is the value."""

import pytest
import torch

from tests.attention.sparse_problems import make_decode

BF16 = torch.bfloat16
CACHES = pytest.mark.parametrize("layout", ["fp8_v4", "int8", None])
SMALL = dict(latent_dim=256, rope_dim=0, dtype=BF16)


@CACHES
@pytest.mark.parametrize("heads, page_size, queries", [(5, 3, 2), (64, 1, 1)])
def test_parity(backend, device, layout, heads, page_size, queries):
    options = dict(heads=heads, page_size=page_size, queries=queries, layout=layout, device=device, **SMALL)
    problem = make_decode(33, lengths=True, sink=True, **options)
    problem.check(problem.run())


@CACHES
@pytest.mark.parametrize("top_k, extra_top_k", [(33, 7), (5, 290)])
def test_two_caches_of_other_page_sizes_and_numbers_of_picks(backend, device, layout, top_k, extra_top_k):
    problem = make_decode(
        top_k,
        extra_top_k=extra_top_k,
        heads=12,
        page_size=8,
        layout=layout,
        sink=True,
        lengths=True,
        device=device,
        **SMALL,
    )
    assert problem.extra_cache.page_size == 17
    problem.check(problem.run())
