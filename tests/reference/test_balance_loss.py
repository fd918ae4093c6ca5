"""The reference's balance loss against Hugging Face's, DeepSeek's own formulas, and its bias rule on a small case."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mla_kernels.reference.balance import balance_loss, expert_load, update_bias
from mla_kernels.reference.route import route


def test_load_example():
    ids = torch.tensor([[2, 0], [0, -1], [2, 1]], dtype=torch.int32)
    assert expert_load(ids, 3).tolist() == [2, 1, 2] and expert_load(ids, 2).tolist() == [2, 1]


def test_bias_moves_towards_an_even_load():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    update_bias(bias, torch.tensor([10, 2, 0, 4], dtype=torch.int32), 0.25)
    assert bias.tolist() == [0.25, 0.25, -0.25, 0.0]


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_hugging_face_batch_loss_and_gradient(top_k):
    logits = torch.randn(60, 16, requires_grad=True)
    expected = load_balancing_loss_func((logits,), 16, top_k)
    _, ids = route(logits.detach(), top_k, scoring="softmax")
    loss = balance_loss(logits, ids, scoring="softmax", divide_by_top_k=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_deepseek_sequence_loss(scoring):
    """DeepSeek-V2's modeling code (seq_aux), and DeepSeek-V3's equations, on 3 sequences of 20 tokens."""
    batch, length, experts, top_k, alpha = 3, 20, 12, 4, 0.003
    logits = torch.randn(batch * length, experts, dtype=torch.float64)
    _, ids = route(logits, top_k, scoring=scoring)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    scores = (scores / scores.sum(-1, keepdim=True)).view(batch, length, experts)
    ce = torch.zeros(batch, experts, dtype=torch.float64)
    ones = torch.ones(batch, length * top_k, dtype=torch.float64)
    ce.scatter_add_(1, ids.view(batch, -1).long(), ones).div_(length * top_k / experts)
    expected = (ce * scores.mean(1)).sum(1).mean() * alpha
    bounds = torch.arange(0, 61, 20, dtype=torch.int32)
    loss = balance_loss(logits, ids, scoring=scoring, cu_seqlens=bounds, coefficient=alpha)
    torch.testing.assert_close(loss, expected)


def test_an_even_load_gives_the_coefficient():
    ids = torch.arange(32, dtype=torch.int32).view(16, 2) % 8
    torch.testing.assert_close(balance_loss(torch.zeros(16, 8), ids, coefficient=0.5), torch.tensor(0.5))
    shared = F.pad(ids, (0, 1), value=8)
    torch.testing.assert_close(balance_loss(torch.zeros(16, 8), shared, num_shared=1), torch.tensor(1.0))
