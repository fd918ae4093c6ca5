"""The functions of DeepSeek-V4's residual streams that vLLM's model takes from TileLang, over this library's ops.

Names and arguments are those of vLLM 0.33's ``vllm.model_executor.kernels.mhc.tilelang``;
:mod:`mla_kernels.compat.vllm_v4` puts them where the model has imported them, on chips for which vLLM has no attention
of DeepSeek-V4. ``n_splits`` and ``tile_n`` choose between kernels of the same result there, and are not read.
"""

import functools

import torch

from mla_kernels.checks import check_tensor
from mla_kernels.hyper.form import HyperForm
from mla_kernels.hyper.op import hyper_head, hyper_post, hyper_post_pre, hyper_pre

NAMES = (
    "hc_head_fused_kernel_tilelang",
    "mhc_fused_post_pre_tilelang",
    "mhc_post_tilelang",
    "mhc_pre_broadcast_tilelang",
    "mhc_pre_tilelang",
)


def mhc_pre_tilelang(
    residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
    n_splits=1, norm_weight=None, norm_eps=1e-6,
):  # fmt: skip
    """residual [T, N, H] -> (post [T, N, 1], comb [T, N, N], what the layer reads [T, H]): ``hyper_pre``.

    Raises:
        NotImplementedError: epsilons that ``HyperForm`` has as one number and that differ here.
        TypeError, ValueError: as :func:`mla_kernels.hyper_pre`.
    """
    form = _form(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps)
    collapsed, post, comb = hyper_pre(residual, fn, hc_base, hc_scale, form=form, norm_weight=norm_weight)
    return post[..., None], comb, collapsed


def mhc_pre_broadcast_tilelang(
    residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
    n_splits=1, norm_weight=None, norm_eps=1e-6, fn_broadcast=None,
):  # fmt: skip
    """The same of residual [T, H], of which all streams begin: (streams [T, N, H], post, comb, what the layer reads).

    ``fn_broadcast``, the sum of ``fn`` over the streams, saves products there; it is not read.

    Raises:
        NotImplementedError, TypeError, ValueError: as :func:`mhc_pre_tilelang`.
    """
    check_tensor("residual", residual, rank=2)
    check_tensor("fn", fn, rank=2)
    count = fn.shape[1] // residual.shape[1]
    streams = residual[:, None].expand(-1, count, -1).contiguous()
    return streams, *mhc_pre_tilelang(
        streams, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat,
        norm_weight=norm_weight, norm_eps=norm_eps,
    )  # fmt: skip


def mhc_post_tilelang(x, residual, post_layer_mix, comb_res_mix):
    """x [T, H], residual [T, N, H], post [T, N] or [T, N, 1], comb [T, N, N] -> [T, N, H]: ``hyper_post``."""
    return hyper_post(residual, x, _post(post_layer_mix, residual), comb_res_mix)


def mhc_fused_post_pre_tilelang(
    x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps,
    hc_post_mult_value, sinkhorn_repeat, n_splits=1, tile_n=1, norm_weight=None, norm_eps=1e-6,
):  # fmt: skip
    """Both in turn: (streams [T, N, H], post [T, N, 1], comb [T, N, N], what the layer reads [T, H]).

    Raises:
        NotImplementedError, TypeError, ValueError: as :func:`mhc_pre_tilelang`.
    """
    form = _form(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat, norm_weight, norm_eps)
    post = _post(post_layer_mix, residual)
    streams, collapsed, post, comb = hyper_post_pre(
        residual, x, post, comb_res_mix, fn, hc_base, hc_scale, form=form, norm_weight=norm_weight
    )
    return streams, post[..., None], comb, collapsed


def hc_head_fused_kernel_tilelang(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps):
    """hs_flat [T, N, H] -> [T, H]: ``hyper_head``."""
    return hyper_head(hs_flat, fn, hc_base, hc_scale, form=_kept(1, hc_eps, rms_eps, 2.0))


def _post(post_layer_mix: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return post_layer_mix.view(residual.shape[:2])


def _form(rms_eps, pre_eps, sinkhorn_eps, magnitude, iterations, norm_weight, norm_eps) -> HyperForm:
    if pre_eps != sinkhorn_eps:
        raise NotImplementedError(
            f"hc_pre_eps, hc_sinkhorn_eps: got {pre_eps} and {sinkhorn_eps}, the same number is accepted"
        )
    if norm_weight is not None and norm_eps != rms_eps:
        raise NotImplementedError(f"norm_eps, rms_eps: got {norm_eps} and {rms_eps}, the same number is accepted")
    return _kept(iterations, pre_eps, rms_eps, magnitude)


@functools.lru_cache
def _kept(iterations: int, eps: float, norm_eps: float, magnitude: float) -> HyperForm:
    return HyperForm(iterations=iterations, eps=eps, norm_eps=norm_eps, magnitude=magnitude)
