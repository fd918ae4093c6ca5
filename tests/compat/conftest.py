from collections import Counter

import pytest

from mla_kernels.compat import (
    transformers_attention,
    transformers_experts,
    transformers_indexer,
    transformers_pools,
)

OPS = {
    transformers_attention: ("mla_decode", "mla_prefill", "sparse_mla_decode", "sparse_mla_prefill"),
    transformers_experts: ("fused_moe",),
    transformers_indexer: ("select_slots",),
    transformers_pools: ("select_slots",),
}


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often transformers' models ran each op: name -> calls."""
    counts = Counter()

    def counting(name, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    for module, names in OPS.items():
        for name in names:
            monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counts
