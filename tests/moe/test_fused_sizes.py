"""fused_moe over numbers of tokens, experts and slots, with sizes that no tile divides: sampled, or all with --slow."""

import itertools
import random

import pytest
import torch

from tests.moe.problems import layer
from tests.support import assert_close, not_on

TOKENS, EXPERTS, TOP_K = (1, 2, 17, 256, 4096), (8, 64, 160, 256, 384), (1, 6, 8)
WIDTHS = ((40, 24), (83, 37), (144, 72))  # hidden and intermediate size
ALL = [(*sizes, *WIDTHS[index % 3]) for index, sizes in enumerate(itertools.product(TOKENS, EXPERTS, TOP_K))]
SMALL = [sizes for sizes in ALL if sizes[0] * sizes[2] <= 64]


def check(tokens, experts, top_k, hidden, intermediate, dtype, device):
    problem = layer(tokens, experts, top_k, hidden, intermediate, dtype, device=device)
    problem.ids[0, 0], problem.ids[-1, -1] = experts, -1
    assert_close(problem.run(), problem.exact(), problem.baseline())


@pytest.mark.parametrize("tokens, experts, top_k, hidden, intermediate", random.Random(7).sample(SMALL, 3))
def test_sampled_sizes(device, tokens, experts, top_k, hidden, intermediate):
    check(tokens, experts, top_k, hidden, intermediate, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, experts, top_k, hidden, intermediate", ALL)
@pytest.mark.leave_out(
    "takes minutes in the interpreter",
    when=lambda backend, tokens, top_k: backend == "interpret" and tokens * top_k > 2048,
)
def test_every_size(device, tokens, experts, top_k, hidden, intermediate, dtype):
    check(tokens, experts, top_k, hidden, intermediate, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", TOP_K)
@not_on("runs every size", "cpu", "npu-emulated", "cuda", "npu")
def test_many_tokens_in_the_interpreter(device, top_k):
    check(4096, 8, top_k, 40, 24, torch.float32, device)
