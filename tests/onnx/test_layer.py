"""A decoder layer exported whole: a prompt, then token by token in onnxruntime, its cache handed on, beside torch."""

import numpy as np
import onnxruntime
import pytest
import torch

import mla_kernels
import mla_kernels.onnx
from mla_kernels import launch
from mla_kernels.nn import AttentionConfig, LatentAttention, MoE, MoEConfig, rope_tables
from mla_kernels.nn.layers import RMSNorm

PAGE, PAGES = 16, 4
SMALL = dict(hidden=64, heads=4, latent=32, nope=16, rope=16, v=16, inner=32, experts=8, top_k=3)
LITE = dict(hidden=2048, heads=16, latent=512, nope=128, rope=64, v=128, inner=1408, experts=8, top_k=6)
"""DeepSeek-V2-Lite's widths, with 8 of its 64 experts."""


class DecoderLayer(torch.nn.Module):
    """DeepSeek-V2-Lite's: attention over a paged cache, then a mixture of experts, each behind a norm."""

    def __init__(self, hidden, heads, latent, nope, rope, v, inner, experts, top_k):
        super().__init__()
        self.latent = latent
        config = AttentionConfig(
            hidden, heads, q_lora_rank=None, kv_lora_rank=latent, nope_dim=nope, rope_dim=rope, v_dim=v,
            rope="interleaved",
        )  # fmt: skip
        self.attention, self.attention_norm = LatentAttention(config), RMSNorm(hidden)
        moe = MoEConfig(hidden, inner, 2 * inner, experts, top_k, scoring="softmax", num_groups=1, top_k_groups=1)
        self.moe, self.moe_norm = MoE(moe), RMSNorm(hidden)
        for name, table in zip(("cos", "sin"), rope_tables(rope, PAGE * PAGES, {"rope_theta": 1e4})):
            self.register_buffer(name, table)

    def forward(self, hidden, positions, slots, block_table, seq_lens, data):
        cache = mla_kernels.LatentCache(data, self.latent)
        places = self.cos, self.sin, positions, slots, cache, block_table, seq_lens
        hidden = hidden + self.attention.decode(self.attention_norm(hidden), *places)
        return hidden + self.moe(self.moe_norm(hidden))


def step(table, first, count):
    """What a layer takes beside hidden states and the cache for ``count`` new tokens from position ``first`` on."""
    positions = torch.arange(first, first + count)[None]
    slots = table.long()[0, positions // PAGE] * PAGE + positions % PAGE
    return positions, slots, table, torch.tensor([first + count], dtype=torch.int32)


FUSED = {"fused": ("attention", "experts")}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param(SMALL, {"functions": True}, id="small-functions"),
        pytest.param(SMALL, {}, id="small", marks=SLOW),
        pytest.param(LITE, {}, id="lite", marks=SLOW),
        pytest.param(LITE, {"functions": True}, id="lite-functions", marks=SLOW),
        pytest.param(LITE, FUSED, id="lite-fused", marks=SLOW),
    ],
)
def test_token_by_token(sizes, options, tmp_path):
    torch.manual_seed(0)
    layer = DecoderLayer(**sizes).eval().requires_grad_(False)
    table = torch.randperm(PAGES, dtype=torch.int32)[None]
    hidden = torch.randn(1, 24, sizes["hidden"])
    data = torch.zeros(PAGES, PAGE, sizes["latent"] + sizes["rope"])
    tokens = {1: "tokens"}
    with launch.on_cpu("torch"):
        program = mla_kernels.onnx.export(
            layer, (hidden[:, :5], *step(table, 0, 5), data.clone()),
            dynamic_shapes=(tokens, tokens, tokens, None, None, None), **options,
        )  # fmt: skip
        called = {node.op_type.rsplit("_", 1)[0] for node in program.model.graph if node.domain == "mla_kernels"}
        every = {"mla_prolog", "mla_decode", "expand_output", "route", "fused_moe"}
        assert called == (every if "functions" in options else set())
        program.save(tmp_path / "layer.onnx", external_data=True)
        session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
        names = [value.name for value in session.get_inputs()]
        assert session.get_outputs()[1].name == "data_out"
        theirs = data.numpy().copy()
        for first, count in ((0, 9), *((place, 1) for place in range(9, 24))):
            given = hidden[:, first : first + count], *step(table, first, count)
            want = layer(*given, data)
            feed = dict(zip(names, [*(part.numpy() for part in given), theirs]))
            result, theirs = session.run(None, feed)
            scale = want.abs().max().item()
            assert np.abs(result - want.numpy()).max() <= 1e-5 * scale, (first, scale)
        assert np.abs(theirs - data.numpy()).max() <= 1e-5 * data.abs().max().item()
