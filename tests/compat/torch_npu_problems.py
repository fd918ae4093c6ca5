"""Problems that the tests of compat.torch_npu share."""

import pytest
import torch

from mla_kernels import LatentCache
from mla_kernels.compat import torch_npu as npu
from tests.support import assert_close

BF16, FP32 = torch.bfloat16, torch.float32
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def close(actual, function, *tensors, pick=0):
    """``actual`` against result ``pick`` of ``function``: in float64, and in the tensors' dtype as the baseline."""

    def run(dtype):
        found = function(*(one.cpu().to(dtype) if one is not None else None for one in tensors))
        return found[pick] if isinstance(found, tuple) else found

    assert_close(actual, run(torch.float64), None if tensors[0].dtype == FP32 else run(tensors[0].dtype))


def angles(*shape, rope, device, dtype):
    """cos and sin [..., rope], both halves alike."""
    turn = torch.rand(*shape, rope // 2) * 6.28
    return [torch.cat((one, one), -1).to(device, dtype) for one in (turn.cos(), turn.sin())]


def caches(blocks, size, latent, rope, dtype, device, together):
    """(kv_cache, kr_cache) of random values: views of one cache, or tensors of their own."""
    whole = torch.randn(blocks, size, latent + rope).to(device, dtype)
    if together:
        return npu.cache_views(LatentCache(whole, latent))
    return [part[:, :, None].contiguous() for part in whole.split((latent, rope), -1)]


def case(*arguments, name):
    return pytest.param(*arguments, id=name)


def paged_problem(kv_lens, size, latent, rope, dtype, device, together):
    """Caches with NaN wherever no key is, and a table whose spare entries are those of one such page."""
    pages = [-(-length // size) for length in kv_lens]
    blocks = sum(pages) + 2
    kv_cache, kr_cache = caches(blocks, size, latent, rope, dtype, device, together)
    free = torch.randperm(blocks).tolist()
    spare = free.pop()
    table = torch.full((len(kv_lens), max(1, *pages) + 1), spare, dtype=torch.int32)
    unused = torch.ones(blocks, size, dtype=torch.bool)
    for row, (length, count) in enumerate(zip(kv_lens, pages)):
        for place in range(count):
            table[row, place] = page = free.pop()
            unused[page, : length - place * size] = False
    for cache in (kv_cache, kr_cache):
        cache[unused.to(device)] = float("nan")
    return kv_cache, kr_cache, table.to(device)


SMALL = {"He": 64, "Hcq": 32, "N": 3, "D": 16, "Hckv": 32, "Dr": 16}
V3 = {"He": 7168, "Hcq": 1536, "N": 16, "D": 128, "Hckv": 512, "Dr": 64}  # 16 of 128 heads: one of eight ranks


def prolog_problem(lead, device, dtype, He, Hcq, N, D, Hckv, Dr):
    weights = [
        (torch.randn(*shape) * shape[-2] ** -0.5).to(device, dtype)
        for shape in ((He, Hcq), (Hcq, N * (D + Dr)), (N, D, Hckv), (He, Hckv + Dr))
    ]
    gammas = [(torch.randn(width)).to(device, dtype) for width in (Hcq, Hckv)]
    cos, sin = angles(*lead, rope=Dr, device=device, dtype=dtype)
    return [torch.randn(*lead, He).to(device, dtype), *weights, *gammas, sin, cos]
