"""The fused experts forward and backward, at DeepSeek-V2-Lite's sizes, beside Hugging Face's experts in one run.

The gradients are those of hidden, both weights and the routing weights. Beside times, the bytes that the forward pass
keeps for the backward pass can be read off the saved tensors: 2 I a pair by default, none with ``recompute``.

HF's eager experts take a gradient of all weights for every expert that has tokens, hence minutes a step with 64
experts; they run with 8.
"""

import pytest
import torch

from bench.test_moe import HIDDEN, INTERMEDIATE, TOP_K, expert_weights
from mla_kernels import fused_moe, route
from mla_kernels.reference import moe as reference

SAMPLE = 4


def hf_module(gate_up, down, implementation):
    """transformers' experts on the same weights."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=gate_up.shape[0],
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation_internal = implementation
    with torch.device("meta"):
        module = DeepseekV3Experts(config)
    module.gate_up_proj, module.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    return lambda hidden, gate_up, down, weights, ids: module(hidden, ids.long(), weights), module


def exact_gradient(hidden, gate_up, down, weights, ids, out_grad):
    """float64 gradient of hidden for these tokens, from the experts that they use."""
    used = ids.unique()
    numbers = torch.zeros(gate_up.shape[0], dtype=torch.int32)
    numbers[used.long()] = torch.arange(len(used), dtype=torch.int32)
    leaf = hidden.double().requires_grad_()
    with torch.enable_grad():
        out = reference.fused_moe(
            leaf, gate_up[used.long()].double(), down[used.long()].double(), weights.double(), numbers[ids.long()]
        )
    return torch.autograd.grad(out, leaf, out_grad.double())[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens, experts", [(16, 64), (256, 64), (1024, 64), (256, 8)])
def test_fused_moe_forward_and_backward(race, dtype, tokens, experts):
    gate_up, down = (weight[:experts] for weight in expert_weights(dtype))
    hidden, out_grad = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
    weights, ids = route(torch.randn(tokens, experts), TOP_K)
    leaves = [x.detach().requires_grad_() for x in (hidden, gate_up, down, weights)]

    def step(run, module=None):
        if module is not None:
            module.gate_up_proj, module.down_proj = (torch.nn.Parameter(x.detach()) for x in leaves[1:3])
            inputs = [leaves[0], module.gate_up_proj, module.down_proj, leaves[3]]
        else:
            inputs = leaves
        with torch.enable_grad():
            out = run(*inputs, ids)
        return torch.autograd.grad(out, inputs, out_grad)

    others = {}
    for name in ("grouped_mm", "eager") if experts == 8 else ("grouped_mm",):
        run, module = hf_module(gate_up, down, name)
        others[f"HF {name}"] = lambda run=run, module=module: step(run, module)
    others["recompute"] = lambda: step(lambda *inputs: fused_moe(*inputs, recompute=True))
    sample = slice(0, SAMPLE)
    race(
        lambda: step(fused_moe),
        others,
        exact_gradient(hidden[sample], gate_up, down, weights[sample], ids[sample], out_grad[sample]),
        pick=lambda grads: grads[0][sample],
        nbytes=2 * (gate_up.nbytes + down.nbytes) + 4 * hidden.nbytes,
        flops=3 * 6 * INTERMEDIATE * HIDDEN * tokens * TOP_K,
    )
