"""ExpertParallel in groups of gloo processes, against all experts in one process."""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mla_kernels import launch
from mla_kernels.moe.experts.activation import Activation
from mla_kernels.moe.parallel import exchange as module
from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from mla_kernels.reference import moe as reference
from tests.moe.problems import distinct_ids
from tests.moe.ranks import Ranks
from tests.support import assert_close

EXPERTS, TOP_K, HIDDEN, INNER = 7, 3, 20, 6
WAIT = 90
"""Seconds: no test waits so long unless something is wrong, however busy the machine is."""

SOON = 30
"""Seconds in which an error must be on every rank that is not to wait for its time-out."""

CASES = {  # tokens of each rank, experts of each rank, chunks, capacity
    "2": ([6, 5], None, 1, None),
    "2, chunked": ([6, 5], None, 3, None),
    "2, capacity": ([6, 5], None, 2, 9),
    "4, uneven": ([5, 2, 1, 9], [1, 4, 0, 2], 1, None),
    "4, a rank without tokens, chunked": ([5, 0, 1, 9], [3, 2, 1, 1], 4, None),
    "4, all tokens on one rank": ([0, 0, 13, 0], None, 2, None),
    "4, all experts on one rank": ([4, 3, 2, 4], [0, 7, 0, 0], 2, None),
    "4, a rank without tokens, capacity": ([5, 0, 1, 9], [3, 2, 0, 2], 3, 9),
    "4, no tokens": ([0, 0, 0, 0], None, 2, None),
}


@pytest.fixture(scope="module")
def pools():
    """The processes of a group of so many, started once, and again after one of them was lost."""
    started = {}

    def of(size):
        if size in started and started[size].broken:
            started.pop(size).close()
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield of
    for pool in started.values():
        pool.close()


def _experts(rows, weights, ids, gate_up, down):
    """SwiGLU experts as sums whose bits do not depend on how many rows there are; NaN where nothing may be read."""
    out = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    for expert in range(len(gate_up)):
        gate, up = (rows[:, None] * gate_up[expert]).sum(-1).chunk(2, -1)
        y = ((F.silu(gate) * up)[:, None] * down[expert]).sum(-1)
        for slot in range(ids.shape[1]):
            out = torch.where(ids[:, slot, None] == expert, out + weights[:, slot, None] * y, out)
    return out.to(rows.dtype)


def _problem(tokens, dtype=torch.float32, ids=None):
    """hidden, gate_up, down, weights, ids, and a gradient of the result."""
    if ids is None:
        ids = distinct_ids(tokens, EXPERTS, TOP_K)
        if tokens > 3:
            ids[1, 1], ids[2, 0] = -1, 2**31 - 1
    return (
        torch.randn(tokens, HIDDEN).to(dtype),
        (torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3).to(dtype),
        (torch.randn(EXPERTS, HIDDEN, INNER) * 0.3).to(dtype),
        torch.rand(tokens, TOP_K),
        ids,
        torch.randn(tokens, HIDDEN).to(dtype),
    )


def _single(problem, compute=_experts):
    """The result and the gradients of hidden, weights, gate_up and down in one process."""
    hidden, gate_up, down, weights, ids, grad = problem
    hidden, weights, gate_up, down = (x.clone().requires_grad_() for x in (hidden, weights, gate_up, down))
    out = compute(hidden, weights, ids, gate_up, down)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in (hidden, weights, gate_up, down))]


def _share(problem, tokens_of, rank, parallel):
    """A rank's tokens and experts."""
    hidden, gate_up, down, weights, ids, grad = problem
    own = slice(sum(tokens_of[:rank]), sum(tokens_of[: rank + 1]))
    tensors = hidden[own], weights[own], gate_up[parallel.local], down[parallel.local]
    return [x.clone().requires_grad_() for x in tensors], ids[own], grad[own]


def _gather(results):
    """Every rank's [out, gradients], joined."""
    return [torch.cat(parts) for parts in zip(*results)]


