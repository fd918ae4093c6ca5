"""Cases of kernels for Hopper that tests/launch/test_cuda_launch.py runs over the stub driver; see cuda_cases.py."""

import pytest
import torch

import mla_kernels
from mla_kernels import hopper
from mla_kernels.hopper.indexer import HOPPER_INDEXER_LOGITS
from mla_kernels.hopper.sparse import HOPPER_SPARSE_MLA
from tests.launch.cuda_cases import BF16, I32, pointers
from tests.launch.cuda_recorder import record

pytestmark = pytest.mark.device_process
E4M3 = torch.float8_e4m3fn


def test_hopper_sparse_mla_prefill():
    q, kv = torch.randn(5, 128, 576).to(BF16), torch.randn(40, 576).to(BF16)
    indices = torch.zeros(5, 64, dtype=I32)
    with record() as launches, hopper.variants("force"):
        results = mla_kernels.sparse_mla_prefill(q, kv, indices, softmax_scale=0.1, return_max_logits=True)
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.threads) == (HOPPER_SPARSE_MLA.name, 5 * 2, 384)
    assert launch.arguments["page_stride"] == 1152 // 16 and launch.constants["PAGE_SIZE"] == 1
    assert {t.data_ptr() for t in (kv, indices, *results)} <= set(pointers(launch).values())


def test_hopper_paged_indexer_logits():
    """A descriptor over the queries' codes and one over the cache's, whose pages hold scales behind them."""
    cache = mla_kernels.IndexerCache.allocate(40, 64, layout="fp8")
    q, weights = torch.zeros(2, 1, 64, 128).to(E4M3), torch.randn(2, 1, 64)
    block_table, seq_lens = torch.zeros(2, 20, dtype=I32), torch.full((2,), 130, dtype=I32)
    with record() as launches, hopper.variants("force"):
        logits = mla_kernels.paged_indexer_logits(q, cache, weights, block_table, seq_lens)
        known = HOPPER_INDEXER_LOGITS.launches_known
        mla_kernels.paged_indexer_logits(q.clone(), cache, weights, block_table, seq_lens)
        assert HOPPER_INDEXER_LOGITS.launches_known == known
    launch = launches[0]
    assert (launch.kernel, launch.grid, launch.threads) == (HOPPER_INDEXER_LOGITS.name, 2 * 20 // 4, 256)
    assert launch.shared_bytes > 5 * 64 * 132
    queries, keys = launch.arguments["q_tiles"], launch.arguments["key_tiles"]
    assert (queries.base.data_ptr(), queries.shape) == (q.data_ptr(), [2, 64, 128])
    assert (keys.base.data_ptr(), keys.shape, keys.strides) == (cache.data.data_ptr(), [40, 64, 128], [8448, 128, 1])
    assert pointers(launch)["scale_ptr"] == cache.data.data_ptr() + 64 * 128
    assert launch.arguments["scale_stride"] == 8448 // 4
    assert {t.data_ptr() for t in (logits, weights, block_table, seq_lens)} <= set(pointers(launch).values())


def test_hopper_indexer_logits():
    q, k = torch.zeros(9, 64, 128).to(E4M3), torch.zeros(700, 128).to(E4M3)
    weights, scale = torch.randn(9, 64), torch.ones(700)
    starts, ends = torch.zeros(9, dtype=I32), torch.full((9,), 700, dtype=I32)
    with record() as launches, hopper.variants("force"):
        mla_kernels.indexer_logits(q, k, weights, starts, ends, k_scale=scale)
    (launch,) = launches
    assert (launch.kernel, launch.grid) == (HOPPER_INDEXER_LOGITS.name, 3 * 3)  # four tokens, four blocks
    keys = launch.arguments["key_tiles"]
    assert (keys.base.data_ptr(), keys.shape) == (k.data_ptr(), [1, 700, 128])
    assert {t.data_ptr() for t in (weights, scale, starts, ends)} <= set(pointers(launch).values())
