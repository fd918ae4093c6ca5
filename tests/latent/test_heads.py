"""rotate_heads: parity with the reference on every backend, gradients, inverses, refusals; transformers' V4."""

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

import mla_kernels as mk
from mla_kernels.reference.heads import rotate_heads as reference
from tests.support import assert_close, not_on

ROWS = 9  # of the tables
SHAPES = [  # head_dim, rope_dim, rope, rope_first, norm_eps, inverse
    (512, 64, "interleaved", False, 1e-6, False),
    (512, 64, "interleaved", False, None, True),
    (64, 16, "interleaved_to_half", True, 1e-3, True),
    (32, 32, "half", False, 1e-6, False),
    (16, 16, "interleaved_to_half", False, None, False),
]
NAMES = ("rope_dim", "rope", "rope_first", "norm_eps", "inverse")


def given(width, rope_dim, dtype, tokens=7, heads=3):
    """x with strided tokens and heads, tables and positions."""
    angles = torch.rand(ROWS, rope_dim // 2) * 6
    x = (torch.randn(heads, tokens, 2 * width) * 3).to(dtype)[..., :width].transpose(0, 1)
    return x, angles.cos(), angles.sin(), torch.randint(0, ROWS, (tokens,))


def options(*values):
    return dict(zip(NAMES, values))


@pytest.mark.quick("rotate_heads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(backend, device, shape, dtype):
    width, *rest = shape
    x, cos, sin, positions = given(width, rest[0], dtype)
    got = mk.rotate_heads(x.to(device), cos.to(device), sin.to(device), positions.to(device), **options(*rest))
    assert got.dtype == dtype and got.is_contiguous()
    exact = reference(x.double(), cos.double(), sin.double(), positions, **options(*rest))
    own = reference(x, cos, sin, positions, **options(*rest)) if dtype != torch.float32 else None
    assert_close(got.cpu(), exact, own)


@pytest.mark.quick("rotate_heads_backward")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients(backend, device, shape, dtype):
    width, *rest = shape
    x, cos, sin, positions = given(width, rest[0], dtype)
    toward = torch.randn(x.shape).to(dtype)
    leaf = x.to(device).requires_grad_()
    out = mk.rotate_heads(leaf, cos.to(device), sin.to(device), positions.to(device), **options(*rest))
    (got,) = torch.autograd.grad(out, leaf, toward.to(device))

    def autograd(x, cos, sin, toward):
        x = x.detach().requires_grad_()
        out = reference(x, cos, sin, positions, **options(*rest))
        return torch.autograd.grad(out, x, toward)[0]

    exact = autograd(x.double(), cos.double(), sin.double(), toward.double())
    assert_close(got.cpu(), exact, None if dtype == torch.float32 else autograd(x, cos, sin, toward))


def test_a_gradient_of_any_stride(backend, device):
    x, cos, sin, positions = (tensor.to(device) for tensor in given(64, 16, torch.float32))
    leaf = x.requires_grad_()
    for eps in (None, 1e-6):
        out = mk.rotate_heads(leaf, cos, sin, positions, rope_dim=16, norm_eps=eps)
        whole = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]  # of stride 0
        assert torch.equal(whole, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
def test_the_inverse_undoes(backend, device, rope):
    x, cos, sin, positions = (tensor.to(device) for tensor in given(64, 32, torch.float32))
    turned = mk.rotate_heads(x, cos, sin, positions, rope_dim=32, rope=rope)
    assert not torch.allclose(turned, x, atol=1e-2)
    assert_close(mk.rotate_heads(turned, cos, sin, positions, rope_dim=32, rope=rope, inverse=True), x.double())


def test_the_example(backend, device):
    x = torch.zeros(1, 1, 16, device=device)
    x[..., 0] = 1.0
    cos, sin = torch.zeros(1, 8, device=device), torch.ones(1, 8, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    for inverse, value in ((False, 1.0), (True, -1.0)):
        got = mk.rotate_heads(x, cos, sin, zero, rope_dim=16, inverse=inverse)
        assert got.flatten().tolist() == [0.0, value] + [0.0] * 14


def test_as_transformers_treats_queries_and_the_output(backend, device):
    x, cos, sin, positions = given(512, 64, torch.float32)
    cos, sin = (table.double().to(torch.float32) for table in (cos, sin))
    heads = x.transpose(0, 1)[None]  # [batch, heads, tokens, width]
    normed = v4.DeepseekV4UnweightedRMSNorm(1e-6)(heads)
    rows = cos[positions][None], sin[positions][None]
    want = v4.apply_rotary_pos_emb(normed, *rows)[0].transpose(0, 1)
    moved = [tensor.to(device) for tensor in (cos, sin, positions)]
    got = mk.rotate_heads(x.to(device), *moved, rope_dim=64, norm_eps=1e-6)
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)
    want = v4.apply_rotary_pos_emb(heads, rows[0], -rows[1])[0].transpose(0, 1)
    got = mk.rotate_heads(x.to(device), *moved, rope_dim=64, inverse=True)
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)


def test_sizes_of_batches(backend, device):
    for tokens, heads in ((1, 1), (0, 3), (3, 0), (2, 127)):
        x, cos, sin, positions = given(32, 16, torch.float32, tokens, heads)
        got = mk.rotate_heads(*(t.to(device) for t in (x, cos, sin, positions)), rope_dim=16, norm_eps=1e-6)
        assert got.shape == x.shape
        if x.numel():
            wide = x.double(), cos.double(), sin.double(), positions
            assert_close(got.cpu(), reference(*wide, rope_dim=16, norm_eps=1e-6))


@not_on("refuses such positions", "cpu")
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_positions_outside_the_tables_leave_zeros(backend, device, eps, monkeypatch):
    from mla_kernels.latent import heads

    x, cos, sin, positions = (tensor.to(device) for tensor in given(32, 16, torch.float32))
    positions[2], positions[4] = -1, ROWS
    if device.type == "cpu":  # values of CPU tensors are checked: launch as a device does
        got = heads._launch_heads(x, cos, sin, positions, 16, "half", False, eps, False, False)
    else:
        got = mk.rotate_heads(x, cos, sin, positions, rope_dim=16, rope="half", norm_eps=eps)
    exact = reference(
        x.double().cpu(),
        cos.double().cpu(),
        sin.double().cpu(),
        positions.cpu(),
        rope_dim=16,
        rope="half",
        norm_eps=eps,
    )
    assert_close(got.cpu(), exact)
    assert not got[2].any() and not got[4].any() and got[3].any()


REFUSED = {
    "x": (lambda a: {"x": a["x"][0]}, ValueError, r"x: got 2 dimensions \(3, 32\), 3 are accepted"),
    "width": (lambda a: {"x": a["x"][..., :24]}, ValueError, "x: got head_dim 24, powers of two from 16 to 1024"),
    "dtype": (lambda a: {"x": a["x"].double()}, TypeError, "x: got dtype float64"),
    "stride": (lambda a: {"x": a["x"].mT}, ValueError, "x: got .*"),
    "cos": (lambda a: {"cos": a["cos"].half()}, TypeError, "cos: got dtype float16"),
    "sin": (lambda a: {"sin": a["sin"][:3]}, ValueError, r"sin: got shape \(3, 8\)"),
    "positions": (lambda a: {"positions": a["positions"][:3]}, ValueError, r"positions: got shape \(3,\)"),
    "far": (lambda a: {"positions": a["positions"] + ROWS}, ValueError, "positions: got values from"),
    "rope_dim": (lambda a: {"rope_dim": 24}, ValueError, "rope_dim: got 24, powers of two from 16 to 32"),
    "wide": (lambda a: {"rope_dim": 64}, ValueError, "rope_dim: got 64, an integer from 16 to 32"),
    "rope": (lambda a: {"rope": "both"}, ValueError, "rope: got 'both', accepted"),
    "first": (lambda a: {"rope_first": 1}, TypeError, "rope_first: got int, a bool"),
    "inverse": (lambda a: {"inverse": None}, TypeError, "inverse: got NoneType, a bool"),
    "eps": (lambda a: {"norm_eps": -1.0}, ValueError, "norm_eps: got -1.0, None or a finite number"),
    "grad": (lambda a: {"sin": a["sin"].requires_grad_()}, NotImplementedError, "sin requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, cpu_code):
    change, error, words = REFUSED[name]
    x, cos, sin, positions = given(32, 16, torch.float32)
    arguments = {"x": x, "cos": cos, "sin": sin, "positions": positions, "rope_dim": 16}
    with pytest.raises(error, match=words):
        mk.rotate_heads(**(arguments | change(arguments)))


def test_a_second_derivative_is_exact_or_refused(cpu_code):
    x, cos, sin, positions = given(32, 16, torch.float32)
    leaf, arguments = x.requires_grad_(), (cos, sin, positions)
    for eps in (None, 1e-6):
        out = mk.rotate_heads(leaf, *arguments, rope_dim=16, norm_eps=eps)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        if eps is None:  # a rotation keeps lengths
            torch.testing.assert_close(torch.autograd.grad(gradient.sum(), leaf)[0], torch.full_like(x, 2.0))
    with pytest.raises(NotImplementedError, match="rotate_heads has no second derivative with norm_eps"):
        gradient.sum().backward()


def test_opcheck(cpu_code):
    x, cos, sin, positions = given(32, 16, torch.float32)
    arguments = cos, sin, positions, 16, "interleaved", False, 1e-6, True
    torch.library.opcheck(torch.ops.mla_kernels.rotate_heads.default, (x.requires_grad_(), *arguments))
    grad = torch.randn(x.shape)
    torch.library.opcheck(torch.ops.mla_kernels.rotate_heads_backward.default, (grad, x.detach(), *arguments))
