"""Expert parallelism in two gloo processes of one thread each: all tokens at once, in chunks, and once for each expert.

gloo's threads share the processors with the experts here, so what an overlap could hide it also slows down: the ratios
of test_parallel_moe say what chunks cost on such a machine. test_simulated_link adds the time that a network of so many
bytes a second would take, during which the processors are free, and says what chunks hide of it.
"""

import time

import pytest
import torch
import torch.distributed as dist

from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from mla_kernels.reference import moe as reference
from tests.moe.ranks import Ranks

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 6, 2048, 704
RANKS, SAMPLE = 2, 4
_here = {}
"""Within a rank's process: its tokens and experts."""


class Link:
    """Makes an exchange take as long as if its bytes went through a link of ``speed`` bytes a second, one by one."""

    def __init__(self, speed):
        self.speed, self.free, self.exchange = speed, 0.0, dist.all_to_all_single

    def __call__(self, out, value, *arguments, **options):
        handle = self.exchange(out, value, *arguments, **options)
        self.free = max(self.free, time.monotonic()) + value.nbytes / self.speed
        return Delayed(handle, self.free)


class Delayed:
    """An exchange that is over at a given time."""

    def __init__(self, handle, ready):
        self.handle, self.ready, self.is_completed = handle, ready, handle.is_completed

    def wait(self, *arguments):
        self.handle.wait(*arguments)
        time.sleep(max(0.0, self.ready - time.monotonic()))


def prepare(rank, size, hidden, gate_up, down, weights, ids, dtype, link):
    if link:
        dist.all_to_all_single = Link(link)
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


def _compare(race, tokens, dtype, link, others):
    """Race one exchange of all tokens against ``others``, each (chunks, kind)."""
    hidden, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    pool = Ranks(RANKS)
    pool.run(prepare, hidden, gate_up, down, weights, ids, dtype, link)
    sample = slice(0, SAMPLE)
    inputs = (x.to(dtype).double() for x in (hidden[sample], gate_up, down))
    exact = reference.fused_moe(*inputs, weights[sample].double(), ids[sample])
    race(
        lambda: pool.run(step, 1, "plain")[0],
        {name: lambda call=call: pool.run(step, *call)[0] for name, call in others.items()},
        exact,
        nbytes=ids.unique().numel() * 3 * INTERMEDIATE * HIDDEN * dtype.itemsize + 2 * tokens * HIDDEN * dtype.itemsize,
        flops=6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )
    pool.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [16, 512])
def test_parallel_moe(race, tokens, dtype):
    others = {
        "2 chunks": (2, "plain"),
        "4 chunks": (4, "plain"),
        "capacity": (1, "capacity"),
        "a row for each expert": (1, "a row for each expert"),
    }
    _compare(race, tokens, dtype, None, others)


def test_simulated_link(race):
    _compare(race, 512, torch.bfloat16, 2e7, {"2 chunks": (2, "plain"), "4 chunks": (4, "plain")})
