"""The product that latents and experts share."""

import pytest
import torch

from mla_kernels.cpu import gemm
from tests.support import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 33])
@pytest.mark.parametrize("strided", [False, True])
def test_linear(dtype, rows, strided):
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(40, 96).to(dtype)
    if strided:
        x, weight = torch.randn(rows, 128).to(dtype)[:, :96], torch.randn(40, 200).to(dtype)[:, 100:196]
    result = gemm.linear(x, weight)
    assert result.dtype == dtype
    assert_close(result, x.double() @ weight.double().t(), None if dtype == torch.float32 else x @ weight.t())


def test_without_onednn(monkeypatch):
    x, weight = torch.randn(5, 96), torch.randn(40, 96)
    monkeypatch.setattr(gemm, "_onednn_linear", lambda: None)
    assert_close(gemm.linear(x, weight), x.double() @ weight.double().t())


def test_onednn_is_used_only_where_it_works(monkeypatch):
    class Missing:
        """As torch.ops answers where torch was built without oneDNN."""

        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Missing())
    assert gemm._onednn_linear.__wrapped__() is None
