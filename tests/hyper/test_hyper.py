"""hyper_pre, hyper_post, hyper_post_pre and hyper_head against the reference."""

import pytest
import torch

import mla_kernels as mk
from tests.hyper.problems import exactly, forms_and_shapes, make, reference
from tests.support import assert_close, not_on, poisoned, repeats

SHAPES = [(3, 100, 4), (17, 24, 3), (2, 24, 1), (2, 70, 2)]  # tokens, hidden, streams


def assert_all(got, exact, baseline=None):
    """Every result, None where the reference has none."""
    got = got if isinstance(got, tuple) else (got,)
    baseline = baseline if isinstance(baseline, tuple) else (baseline,) * len(got)
    assert len(got) == len(exact)
    for mine, want, torchs in zip(got, exact, baseline):
        if want is None:
            assert mine is None
            continue
        assert_close(mine, want, None if mine.dtype == torch.float32 else torchs)


@pytest.mark.quick("hyper_post_pre", when=lambda shape, form: shape == SHAPES[0] and form == "v4")
@pytest.mark.parametrize("form, shape", forms_and_shapes(SHAPES))
def test_from_layer_to_layer(device, form, shape):
    tokens, hidden, count = shape
    p = make(tokens, hidden, count, form, device=device)
    got = mk.hyper_post_pre(*p.written, *p.weights, form=p.form)
    assert_all(got, exactly(reference.hyper_post_pre, *p.written, *p.weights, form=p.form))


@pytest.mark.quick("hyper_pre", when=lambda shape, form: shape == SHAPES[0] and form == "v4")
@pytest.mark.parametrize("form, shape", [("v4", SHAPES[0]), ("one iteration", SHAPES[1]), ("hy_v4", SHAPES[0])])
def test_first_layer(device, form, shape):
    tokens, hidden, count = shape
    p = make(tokens, hidden, count, form, device=device)
    got = mk.hyper_pre(p.streams, *p.weights, form=p.form, norm_weight=p.norm_weight)
    options = {"form": p.form, "norm_weight": p.norm_weight}
    assert_all(got, exactly(reference.hyper_pre, p.streams, *p.weights, **options))


@pytest.mark.quick("hyper_post", when=lambda form: form == "v4")
@pytest.mark.parametrize("form", ["v4", "hy_v4"])
def test_last_layer(device, form):
    p = make(17, 70, 4, form, device=device)
    assert_all(mk.hyper_post(*p.written), exactly(reference.hyper_post, *p.written))


@pytest.mark.quick("hyper_head", when=lambda collapse: collapse == "sigmoid")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("collapse", ["sigmoid", "mean"])
def test_head(device, collapse, norm):
    p = make(5, 70, 4, device=device)
    weights = (p.fn[:4], p.base[:4], p.scale[:1]) if collapse == "sigmoid" else ()
    options = {"collapse": collapse, "form": p.form, "norm_weight": p.norm_weight if norm else None}
    got = mk.hyper_head(p.streams, *weights, **options)
    assert_all(got, exactly(reference.hyper_head, p.streams, *weights, **options))


