"""The prefill reference against torch's attention and Hugging Face's, and its gradients in float64."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from mla_kernels.reference.attention import merge_states
from mla_kernels.reference.prefill import mla_prefill

SCALE = 0.21


def problem(lengths, *, heads=3, key=12, rope=4, value=10, dtype=torch.float64):
    """q, k, v, k_rope and both bounds."""
    queries, keys = zip(*lengths)
    bounds = [torch.tensor([0, *side]).cumsum(0).int() for side in (queries, keys)]
    shapes = (sum(queries), heads, key + rope), (sum(keys), heads, key), (sum(keys), heads, value), (sum(keys), rope)
    return [torch.randn(shape, dtype=dtype) for shape in shapes], bounds


def prefill(tensors, bounds, causal=True):
    q, k, v, k_rope = tensors
    return mla_prefill(
        q, k, v, *bounds, max_seqlen_q=99, max_seqlen_k=99, softmax_scale=SCALE, causal=causal, k_rope=k_rope
    )


@pytest.mark.parametrize("causal", [True, False])
def test_each_sequence_is_torch_attention(causal):
    lengths = [(5, 5), (3, 9), (1, 1), (7, 8)]
    (q, k, v, k_rope), bounds = problem(lengths)
    out, lse = prefill((q, k, v, k_rope), bounds, causal)
    key = torch.cat([k, k_rope[:, None].expand(-1, 3, -1)], -1)
    row, start = 0, 0
    for queries, keys in lengths:
        mask = torch.ones(queries, keys, dtype=torch.bool)
        mask = mask.tril(keys - queries) if causal else mask
        parts = (
            t.transpose(0, 1) for t in (q[row : row + queries], key[start : start + keys], v[start : start + keys])
        )
        q_heads, k_heads, v_heads = parts
        expected = torch.nn.functional.scaled_dot_product_attention(
            q_heads, k_heads, v_heads, attn_mask=mask, scale=SCALE
        )
        torch.testing.assert_close(out[row : row + queries], expected.transpose(0, 1))
        scores = (SCALE * q_heads @ k_heads.mT).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[row : row + queries], scores.logsumexp(-1).T)
        row, start = row + queries, start + keys


def test_queries_with_nothing_to_see():
    tensors, bounds = problem([(4, 2), (3, 0), (0, 5), (2, 2)])
    out, lse = prefill(tensors, bounds)
    empty = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(lse == -torch.inf, empty[:, None].expand(-1, 3))
    assert not out[empty].any() and out[~empty].all()
    assert torch.equal(
        (prefill(tensors, bounds, causal=False)[1] == -torch.inf)[:, 0].nonzero().flatten(), torch.arange(4, 7)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    tensors, bounds = problem([(5, 9), (4, 2)], dtype=dtype)
    out, lse = prefill(tensors, bounds)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, exact_lse = prefill([tensor.double() for tensor in tensors], bounds)
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(out.double(), exact, atol=precision, rtol=precision)
    torch.testing.assert_close(lse.double(), exact_lse, atol=precision, rtol=precision)


def test_parts_merge_to_the_whole():
    (q, k, v, k_rope), bounds = problem([(4, 11)])
    whole = prefill((q, k, v, k_rope), bounds)
    parts = [
        prefill((q, k[rows], v[rows], k_rope[rows]), (bounds[0], torch.tensor([0, rows.stop - rows.start])), causal)
        for rows, causal in ((slice(0, 7), False), (slice(7, 11), True))
    ]
    merged = merge_states(*(torch.stack(pair) for pair in zip(*parts)))
    torch.testing.assert_close(merged, whole)


def test_hugging_face_computes_the_same():
    """DeepseekV3's own attention function, without its projections, one padded row a sequence."""
    lengths = [(6, 6), (4, 4)]
    (q, k, v, k_rope), bounds = problem(lengths, dtype=torch.float32)
    out, _ = prefill((q, k, v, k_rope), bounds)

    class Layer:
        num_key_value_groups, training = 1, False

    for start, (count, _) in zip(bounds[0].tolist(), lengths):
        rows = slice(start, start + count)
        key = torch.cat([k[rows], k_rope[rows, None].expand(-1, 3, -1)], -1)
        mask = torch.full((count, count), -torch.inf).triu(1)
        expected, _ = v3.eager_attention_forward(
            Layer(), *(t.transpose(0, 1)[None] for t in (q[rows], key, v[rows])), mask[None, None], SCALE
        )
        torch.testing.assert_close(out[rows], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients(causal):
    tensors, bounds = problem([(3, 5), (2, 0), (4, 2)], heads=2, key=4, rope=2, value=3)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def results(*leaves):
        out, lse = prefill(leaves, bounds, causal)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert gradcheck(results, leaves)
