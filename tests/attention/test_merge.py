"""merge_states against the reference: values, empty parts, strides, gradients, bad arguments."""

import pytest
import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.reference import attention as reference
from tests.attention.problems import make
from tests.support import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY = float("-inf")
INF, NAN = float("inf"), float("nan")


def check(outs, lses, result):
    exact = reference.merge_states(outs.double().cpu(), lses.double().cpu())
    own = (None, None) if outs.dtype == torch.float32 else reference.merge_states(outs.cpu(), lses.cpu())
    assert_close(result[0].cpu(), exact[0], own[0])
    assert_close(result[1].cpu(), exact[1])


@pytest.mark.quick("merge_states")
@pytest.mark.parametrize("shape", [(2, 7, 512), (3, 2, 3, 5, 64), (1, 4, 16), (5, 33, 48), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(backend, device, shape, dtype):
    outs = torch.randn(shape).to(device, dtype)
    lses = (5 * torch.randn(shape[:-1])).to(device)
    check(outs, lses, merge_states(outs, lses))


def test_empty_parts_change_nothing(backend, device):
    outs, lses = torch.randn(3, 4, 16, device=device), torch.randn(3, 4, device=device)
    lses[0, 0] = lses[1, 1] = lses[2, 2] = lses[:, 3] = EMPTY
    outs[0, 0] = outs[:, 3] = float("nan")
    out, lse = merge_states(outs, lses)
    check(outs, lses, (out, lse))
    assert (out[3] == 0).all() and lse[3] == EMPTY


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 48, 1])
def test_plus_infinity_beside_zeros_is_an_empty_part_and_beside_others_an_overflow(backend, device, dtype, width):
    """FlashMLA writes lse +inf where a query saw nothing; an overflow has it, too, and must show."""
    outs, lses = torch.randn(3, 9, width).to(dtype), torch.randn(3, 9)
    lses[1, 0], outs[1, 0] = INF, 0.0  # empty, FlashMLA's
    lses[0, 1], lses[2, 1], outs[2, 1], outs[0, 1] = EMPTY, INF, 0.0, NAN  # both conventions in a row
    lses[:, 2], outs[:, 2] = INF, 0.0  # nothing seen at all
    lses[0, 3], outs[0, 3] = INF, NAN  # an overflow: softmax over a score of +inf
    lses[1, 4], outs[1, 4], outs[1, 4, -1] = INF, 0.0, 1e-6  # an overflow beside one value that is not 0
    lses[2, 5], outs[2, 5] = INF, INF
    lses[1, 6] = NAN
    lses[:, 7], outs[:, 7] = torch.tensor([EMPTY, INF, NAN]), 0.0
    outs, lses = outs.to(device), lses.to(device)
    out, lse = merge_states(outs, lses)
    check(outs, lses, (out, lse))
    left = torch.tensor([0, 2], device=device)
    assert torch.equal(out[0], merge_states(outs[left], lses[left])[0][0]), "an empty part changes no bit"
    assert torch.equal(out[1], outs[1, 1]) and lse[1] == lses[1, 1]
    assert not out[2].any() and lse[2] == EMPTY
    assert lse.isnan().tolist() == [False, False, False, True, True, True, True, True, False]
    assert torch.equal(out.isnan(), lse.isnan()[:, None].expand(9, width))


def test_gradients_of_parts_with_plus_infinity(backend, device):
    """No gradient reaches an empty part, the others' is as without it; an overflow's row has NaN."""
    outs, lses = torch.randn(2, 3, 16), torch.randn(2, 3)
    outs[0, 0], lses[0, 0] = 0.0, INF
    outs[1, 1], lses[1, 1] = NAN, INF
    mine = [value.clone().to(device).requires_grad_() for value in (outs, lses)]
    out, lse = merge_states(*mine)
    (out.sum() + lse.sum()).backward()
    d_outs, d_lses = (value.grad.cpu() for value in mine)
    assert not d_outs[0, 0].any() and d_lses[:, 0].tolist() == [0.0, 1.0] and torch.equal(d_outs[1, 0], torch.ones(16))
    assert d_outs[:, 1].isnan().all() and d_outs[:, 2].isfinite().all() and d_lses[:, 2].isfinite().all()
    exact = [value[:, ::2].double().requires_grad_() for value in (outs, lses)]
    out, lse = reference.merge_states(*exact)
    (out.sum() + lse.sum()).backward()
    for got, want in zip((d_outs, d_lses), exact):
        assert_close(got[:, ::2], want.grad)


