"""Hyper-connections at the sizes of DeepSeek-V4-Flash: from one layer to the next, with gradients, and in a layer of
transformers beside its own code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_kernels import HyperForm, hyper_post_pre
from mla_kernels.reference import hyper as reference

STREAMS, HIDDEN, EPS = 4, 4096, 1e-6


def plain(streams, out, post, comb, fn, base, scale, norm_weight):
    """As transformers' layer, connection and norm have it; post and comb are not rounded."""
    x = streams.float()
    new = post.unsqueeze(-1) * out.float().unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    new = new.to(streams.dtype)
    flat = new.flatten(1).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre, post, comb = F.linear(flat, fn).split([STREAMS, STREAMS, STREAMS**2], dim=-1)
    pre = torch.sigmoid(pre * scale[0] + base[:STREAMS]) + EPS
    post = 2 * torch.sigmoid(post * scale[1] + base[STREAMS : 2 * STREAMS])
    comb = (comb * scale[2] + base[2 * STREAMS :]).unflatten(-1, (STREAMS, STREAMS)).softmax(-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    row = (pre.unsqueeze(-1) * new).sum(1)
    row = row * torch.rsqrt(row.float().square().mean(-1, keepdim=True) + EPS) * norm_weight
    return new, row.to(streams.dtype), post, comb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 256])
def test_hyper_post_pre(race, tokens, dtype):
    rows, depth = (2 + STREAMS) * STREAMS, STREAMS * HIDDEN
    streams, out = torch.randn(tokens, STREAMS, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
    post, comb = torch.rand(tokens, STREAMS) * 2, torch.randn(tokens, STREAMS, STREAMS).softmax(-1)
    weights = torch.randn(rows, depth) * depth**-0.5, torch.randn(rows), torch.rand(3)
    tensors = streams, out, post, comb, *weights
    norm = torch.rand(HIDDEN)
    exact = reference.hyper_post_pre(*(x.double() for x in tensors), norm_weight=norm.double())[1]
    race(
        lambda: hyper_post_pre(*tensors, norm_weight=norm),
        {"torch (HF's code)": lambda: plain(*tensors, norm)},
        exact,
        pick=lambda result: result[1],
        nbytes=2 * streams.nbytes + 2 * out.nbytes + weights[0].nbytes + 160 * tokens,
        flops=tokens * depth * (2 * rows + 2 * STREAMS + 4),
    )


def layer_of(family, dtype):
    """A decoder layer of transformers between whose connections stand modules that do nothing, and the forward that
    ``enable`` gives it."""
    import transformers
    from transformers.models.deepseek_v4 import modeling_deepseek_v4
    from transformers.models.hy_v4 import modeling_hy_v4

    from mla_kernels.compat import transformers_hyper

    class Attention(nn.Module):
        def forward(self, *row, hidden_states=None, **options):
            return (row[0], None) if row else (hidden_states, None, None)

    class Experts(nn.Module):
        def forward(self, row, input_ids=None):
            return row

    module = {"DeepseekV4": modeling_deepseek_v4, "HYV4": modeling_hy_v4}[family]
    config = getattr(transformers, f"{family}Config")(hidden_size=HIDDEN, hc_mult=STREAMS)
    with torch.device("meta"):
        layer = getattr(module, f"{family}DecoderLayer")(config, 0)
    layer.self_attn, layer.mlp = Attention(), Experts()
    layer.to_empty(device="cpu")
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.01 if name.endswith("fn") else 1.0)
        parameter.data = parameter.data.to(dtype if family == "HYV4" and "norm" in name else torch.float32)
    base = nn.Module()
    base.config, base.layer = config, layer
    ((_, _, ours),) = transformers_hyper.replacements(base, family)
    return layer, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2048])
@pytest.mark.parametrize("family", ["DeepseekV4", "HYV4"])
def test_the_hyper_part_of_a_layer(race, family, tokens, dtype):
    """Connections, norms and what is written back, twice; five calls of ours where a whole model takes four."""
    layer, ours = layer_of(family, dtype)
    streams = torch.randn(1, tokens, STREAMS, HIDDEN).to(dtype)
    few, rows = streams[:, :2].double(), layer.attn_hc.fn.shape[0]
    for half, norm in ((layer.attn_hc, layer.input_layernorm), (layer.ffn_hc, layer.post_attention_layernorm)):
        form = HyperForm("identity" if family == "HYV4" else "sinkhorn", norm_eps=norm.variance_epsilon)
        weights = (x.double() for x in (half.fn, half.base, half.scale))
        options = {"form": form, "norm_weight": norm.weight.double()}
        row, post, comb = reference.hyper_pre(few.flatten(0, 1), *weights, **options)
        few = reference.hyper_post(few.flatten(0, 1), row, post, comb).view(few.shape)
    race(
        lambda: ours(streams),
        {"transformers": lambda: layer(streams)},
        few,
        pick=lambda result: (result if isinstance(result, torch.Tensor) else result[0])[:, :2],
        nbytes=6 * streams.nbytes + 2 * layer.attn_hc.fn.nbytes,
        flops=4 * tokens * STREAMS * HIDDEN * (rows + STREAMS + 2),
    )


@pytest.mark.parametrize("tokens", [16, 512])
def test_hyper_post_pre_forward_and_backward(race, tokens):
    rows, depth = (2 + STREAMS) * STREAMS, STREAMS * HIDDEN
    tensors = [
        torch.randn(tokens, STREAMS, HIDDEN), torch.randn(tokens, HIDDEN), torch.rand(tokens, STREAMS) * 2,
        torch.randn(tokens, STREAMS, STREAMS).softmax(-1), torch.randn(rows, depth) * depth**-0.5, torch.randn(rows),
        torch.rand(3), torch.rand(HIDDEN),
    ]  # fmt: skip
    towards = [torch.randn(x.shape) for x in tensors[:4]]  # new streams, row, post and comb have their shapes

    def step(function, some=slice(None), dtype=torch.float32):
        leaves = [x[some] if place < 4 else x for place, x in enumerate(tensors)]
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        with torch.enable_grad():
            results = function(*leaves[:7], norm_weight=leaves[7])
        return torch.autograd.grad(results, leaves, [x[some].to(dtype) for x in towards])

    race(
        lambda: step(hyper_post_pre),
        {"torch (HF's code)": lambda: step(plain)},
        step(reference.hyper_post_pre, slice(2), torch.float64)[0],
        pick=lambda gradients: gradients[0][:2],
        nbytes=5 * tensors[0].nbytes + 3 * tensors[1].nbytes + 4 * tensors[4].nbytes,
        flops=6 * tokens * depth * (rows + STREAMS + 2),
    )
