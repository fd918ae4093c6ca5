"""What vLLM's DeepSeek-V4 calls of this library and needs no vLLM; tests/engines has the rest."""

import pytest
import torch

from mla_kernels.compat import vllm_hyper
from mla_kernels.hyper.form import HyperForm
from mla_kernels.reference import hyper

pytestmark = pytest.mark.usefixtures("cpu_code")
TOKENS, STREAMS, WIDTH = 5, 4, 64
PLAIN = (1e-6, 1e-5, 1e-5, 2.0, 20)  # rms_eps, both hc_eps, hc_post_mult_value, sinkhorn_repeat


FORM = HyperForm(eps=1e-5)


def weights():
    torch.manual_seed(0)
    rows = (2 + STREAMS) * STREAMS
    return torch.randn(rows, STREAMS * WIDTH) / 8, torch.rand(3), torch.randn(rows)


def test_streams_are_those_of_the_references():
    fn, scale, base = weights()
    hidden, norm = torch.randn(TOKENS, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16()
    streams, post, comb, collapsed = vllm_hyper.mhc_pre_broadcast_tilelang(
        hidden, fn, scale, base, *PLAIN, norm_weight=norm, fn_broadcast=None
    )
    assert torch.equal(streams, hidden[:, None].expand(-1, STREAMS, -1)) and post.shape == (TOKENS, STREAMS, 1)
    want = hyper.hyper_pre(streams, fn, base, scale, form=FORM, norm_weight=norm)
    for got, exact in zip((collapsed, post[..., 0], comb), want, strict=True):
        torch.testing.assert_close(got.float(), exact.float(), atol=2e-2, rtol=2e-2)
    again = vllm_hyper.mhc_pre_tilelang(streams, fn, scale, base, *PLAIN, norm_weight=norm)
    assert all(map(torch.equal, again, (post, comb, collapsed)))

    out = torch.randn(TOKENS, WIDTH).bfloat16()
    behind = vllm_hyper.mhc_post_tilelang(out, streams, post, comb)
    torch.testing.assert_close(behind, hyper.hyper_post(streams, out, post[..., 0], comb), atol=2e-2, rtol=2e-2)
    both = vllm_hyper.mhc_fused_post_pre_tilelang(
        out, streams, post, comb, fn, scale, base, *PLAIN, n_splits=1, tile_n=1, norm_weight=norm
    )
    apart = (behind, *vllm_hyper.mhc_pre_tilelang(behind, fn, scale, base, *PLAIN, norm_weight=norm))
    for got, exact in zip(both, apart, strict=True):
        torch.testing.assert_close(got, exact, atol=2e-2, rtol=2e-2)
    head = vllm_hyper.hc_head_fused_kernel_tilelang(behind, fn[:STREAMS], scale[:1], base[:STREAMS], 1e-6, 1e-5)
    want = hyper.hyper_head(behind, fn[:STREAMS], base[:STREAMS], scale[:1], form=FORM)
    torch.testing.assert_close(head, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("numbers, message", [((1e-6, 1e-5, 1e-6, 2.0, 20), "hc_sinkhorn_eps"),
                                              ((1e-5, 1e-5, 1e-5, 2.0, 20), "norm_eps")])  # fmt: skip
def test_epsilons_that_differ_are_refused(numbers, message):
    fn, scale, base = weights()
    with pytest.raises(NotImplementedError, match=message):
        vllm_hyper.mhc_pre_tilelang(
            torch.zeros(1, STREAMS, WIDTH), fn, scale, base, *numbers, norm_weight=torch.ones(WIDTH), norm_eps=1e-6
        )
