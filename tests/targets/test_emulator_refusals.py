"""What the NPU emulator refuses, what its guard pages catch, and where the Ascend lowering differs."""

import pytest
import torch

from mla_kernels.language import tl, triton
from mla_kernels.targets import emulator, service
from tests.targets.emulated import gather_kernel, matmul, run


def test_out_of_bounds_read_is_named():
    a, b, c = torch.randn(50, 100), torch.randn(100, 70), torch.zeros(50, 70)
    with emulator.guarded(), pytest.raises(emulator.EmulationError, match="bytes past the end of a"):
        matmul(a, b, c, rows=52)
    assert c.eq(0).all()  # a run that died wrote nothing


@triton.jit
def shifted_copy_kernel(x, y, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + shift))


@pytest.mark.parametrize("shift, message", [(-1, "4 bytes before the start of x"), (1, "bytes past the end of x")])
def test_out_of_bounds_by_one(shift, message):
    x, y = torch.randn(64), torch.empty(64)
    with emulator.guarded():
        run(shifted_copy_kernel, (1,), x, y, 0, BLOCK=64)
        assert y.equal(x)
        with pytest.raises(emulator.EmulationError, match=message):
            run(shifted_copy_kernel, (1,), x, y, shift, BLOCK=64)


def test_guarded_views_of_one_storage_stay_together():
    buffer = torch.randn(128)
    first = buffer[:64].clone()
    with emulator.guarded():
        run(shifted_copy_kernel, (1,), buffer[:64], buffer[64:], 0, BLOCK=64)
    assert buffer[:64].equal(first) and buffer[64:].equal(first)


@triton.jit
def inline_assembly_kernel(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    value = tl.inline_asm_elementwise("mov $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x + at, value)


def test_inline_assembly_is_refused():
    with pytest.raises(emulator.EmulationError, match="inline_assembly_kernel: emulator rewrites: inline assembly"):
        run(inline_assembly_kernel, (1,), torch.zeros(64, dtype=torch.int32), BLOCK=64)


def test_unknown_device_function_is_refused():
    source = """
import triton
import triton.language as tl
from triton.language.extra.ascend import libdevice
@triton.jit
def f(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, libdevice.relu(tl.load(x + at)))
"""
    with pytest.raises(emulator.EmulationError, match=r"linking failed: (.|\n)*undefined reference to `reluf"):
        emulator.run(source, "f", {"x": "*fp32"}, {"BLOCK": 64}, (1,), (torch.zeros(64),))


def test_error_names_the_stage():
    with pytest.raises(emulator.EmulationError, match="triton front end"):
        emulator.run("import triton\n@triton.jit\ndef f(x):\n    nothing(x)\n", "f", {"x": "*fp32"}, {}, (1,), ())


def test_missing_toolchain_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_KERNELS_ASCEND_PYTHON", str(tmp_path / "python"))
    with pytest.raises(service.ToolchainMissing, match="no Ascend toolchain"):
        service.ascend_python()


# Where triton-ascend's lowering, and so the emulator, differs from Triton elsewhere (seen in triton-ascend 3.2.0)


@triton.jit
def high_product_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.umulhi(tl.load(x + at), tl.load(x + at)))


def test_umulhi_is_signed_on_ascend():
    x = torch.tensor([-1, 1 << 30] * 8, dtype=torch.int32)
    y = torch.zeros_like(x)
    run(high_product_kernel, (1,), x, y, BLOCK=16)
    assert y.tolist() == [0, 1 << 28] * 8  # unsigned: 2^32 - 2 first


def test_masked_row_gather_reads_the_whole_block_on_ascend():
    table, index = torch.randn(20, 60), torch.full((16,), 19, dtype=torch.int32)
    with emulator.guarded(), pytest.raises(emulator.EmulationError, match="past the end of table"):
        run(gather_kernel, (1,), table, index, torch.empty(16, 60), 16, 60, BLOCK_N=16, BLOCK_D=64)


@triton.jit
def compare_and_swap_kernel(x, y):
    tl.store(y, tl.atomic_cas(x, 3, 5))


def test_compare_and_swap_returns_the_new_value_on_ascend():
    x, y = torch.full((1,), 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(compare_and_swap_kernel, (1,), x, y)
    assert x.item() == 5 and y.item() == 5  # elsewhere the result is the old value, 3


@triton.jit
def ticket_kernel(counter, y):
    tl.store(y + tl.atomic_add(counter, 1), 1)


def test_scalar_atomic_with_a_used_result_does_not_lower_on_ascend():
    with pytest.raises(emulator.EmulationError, match="triton-adapter"):
        run(ticket_kernel, (1,), torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
