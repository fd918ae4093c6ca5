"""define_op: one declaration, and everything torch wants of an op."""

import pytest
import torch

from mla_kernels import launch, shim


def _check(x, factor):
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: got non-finite values, finite are accepted")


calls = []


def _cpu(x, factor):
    calls.append("cpu")
    return x * factor


def _device(x, factor):
    calls.append("device")
    return x * factor


scale = shim.define_op(
    "test_scale",
    "(Tensor x, float factor) -> Tensor",
    cpu=_cpu,
    device=_device,
    fake=lambda x, factor: torch.empty_like(x),
    check_values=_check,
    autograd=(
        lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
        lambda ctx, gradient: (gradient * ctx.factor, None),
    ),
)


def _affine(x, factor, shift, offset):
    return x * factor + shift + (0.0 if offset is None else offset)


affine = shim.define_op(
    "test_affine",
    "(Tensor x, float factor, float shift=1.5, Tensor? offset=None) -> Tensor",
    cpu=_affine,
    device=_affine,
    fake=lambda x, factor, shift, offset: torch.empty_like(x),
    autograd=(
        lambda ctx, inputs, output: (setattr(ctx, "factor", inputs[1]), setattr(ctx, "last", len(inputs) - 1)),
        lambda ctx, gradient: (gradient * ctx.factor, None, None, gradient if ctx.needs_input_grad[ctx.last] else None),
    ),
)


@pytest.fixture(autouse=True)
def _torch_mode():
    calls.clear()
    with launch.on_cpu("torch"):
        yield


def test_cpu_tensors_run_the_cpu_function_and_the_kernels_where_asked():
    x = torch.randn(4)
    assert torch.equal(scale(x, 2.0), 2 * x)
    with launch.on_cpu("interpret"):
        scale(x, 2.0)
    assert calls == ["cpu", "device"]


def test_opcheck():
    torch.library.opcheck(scale, (torch.randn(4), 2.0))
    torch.library.opcheck(scale, (torch.randn(4, requires_grad=True), 2.0))


def test_autograd():
    x = torch.randn(4, requires_grad=True)
    scale(x, 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 3.0))


def test_values_are_checked_before_anything_runs():
    with pytest.raises(ValueError, match="x: got non-finite"):
        scale(torch.tensor([float("nan")]), 2.0)
    assert calls == []


def test_values_are_not_read_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert scale(torch.empty(4), 2.0).shape == (4,)
    assert calls == []


def test_compile_fullgraph():
    x = torch.randn(4)
    assert torch.equal(torch.compile(lambda x: scale(x, 2.0) + 1, fullgraph=True, backend="eager")(x), 2 * x + 1)


def test_npu_is_registered_under_privateuse1_before_any_rename():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mla_kernels::test_scale", "PrivateUse1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mla_kernels::test_scale", "CUDA")


def test_defaults_of_the_schema_reach_every_implementation():
    x = torch.randn(4)
    for given, shift in (((), 1.5), ((1.5,), 1.5), ((2.0,), 2.0), ((1.5, x), 1.5 + x), ((2.0, None), 2.0)):
        assert torch.equal(affine(x, 3.0, *given), 3 * x + shift)
        assert torch.compile(lambda *a: affine(*a), fullgraph=True, backend="eager")(x, 3.0, *given).shape == (4,)
        torch.library.opcheck(affine, (x.clone().requires_grad_(), 3.0, *given))
    assert torch.equal(affine(x, 3.0, offset=x), 3 * x + 1.5 + x)
    leaf = x.clone().requires_grad_()
    affine(leaf, 3.0).sum().backward()
    assert torch.equal(leaf.grad, torch.full((4,), 3.0))


def test_keyword_only_arguments_are_refused():
    with pytest.raises(TypeError, match="keyword-only arguments in the schema, positional ones are accepted"):
        shim.define_op(
            "test_keyword", "(Tensor x, *, float factor) -> Tensor", cpu=_cpu, device=_device, fake=_cpu
        )  # fmt: skip
