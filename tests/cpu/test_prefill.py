"""The CPU prefill's own devices: padded widths, parts around the causal square, bounded memory, few operators."""

import pytest
import torch

from mla_kernels.cpu import prefill
from mla_kernels.reference import prefill as reference
from tests.cpu.recorder import record
from tests.support import assert_close

SCALE = 0.09


def problem(lengths, *, heads=4, key=32, rope=16, value=32, dtype=torch.float32):
    """Arguments of the op up to the bounds."""
    queries, keys = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths))
    shapes = (queries[-1], heads, key + rope), (keys[-1], heads, key), (keys[-1], heads, value), (keys[-1], rope)
    return *(torch.randn(shape).to(dtype) for shape in shapes), queries, keys


def forward(arguments, causal=True):
    return prefill.mla_prefill(*arguments, 0, 0, SCALE, causal)


def exact(arguments, causal=True):
    q, k, v, k_rope, *bounds = arguments
    typed = [tensor.double() for tensor in (q, k, v)]
    return reference.mla_prefill(
        *typed, *bounds, max_seqlen_q=0, max_seqlen_k=0, softmax_scale=SCALE, causal=causal, k_rope=k_rope.double()
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [16, 48, 64], ids=["narrower than keys", "as wide", "wider"])
def test_widths_of_values(value, causal):
    arguments = problem([(300, 700), (40, 40), (9, 5)], value=value)
    for got, want in zip(forward(arguments, causal), exact(arguments, causal)):
        assert_close(got, want)


def test_long_bfloat16_sums_keep_their_precision():
    """Gradients are added up over 12 blocks of queries in fp32."""
    arguments = problem([(3000, 3000)], heads=1, dtype=torch.bfloat16)
    q, k, v, k_rope, *bounds = arguments
    out, lse = forward(arguments)
    grads = torch.randn_like(out), torch.randn_like(lse)
    got = prefill.mla_prefill_backward(*grads, *arguments, out, lse, 0, 0, SCALE, True)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v, k_rope)]
    results = reference.mla_prefill(
        *leaves[:3], *bounds, max_seqlen_q=0, max_seqlen_k=0, softmax_scale=SCALE, k_rope=leaves[3]
    )
    loss = sum((result * grad.double()).sum() for result, grad in zip(results, grads))
    for mine, want in zip(got, torch.autograd.grad(loss, leaves)):
        assert (mine - want).square().mean().sqrt() < 2**-8 * want.square().mean().sqrt()


def test_memory_is_bounded():
    """Nothing of the size [heads, queries, keys], nor of [queries, keys], is ever held."""
    arguments = problem([(2048, 2048)], heads=2)
    scores = 2048 * 2048 * 4
    assert record(forward, arguments).largest_bytes < scores / 4
    out, lse = forward(arguments)
    gradient = torch.randn_like(out), torch.randn_like(lse)
    made = record(prefill.mla_prefill_backward, *gradient, *arguments, out, lse, 0, 0, SCALE, True)
    assert made.largest_bytes < scores / 4


def test_operators_do_not_grow_with_tokens():
    few, many = (record(forward, problem([(tokens, 2 * tokens)])).operators for tokens in (40, 400))
    assert few == many
