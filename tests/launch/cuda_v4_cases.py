"""Cases that tests/launch/test_cuda_launch.py runs over the stub driver: what a decode step of DeepSeek-V4 launches."""

import pytest
import torch

from mla_kernels import nn
from mla_kernels.compat.transformers import enable
from mla_kernels.nn import v4_attention
from tests.compat.models import CACHE
from tests.compat.test_transformers_v4 import KINDS, tiny
from tests.launch.cuda_recorder import Operators, record

pytestmark = pytest.mark.device_process


KERNELS = {
    "sliding_attention": ["write_kv", "rotate_heads", "sparse_mla", "rotate_heads"],
    "heavily_compressed_attention": ["write_windows", "write_kv", "rotate_heads", "sparse_mla_pair", "rotate_heads"],
    "compressed_sparse_attention": [
        "write_windows", "write_windows", "write_kv", "rotate_heads", "rotate_heads", "indexer_logits", "topk",
        "sparse_mla_pair", "rotate_heads",
    ],
}  # fmt: skip


MOST = 14
"""Launches of a step's layer beside vendor products; attention may take one more, to join splits."""


@pytest.fixture(autouse=True)
def _values_are_not_looked_at(monkeypatch):
    """As those of tensors on a device."""
    monkeypatch.setattr(v4_attention, "readable", lambda values: False)


def test_launches_of_a_decode_step_of_v4():
    """Beside vendor products; lists of slots and limits are made in the first layer of a step alone."""
    for kind, kernels in KERNELS.items():
        ratio = {"sliding_attention": 0, "heavily_compressed_attention": 128}.get(kind, 4)
        config = nn.V4AttentionConfig(
            kind, hidden_size=64, num_heads=16, head_dim=64, rope_dim=16, q_lora_rank=32, o_groups=2, o_lora_rank=16,
            window=16, ratio=ratio, index_heads=16, index_head_dim=32, index_top_k=8,
        )  # fmt: skip
        layer = nn.V4Attention(config).bfloat16()
        cache = nn.V4Cache.allocate(config, num_pages=4, page_size=16, entry_pages=4, slots=2)
        table = torch.arange(4, dtype=torch.int32).view(2, 2)
        lengths, slots = torch.tensor([20, 9], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        sequences = nn.V4Sequences(lengths, table, {ratio: table} if ratio else {}, slots)
        arguments = *nn.rope_tables(16, 64, {"rope_theta": 1e4}), torch.tensor([[19], [40]]), cache, sequences
        hidden = torch.randn(2, 1, 64).bfloat16()
        layer.decode(hidden, *arguments)  # on the CPU: the lists are kept
        with record() as launches, Operators("aten.mm", "aten.bmm") as operators:
            layer.decode(hidden, *arguments)
        assert [launch.kernel.removesuffix("_kernel") for launch in launches] == kernels
        assert operators.seen == []
        assert len(kernels) + 1 <= MOST


def test_launches_of_a_decode_step_of_an_enabled_v4():
    """The second layer of each type; transformers' grouped projection copies its result."""
    model = enable(tiny(num_hidden_layers=6, layer_types=KINDS * 2, mlp_layer_types=["moe"] * 6).bfloat16())
    for layer in model.model.layers:  # as from_pretrained leaves them, whatever its dtype
        for name, parameter in layer.self_attn.named_parameters():
            if name.endswith(("sinks", "norm.weight", "position_bias")):
                parameter.data = parameter.data.float()
    ids, found = torch.randint(2, 90, (2, 62)), []
    past = model(ids[:, :61])[CACHE]
    for layer in model.model.layers[3:]:
        attention = layer.self_attn

        def counted(*args, forward=attention.forward, **kwargs):
            with record() as launches, Operators("aten.mm", "aten.bmm") as operators:
                forward(*args, **kwargs)
            found.append(([launch.kernel.removesuffix("_kernel") for launch in launches], operators.seen))
            return forward(*args, **kwargs)  # on the CPU: what the recorder's driver computes is nothing

        attention.forward = counted
    model(ids[:, 61:], **{CACHE: past})
    assert [kernels for kernels, _ in found] == [KERNELS[kind] for kind in KINDS]
    for kernels, operators in found:
        assert operators == ["aten.clone"]
        assert len(kernels) + len(operators) + 1 <= MOST
