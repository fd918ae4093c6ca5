"""Whose experts a layer gets that was not asked for by name."""

from types import SimpleNamespace

import pytest
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.runtime_context import get_flags

from mla_kernels.compat import sglang_experts

IN_BLOCKS = {"block_quant": True, "use_mxfp8": False, "is_fp4_expert": False}


def made(monkeypatch, capability, method, backend=MoeRunnerBackend.AUTO):
    """The function that computes experts of such a method on a chip of that capability."""

    def original(method, layer, config):
        method.runner = SimpleNamespace(fused_func="SGLang's")

    monkeypatch.setattr(sglang_experts, "get_device_capability", lambda: capability)
    method = SimpleNamespace(**method)
    with get_flags().moe.override(runner_backend=backend):
        sglang_experts.create_runner(original, method, None, None)
    return method.runner.fused_func


@pytest.mark.parametrize(
    "capability, ours", [((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
)
def test_fp8_in_blocks_is_ours_where_sglang_has_no_kernels(monkeypatch, capability, ours):
    assert made(monkeypatch, capability, IN_BLOCKS) == (sglang_experts.run_experts if ours else "SGLang's")


@pytest.mark.parametrize(
    "method", [{}, {"block_quant": False}, IN_BLOCKS | {"use_mxfp8": True}, IN_BLOCKS | {"is_fp4_expert": True}]
)
def test_other_experts_are_left_alone(monkeypatch, method):
    assert made(monkeypatch, (8, 0), method) == "SGLang's"


def test_a_runner_that_the_user_named_is_left_alone(monkeypatch):
    assert made(monkeypatch, (8, 0), IN_BLOCKS, MoeRunnerBackend.TRITON) == "SGLang's"
