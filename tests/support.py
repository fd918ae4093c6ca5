"""What the tests share: one comparison, poison, and what stands around a device."""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def assert_close(
    actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor | None = None, *, accepted: float = 1e-5
) -> None:
    """Hold ``actual`` against the float64 result ``exact``.

    float32: the largest error is at most ``accepted`` of the output's scale (its largest magnitude). bfloat16 and
    float16: the largest and the RMS error are at most twice those of ``baseline``, the same mathematics by torch in
    that dtype, with one rounding of the output's scale as a floor. Infinities and NaN must stand in the same places,
    with the same sign.
    Each may lie on any device; they are compared on the CPU.
    """
    actual, exact, baseline = on_cpu((actual, exact, baseline))
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, "the exact result must be float64"
    got = actual.double()
    assert torch.equal(got.isnan(), exact.isnan()), (
        f"NaN in {int(got.isnan().sum())} places, expected {int(exact.isnan().sum())}"
    )
    for sign in (float("inf"), float("-inf")):
        assert torch.equal(got == sign, exact == sign), f"{sign} in other places than expected"
    finite = exact.isfinite()
    if not finite.any():
        return
    scale = exact[finite].abs().max().item()
    worst, rms = _errors(got[finite], exact[finite])
    if actual.dtype == torch.float32 and baseline is None:
        assert worst <= accepted * scale, f"largest error {worst:.3g}, accepted {accepted * scale:.3g} ({scale:.3g})"
        return
    assert baseline is not None, f"{actual.dtype} needs a baseline: torch's own result in that dtype"
    torch_worst, torch_rms = _errors(baseline.double()[finite], exact[finite])
    floor = EPSILON[actual.dtype] * scale
    assert worst <= max(2 * torch_worst, floor), f"largest error {worst:.3g}, torch's own {torch_worst:.3g}"
    assert rms <= max(2 * torch_rms, floor / 8), f"RMS error {rms:.3g}, torch's own {torch_rms:.3g}"


def _errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    error = (got - exact).abs()
    return error.max().item(), error.square().mean().sqrt().item()


def on_cpu(value):
    """``value`` with its tensors on the CPU, where references compute: a tensor, or tuples, lists and dicts of them."""
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, value)


def not_on(reason: str, *backends: str) -> pytest.MarkDecorator:
    """The mark of a test that does not exist on these backends."""
    return pytest.mark.leave_out(reason, when=lambda backend: backend in backends)


def repeats(device: torch.device | str) -> range:
    """How often a test calls an op again for the same bits: programs race on a device, and on the CPU none does."""
    return range(2 if torch.device(device).type == "cpu" else 19)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of NaN: whatever reads it shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def one_further(tensor):
    """The same values one element behind where an allocation begins, which words of four bytes do not reach evenly."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory.view(torch.uint8)[tensor.element_size() :] = tensor.contiguous().view(torch.uint8).flatten()
    return memory[1:].view(tensor.shape)


@contextlib.contextmanager
def divided_addresses():
    """Within the block the interpreter refuses what GPUs do: loads from addresses that their size does not divide."""
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    load = InterpreterBuilder.create_masked_load

    def checked(builder, pointers, mask, *rest):
        size = np.dtype(_get_np_dtype(pointers.get_element_ty())).itemsize
        assert not (mask.data & (pointers.data % size != 0)).any(), f"{size} bytes at addresses they do not divide"
        return load(builder, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", checked)
        yield
