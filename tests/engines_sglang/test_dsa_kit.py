"""What SGLang asks of its own implementations of sparse attention (``sglang.test.kits``): batches and reference."""

import unittest

import pytest
import torch
from sglang.srt.plugins import load_plugins
from sglang.test.kits.attention_unittest.attention_methods import dsa_attention as kit

from mla_kernels import launch
from mla_kernels.compat import sglang_dsa_backend
from tests.engines_sglang.small_dsa import Posing

load_plugins()
CASES = {case.name: case for case in kit.make_dsa_sparse_cases("dsa")}


@pytest.mark.parametrize("packed", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_sglang_s_own_cases(name, packed, monkeypatch):
    calls = []
    attend = sglang_dsa_backend.sparse_mla_decode
    monkeypatch.setattr(sglang_dsa_backend, "sparse_mla_decode", lambda *a, **k: calls.append(1) or attend(*a, **k))
    both = dict.fromkeys(("dsa_prefill_backend", "dsa_decode_backend"), "mla_kernels")
    with launch.on_cpu("torch"), torch.no_grad(), Posing():
        kit.run_dsa_sparse_attention_case(unittest.TestCase(), CASES[name], fp8_kv_cache=packed, **both)
    assert calls
