"""What vLLM's DeepSeek-V4 calls of this library and needs no vLLM; tests/engines has the rest."""

import pytest
import torch

from mla_kernels.compat import vllm_hyper, vllm_v4_windows
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


@pytest.mark.parametrize("ratio, sides, page", [(4, 2, 4), (4, 2, 3), (8, 1, 8), (128, 1, 8)])
def test_finished_windows(monkeypatch, ratio, sides, page):
    """Two sequences step by step, pages of no order; what no window reads is NaN."""
    monkeypatch.setattr(vllm_v4_windows, "ROWS", 3 * ratio)  # parts of one or a few entries
    torch.manual_seed(0)
    lengths, width = (2 * ratio + 3, 3 * ratio), 16
    columns = -(-max(lengths) // page)
    table = torch.randperm(2 * columns).view(2, columns).int()
    kv, score = (torch.randn(2, max(lengths), sides * width, dtype=torch.float32) for _ in range(2))
    states = torch.full((2 * columns, page, 2 * sides * width), float("nan"))
    done, found = [0, 0], {}
    for step in ([ratio + 1, 0], [1, 2], [ratio, 2 * ratio - 1], [1, ratio - 1]):
        requests, positions, slots = [], [], []
        for request, count in enumerate(step):
            for position in range(done[request], done[request] + count):
                there = states[table[request, position // page], position % page]
                there[:] = torch.cat([kv[request, position], score[request, position]])
                ends = (position + 1) % ratio == 0
                requests.append(request)
                positions.append(position)
                slots.append(1000 * request + position // ratio if ends else -1)
            done[request] += count
        made = vllm_v4_windows.finished_windows(
            states,
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor(requests, dtype=torch.int32),
            table,
            ratio=ratio,
            sides=sides,
        )
        for tokens, entries in made:
            for slot, position, entry in zip(tokens.slots.tolist(), tokens.positions.tolist(), entries, strict=True):
                if slot >= 0:
                    assert position == slot % 1000 * ratio + ratio - 1
                    found[slot] = entry
    assert done == list(lengths)
    assert sorted(found) == [0, 1, 1000, 1001, 1002]
    for slot, entry in found.items():
        request, window = divmod(slot, 1000)
        rows = []
        for side in range(sides):
            first = (window - (sides - 1 - side)) * ratio
            part = slice(side * width, (side + 1) * width)
            if first >= 0:
                rows.append((kv[request, first : first + ratio, part], score[request, first : first + ratio, part]))
        values, scores = (torch.cat(parts).double() for parts in zip(*rows, strict=True))
        torch.testing.assert_close(entry.double(), (scores.softmax(0) * values).sum(0), atol=1e-5, rtol=1e-5)
