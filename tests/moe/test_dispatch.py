"""dispatch against the reference, and the properties of a stable sort by expert."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.dispatch.dispatch import dispatch
from mla_kernels.reference import moe as reference
from mla_kernels.targets import emulator
from tests.support import on_cpu

SENTINELS = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)


def random_ids(tokens, experts, top_k, device="cpu"):
    """Any experts, a fifth of them none of this device's."""
    ids = torch.randint(0, experts, (tokens, top_k), dtype=torch.int32)
    outside = torch.cat([SENTINELS, torch.tensor([experts], dtype=torch.int32)])
    return torch.where(torch.rand(tokens, top_k) < 0.2, outside[torch.randint(0, 4, (tokens, top_k))], ids).to(device)


def assert_same(actual, expected):
    actual, expected = on_cpu((actual, expected))
    for name in expected._fields:
        got = getattr(actual, name)
        assert got.dtype == torch.int32 and torch.equal(got, getattr(expected, name)), name


@pytest.mark.quick("dispatch", when=lambda tokens: tokens == 17)
@pytest.mark.parametrize(
    "tokens, experts, top_k",
    [(0, 8, 2), (1, 1, 1), (2, 64, 6), (17, 8, 1), (61, 64, 6), (300, 8, 6), (3, 256, 8), (2, 160, 6)],
)
def test_parity(device, tokens, experts, top_k):
    ids = random_ids(tokens, experts, top_k, device)
    assert_same(dispatch(ids, experts), reference.dispatch(ids.cpu(), experts))


@pytest.mark.parametrize("mode", ["torch", pytest.param("npu-emulated", marks=pytest.mark.slow)])
def test_a_million_pairs_to_1024_experts(mode):
    ids = random_ids(1 << 17, 1024, 8)
    with launch.on_cpu(mode):
        assert_same(dispatch(ids, 1024), reference.dispatch(ids, 1024))


def test_documented_example(device):
    ids = torch.tensor([[2, 0], [0, -1], [2, 1]], dtype=torch.int32, device=device)
    order, tokens, inverse, offsets = dispatch(ids, 3)
    assert order.tolist() == [1, 2, 5, 0, 4, 3]
    assert tokens.tolist() == [0, 1, 2, 0, 2, 1]
    assert inverse.tolist() == [3, 0, 1, 5, 4, 2]
    assert offsets.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("expert", [0, 7, -1, 8])
def test_all_tokens_to_one_expert(device, expert):
    ids = torch.full((100, 6), expert, dtype=torch.int32, device=device)
    order, _, _, offsets = dispatch(ids, 8)
    assert order.tolist() == list(range(600))
    starts = [0] * 9 if not 0 <= expert < 8 else [0] * (expert + 1) + [600] * (8 - expert)
    assert offsets.tolist() == starts


def test_permuting_and_back_is_the_identity(device):
    ids = random_ids(61, 64, 6, device)
    order, tokens, inverse, offsets = on_cpu(dispatch(ids, 64))
    ids = ids.cpu()
    pairs = torch.arange(61 * 6, dtype=torch.int32)
    assert torch.equal(order[inverse.long()], pairs)
    assert torch.equal(inverse[order.long()], pairs)
    assert torch.equal(tokens, order // 6)
    assert offsets[-1] == ((ids >= 0) & (ids < 64)).sum()
    assert torch.equal(offsets.diff().long(), torch.bincount(ids[(ids >= 0) & (ids < 64)], minlength=64))


def test_rows_with_a_stride(device):
    ids = random_ids(61, 64, 6, device)
    wide = torch.full((61, 10), 3, dtype=torch.int32, device=device)
    wide[:, 2:8] = ids
    assert_same(dispatch(wide[:, 2:8], 64), dispatch(ids, 64))


def test_no_access_outside_the_tensors():
    ids = random_ids(61, 64, 6)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        result = dispatch(ids, 64)
    assert_same(result, reference.dispatch(ids, 64))