def _train(rank, size, problem, tokens_of, experts_of, chunks, capacity):
    parallel = ExpertParallel(EXPERTS, experts_per_rank=experts_of, capacity=capacity, timeout=WAIT)
    (hidden, weights, gate_up, down), ids, grad = _share(problem, tokens_of, rank, parallel)
    options = {"parameters": (gate_up, down), "chunks": chunks}
    with torch.no_grad():
        inference = parallel.run(_experts, hidden, weights, ids, **options)
    for _ in range(2):  # the second call of a kind exchanges no sizes with a capacity
        out = parallel.run(_experts, hidden, weights, ids, **options)
    assert torch.equal(out, inference)
    out.backward(grad)
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward(grad)
    return [out.detach(), *(x.grad for x in (hidden, weights, gate_up, down))]


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_one_process(pools, case):
    tokens_of, *options = CASES[case]
    problem = _problem(sum(tokens_of))
    got = _gather(pools(len(tokens_of)).run(_train, problem, tokens_of, *options))
    exact = _single([x.double() if x.is_floating_point() else x for x in problem])
    for actual, expected in zip(got, exact):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pools, dtype):
    problem = _problem(11, dtype)
    got = _gather(pools(2).run(_train, problem, [6, 5], None, 2, None))
    exact = _single([x.double() if x.is_floating_point() else x for x in problem])
    for actual, expected, baseline in zip(got, exact, _single(problem)):
        assert actual.dtype == baseline.dtype
        scale = expected.abs().max()
        bound = 2 * (baseline.double() - expected).abs().max() + 4 * torch.finfo(dtype).eps * scale
        assert (actual.double() - expected).abs().max() <= bound  # a partial sum of each rank is rounded, too


def test_bits_do_not_depend_on_chunks_or_capacity(pools):
    problem = _problem(17)
    variants = [(1, None), (2, None), (5, None), (3, 12)]
    runs = [_gather(pools(4).run(_train, problem, [4, 12, 0, 1], [2, 0, 4, 1], *variant)) for variant in variants]
    for other in runs[1:]:
        for name in range(3):  # out, and the gradients of hidden and weights; those of experts are sums over chunks
            assert torch.equal(runs[0][name], other[name])
        torch.testing.assert_close(runs[0][3:], other[3:], atol=1e-5, rtol=1e-5)


def test_bits_are_those_of_one_process_where_a_tokens_experts_share_a_rank(pools):
    ids = torch.tensor([[0, 2, 3], [5, 4, 6], [3, 1, -1], [4, -1, 6], [-1, -1, -1]]).int()
    problem = _problem(5, ids=ids)
    out, grad_hidden, grad_weights, *_ = _gather(pools(2).run(_train, problem, [3, 2], None, 1, None))
    expected = _single(problem)
    assert torch.equal(out, expected[0]) and torch.equal(grad_weights, expected[2])
    torch.testing.assert_close(grad_hidden, expected[1])  # a sum over outputs, in torch's order


def _fused(rank, size, tensors, tokens_of, grad, options, mode="torch"):
    with launch.on_cpu(mode):
        return _train_fused(rank, tensors, tokens_of, grad, options)


def _train_fused(rank, tensors, tokens_of, grad, options):
    parallel = ExpertParallel(EXPERTS, experts_per_rank=[5, 2], timeout=WAIT)
    own = slice(sum(tokens_of[:rank]), sum(tokens_of[: rank + 1]))
    here = {
        name: x[own if name in ("hidden", "weights", "ids") else parallel.local].clone() for name, x in tensors.items()
    }
    leaves = [x.requires_grad_() for x in here.values() if x.is_floating_point()]
    out = parallel.fused_moe(**here, **options, chunks=2)
    out.backward(grad[own])
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("weight_at", ["input", "activation", "output"])
def test_fused_moe_with_biases_and_a_clamp(pools, weight_at):
    hidden, gate_up, down, weights, ids, grad = _problem(11)
    biases = {"gate_up_bias": torch.randn(EXPERTS, 2 * INNER), "down_bias": torch.randn(EXPERTS, HIDDEN)}
    options = {"activation": Activation("pre", 0.8), "weight_at": weight_at}
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down, "weights": weights, **biases}
    got = _gather(pools(2).run(_fused, {**tensors, "ids": ids}, [6, 5], grad, options))
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    out = reference.fused_moe(**exact, ids=ids, **options)
    out.backward(grad.double())
    for actual, expected in zip(got, (out.detach(), *(x.grad for x in exact.values()))):
        assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["interpret", "npu-emulated"])
