"""Cases of DeepSeek-V4's windows that tests/launch/test_cuda_launch.py runs over the stub driver; see cuda_cases.py."""

import pytest
import torch

import mla_kernels
from tests.launch.cuda_cases import BF16, I32, pointers, table
from tests.launch.cuda_recorder import record

pytestmark = pytest.mark.device_process


@pytest.mark.parametrize(
    "tokens, rows, launched, most", [(1, 8, 1, 1), (4, 11, 1, 4), (5, 11, 2, 5), (40, 11, 2, 40), (2, 11, 1, 1 << 40)]
)
def test_windows_are_one_launch_a_step(tokens, rows, launched, most):
    """Entries and state together where the state has room for a step's tokens, else one after the other; no sequence
    has more new tokens than there are."""
    kv, gate = torch.randn(2, 2 * tokens, 256).to(BF16)
    cos, sin = table(64)
    state = torch.randn(3, rows, 2, 256).to(BF16)
    cache = mla_kernels.IndexerCache.allocate(40, 64, layout="fp8")
    places = torch.arange(2, dtype=I32), torch.arange(3, dtype=I32) * tokens, torch.full((2,), 44, dtype=I32)
    pages = torch.zeros(2, 4, dtype=I32)
    with record() as launches:
        mla_kernels.write_windows(
            kv, gate, torch.randn(4, 256), torch.ones(128), cos, sin, state, *places, pages, cache,
            ratio=4, overlap=True, max_tokens=most,
        )  # fmt: skip
    assert len(launches) == launched
    flags = [(launch.constants["ENTRIES"], launch.constants["KEEP"]) for launch in launches]
    assert flags == ([(True, True)] if launched == 1 else [(True, False), (False, True)])
    for launch in launches:
        assert launch.grid <= 2 * max(1, tokens)
        assert {t.data_ptr() for t in (kv, gate, cos, sin, state, *places, pages)} <= set(pointers(launch).values())
        assert pointers(launch)["codes"] == cache.data.data_ptr()
        assert pointers(launch)["scales"] == cache.data.data_ptr() + 64 * 128
        assert launch.arguments["scale_stride"] == 64 * 33 and launch.arguments["part_stride"] == 256


@pytest.mark.parametrize("layout", ["fp8_v4", None, "indexer"])
def test_windows_of_pages_are_one_launch(layout):
    """Of any number of tokens, whether they end windows or not; norms of 16 bits, states as an engine holds them."""
    width = 128 if layout == "indexer" else 512
    cache = (
        mla_kernels.IndexerCache.allocate(4, 64, layout="fp8") if layout == "indexer"
        else mla_kernels.LatentCache.allocate(4, 64, rope_dim=0, layout=layout)
    )  # fmt: skip
    states = torch.randn(6, 4, 4 * width)
    positions, slots = torch.arange(9), torch.full((9,), -1)
    sequences, pages, norm = torch.zeros(9, dtype=I32), torch.arange(3, dtype=I32)[None], torch.ones(width).to(BF16)
    cos, sin = table(64)
    with record() as launches:
        mla_kernels.write_paged_windows(
            states.unflatten(2, (2, -1)), positions, slots, sequences, pages, norm, cos, sin, cache, ratio=4,
            overlap=True,
        )  # fmt: skip
    (launch,) = launches
    assert launch.grid == 9 and launch.constants["BLOCK_T"] == 4
    assert {t.data_ptr() for t in (states, positions, slots, sequences, pages, norm, cos, sin)} <= set(
        pointers(launch).values()
    )
    assert pointers(launch)["values" if layout is None else "codes"] == cache.data.data_ptr()
    assert launch.arguments["state_stride"] == 16 * width and launch.arguments["part_stride"] == 2 * width


def test_write_kv_is_one_launch():
    cache = mla_kernels.LatentCache.allocate(4, 64, rope_dim=0, layout="int8")
    kv, norm, (cos, sin), slots = torch.randn(5, 512).to(BF16), torch.ones(512), table(64), torch.arange(5)
    with record() as launches:
        mla_kernels.write_kv(kv, norm, cos, sin, slots, slots, cache)
    (launch,) = launches
    assert {t.data_ptr() for t in (kv, norm, cos, sin, slots)} <= set(pointers(launch).values())
    assert pointers(launch)["codes"] == cache.data.data_ptr() == pointers(launch)["scales"] - 512


def test_windows_of_a_prompt_and_their_gradients_are_three_launches():
    kv, gate = (torch.randn(64, 1024).to(BF16).requires_grad_() for _ in range(2))
    cos, sin = table(64)
    ends = torch.tensor([0, 30, 64], dtype=I32)
    with record() as launches:
        out, _ = mla_kernels.compress_windows(
            kv, gate, torch.randn(4, 1024), torch.ones(512), cos, sin, ends, ratio=4, overlap=True
        )
        out.sum().backward()
    kernels = ["compress_windows_kernel", "compress_windows_backward_kernel", "position_bias_gradient_kernel"]
    assert [launch.kernel for launch in launches] == kernels
