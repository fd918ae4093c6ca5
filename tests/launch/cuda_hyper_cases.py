"""Cases that tests/launch/test_cuda_launch.py runs over the stub driver: what an enabled model with hyper-connections
launches for them, around attention and experts that give back what they are given."""

import pytest
import torch
import transformers
from torch import nn

from mla_kernels.compat import transformers_hyper
from mla_kernels.compat.transformers import enable
from tests.launch.cuda_recorder import Operators, record

pytestmark = pytest.mark.device_process

READ, STEP, WRITE = ["hyper_project", "hyper_finish"], ["hyper_project", "hyper_finish"], ["hyper_project"]
BACK = ["hyper_project", "hyper_rows_backward", "hyper_streams_backward"]  # of what a layer reads


class Attention(nn.Module):
    def forward(self, row, **kwargs):
        return row, None


class Experts(nn.Module):
    def forward(self, row, input_ids):
        return row


def layers_and_head(count: int):
    """Enabled layers of DeepSeek-V4 with their head, in bfloat16: what calls them in turn as their model does."""
    config = transformers.DeepseekV4Config(
        vocab_size=32, hidden_size=64, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16, q_lora_rank=16,
        o_groups=1, o_lora_rank=16, sliding_window=8, num_hidden_layers=count, hc_mult=4, n_routed_experts=2,
        layer_types=["sliding_attention"] * count, mlp_layer_types=["moe"] * count, num_experts_per_tok=1,
        moe_intermediate_size=16,
    )  # fmt: skip
    model = enable(transformers.DeepseekV4Model(config).bfloat16())
    for name, parameter in model.named_parameters():
        if "hc" in name or "layernorm" in name:
            parameter.data = parameter.data.float()  # as transformers loads them
    for layer in model.layers:
        layer.self_attn, layer.mlp = Attention(), Experts()

    def run(streams, **options):
        for layer in model.layers:
            streams = layer(streams, **options)
        return model.hc_head(streams)

    return model, run


def names(launches) -> list[str]:
    return [launch.kernel.removesuffix("_kernel") for launch in launches]


def test_two_launches_around_each_half_of_a_layer():
    """Four a layer, and beside them what the first reads, what the last writes, and the head."""
    for count in (1, 3):
        model, run = layers_and_head(count)
        handed = transformers_hyper.Handed(tuple(model.layers))
        streams = torch.randn(2, 5, 4, 64).bfloat16()
        with torch.no_grad(), record() as launches, Operators() as operators:
            run(streams, **{transformers_hyper.HANDED: handed})
        assert names(launches) == READ + STEP * (2 * count - 1) + WRITE + READ
        assert operators.seen == []


def test_launches_of_training():
    """Five of a layer, and eight back: streams' gradients of either half, beside torch's sums for the weights'."""
    _, run = layers_and_head(1)
    streams = torch.randn(2, 5, 4, 64).bfloat16().requires_grad_()
    with record() as launches:
        run(streams).sum().backward()
    forward = READ + STEP + WRITE + READ
    backward = [*BACK, "hyper_post_backward", *BACK, "hyper_post_backward", *BACK]
    assert names(launches) == forward + backward
