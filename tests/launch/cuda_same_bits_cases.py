"""Cases that tests/launch/test_cuda_launch.py runs over the stub driver: launches for the same bits in any batch."""

import pytest
import torch

import mla_kernels
from mla_kernels.catalogue import CALLS
from tests.launch.cuda_cases import BF16, I32, table
from tests.launch.cuda_recorder import choose, record
from tests.test_batch_invariance import WITHOUT_ROWS

pytestmark = pytest.mark.device_process


def test_a_router_is_compiled_once_for_all_numbers_of_tokens_strides_and_alignments():
    """A row's bits depend on the instance: one aligned to 16 bytes would load, and so add, in another order."""
    import triton

    compiled = []
    wide, bias, table = torch.randn(40, 80), torch.randn(64), torch.randint(0, 64, (50, 6))
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: compiled.append(fn.name) and False
    try:
        with record():
            for rows in (wide[:1, :64], wide[:16, :64], wide[:17, 1:65], wide[3:20, :64].contiguous(), wide[:, 16:]):
                leaf = rows.detach().requires_grad_()
                weights, _ = mla_kernels.route(leaf, 6, bias=bias, scoring="softmax")
                torch.autograd.grad(weights, leaf, torch.ones(len(rows), 7)[:, 1:])
                mla_kernels.hash_route(rows, table, torch.zeros(len(rows), dtype=torch.int64), scoring="softmax")
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert len(compiled) == 3, compiled


EXACT = {
    "merge_splits_kernel", "merge_states_kernel", "sparse_merge_kernel", "moe_combine_kernel", "topk_kernel",
    "slots_kernel", "moe_dispatch_kernel", "moe_inverse_kernel", "permute_kernel", "eb_dispatch_kernel",
    "topk_count_kernel", "topk_write_kernel", "quantise_indexer_query_kernel",
}  # fmt: skip
"""They add lane by lane, count in whole numbers or take maxima: no tile changes a bit."""


@pytest.mark.parametrize("name", [name for name in CALLS if name not in (*WITHOUT_ROWS, "expert_ffn and combine")])
def test_one_tile_serves_every_batch(name):
    """With batch_invariant: what a tensor core or a sum over lanes adds, and in which order, follows from constants."""
    found = []
    for tokens in (1, 9, 200):
        if name.startswith(("fused", "expert", "unpermute")) and tokens == 1:
            tokens = 2
        tensors = CALLS[name].example(tokens)
        with choose():
            CALLS[name].run(**tensors)  # what is kept of a call by default is not taken
        with choose() as launches, mla_kernels.batch_invariant():
            CALLS[name].run(**tensors)
        found.append({(kernel, *constants.items()) for kernel, constants in launches if kernel not in EXACT})
    assert found[0] == found[1] == found[2]


def test_one_tile_serves_expert_ffn():
    gate_up, down = torch.randn(5, 64, 32), torch.randn(5, 32, 32)
    found = []
    for tokens in (1, 9, 400):
        rows, offsets = torch.zeros(2 * tokens, dtype=I32), torch.zeros(6, dtype=I32)
        dispatched = mla_kernels.Dispatch(rows, rows, rows, offsets)
        with choose() as launches:
            mla_kernels.expert_ffn(torch.randn(tokens, 32), gate_up, down, dispatched, batch_invariant=True)
        found.append(launches)
    assert found[0] == found[1] == found[2]


def test_a_batch_invariant_sum_over_a_row_is_compiled_once():
    """Whatever the number of tokens, the strides and the alignment: an aligned row is loaded, and added, otherwise."""
    import triton

    compiled = []
    cos, sin = table(64)
    cache = mla_kernels.LatentCache.allocate(40, 64, latent_dim=256, dtype=BF16, device="cpu")  # no other case's width
    keys = mla_kernels.IndexerCache.allocate(4, 64, head_dim=128, layout="fp8", device="cpu")
    wide = torch.randn(40, 1400).to(BF16)
    raw = mla_kernels.LatentCache.allocate(4, 64, latent_dim=512, rope_dim=0, dtype=BF16, device="cpu")
    norm, rows_norm = torch.ones(256, dtype=BF16), torch.ones(512)
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: compiled.append(fn.name) and False
    try:
        with record(), mla_kernels.batch_invariant():
            for rows, first in ((1, 0), (16, 0), (17, 1), (20, 8), (1, 3)):
                places = (cos, sin, torch.arange(rows), torch.arange(rows))
                kv_a, q_a = wide[:rows, first : first + 320], wide[:rows, 600 + first : 856 + first]
                mla_kernels.write_latent(kv_a, norm, *places, cache, rope="half")
                mla_kernels.norm_and_write(q_a, norm, kv_a, norm, *places, cache, rope="half")
                key, options = wide[:rows, first : first + 128], {"rope_dim": 64, "rope": "half", "hadamard": True}
                mla_kernels.write_indexer_key(key, norm[:128], norm[:128], *places, keys, **options)
                mla_kernels.write_kv(wide[:rows, first : first + 512], rows_norm, *places, raw)
                mla_kernels.write_kv(
                    wide[:rows, first : first + 512], rows_norm, *places, raw, q_a=q_a, q_norm=rows_norm[:256]
                )
                heads = wide[:rows, first : first + 512].unflatten(1, (4, 128))
                mla_kernels.rotate_indexer_query(heads, *places[:3], **options)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert len(compiled) == 6, compiled