def test_on_kernels(pools, mode):
    """The kernels take what came as it lies, rows of hidden with ids and weights between them."""
    hidden, gate_up, down, weights, ids, grad = _problem(11)
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down, "weights": weights}
    got = _gather(pools(2).run(_fused, {**tensors, "ids": ids}, [6, 5], grad, {}, mode))
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    out = reference.fused_moe(**exact, ids=ids)
    out.backward(grad.double())
    for actual, expected in zip(got, (out.detach(), *(x.grad for x in exact.values()))):
        assert_close(actual, expected)


def _rows(rank, size, problem, tokens_of):
    parallel = ExpertParallel(EXPERTS, timeout=WAIT)
    (hidden, weights, gate_up, down), ids, _ = _share(problem, tokens_of, rank, parallel)
    exchange, rows = dist.all_to_all_single, []

    def counted(out, value, *arguments, **options):
        rows.append((value.shape[0], value.nbytes))
        return exchange(out, value, *arguments, **options)

    waits, to_host = [], torch.Tensor.cpu
    dist.all_to_all_single, torch.Tensor.cpu = counted, lambda x: waits.append(1) or to_host(x)
    try:
        with torch.no_grad():
            parallel.run(_experts, hidden, weights, ids, parameters=(gate_up, down))
    finally:
        dist.all_to_all_single, torch.Tensor.cpu = exchange, to_host
    return rows, len(waits)


def test_a_token_travels_once_to_each_rank(pools):
    """Three exchanges (counts, tokens, results), of one row for each (token, rank) and not for each (token, expert)."""
    ids = torch.tensor([[0, 1, 2], [3, 2, 0], [4, 5, 6], [6, 0, 5], [-1, 9, 1]]).int()  # ranks own 0..3 and 4..6
    (first, waits), (second, _) = pools(2).run(_rows, _problem(5, ids=ids), [2, 3])
    assert [rows for rows, _ in first] == [2, 2, 4]  # tokens 0 and 1 to rank 0; back from it also tokens 3 and 4
    assert [rows for rows, _ in second] == [2, 4, 2]
    assert second[1][1] == 4 * (128 + 64 + 64)  # 80 bytes of hidden, 12 of weights, 12 of ids, each padded to 64s
    assert waits == 1


def _events(rank, size, problem, tokens_of, chunks):
    """What happens in order; each chunk's experts wait until the exchanges that may run beside them are over."""
    parallel = ExpertParallel(EXPERTS, timeout=WAIT)
    (hidden, weights, gate_up, down), ids, grad = _share(problem, tokens_of, rank, parallel)
    events, handles, exchange = [], [], dist.all_to_all_single

    def recorded(*arguments, **options):
        if arguments[1].dtype == torch.uint8:
            events.append(f"exchange {len(handles)}")
            handles.append(exchange(*arguments, **options))
            return handles[-1]
        return exchange(*arguments, **options)

    def compute(rows, *arguments):
        deadline = time.monotonic() + WAIT
        while not all(handle.is_completed() for handle in handles):
            assert time.monotonic() < deadline, f"an exchange waits for the experts: {events}"
            time.sleep(0.001)
        events.append(f"experts after {len(handles)}")
        return _experts(rows, *arguments)

    dist.all_to_all_single = recorded
    try:
        out = parallel.run(compute, hidden, weights, ids, parameters=(gate_up, down), chunks=chunks)
        out.backward(grad)
    finally:
        dist.all_to_all_single = exchange
    return events


def test_exchanges_of_other_chunks_run_while_experts_work(pools):
    """No wait on the host stands between the start of these exchanges and the experts, and all end during them."""
    ids = torch.tensor([[0, 4, 5], [5, 1, 6]]).int().repeat(6, 1)  # both ranks get tokens in every chunk
    chunked, _ = pools(2).run(_events, _problem(12, ids=ids), [6, 6], 3)
    assert chunked[:9] == [
        "exchange 0",  # chunk 0 on its way here
        "exchange 1",  # chunk 1 on its way here
        "experts after 2",  # chunk 0 is worked on
        "exchange 2",  # chunk 0 returns ...
        "exchange 3",  # ... after which chunk 2 leaves
        "experts after 4",  # chunk 1 is worked on, 0 returning and 2 arriving
        "exchange 4",
        "experts after 5",
        "exchange 5",
    ]
    assert chunked[9:] == [f"exchange {i}" for i in range(6, 12)]  # backward: the same, without calls of the experts
    whole, _ = pools(2).run(_events, _problem(12, ids=ids), [6, 6], 1)
    assert whole == ["exchange 0", "experts after 1", "exchange 1", "exchange 2", "exchange 3"]


