"""Cases of kernels for Hopper that tests/launch/test_cuda_launch.py runs over the stub driver; see cuda_cases.py."""

import pytest
import torch

import mla_kernels
from mla_kernels import hopper
from mla_kernels.hopper import decode as hopper_decode
from mla_kernels.hopper import experts as hopper_experts
from mla_kernels.hopper import prefill as hopper_prefill
from mla_kernels.hopper import sparse as hopper_sparse
from mla_kernels.hopper import sparse_gradients as hopper_sparse_gradients
from mla_kernels.hopper.indexer import HOPPER_INDEXER_LOGITS
from tests.launch.cuda_cases import BF16, I32, make_cache, pointers
from tests.launch.cuda_recorder import record

pytestmark = pytest.mark.device_process
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "heads, queries, rows, pages", [(16, 1, 16, 2), (16, 2, 32, 40), (40, 1, 64, 40), (128, 2, 64, 2)]
)
@pytest.mark.slow(when=lambda pages: pages == 2)
def test_hopper_mla_decode(heads, queries, rows, pages):
    """The grid, 64 or 16 or 32 rows a program, all warps, shared memory, and descriptors over queries and cache."""
    cache, q = make_cache(), torch.randn(3, queries, heads, 576).to(BF16)
    block_table, sink = torch.zeros(3, pages, dtype=I32), torch.zeros(heads)
    seq_lens = torch.full((3,), 64 * pages, dtype=I32)
    kernel = hopper_decode.HOPPER_MLA_DECODE if rows == 64 else hopper_decode.HOPPER_MLA_DECODE_FEW_ROWS
    with record() as launches, hopper.variants("force"):
        out, _ = mla_kernels.mla_decode(q, cache, block_table, seq_lens, softmax_scale=0.1, sink=sink)
        known = kernel.launches_known
        mla_kernels.mla_decode(q.clone(), cache, block_table, seq_lens, softmax_scale=0.1, sink=sink)
        assert kernel.launches_known == known
    decode, *merge = launches[: len(launches) // 2]
    assert decode.kernel == kernel.name
    assert decode.grid == 3 * decode.arguments["splits"] * -(-queries * heads // rows)
    assert decode.threads == (256 if rows == 64 else 128)
    assert decode.shared_bytes > 64 * 576 * 2 * 2  # two blocks of keys
    q_tiles, key_tiles = decode.arguments["q_tiles"], decode.arguments["key_tiles"]
    assert (q_tiles.base.data_ptr(), q_tiles.shape) == (q.data_ptr(), [3, queries * heads, 576])
    assert (key_tiles.base.data_ptr(), key_tiles.strides) == (cache.data.data_ptr(), [64 * 576, 576, 1])
    assert {t.data_ptr() for t in (block_table, seq_lens)} <= set(pointers(decode).values())
    assert (out.data_ptr() in pointers(merge[0] if merge else decode).values()) and len(merge) <= 1


@pytest.mark.parametrize("layout, heads, rows", [("fp8_v32", 40, 64), ("int8", 16, 16)])
@pytest.mark.slow(when=lambda layout: layout == "fp8_v32")
def test_hopper_mla_decode_of_codes(heads, rows, layout):
    """The same with the codes', the scales' and the rotated keys' places in the cache, and strides in 16 bytes."""
    cache = mla_kernels.LatentCache.allocate(8, 64, latent_dim=512, rope_dim=64, dtype=BF16, layout=layout)
    q, block_table = torch.randn(3, 1, heads, 576).to(BF16), torch.zeros(3, 2, dtype=I32)
    with record() as launches, hopper.variants("force"):
        out, _ = mla_kernels.mla_decode(q, cache, block_table, torch.full((3,), 128, dtype=I32), softmax_scale=0.1)
    (decode,) = launches
    assert decode.kernel == hopper_decode.kernel_for(heads, layout).name and decode.grid == 3
    assert decode.threads == 384 and decode.constants["LAYOUT"] == layout
    at, parts = cache.data.data_ptr(), pointers(decode)
    assert (parts["codes_ptr"], parts["scales_ptr"], parts["rope_ptr"]) == (at, at + 512, at + 528)
    assert (decode.arguments["page_units"], decode.arguments["token_units"]) == (64 * 41, 41)
    assert decode.arguments["q_tiles"].base.data_ptr() == q.data_ptr() and parts["out_ptr"] == out.data_ptr()


@pytest.mark.parametrize("heads_first", [False, True])
def test_hopper_mla_prefill(heads_first):
    """The grid, all warps, shared memory, and a descriptor over each tensor as a matrix; of the gradients, too."""
    q, rope = torch.randn(300, 3, 192).to(BF16), torch.randn(350, 64).to(BF16)
    kv = torch.randn(350, 3, 256).to(BF16)
    if heads_first:
        q, kv = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, kv))
    bounds = torch.tensor([0, 270, 300], dtype=I32), torch.tensor([0, 280, 350], dtype=I32)
    leaves = [tensor.requires_grad_() for tensor in (q, kv, rope)]
    kernel, sizes = hopper_prefill.HOPPER_MLA_PREFILL, dict(max_seqlen_q=270, max_seqlen_k=280, softmax_scale=0.1)
    with record() as launches, hopper.variants("force"):
        k, v = kv.split([128, 128], -1)
        out, lse = mla_kernels.mla_prefill(q, k, v, *bounds, **sizes, k_rope=rope)
        known = kernel.launches_known
        mla_kernels.mla_prefill(q.clone(), k, v, *bounds, **sizes, k_rope=rope)
        assert kernel.launches_known == known
        torch.autograd.grad(out.sum() + lse.sum(), leaves)
    first, again, stats, *gradients, heads = launches
    assert first.kernel == again.kernel == kernel.name and stats.kernel == "mla_prefill_delta_kernel"
    assert [launch.kernel for launch in gradients] == [
        "hopper_mla_prefill_key_gradient_kernel", "hopper_mla_prefill_query_gradient_kernel",
    ]  # fmt: skip
    assert [launch.grid for launch in gradients] == [18, 18] and [launch.threads for launch in gradients] == [384, 384]
    for launch in gradients:
        assert pointers(launch)["stats_ptr"] == pointers(stats)["stats_ptr"]
        assert {t.data_ptr() for t in bounds} <= set(pointers(launch).values())
        for name, tensor in (("q", q), ("k", k), ("v", v), ("rope", rope)):
            assert launch.arguments[f"{name}_tiles"].base.data_ptr() == tensor.data_ptr()
        assert launch.arguments["grad_tiles"].block_shape == [64, 128]
        assert (launch.arguments["queries"], launch.arguments["tokens"]) == (300, 350)
    assert pointers(gradients[0])["rope_grad_ptr"] == pointers(heads)["partial_ptr"]
    assert first.grid == 2 * 3 * 3 and first.threads == 384
    assert first.shared_bytes > 128 * 192 * 2 + 2 * 128 * (192 + 128) * 2  # queries, two blocks of keys and values
    given = {t.data_ptr() for t in (out, lse, *bounds)}
    assert given <= set(pointers(first).values())
    for name, tensor in (("q", q), ("q_rope", q), ("k", k), ("v", v), ("rope", rope)):
        tiles = first.arguments[f"{name}_tiles"]
        rows, columns = tensor.shape[0], tensor.stride(0) if name == "rope" else 2 * tensor.stride(1) + tensor.shape[2]
        if heads_first and name != "rope":
            rows, columns = 3 * tensor.shape[0], tensor.shape[2]
        assert (tiles.base.data_ptr(), tiles.shape) == (tensor.data_ptr(), [rows, columns])
        assert tiles.strides == [tensor.stride(0), 1] and tiles.block_shape[1] == (64 if "rope" in name else 128)
    steps = (350, 0, 350, 0) if heads_first else (0, 256, 0, 256)
    assert tuple(first.arguments[name] for name in ("k_row", "k_column", "v_row", "v_column")) == steps
    assert first.arguments["together"] == 6 and first.arguments["tokens"] == 350


