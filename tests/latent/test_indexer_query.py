"""quantise_indexer_query: codes and weights of the reference, on every backend."""

import pytest
import torch

from mla_kernels.latent.indexer.query import quantise_indexer_query
from mla_kernels.reference import indexer as reference
from tests.support import repeats

E4M3 = torch.float8_e4m3fn


@pytest.mark.quick("quantise_indexer_query")
@pytest.mark.parametrize("shape", [(3, 64, 128), (2, 3, 5, 32), (1, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_weights(backend, device, shape, dtype):
    """Exactly the reference's: a scale is a power of two, and the largest magnitude is exact."""
    q = (torch.randn(shape) * 10.0 ** torch.randint(-6, 4, shape[:-1])[..., None]).to(dtype)
    weights = torch.randn(shape[:-1])
    want_codes, want = reference.quantise_indexer_query(q, weights)
    codes, folded = quantise_indexer_query(q.to(device), weights.to(device))
    assert codes.dtype == E4M3 and codes.shape == shape
    assert torch.equal(codes.cpu().view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(folded.cpu(), want)


def test_no_tokens():
    codes, weights = quantise_indexer_query(torch.randn(0, 4, 64), torch.randn(0, 4))
    assert codes.shape == (0, 4, 64) and codes.dtype == E4M3 and weights.shape == (0, 4)


def test_the_products_are_those_of_values_rounded_to_four_bits(device):
    q, weights = torch.randn(7, 16, 64), torch.rand(7, 16)
    codes, folded = quantise_indexer_query(q.to(device), weights.to(device))
    restored = codes.cpu().double() * (folded.cpu() / weights).double()[..., None]
    assert ((restored - q).abs() <= q.abs() / 16 + q.abs().amax(-1, keepdim=True) * 2.0**-17).all()


def test_the_example_of_the_docstring(backend, device):
    q = torch.zeros(1, 32, device=device)
    q[0, 0], q[0, 1] = 896.0, 3.5
    codes, weights = quantise_indexer_query(q, torch.tensor([0.5], device=device))
    assert codes[0, :3].float().tolist() == [448.0, 1.75, 0.0] and weights.tolist() == [1.0]


def test_what_is_not_finite_is_kept_in_the_weight(backend, device):
    q, weights = torch.randn(4, 3, 32, device=device), torch.ones(4, 3, device=device)
    q[1, 2, 5], q[3, 0, 0] = float("nan"), float("-inf")
    codes, folded = quantise_indexer_query(q, weights)
    nan = torch.zeros(4, 3, dtype=torch.bool)
    nan[1, 2], nan[3, 0] = True, True
    assert torch.equal(folded.cpu().isnan(), nan)
    assert (codes.cpu().view(torch.uint8)[nan] == 0x7F).all()


def test_any_stride_the_same_bits_and_heads_alone(backend, device):
    q, weights = torch.randn(5, 3, 64, device=device), torch.randn(5, 3, device=device)
    codes, folded = quantise_indexer_query(q, weights)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([weights, weights], -1)[..., 0]
    alone = quantise_indexer_query(q[2:3, 1:2], weights[2:3, 1:2])
    for _ in repeats(device):
        for got, want in zip(quantise_indexer_query(*turned), (codes, folded)):
            assert torch.equal(got.float(), want.float())
    assert torch.equal(alone[0].float(), codes[2:3, 1:2].float()) and torch.equal(alone[1], folded[2:3, 1:2])


REFUSED = {
    "q dtype": (lambda q, w: (q.double(), w), TypeError, "q: got dtype float64"),
    "q rank": (lambda q, w: (q[0, 0], w), ValueError, "q: got 1 dimensions"),
    "head_dim": (lambda q, w: (q[..., :24].contiguous(), w), ValueError, "head_dim: got 24"),
    "weights dtype": (lambda q, w: (q, w.half()), TypeError, "weights: got dtype float16, accepted: float32"),
    "weights shape": (lambda q, w: (q, w[:2]), ValueError, r"weights: got shape \(2, 4\), \(3, 4\) is accepted"),
    "gradient": (lambda q, w: (q.requires_grad_(), w), NotImplementedError, "has no backward and q requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        quantise_indexer_query(*change(torch.randn(3, 4, 32), torch.randn(3, 4)))


def test_opcheck():
    quantise = torch.ops.mla_kernels.quantise_indexer_query.default
    torch.library.opcheck(quantise, (torch.randn(3, 4, 32), torch.randn(3, 4)))