def _without_host(rank, size, problem, tokens_of):
    parallel = ExpertParallel(EXPERTS, capacity=8, timeout=WAIT)
    (hidden, weights, gate_up, down), ids, _ = _share(problem, tokens_of, rank, parallel)

    def forbidden(*arguments, **options):
        raise AssertionError("a value came to the host")

    # added up by an op, which looks at values on CPU tensors
    module._sum, add = lambda rows, slots: rows.new_zeros(len(slots), rows.shape[1]), module._sum
    names = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    with torch.no_grad():
        first = parallel.run(_experts, hidden, weights, ids, parameters=(gate_up, down))
        kept = {name: getattr(torch.Tensor, name) for name in names}
        for name in names:
            setattr(torch.Tensor, name, forbidden)
        try:
            second = parallel.run(_experts, hidden, weights, ids.flip(0), parameters=(gate_up, down))
        finally:
            module._sum = add
            for name, method in kept.items():
                setattr(torch.Tensor, name, method)
    return first.shape == second.shape


def test_with_a_capacity_nothing_comes_to_the_host(pools):
    assert pools(2).run(_without_host, _problem(11), [8, 3]) == [True, True]


SIZES = {"hidden": HIDDEN, "dtype": torch.float32, "top_k": TOP_K, "experts": EXPERTS, "chunks": 1, "capacity": None}


def _call(rank, size, changes, own_group=True):
    """One call with default sizes, and this rank's changes to them; ``fail`` makes its experts raise."""
    sizes = SIZES | changes.get(rank, {})
    group = dist.new_group() if own_group else None  # what a failed call leaves behind stays in it
    parallel = ExpertParallel(sizes["experts"], group, capacity=sizes["capacity"], timeout=sizes.get("timeout", WAIT))
    if "experts_per_rank" in sizes:  # of more ranks than a test can have
        parallel.experts_per_rank = sizes["experts_per_rank"]
    hidden = torch.randn(4, sizes["hidden"]).to(sizes["dtype"])
    if sizes.get("gradients"):
        hidden.requires_grad_()

    def compute(rows, weights, ids):
        if "fail" in sizes:
            raise ArithmeticError(sizes["fail"])
        if "end" in sizes:
            os._exit(1)
        return {"double": rows.double(), "narrow": rows[:, 1:]}.get(sizes.get("result"), rows)

    if sizes.get("absent"):
        return None
    ids = (2 * torch.arange(4)[:, None] + torch.arange(sizes["top_k"])).int() % EXPERTS  # each has a token
    weights = torch.rand(4, sizes["top_k"], dtype=sizes.get("weights", torch.float32))
    start = time.monotonic()
    try:
        parallel.run(compute, hidden, weights, ids, chunks=sizes["chunks"])
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"hidden": 24}}, r"disagree on hidden_size \(20 on rank 0, 24 on rank 1\)"),
        ({0: {"dtype": torch.bfloat16}}, r"dtype \(torch.bfloat16 on rank 0, torch.float32 on rank 1\)"),
        ({1: {"top_k": 2}}, r"top_k \(3 on rank 0, 2 on rank 1\)"),
        ({1: {"experts": 8}}, r"num_experts \(7 on rank 0, 8 on rank 1\); experts_per_rank \(\(4, 3\)"),
        ({0: {"chunks": 2}}, r"chunks \(2 on rank 0, 1 on rank 1\)"),
        ({0: {"gradients": True}}, r"gradients \(True on rank 0, False on rank 1\)"),
        ({0: {"capacity": 4}}, r"capacity \(4 on rank 0, None on rank 1\)"),
        ({0: {"capacity": 4, "hidden": 24}, 1: {"capacity": 4}}, r"hidden_size \(24 on rank 0, 20 on rank 1\)"),
    ],
)
def test_ranks_that_disagree_all_say_on_what(pools, changes, message):
    for kind, text, seconds in pools(2).run(_call, changes):
        assert kind == "ValueError" and seconds < SOON
        assert re.search(message, text), text