@pytest.mark.parametrize(
    "heads, rows, layout, top_k", [(16, 16, None, 2048), (40, 64, None, 128), (128, 64, "fp8_v32", 2048)]
)
@pytest.mark.slow(when=lambda heads: heads == 40)
def test_hopper_sparse_mla_decode(heads, rows, layout, top_k):
    """The grid, all warps, shared memory, a descriptor over the queries, strides of the cache in units of 16 bytes."""
    cache, q = make_cache(layout), torch.randn(3, 2, heads, 576).to(BF16)
    indices, sink = torch.zeros(3, 2, top_k, dtype=I32), torch.zeros(heads)
    lengths = torch.full((3,), top_k, dtype=I32)
    kernel = hopper_sparse.HOPPER_SPARSE_MLA if rows == 64 else hopper_sparse.HOPPER_SPARSE_MLA_FEW_ROWS
    options = dict(softmax_scale=0.1, topk_length=lengths, sink=sink)
    with record() as launches, hopper.variants("force"):
        out, _ = mla_kernels.sparse_mla_decode(q, cache, indices, **options)
        known = kernel.launches_known
        mla_kernels.sparse_mla_decode(q.clone(), cache, indices, **options)
        assert kernel.launches_known == known
    decode, *merge = launches[: len(launches) // 2]
    assert decode.kernel == kernel.name and len(merge) == (top_k > 128)
    assert decode.grid == 6 * decode.arguments["splits"] * -(-heads // rows)
    assert decode.threads == (384 if rows == 64 else 256)
    assert decode.shared_bytes > 64 * 576 * 2 * 2  # two blocks of keys
    q_tiles = decode.arguments["q_tiles"]
    assert (q_tiles.base.data_ptr(), q_tiles.shape) == (q.data_ptr(), [6, heads, 576])
    token = 656 if layout else 1152
    assert decode.arguments["token_stride"] == token // 16 and decode.constants["PAGE_SIZE"] == 1
    assert {t.data_ptr() for t in (cache.data, indices, lengths)} <= set(pointers(decode).values())
    assert {out.data_ptr(), sink.data_ptr()} <= set(pointers(merge[0] if merge else decode).values())


@pytest.mark.parametrize("format", ["fp8_block", "plain"])
def test_hopper_experts(format):
    """A program a multiprocessor, all warps, descriptors over rows and weights, and rows in units of 16 bytes."""
    hidden, ids = torch.randn(40, 144).to(BF16), torch.arange(80, dtype=I32).view(40, 2) % 3
    gate_up, down = torch.randn(3, 256, 144).to(BF16), torch.randn(3, 144, 128).to(BF16)
    experts = mla_kernels.ExpertWeights.quantise(gate_up, down, format)
    kernel = hopper_experts.HOPPER_EXPERTS
    with record() as launches, hopper.variants("force"):
        mla_kernels.fused_experts(hidden, experts, torch.rand(40, 2), ids)
        known = kernel.launches_known
        mla_kernels.fused_experts(hidden.clone(), experts, torch.rand(40, 2), ids)
        assert kernel.launches_known == known
    own = [launch for launch in launches if launch.kernel == kernel.name]
    assert len(launches) == 8 and len(own) == 4
    element = torch.float8_e4m3fn if format == "fp8_block" else BF16
    for launch, weight, depth in zip(own, (experts.gate_up, experts.down), (144, 128)):
        rows, columns = weight.shape[1:]
        assert launch.threads == 384 and launch.grid == launch.arguments["items"] == 4
        tiles = launch.arguments["w_tiles"]
        assert (tiles.base.data_ptr(), tiles.shape) == (weight.data_ptr(), [3, rows, columns])
        assert tiles.base.dtype == element and tiles.block_shape == [1, 128, 128 // element.itemsize]
        assert launch.arguments["depth_units"] == depth * element.itemsize // 16
        assert launch.shared_bytes > 4 * 128 * 2 * 128  # stages of weights


def test_hopper_sparse_mla_prefill():
    q, kv = torch.randn(5, 128, 576).to(BF16), torch.randn(40, 576).to(BF16)
    indices = torch.zeros(5, 64, dtype=I32)
    with record() as launches, hopper.variants("force"):
        results = mla_kernels.sparse_mla_prefill(q, kv, indices, softmax_scale=0.1, return_max_logits=True)
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.threads) == (hopper_sparse.HOPPER_SPARSE_MLA.name, 5 * 2, 384)
    assert launch.arguments["page_stride"] == 1152 // 16 and launch.constants["PAGE_SIZE"] == 1
    assert {t.data_ptr() for t in (kv, indices, *results)} <= set(pointers(launch).values())


def test_hopper_sparse_mla_gradients():
    """Grids, all warps, shared memory, and descriptors over queries, gradients and the weights' workspace."""
    q, kv = torch.randn(5, 128, 576).to(BF16).requires_grad_(), torch.randn(40, 576).to(BF16).requires_grad_()
    indices = torch.zeros(5, 700, dtype=I32)
    with record() as launches, hopper.variants("force"):
        out, lse = mla_kernels.sparse_mla_prefill(q, kv, indices, softmax_scale=0.1)
        torch.autograd.grad(out.sum() + lse.sum(), [q, kv])
    _, gate, weights, queries, picks, sums = launches
    own = weights, queries, picks
    assert [launch.kernel for launch in own] == [kernel.name for kernel in hopper_sparse_gradients.KERNELS]
    assert [launch.grid for launch in own] == [5 * 2 * 2, 5 * 3, 5 * 6]
    assert {launch.threads for launch in own} == {384} and min(launch.shared_bytes for launch in own) > 160 << 10
    workspace = pointers(weights)["weights_ptr"]
    for launch in (queries, picks):
        tiles = launch.arguments["weight_tiles"]
        assert (tiles.base.data_ptr(), tiles.shape, tiles.strides) == (workspace, [5 * 2 * 128, 768], [768, 1])
    for launch in (weights, picks):
        assert launch.arguments["q_tiles"].base.data_ptr() == q.data_ptr()
        assert launch.arguments["grad_tiles"].shape == [5, 128, 512]
    assert (weights.arguments["token_stride"], weights.arguments["pick_blocks"]) == (72, 6)
    assert pointers(gate)["shift_ptr"] == pointers(weights)["shift_ptr"]
    assert pointers(picks)["picks_ptr"] == pointers(sums)["picks_ptr"]
    assert {t.data_ptr() for t in (kv, indices, lse)} <= set(pointers(weights).values())


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
