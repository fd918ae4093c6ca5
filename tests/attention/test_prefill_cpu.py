"""mla_prefill of CPU tensors: both forwards, the blocks of the backward, broadcast inputs, defaults that others set."""

import pytest
import torch

from mla_kernels import launch
from mla_kernels.cpu import prefill as cpu
from tests.attention.prefill_problems import make


@pytest.fixture(autouse=True)
def _by_torch():
    with launch.on_cpu("torch"):
        yield


RAGGED = [(5, 9), (20, 30), (0, 4), (40, 3), (3, 0), (30, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_without_the_fused_attention_of_torch(dtype, causal, monkeypatch):
    assert cpu.fused_attention() is not None
    monkeypatch.setattr(cpu, "fused_attention", lambda: None)
    problem = make(RAGGED, dtype=dtype, causal=causal)
    problem.check(problem.run())
    monkeypatch.setattr(cpu, "_SCORES", 1 << 12)  # few queries at a time
    problem.check(problem.run())


@pytest.mark.parametrize("scores", [1 << 16, 1 << 19])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_over_several_blocks(scores, causal, monkeypatch):
    monkeypatch.setattr(cpu, "_SCORES", scores)
    problem = make([(140, 1100)], causal=causal, poison=False)
    problem.check_gradients(problem.gradients())


def test_inputs_that_are_one_row_or_head_expanded():
    problem = make(RAGGED, poison=False)
    for expand in (lambda t: t[:1].expand_as(t), lambda t: t[:, :1].expand_as(t) if t.dim() == 3 else t):
        expanded = problem.with_inputs(expand)
        expanded.check(expanded.run())
        expanded.check_gradients(expanded.gradients())


@pytest.mark.parametrize("name", ["q", "k", "v", "k_rope"])
def test_one_input_alone_wants_a_gradient(name):
    problem = make([(20, 30), (5, 5)], poison=False)
    together = dict(zip(("q", "k", "v", "k_rope"), _gradients(problem, "q", "k", "v", "k_rope")))
    (alone,) = _gradients(problem, name)
    assert torch.equal(alone, together[name])


def _gradients(problem, *names):
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    out, lse = problem.run(**leaves)
    return torch.autograd.grad(out.square().sum() + lse.square().sum(), tuple(leaves.values()))


def test_defaults_set_elsewhere_change_nothing():
    problem = make([(20, 30), (5, 3)], poison=False)
    want = problem.run()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = problem.run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(got, want))


def test_autocast_changes_nothing():
    problem = make([(20, 30), (5, 5)], poison=False)
    want, gradients = problem.run(), problem.gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(problem.run(), want))
        assert all(torch.equal(*pair) for pair in zip(problem.gradients(), gradients))
