"""align_blocks: the padded-block layout against the reference and against its definition."""

import re

import pytest
import torch

from mla_kernels import launch
from mla_kernels.moe.dispatch.align import align_blocks
from mla_kernels.reference import permute as reference
from mla_kernels.targets import emulator
from tests.moe.test_dispatch import random_ids
from tests.support import on_cpu, repeats


def assert_same(got, want):
    for one, other in zip(*on_cpu((got, want)), strict=True):
        assert one.dtype == torch.int32 and torch.equal(one, other)


@pytest.mark.quick("align_blocks", when=lambda tokens: tokens == 17)
@pytest.mark.parametrize(
    "tokens, experts, top_k, block_size",
    [(0, 8, 2, 16), (1, 1, 1, 1), (2, 64, 6, 16), (17, 8, 1, 64), (61, 16, 6, 16), (300, 8, 6, 48), (3, 70, 8, 7)],
)
def test_parity(device, tokens, experts, top_k, block_size):
    ids = random_ids(tokens, experts, top_k, device)
    assert_same(align_blocks(ids, experts, block_size), reference.align_blocks(ids.cpu(), experts, block_size))


def test_documented_example(device):
    ids = torch.tensor([[2, 0], [0, -1], [2, 2]], dtype=torch.int32, device=device)
    sorted_ids, expert_ids, used = align_blocks(ids, 3, 2)
    assert sorted_ids.tolist() == [1, 2, 0, 4, 5, 6, 6, 6]
    assert expert_ids.tolist() == [0, 2, 2, -1] and used.tolist() == [6]


def test_the_example_of_sglang_and_vllm(device):
    """That of their docstrings, its experts numbered from 0."""
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32) - 1
    sorted_ids, expert_ids, used = align_blocks(ids.to(device), 4, 4)
    assert used.tolist() == [16] and expert_ids[:4].tolist() == [0, 1, 2, 3]
    assert sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]


def test_every_pair_with_an_expert_stands_once_in_a_block_of_its_own(device):
    ids = random_ids(61, 16, 6)
    sorted_ids, expert_ids, used = on_cpu(align_blocks(ids.to(device), 16, 16))
    blocks = sorted_ids.view(-1, 16)
    flat = torch.cat([ids.flatten(), torch.tensor([-1], dtype=torch.int32)])
    in_use = int(used) // 16
    assert (expert_ids[:in_use] >= 0).all() and (expert_ids[in_use:] == -1).all()
    for block, expert in zip(blocks, expert_ids.tolist()):
        pairs = block[block < ids.numel()].long()
        assert (flat[pairs] == expert).all() if expert >= 0 else pairs.numel() == 0
    present = ((ids >= 0) & (ids < 16)).flatten().nonzero().flatten()
    assert torch.equal(sorted_ids[sorted_ids < ids.numel()].sort().values.long(), present)


@pytest.mark.parametrize("expert", [0, 7, -1, 8])
def test_all_tokens_to_one_expert(device, expert):
    ids = torch.full((100, 6), expert, dtype=torch.int32)
    assert_same(align_blocks(ids.to(device), 8, 64), reference.align_blocks(ids, 8, 64))


def test_rows_with_a_stride(device):
    wide = random_ids(17, 8, 6, device)
    assert_same(align_blocks(wide[:, 1:4], 8, 16), align_blocks(wide[:, 1:4].contiguous(), 8, 16))


def test_repeats_give_the_same_bits(backend, device):
    ids = random_ids(61, 16, 6, device)
    first = align_blocks(ids, 16, 16)
    for _ in repeats(device):
        assert_same(align_blocks(ids, 16, 16), first)


def test_no_access_outside_the_tensors():
    ids = random_ids(61, 64, 6)
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        result = align_blocks(ids, 64, 16)
    assert_same(result, reference.align_blocks(ids, 64, 16))


def test_under_torchs_tools():
    ids = random_ids(17, 8, 3)
    torch.library.opcheck(torch.ops.mla_kernels.align_blocks.default, (ids, 8, 16))
    compiled = torch.compile(lambda ids: align_blocks(ids, 8, 16), fullgraph=True, backend="aot_eager")
    assert_same(compiled(ids), align_blocks(ids, 8, 16))


@pytest.mark.parametrize(
    "ids, experts, block_size, error, text",
    [
        (torch.zeros(2, 3), 8, 16, TypeError, "ids: got dtype float32, accepted: int32"),
        (torch.zeros(6).int(), 8, 16, ValueError, "ids: got 1 dimensions (6,), 2 are accepted"),
        (torch.zeros(2, 3).int(), 0, 16, ValueError, "num_experts: got 0, an integer from 1 to 1024"),
        (torch.zeros(2, 3).int(), 8, 0, ValueError, "block_size: got 0, an integer from 1 to 1024"),
        (torch.zeros(2, 3).int(), 8, True, TypeError, "block_size: got bool, an integer from 1 to 1024"),
    ],
)
def test_refusals(ids, experts, block_size, error, text):
    with pytest.raises(error, match=re.escape(text)):
        align_blocks(ids, experts, block_size)