def test_one_part_is_returned_bit_for_bit(backend, device):
    outs, lses = torch.randn(1, 9, 64, device=device), 50 * torch.randn(1, 9, device=device)
    out, lse = merge_states(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


def test_far_apart_log_sums(backend, device):
    outs = torch.tensor([[[1.0], [1.0]], [[5.0], [5.0]]], device=device)
    lses = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], device=device)
    out, lse = merge_states(outs, lses)
    assert out.flatten().tolist() == [1.0, 5.0] and lse.tolist() == [300.0, 300.0]


def test_any_stride(backend, device):
    outs, lses = torch.randn(3, 4, 5, 16, device=device), torch.randn(3, 4, 5, device=device)
    want = merge_states(outs, lses)
    for got in (
        merge_states(torch.cat([outs, outs], 1)[:, :4], torch.cat([lses, lses], 1)[:, :4]),
        merge_states(outs.transpose(1, 2).contiguous().transpose(1, 2), lses),
        merge_states(outs[:1].expand(3, -1, -1, -1).clone().copy_(outs), lses),
        merge_states(outs, lses.mT.contiguous().mT),
        merge_states(outs, lses.movedim(0, -1).contiguous().movedim(-1, 0)),
    ):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.no_launch("no rows")
def test_no_rows(backend, device):
    out, lse = merge_states(torch.empty(2, 0, 8, device=device), torch.empty(2, 0, device=device))
    assert out.shape == (0, 8) and lse.shape == (0,)


def test_the_worked_example(backend, device):
    outs, lses = torch.tensor([[1.0], [5.0]], device=device), torch.tensor([3.0, 1.0], device=device).log()
    out, lse = merge_states(outs, lses)
    torch.testing.assert_close((out.cpu(), lse.cpu()), (torch.tensor([2.0]), torch.tensor(4.0).log()))


def test_attention_over_two_halves_of_the_pages(backend, device):
    whole = make([128], heads=4, causal=False, device=device)
    halves = [whole.run(block_table=page, seq_lens=whole.seq_lens // 2) for page in whole.block_table.split(1, 1)]
    merged = merge_states(torch.stack([out for out, _ in halves]), torch.stack([lse for _, lse in halves]))
    whole.check(merged)


def test_gradients(backend, device):
    outs, lses = torch.randn(3, 4, 5, 16), torch.randn(3, 4, 5)
    lses[0, 0] = lses[:, 1] = EMPTY
    outs[0, 0] = float("nan")
    exact = [outs.double().requires_grad_(), lses.double().requires_grad_()]
    mine = [outs.to(device).requires_grad_(), lses.to(device).requires_grad_()]
    weights = torch.randn(4, 5, 16), torch.randn(4, 5)
    for arguments, function in ((exact, reference.merge_states), (mine, merge_states)):
        out, lse = function(*arguments)
        lse = lse.masked_fill(lse == EMPTY, 0.0)
        ((out.cpu() * weights[0]).sum() + (lse.cpu() * weights[1]).sum()).backward()
    for got, want in zip(mine, exact):
        assert_close(got.grad.cpu(), want.grad)
    (only_lse,) = torch.autograd.grad(merge_states(*mine)[1][2].sum(), mine[1])
    torch.testing.assert_close(only_lse[:, 2].cpu(), torch.softmax(lses, 0)[:, 2])


def test_no_gradient_is_recorded_where_none_is_wanted():
    outs, lses = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3)
    assert merge_states(outs, lses)[0].requires_grad
    with torch.no_grad():
        assert not merge_states(outs, lses)[0].requires_grad


REFUSED = {
    "outs no tensor": (([1.0], torch.zeros(1)), TypeError, "outs: got list"),
    "outs dtype": ((torch.zeros(2, 3, 4).double(), torch.zeros(2, 3)), TypeError, "outs: got dtype float64"),
    "outs rank": ((torch.zeros(4), torch.zeros(())), ValueError, "outs: got shape"),
    "no parts": ((torch.zeros(0, 3, 4), torch.zeros(0, 3)), ValueError, "outs: got shape .* parts and d above 0"),
    "outs strided": ((torch.zeros(2, 3, 4).mT, torch.zeros(2, 4)), ValueError, "outs: got stride 4"),
    "lses shape": ((torch.zeros(2, 3, 4), torch.zeros(2, 4)), ValueError, r"lses: got shape \(2, 4\), \(2, 3\)"),
    "lses dtype": ((torch.zeros(2, 3, 4), torch.zeros(2, 3).half()), TypeError, "lses: got dtype float16"),
    "lses device": ((torch.zeros(2, 3, 4), torch.zeros(2, 3, device="meta")), ValueError, "lses: got a tensor on"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        merge_states(*arguments)
