"""mla_prefill's Hopper kernel against the reference: emulated here, and on a Hopper GPU with ``--backend cuda``."""

import random

import pytest
import torch

from mla_kernels.attention.merge import merge_states
from mla_kernels.attention.prefill import forward as prefill
from mla_kernels.gluon_launch import GluonKernel
from tests.attention import prefill_problems
from tests.attention.prefill_problems import Problem
from tests.hopper.problems import ON_HOPPER

pytestmark = ON_HOPPER

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 200, 256, 300)


def make(lengths, **options) -> Problem:
    return prefill_problems.make(lengths, **dict(heads=2, key=128, rope=64, value=128, dtype=BF16) | options)


def forms(count: int) -> list[tuple]:
    """Random (heads, dtype, causal, lengths): every number of queries and of keys stands at least once."""
    rng = random.Random(6)
    columns = []
    for values in ((1, 2), (BF16, FP16), (True, True, False), LENGTHS, LENGTHS):
        column = [*values * (2 * count // len(values) + 1)][: 2 * count]
        rng.shuffle(column)
        columns.append(column)
    lengths = list(zip(*columns[3:]))
    return [(*form, lengths[2 * i : 2 * i + 2]) for i, form in enumerate(zip(*(c[:count] for c in columns[:3])))]


@pytest.mark.parametrize("heads, dtype, causal, lengths", forms(8))
def test_parity(backend, device, heads, dtype, causal, lengths):
    problem = make(lengths, heads=heads, dtype=dtype, causal=causal, device=device)
    problem.check(problem.run())


WIDTHS = {
    "expanded": (192, 0, 128),
    "no_rope": (128, 0, 128),
    "small": (64, 32, 64),
    "expanded_small": (96, 0, 64),
    "wide": (192, 64, 256),
    "expanded_wide": (256, 0, 256),
    "narrow_values": (192, 64, 128),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_parity_of_other_widths(backend, device, widths, causal):
    key, rope, value = WIDTHS[widths]
    problem = make([(70, 300), (1, 65)], key=key, rope=rope, value=value, causal=causal, device=device)
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_parity_of_many_forms_in_many_orders(backend, device, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(5):
        monkeypatch.setattr(GluonKernel, "emulated_seed", rng.randrange(1 << 30))
        lengths = [(rng.choice(LENGTHS), rng.choice((*LENGTHS, 511, 700))) for _ in range(rng.choice((1, 2, 3)))]
        problem = make(
            lengths, heads=rng.choice((1, 2, 5)), dtype=rng.choice((BF16, FP16)), causal=rng.random() < 0.7,
            device=device,
        )  # fmt: skip
        problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.parametrize("heads, lengths", [(128, [(130, 130)]), (16, [(400, 400), (7, 1300)])])
def test_real_sizes(backend, device, heads, lengths):
    problem = make(lengths, heads=heads, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize("causal", [True, False])
def test_empty_rows_are_zero_and_minus_infinity(backend, device, causal):
    problem = make([(3, 0), (4, 2), (140, 2)], causal=causal, device=device)
    out, lse = (result.cpu() for result in problem.run())
    unseen = [False, False] if causal else [True, True]
    seen = [False] * 3 + unseen + [True] * 2 + unseen * 69 + [True] * 2
    seen = torch.tensor(seen, dtype=torch.bool)
    assert torch.equal(lse == float("-inf"), ~seen[:, None].expand(-1, 2))
    assert (out[~seen] == 0).all() and (out[seen] != 0).any(-1).all()


@pytest.mark.no_launch("nothing to attend to, or nobody")
def test_no_sequences_no_queries_and_no_keys(backend, device):
    none = make([], poison=False, device=device)
    assert none.run()[0].shape == (0, 2, 128)
    assert make([(0, 5)], poison=False, device=device).run()[1].shape == (0, 2)
    out, lse = make([(5, 0), (2, 0)], poison=False, device=device).run()
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("rows", [(3, 0), (150, 75)], ids=str)
def test_padding_is_cleared_and_not_read(backend, device, rows):
    """Rows before the first sequence, behind the last, and past the longest length; all of them NaN."""
    problem = make([(3, 4), (20, 40), (9, 9)], poison=False, device=device)

    def longer(tensor):
        count = rows[0] if tensor is problem.q else rows[1]
        nothing = tensor.new_full((count, *tensor.shape[1:]), float("nan"))
        tensor = torch.cat([tensor, nothing])
        tensor[: 3 if count == rows[0] else 4] = float("nan")
        return tensor

    problem.cu_seqlens_q, problem.cu_seqlens_k = problem.cu_seqlens_q[1:], problem.cu_seqlens_k[1:]
    want, want_lse = prefill.launch_prefill(*problem.arguments())
    long = problem.with_inputs(longer)
    arguments = list(long.arguments())
    arguments[6] = 19  # one query of the second sequence is past the longest length
    out, lse = prefill.launch_prefill(*arguments)
    there = torch.zeros(out.shape[0], dtype=torch.bool)
    there[3:22] = there[23:32] = True
    assert not out[~there].any() and (lse[~there] == float("-inf")).all()
    assert torch.equal(out[23:32], want[23:32]) and torch.equal(lse[23:32], want_lse[23:32])
    assert not out[3:22].isnan().any() and out[3:22].any()


@pytest.mark.parametrize("layout", ["one projection", "heads first", "one token", "one head"])
def test_tensors_of_other_strides(backend, device, layout):
    problem = make([(1, 1)] if layout == "one token" else [(20, 70), (5, 135)], poison=False, device=device)
    if layout == "one head":
        cut = problem.with_inputs(lambda t: t[:, :1] if t.dim() == 3 else t)
        alone = problem.with_inputs(lambda t: t[:, :1].contiguous() if t.dim() == 3 else t)
        problem, other = alone, cut
    elif layout == "heads first":
        other = problem.with_inputs(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t)
    else:
        k, v = torch.cat([problem.k, problem.v], -1).split([128, 128], -1)
        q = torch.full((*problem.q.shape[:2], 208), float("nan"), dtype=BF16, device=device)[:, :, 8:200]
        rope = torch.full((k.shape[0], 80), float("nan"), dtype=BF16, device=device)[:, 8:72]
        other = Problem(**vars(problem) | {"q": q.copy_(problem.q), "k": k, "v": v, "k_rope": rope})
        rope.copy_(problem.k_rope)
    for got, want in zip(other.run(), problem.run()):
        assert torch.equal(got, want)


@pytest.mark.parametrize("context", [(0, 70), (30, 128)])
def test_chunked_prefill_equals_one_call(backend, device, context):
    """Attend to the cached context, then causally to the chunk, then merge."""
    chunks = (70, 5)
    whole = make([(chunk, past + chunk) for chunk, past in zip(chunks, context)], poison=False, device=device)
    past_rows, own_rows, start = [], [], 0
    for chunk, past in zip(chunks, context):
        past_rows += range(start, start + past)
        own_rows += range(start + past, start + past + chunk)
        start += past + chunk

    def part(rows, lengths, causal):
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        own = {name: getattr(whole, name)[rows] for name in ("k", "v", "k_rope")}
        return whole.run(**own, cu_seqlens_k=bounds, max_seqlen_k=max(lengths), causal=causal)

    parts = part(past_rows, context, False), part(own_rows, chunks, True)
    whole.check(merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])))


def test_bits_follow_neither_the_batch_nor_the_order_of_events(backend, device, monkeypatch):
    """The same in any order (emulated) and on a repeat (on a device)."""
    problem = make([(70, 100), (130, 265), (0, 5), (3, 70), (9, 0)], heads=1, device=device)
    together = problem.run()
    for index in (1, 3, 7, 9):
        rows = slice(*problem.cu_seqlens_q[index : index + 2].tolist())
        monkeypatch.setattr(GluonKernel, "emulated_seed", index)
        alone = problem.sequence(index)
        if alone.k.shape[0]:
            for got, joint in zip(alone.run(), together):
                assert torch.equal(got, joint[rows])
    for wider, joint in zip(problem.run(max_seqlen_q=300, max_seqlen_k=1000), together):
        assert torch.equal(wider, joint)


def test_bits_do_not_follow_the_order_of_tiles(backend, device, monkeypatch):
    from mla_kernels.hopper import prefill as variant

    problem = make([(130, 130)], heads=3, poison=False, device=device)
    together = problem.run()
    for kept in (1, 2 * 2 * 130 * 256):  # one head, and two at a time
        monkeypatch.setattr(variant, "KEPT_TOGETHER", kept)
        for got, want in zip(problem.run(), together):
            assert torch.equal(got, want)
    problem.check(together)


def test_nan_in_a_sequence_stays_there(backend, device):
    problem = make([(20, 20), (5, 30), (70, 70)], device=device)
    first, last = problem.cu_seqlens_k[3:5].tolist()
    for tensor in (problem.k, problem.v):
        tensor[first:last] = float("nan")
    out, lse = problem.run()
    assert out[20:25].isnan().all() and lse[20:25].isnan().all()
    assert not out[:20].isnan().any() and not out[25:].isnan().any() and not lse[25:].isnan().any()


GARBAGE = {
    "beyond the tensors": ([0, 20, 500], [0, 70, 2**31 - 1]),
    "negative": ([-7, 20, 25], [-(2**31), 70, 75]),
    "falling": ([0, 25, 3], [0, 75, 2]),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_in_bounds_reaches_no_other_memory(backend, device, name):
    problem = make([(20, 70), (5, 5)], poison=False, device=device)
    queries, keys = (torch.tensor(values, dtype=torch.int32, device=device) for values in GARBAGE[name])
    problem.cu_seqlens_q, problem.cu_seqlens_k = queries, keys
    prefill.launch_prefill(*problem.arguments())


def test_offsets_past_two_to_the_31(backend, device):
    small = make([(5, 70)], poison=False, device=device)
    stride = 1 << 22
    rows = 2**31 // stride + 80
    storage = torch.empty(rows * stride, dtype=BF16, device=device)  # only the rows in use become real

    def far(tensor, start):
        wide = storage.as_strided((rows, *tensor.shape[1:]), (stride, *tensor.stride()[1:]), start)
        wide[-tensor.shape[0] :] = tensor
        return wide

    bounds_k = torch.tensor([0, rows - 70, rows], dtype=torch.int32, device=device)
    bounds_q = torch.tensor([0, 0, 5], dtype=torch.int32, device=device)
    large = Problem(
        far(small.q, 0)[-5:], far(small.k, 1024), far(small.v, 2048), bounds_q, bounds_k, 5, rows, small.softmax_scale,
        True, far(small.k_rope, 3072),
    )  # fmt: skip
    for got, want in zip(large.run(), small.run()):
        assert torch.equal(got, want)


def test_gradients_through_its_results(backend, device):
    problem = make([(20, 70), (5, 5)], heads=1, device=device)
    problem.check_gradients(problem.gradients())
