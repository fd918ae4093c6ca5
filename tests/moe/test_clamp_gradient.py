"""The gradient of a value that lies exactly on the limit of a clamp is that of the values before it, everywhere."""

import pytest
import torch

from mla_kernels import Activation, fused_moe
from mla_kernels.reference import moe as reference

LIMIT = 1.5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# gate and up of eight columns: inside, on the limits, and one step of bfloat16 outside them
GATES = [0.5, LIMIT, LIMIT, -LIMIT, LIMIT, 1.5078125, LIMIT, 1.5078125]
UPS = [0.25, 0.5, LIMIT, LIMIT, -LIMIT, -LIMIT, 1.5078125, -1.5078125]


def derivatives(clamp, alpha):
    """d activation / d gate and / d up of the columns in float64, by hand: slopes of what is not past its limit."""
    gate, up = torch.tensor(GATES).double(), torch.tensor(UPS).double()
    slope, shift = (alpha, 1.0) if clamp == "gpt_oss" else (1.0, 0.0)
    x = gate if clamp == "post" else gate.clamp(max=LIMIT)
    sigmoid = torch.sigmoid(slope * x)
    gated = x * sigmoid
    passes = gated <= LIMIT if clamp == "post" else gate <= LIMIT
    factor = up.clamp(-LIMIT, LIMIT) + shift
    of_gate = sigmoid * (1 + slope * x * (1 - sigmoid)) * factor * passes
    of_up = (gated.clamp(max=LIMIT) if clamp == "post" else gated) * (up.abs() <= LIMIT)
    return of_gate, of_up


@pytest.mark.parametrize("clamp", ["pre", "post", "gpt_oss"])
def test_reference(clamp):
    both = torch.tensor([GATES + UPS], dtype=torch.float64, requires_grad=True)
    reference.apply_activation(both, clamp, LIMIT, 1.7).sum().backward()
    torch.testing.assert_close(both.grad[0], torch.cat(derivatives(clamp, 1.7)))
    nan = torch.full((1, 2), float("nan"), dtype=torch.float64)
    assert reference.apply_activation(nan, clamp, LIMIT, 1.7).isnan().all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp", ["pre", "post", "gpt_oss"])
def test_backends(backend, device, clamp, dtype, recompute):
    """hidden [1, 0, ...] makes the first column of gate_up its result, exactly; down adds the activations up."""
    hidden, inner = torch.zeros(1, 16), len(GATES)
    hidden[0, 0] = 1.0
    gate_up = torch.zeros(1, 2 * inner, 16)
    gate_up[0, :, 0] = torch.tensor(GATES + UPS)
    down = torch.zeros(1, 16, inner)
    down[0, 0] = 1.0
    hidden, gate_up, down = (tensor.to(device, dtype).requires_grad_() for tensor in (hidden, gate_up, down))
    weights, ids = torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    out = fused_moe(hidden, gate_up, down, weights, ids, activation=Activation(clamp, LIMIT, 1.7), recompute=recompute)
    out[0, 0].backward()
    got, exact = gate_up.grad[0, :, 0].cpu().double(), torch.cat(derivatives(clamp, 1.7))
    assert got.eq(0).equal(exact.eq(0))
    torch.testing.assert_close(got, exact, rtol=2.0**-6 if dtype != torch.float32 else 1e-5, atol=1e-6)
