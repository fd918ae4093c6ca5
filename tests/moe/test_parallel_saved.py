"""ExpertParallel under activation checkpoints, saved-tensor hooks and graphs that are kept, on several ranks."""

import functools
import time
import weakref

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mla_kernels.moe.experts.fused import fused_moe
from mla_kernels.moe.parallel.expert_parallel import ExpertParallel
from tests.moe.problems import distinct_ids
from tests.moe.ranks import Ranks

EXPERTS, TOP_K, HIDDEN, INNER, WAIT = 6, 2, 20, 6, 60
TOKENS = {"busy": [5, 4], "a rank without tokens": [9, 0], "a rank without work in its last chunks": [9, 0]}


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def _ids(name):
    ids = distinct_ids(9, EXPERTS, TOP_K)
    if name == "a rank without work in its last chunks":
        ids[3:] %= 3  # experts of rank 0
    return ids


def _layer(rank, tokens_of, ids, chunks):
    """(step of the leaves, leaves, calls of the experts) of this rank's share of a seeded problem."""
    torch.manual_seed(0)
    hidden, weights = torch.randn(9, HIDDEN), torch.rand(9, TOP_K)
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    parallel = ExpertParallel(EXPERTS, timeout=WAIT)
    own = slice(sum(tokens_of[:rank]), sum(tokens_of[: rank + 1]))
    leaves = [hidden[own], weights[own], gate_up[parallel.local], down[parallel.local]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    rows_seen = []

    def compute(rows, weights, ids, gate_up, down):
        rows_seen.append(weakref.ref(rows.untyped_storage()))
        return fused_moe(rows.contiguous(), gate_up, down, weights, ids)

    def step(hidden, weights, gate_up, down):
        return parallel.run(compute, hidden, weights, ids[own], parameters=(gate_up, down), chunks=chunks)

    return step, leaves, rows_seen


def _gradients(step, leaves):
    out = step(*leaves)
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))


def _backward(step, leaves):
    out = step(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def _modes(rank, size, tokens_of, ids, chunks):
    """Which modes gave other gradients than a plain backward, and how often the experts ran under a checkpoint."""
    step, leaves, rows_seen = _layer(rank, tokens_of, ids, chunks)
    expected = _gradients(step, leaves)
    plain, wrong = len(rows_seen), []

    def expect(mode, gradients):
        if not all(torch.equal(a, b) for a, b in zip(gradients, expected)):
            wrong.append(mode)

    calls = {}
    for reentrant, gradients_of in ((False, _gradients), (True, _backward)):
        rows_seen.clear()
        expect(reentrant, gradients_of(functools.partial(checkpoint, step, use_reentrant=reentrant), leaves))
        calls[reentrant] = len(rows_seen)
    with save_on_cpu():
        expect("offloaded", _gradients(step, leaves))
    out = step(*leaves)
    for use in ("first", "second"):
        grad = torch.linspace(-1, 1, out.numel()).view_as(out)
        expect(use, torch.autograd.grad(out, leaves, grad, retain_graph=use == "first"))
    return wrong, plain, calls


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", TOKENS)
def test_the_same_gradients(pair, name, chunks):
    for wrong, plain, calls in pair.run(_modes, TOKENS[name], _ids(name), chunks):
        assert wrong == []
        assert calls == {False: 2 * plain, True: 2 * plain}  # the forward pass, and once more for all chunks


def _kept(rank, size, tokens_of, ids):
    """How many chunks' rows are still held between the passes, whose saved tensors hooks have taken away."""
    step, leaves, rows_seen = _layer(rank, tokens_of, ids, 3)
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy):
        out = step(*leaves)
        end = time.monotonic() + 10
        while kept := sum(storage() is not None for storage in rows_seen):  # gloo's threads let go a moment later
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        out.sum().backward()
    return len(rows_seen), kept


def test_rows_are_kept_where_hooks_see_them(pair):
    assert pair.run(_kept, [5, 4], _ids("busy")) == [(3, 0)] * 2


def _twice(rank, size, tokens_of, ids):
    """Two layers in one checkpoint, the second of which has no work on rank 1."""
    step, leaves, _ = _layer(rank, tokens_of, ids, 2)
    other, *_ = _layer(rank, tokens_of, ids % 3, 2)

    def both(hidden, *rest):
        return other(step(hidden, *rest).tanh(), *rest)

    expected = _gradients(both, leaves)
    checkpointed = _gradients(functools.partial(checkpoint, both, use_reentrant=False), leaves)
    return all(torch.equal(a, b) for a, b in zip(checkpointed, expected))


def test_two_layers_in_a_checkpoint(pair):
    assert pair.run(_twice, [5, 4], _ids("busy")) == [True, True]
