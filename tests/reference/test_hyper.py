"""The reference of hyper-connections against Hugging Face's three models, in float64."""

import pytest
import torch
import transformers
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.glm5_next import modeling_glm5_next as glm5
from transformers.models.hy_v4 import modeling_hy_v4 as hy_v4

from mla_kernels.reference import hyper as reference

SIZES = {"hidden_size": 40, "hc_mult": 4, "hc_eps": 1e-3, "rms_norm_eps": 1e-2}
FORM = {"eps": 1e-3, "norm_eps": 1e-2}


def filled(module):
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter)
    return module.requires_grad_(False)


def written(streams, out, post, comb):
    """As DeepseekV4DecoderLayer.forward and Glm5NextTextDecoderLayer.forward have it."""
    dtype = streams.dtype
    mixed = torch.matmul(comb.to(dtype).transpose(-1, -2), streams)
    return post.to(dtype).unsqueeze(-1) * out.unsqueeze(-2) + mixed


class Widely(torch.nn.Module):
    """Their modules compute in float32 where they say ``.float()``; here that is float64."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, streams):
        before = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double
        try:
            return self.module(streams)
        finally:
            torch.Tensor.float = before


@pytest.fixture
def streams():
    return torch.randn(2, 3, 4, 40, dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("family", ["DeepseekV4", "Glm5NextText"])
def test_sinkhorn(streams, family, iterations):
    config = getattr(transformers, f"{family}Config")(**SIZES, hc_sinkhorn_iters=iterations)
    module = filled(getattr(v4 if family == "DeepseekV4" else glm5, f"{family}HyperConnection")(config))
    flat, form = streams.flatten(0, 1), reference.HyperForm(iterations=iterations, **FORM)
    got = reference.hyper_pre(flat, module.fn, module.base, module.scale, form=form)
    post, comb, collapsed = Widely(module)(streams)
    for mine, theirs in zip(got, (collapsed, post, comb)):
        close(mine, theirs)
    out = torch.randn(2, 3, 40, dtype=torch.float64)
    close(reference.hyper_post(flat, out.flatten(0, 1), *got[1:]), written(streams, out, post, comb))


@pytest.mark.parametrize("magnitude", [2.0, 0.75])
def test_identity(streams, magnitude):
    config = transformers.HYV4Config(**SIZES, hc_magnitude=magnitude)
    module, flat = filled(hy_v4.HYV4HyperConnection(config)), streams.flatten(0, 1)
    form = reference.HyperForm("identity", magnitude=magnitude, **FORM)
    got = reference.hyper_pre(flat, module.fn, module.base, module.scale, form=form)
    post, collapsed = Widely(module)(streams)
    close(got[0], collapsed)
    close(got[1], post)
    assert got[2] is None
    out = torch.randn(2, 3, 40, dtype=torch.float64)
    theirs = post.unsqueeze(-1) * out.unsqueeze(-2) + streams  # as HYV4DecoderLayer.forward has it
    close(reference.hyper_post(flat, out.flatten(0, 1), got[1]), theirs)


@pytest.mark.parametrize("family", ["DeepseekV4", "HYV4"])
def test_head(streams, family):
    config = getattr(transformers, f"{family}Config")(**SIZES)
    module = filled(getattr(v4 if family == "DeepseekV4" else hy_v4, f"{family}HyperHead")(config))
    weights, form = (module.hc_fn, module.hc_base, module.hc_scale), reference.HyperForm(**FORM)
    close(reference.hyper_head(streams.flatten(0, 1), *weights, form=form), Widely(module)(streams))


def test_head_of_the_mean(streams):
    close(reference.hyper_head(streams.flatten(0, 1), collapse="mean"), glm5.Glm5NextTextHyperHead()(streams))


def test_the_norm_is_the_layer_s(streams):
    """RMSNorm of the collapsed row, as of DeepseekV4RMSNorm."""
    norm, flat = v4.DeepseekV4RMSNorm(40, eps=1e-2).double(), streams.flatten(0, 1)
    torch.nn.init.normal_(norm.weight)
    weights, form = (torch.randn(4, 160), torch.randn(4), torch.randn(1)), reference.HyperForm(**FORM)
    row = reference.hyper_head(flat, *weights, form=form)
    normed = reference.hyper_head(flat, *weights, form=form, norm_weight=norm.weight.detach())
    variance = row.square().mean(-1, keepdim=True)  # theirs, before it is rounded to float32
    torch.testing.assert_close(normed, norm.weight.detach() * (row * torch.rsqrt(variance + 1e-2)))
    torch.testing.assert_close(normed.float(), norm(row).detach().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_their_roundings_of_post_and_comb(dtype):
    streams, out = torch.randn(5, 4, 40).to(dtype), torch.randn(5, 40).to(dtype)
    post, comb = torch.rand(5, 4) * 2, torch.rand(5, 4, 4)
    theirs = written(streams, out, post, comb)
    torch.testing.assert_close(reference.hyper_post_rounded(streams, out, post, comb), theirs)
    wide = reference.hyper_post(streams.double(), out.double(), post.double(), comb.double())
    ours = reference.hyper_post(streams, out, post, comb)
    assert (ours.double() - wide).square().mean() < (theirs.double() - wide).square().mean()