def test_a_refused_argument_is_an_error_on_every_rank(pools):
    outcomes = pools(4).run(_call, {2: {"weights": torch.float64}})
    assert [kind for kind, *_ in outcomes] == ["RuntimeError", "RuntimeError", "TypeError", "RuntimeError"]
    assert outcomes[2][1] == "weights: got dtype float64, accepted: float32"
    for rank in (0, 1, 3):
        assert outcomes[rank][1].endswith("rank 2 refused its arguments: TypeError: " + outcomes[2][1])


def test_experts_that_fail_on_one_rank_stop_the_others_with_the_cause(pools):
    outcomes = pools(4).run(_call, {3: {"fail": "out of luck"}})
    assert outcomes[3][:2] == ("ArithmeticError", "out of luck")
    for kind, text, seconds in outcomes[:3]:
        assert kind == "RuntimeError" and "rank 3 failed: ArithmeticError: out of luck" in text
        assert seconds < SOON


def test_a_result_of_another_dtype_or_shape_is_refused(pools):
    for kind, (outcome, other) in {
        "dtype": pools(2).run(_call, {0: {"result": "double"}}),
        "shape": pools(2).run(_call, {0: {"result": "narrow", "gradients": True}, 1: {"gradients": True}}),
    }.items():
        assert outcome[0] == "ValueError" and "compute: its result was" in outcome[1], kind
        assert "rank 0 failed: ValueError: compute" in other[1] and other[2] < SOON


def test_long_sizes_are_told_apart(pools):
    kind, text, _ = pools(2).run(_call, {0: {"experts_per_rank": [1] * 20000}, 1: {"experts_per_rank": [2] * 20000}})[0]
    assert kind == "ValueError" and len(text) < 1000
    assert re.search(r"experts_per_rank \(\[1, 1, .*\.\.\. \(checksum \w{8}\) on rank 0, \[2, 2,", text), text


def test_a_rank_that_does_not_come_is_named(pools):
    outcomes = pools(4).run(_call, {1: {"absent": True}} | {rank: {"timeout": 2} for rank in (0, 2, 3)})
    for kind, text, seconds in (outcomes[0], *outcomes[2:]):
        assert kind == "TimeoutError" and "gave up after 2 s waiting for the other ranks' sizes" in text
        assert "no word from rank 1" in text and seconds < SOON


def test_a_rank_that_ends_is_named(pools):
    pool = Ranks(2)
    (outcome, error), ended = pool.outcomes(_call, {1: {"end": True}}, False)
    with pytest.raises(AssertionError, match="rank 1 ended with exit code 1"):
        pool.run(max)
    pool.close()
    assert ended is None and error is None and pool.broken
    kind, text, seconds = outcome
    assert kind == "RuntimeError" and "was cut off waiting for" in text and "no word from rank 1" in text
    assert seconds < SOON


@pytest.fixture
def alone():
    """A group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_arguments(alone):
    with pytest.raises(ValueError, match=r"experts_per_rank: got \(3, 4\), 1 counts with the sum 7"):
        ExpertParallel(7, experts_per_rank=[3, 4])
    with pytest.raises(ValueError, match="num_experts: got 0"):
        ExpertParallel(0)
    with pytest.raises(ValueError, match="capacity: got 0"):
        ExpertParallel(7, capacity=0)
    with pytest.raises(ValueError, match="timeout: got -1"):
        ExpertParallel(7, timeout=-1)
    parallel = ExpertParallel(7)
    assert (parallel.local, parallel.num_local) == (slice(0, 7), 7)
    hidden, gate_up, down, weights, ids, _ = _problem(4)
    with pytest.raises(ValueError, match="chunks: got 17"):
        parallel.run(_experts, hidden, weights, ids, parameters=(gate_up, down), chunks=17)
    with pytest.raises(ValueError, match=r"gate_up: got shape \(6, 12, 20\), \(7, any, any\)"):
        parallel.fused_moe(hidden, gate_up[:6], down, weights, ids)
    with pytest.raises(ValueError, match="hidden: got 4 tokens, at most the capacity, 3"):
        ExpertParallel(7, capacity=3).run(_experts, hidden, weights, ids, parameters=(gate_up, down))


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ExpertParallel(8)