@pytest.mark.parametrize("norm_dtype", ["streams", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["v4", "hy_v4"])
def test_16_bits(device, form, dtype, norm_dtype):
    norm_dtype = dtype if norm_dtype == "streams" else norm_dtype
    p = make(2, 100, 4, form, dtype, device, norm_dtype)
    got = mk.hyper_post_pre(*p.written, *p.weights, form=p.form, norm_weight=p.norm_weight)
    exact = exactly(reference.hyper_post, *p.written)
    baseline = reference.hyper_post(*(None if x is None else x.cpu() for x in p.written))
    assert_all(got[0], exact, baseline)
    options = {"form": p.form, "norm_weight": p.norm_weight}
    new = got[0]  # rounded once; what follows reads that
    exact = exactly(reference.hyper_pre, new, *p.weights, **options)
    options["norm_weight"] = p.norm_weight.cpu()
    assert_all(got[1:], exact, reference.hyper_pre(new.cpu(), *(x.cpu() for x in p.weights), **options))


def test_direction_of_comb(device):
    """comb = [[0, 1], [0, 0]]: the second stream is the old first."""
    streams = torch.arange(2 * 2 * 16.0).view(2, 2, 16).to(device)
    comb = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(2, 2, 2).to(device)
    out, post = torch.zeros(2, 16, device=device), torch.zeros(2, 2, device=device)
    new = mk.hyper_post(streams, out, post, comb)
    assert not new[:, 0].any() and torch.equal(new[:, 1], streams[:, 0])


@pytest.mark.parametrize("form", ["v4", "hy_v4"])
@pytest.mark.no_launch("no tokens")
def test_no_tokens(device, form):
    p = make(0, 24, 4, form, device=device)
    new, collapsed, post, comb = mk.hyper_post_pre(*p.written, *p.weights, form=p.form)
    assert new.shape == (0, 4, 24) and collapsed.shape == (0, 24) and post.shape == (0, 4)
    assert comb is None if form == "hy_v4" else comb.shape == (0, 4, 4)
    assert mk.hyper_pre(p.streams, *p.weights, form=p.form)[0].shape == (0, 24)
    assert mk.hyper_head(p.streams, collapse="mean").shape == (0, 24)


def test_streams_that_are_views(device):
    """Any strides between tokens and streams, gaps and poison between rows, tokens that are all one."""
    p = make(5, 40, 4, device=device)
    want = mk.hyper_post_pre(*p.written, *p.weights, norm_weight=p.norm_weight)
    wide = poisoned(4, 9, 64, device=device)
    streams = wide[:, 2:7, 3:43].transpose(0, 1)
    streams.copy_(p.streams)
    out = poisoned(9, 50, device=device)[2:7, 5:45].copy_(p.out)
    post, comb = p.post.t().contiguous().t(), p.comb.transpose(1, 2).contiguous().transpose(1, 2)
    got = mk.hyper_post_pre(streams, out, post, comb, *p.weights, norm_weight=p.norm_weight)
    for mine, expected in zip(got, want):
        assert_close(mine, expected.double().cpu())
    one = p.streams[:1].expand(5, -1, -1)
    got, want = mk.hyper_pre(one, *p.weights), mk.hyper_pre(p.streams[:1], *p.weights)
    for mine, expected in zip(got, want):
        assert_close(mine, expected.expand_as(mine).double().cpu())


def test_nan_of_a_token_is_its_own(device):
    p = make(5, 40, 4, device=device)
    clean = mk.hyper_post_pre(*p.written, *p.weights)
    p.streams[2] = float("nan")
    p.out[3, 7] = float("inf")
    for mine, expected in zip(mk.hyper_post_pre(*p.written, *p.weights), clean):
        assert not mine[2].isfinite().any() and not mine[3].isfinite().all()
        others = [0, 1, 4]
        assert_close(mine[others], expected[others].double().cpu())


def test_repeats_have_the_same_bits(device):
    p = make(17, 70, 4, "one iteration", device=device)
    options = {"form": p.form, "norm_weight": p.norm_weight}
    first = mk.hyper_post_pre(*p.written, *p.weights, **options)
    for _ in repeats(device):
        again = mk.hyper_post_pre(*p.written, *p.weights, **options)
        assert all(torch.equal(mine, want) for mine, want in zip(again, first))


@not_on("adds in an order that follows from the batch", "cpu")
def test_bits_do_not_depend_on_the_batch(backend, device):
    p = make(19, 64, 4, "one iteration", device=device)
    options = {"form": p.form, "norm_weight": p.norm_weight}
    whole = mk.hyper_post_pre(*p.written, *p.weights, **options)
    for rows in (slice(0, 1), slice(18, 19), slice(3, 17)):
        part = mk.hyper_post_pre(*(x[rows] for x in p.written), *p.weights, **options)
        assert all(torch.equal(mine, want[rows]) for mine, want in zip(part, whole))


@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.slow
def test_sizes_of_v4(device, hidden):
    p = make(18, hidden, 4, dtype=torch.bfloat16, device=device)
    options = {"form": p.form, "norm_weight": p.norm_weight}
    new, *rest = mk.hyper_post_pre(*p.written, *p.weights, **options)
    assert_all(new, exactly(reference.hyper_post, *p.written), reference.hyper_post(*(x.cpu() for x in p.written)))
    options["norm_weight"] = p.norm_weight.cpu()
    baseline = reference.hyper_pre(new.cpu(), *(x.cpu() for x in p.weights), **options)
    assert_all(tuple(rest), exactly(reference.hyper_pre, new, *p.weights, **options), baseline)


@not_on("is about the kernels", "cpu")
def test_offsets_past_2_31(backend, device):
    """Tokens that lie 2^24 elements apart; their pages are not touched but where a token is."""
    p = make(130, 16, 2, dtype=torch.bfloat16, device=device)
    want = mk.hyper_post(*p.written), mk.hyper_head(p.streams, collapse="mean")
    room = torch.empty(130 << 24, dtype=torch.bfloat16, device=device)
    streams = room.as_strided(p.streams.shape, (1 << 24, 16, 1)).copy_(p.streams)
    got = mk.hyper_post(streams, *p.written[1:]), mk.hyper_head(streams, collapse="mean")
    assert all(torch.equal(mine, expected) for mine, expected in zip(got, want))
