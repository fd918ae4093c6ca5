"""What the Ascend worker reports about kernels of its own."""

import pytest

from mla_kernels.targets import service
from mla_kernels.targets.chips import CHIPS
from mla_kernels.targets.source import HEADER

SOURCE = (
    HEADER
    + """
@triton.jit
def product(a, b, c, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = tl.load(a + m[:, None] * depth + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * BLOCK_N + n[None, :])
        total = tl.dot(left, right, total)
    if SCALE:
        total = tl.exp(total)
    tl.store(c + m[:, None] * BLOCK_N + n[None, :], total.to(c.dtype.element_ty))


@triton.jit
def copy(x, y, index, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(index)
    tl.static_print("printed while compiling")
    tl.store(y + at, tl.load(x + row * BLOCK + at))


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.store(x, no_such_name)
"""
)
ASCEND = ("ascend910b", "ascend910c", "ascend950")


def report(function, signature, constexprs, chip="ascend910b", **options):
    job = {
        "action": "report",
        "source": SOURCE,
        "function": function,
        "signature": signature,
        "constexprs": constexprs,
        "vendor": "ascend",
        "architecture": CHIPS[chip].architecture,
        "options": options,
    }
    return service.pool().submit("ascend", job).result()


def product(chip, m, n, k, scale=False):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "depth": "i32:16"}
    return report("product", signature, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SCALE": scale}, chip)


@pytest.mark.parametrize("chip", ASCEND)
def test_matrix_product(chip):
    answer = product(chip, 64, 128, 64)
    assert answer["ok"], answer["reason"]
    assert answer["tensor_instructions"] == 1
    assert answer["memory"]["L0C"] == 64 * 128 * 4
    assert answer["memory"]["L1"] == 2 * (64 * 64 + 64 * 128) * 2  # both operands, double-buffered
    assert (answer["registers"], answer["spills"], answer["loop_spills"], answer["traps"]) == (None, 0, 0, 0)
    assert answer["detail"]["core"] in ("AIC", "MIX")


def test_mixed_kernel_has_a_workspace():
    answer = product("ascend910b", 64, 64, 64, scale=True)
    assert answer["detail"]["core"] == "MIX" and answer["detail"]["workspace_bytes"] >= 64 * 64 * 4
    assert 0 < answer["memory"]["UB"] <= CHIPS["ascend910b"].memory["UB"]


@pytest.mark.parametrize("chip, limit", [("ascend910b", 128), ("ascend950", 256)])
def test_overflow_is_in_words_and_bytes(chip, limit):
    answer = product(chip, 512, 256, 32)
    assert not answer["ok"]
    assert answer["reason"].startswith("L0C overflow: 512.0 of " + str(limit))
    assert answer["memory"]["L0C"] == 512 * 1024


def test_scalar_loads_are_counted():
    answer = report("copy", {"x": "*fp32", "y": "*fp32", "index": "*i64"}, {"BLOCK": 1024})
    assert answer["ok"], answer["reason"]
    assert answer["detail"]["scalar_gm_loads"] == 1 and answer["detail"]["scalar_gm_stores"] == 0
    assert answer["memory"]["UB"] >= 4096 and answer["tensor_instructions"] == 0


def test_error_is_an_answer_and_the_worker_lives_on():
    answer = report("wrong", {"x": "*fp32"}, {"BLOCK": 16})
    assert not answer["ok"] and "triton front end" in answer["reason"] and "no_such_name" in answer["reason"]
    answer = report("copy", {"x": "*fp32"}, {"BLOCK": 1024})
    assert not answer["ok"] and "no type or constant for index, y" in answer["reason"]
    assert product("ascend910b", 32, 32, 32)["ok"]
