"""Expert parallelism in two gloo processes of one thread each: all tokens at once, in chunks, and once for each expert.

gloo's threads share the processors with the experts here, so what an overlap could hide it also slows down: the ratios
say what chunks cost on such a machine, not what they gain where a network card moves the bytes.
"""

import pytest
import torch

from mla_kernels.moe.parallel import ExpertParallel
from mla_kernels.reference import moe as reference
from tests.moe.ranks import Ranks

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 6, 2048, 704
RANKS, SAMPLE = 2, 4
_here = {}
"""Within a rank's process: its tokens and experts."""


def prepare(rank, size, hidden, gate_up, down, weights, ids, dtype):
    parallel = ExpertParallel(EXPERTS)
    own = slice(rank * len(hidden) // size, (rank + 1) * len(hidden) // size)
    _here.update(
        parallel=parallel,
        capacity=ExpertParallel(EXPERTS, capacity=len(hidden) // size),
        tokens=(hidden[own].to(dtype), weights[own], ids[own]),
        experts=(gate_up[parallel.local].to(dtype), down[parallel.local].to(dtype)),
    )


def step(rank, size, chunks, kind):
    hidden, weights, ids = _here["tokens"]
    with torch.no_grad():
        if kind == "a row for each expert":
            rows = _here["parallel"].fused_moe(
                hidden.repeat_interleave(TOP_K, 0), *_here["experts"], torch.ones(ids.numel(), 1), ids.view(-1, 1)
            )
            out = (rows.view(*ids.shape, -1) * weights.unsqueeze(2)).sum(1).to(hidden.dtype)
        else:
            parallel = _here["capacity" if kind == "capacity" else "parallel"]
            out = parallel.fused_moe(hidden, *_here["experts"], weights, ids, chunks=chunks)
    return out[:SAMPLE].clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [16, 512])
def test_parallel_moe(race, tokens, dtype):
    hidden, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    pool = Ranks(RANKS)
    pool.run(prepare, hidden, gate_up, down, weights, ids, dtype)
    sample = slice(0, SAMPLE)
    inputs = (x.to(dtype).double() for x in (hidden[sample], gate_up, down))
    exact = reference.fused_moe(*inputs, weights[sample].double(), ids[sample])
    used = ids.unique().numel()
    race(
        lambda: pool.run(step, 1, "plain")[0],
        {
            "2 chunks": lambda: pool.run(step, 2, "plain")[0],
            "4 chunks": lambda: pool.run(step, 4, "plain")[0],
            "capacity": lambda: pool.run(step, 1, "capacity")[0],
            "a row for each expert": lambda: pool.run(step, 1, "a row for each expert")[0],
        },
        exact,
        nbytes=used * 3 * INTERMEDIATE * HIDDEN * dtype.itemsize + 2 * tokens * HIDDEN * dtype.itemsize,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )
    pool.close()
