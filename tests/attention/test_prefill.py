"""mla_prefill against the reference on every backend: shapes, strides, poison, bits, chunks."""

import random

import pytest
import torch

from mla_kernels import launch
from mla_kernels.attention.merge import merge_states
from mla_kernels.attention.prefill import forward as prefill
from mla_kernels.attention.prefill.op import mla_prefill
from tests.attention.prefill_problems import Problem, make
from tests.support import not_on, repeats

HEADS = (1, 3, 16, 128)
LENGTHS = (0, 1, 63, 64, 65, 200)
WIDTHS = (
    (128, 64, 128),
    (192, 0, 128),
    (64, 32, 64),
    (128, 0, 64),
    (96, 0, 32),
    (16, 16, 16),
    (192, 64, 256),
    (256, 64, 64),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def carried(widths, dtype) -> bool:
    """Whether the Hopper kernel takes a form."""
    return widths == (128, 64, 128) and dtype != torch.float32


def shapes(count: int) -> list[tuple]:
    """Random (heads, widths, dtype, causal, lengths) in which every value of each stands at least once."""
    rng = random.Random(5)
    columns = []
    for values in (HEADS[:3], WIDTHS, DTYPES, (True, True, False)):
        column = [*values * (count // len(values)), *rng.sample(values, count % len(values))]
        rng.shuffle(column)
        columns.append(column)
    pairs = [(queries, keys) for queries in LENGTHS for keys in LENGTHS if queries * keys <= 65 * 200]
    lengths = [tuple(rng.sample(pairs, 3)) for _ in range(count)]
    return list(zip(*columns, lengths))


@pytest.mark.quick("mla_prefill")
@pytest.mark.parametrize("heads, widths, dtype, causal, lengths", shapes(8))
@pytest.mark.slow(when=lambda backend, heads: backend == "interpret" and heads == 16)  # the emulator runs these
@pytest.mark.hopper(when=carried)
def test_parity(backend, device, heads, widths, dtype, causal, lengths):
    key, rope, value = widths
    problem = make(lengths, heads=heads, key=key, rope=rope, value=value, dtype=dtype, causal=causal, device=device)
    problem.check(problem.run())


@pytest.mark.slow
@pytest.mark.hopper(when=carried)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_every_shape(backend, device, dtype, widths, causal):
    key, rope, value = widths
    for heads in HEADS[:3]:
        lengths = [(queries, keys) for queries in LENGTHS for keys in LENGTHS]
        problem = make(lengths, heads=heads, key=key, rope=rope, value=value, dtype=dtype, causal=causal, device=device)
        problem.check(problem.run())


@pytest.mark.parametrize(
    "heads, dtype, lengths",
    [
        (128, torch.bfloat16, [(65, 65)]),  # DeepSeek-V3
        (16, torch.float32, [(200, 200), (7, 300)]),  # DeepSeek-V2-Lite, or V3 on 8 devices
        (16, torch.bfloat16, [(400, 400)]),
    ],
)
@not_on("takes the interpreter too long; the emulator runs these sizes", "interpret")
def test_real_sizes(heads, dtype, lengths, backend, device):
    problem = make(lengths, heads=heads, key=128, rope=64, value=128, dtype=dtype, device=device)
    problem.check(problem.run())


@pytest.mark.parametrize("causal", [True, False])
def test_empty_rows_are_zero_and_minus_infinity(backend, device, causal):
    problem = make([(3, 0), (4, 2), (2, 2)], causal=causal, device=device)
    out, lse = (result.cpu() for result in problem.run())
    seen = torch.tensor([0, 0, 0, *([0, 0, 1, 1] if causal else [1, 1, 1, 1]), 1, 1], dtype=torch.bool)
    assert torch.equal(lse == float("-inf"), ~seen[:, None].expand(-1, 3))
    assert (out[~seen] == 0).all() and (out[seen] != 0).all()


def test_the_worked_example(backend, device):
    """The example of the docstring: which key each query sees, read off values that name their row."""
    k = torch.zeros(7, 1, 16, device=device)
    v = torch.eye(7, 16, device=device)[:, None]
    bounds = [torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 2, 5], [0, 4, 7])]
    sizes = dict(max_seqlen_q=3, max_seqlen_k=4, softmax_scale=1.0)
    out, lse = mla_prefill(torch.zeros(5, 1, 16, device=device), k, v, *bounds, **sizes)
    seen = [out[i, 0].nonzero().flatten().tolist() for i in range(5)]
    assert seen == [[0, 1, 2], [0, 1, 2, 3], [4], [4, 5], [4, 5, 6]]
    torch.testing.assert_close(lse[:, 0].cpu(), torch.tensor([3.0, 4, 1, 2, 3]).log())


@pytest.mark.no_launch("no queries")
def test_no_sequences_and_no_tokens(backend, device):
    nothing = make([], poison=False, device=device)
    out, lse = nothing.run()
    assert out.shape == (0, 3, 32) and lse.shape == (0, 3)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = nothing.run(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    assert out.shape == (0, 3, 32) and lse.shape == (0, 3)


def test_views_of_one_projection(backend, device):
    """Keys and values as kv_b_proj puts them out, queries in the middle of a wider tensor."""
    problem = make([(20, 70), (5, 5)], key=32, value=32, device=device)
    kv = torch.cat([problem.k, problem.v], -1)
    k, v = kv.split([32, 32], -1)
    q = torch.full((*problem.q.shape[:2], 64), float("nan"), device=device)[:, :, 8:56]
    q.copy_(problem.q)
    rope = torch.full((kv.shape[0], 80), float("nan"), device=device)[:, 64:]
    rope.copy_(problem.k_rope)
    assert not any(tensor.is_contiguous() for tensor in (q, k, v, rope))
    for got, want in zip(problem.run(q=q, k=k, v=v, k_rope=rope), problem.run()):
        assert torch.equal(got, want)


def test_heads_first(backend, device):
    problem = make([(20, 70), (5, 5)], device=device)
    turned = problem.with_inputs(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t)
    assert not turned.k.is_contiguous()
    for got, want in zip(turned.run(), problem.run()):
        assert torch.equal(got, want)


def test_a_shared_rotated_key_equals_an_expanded_one(backend, device):
    problem = make([(20, 70), (5, 5)], key=32, rope=16, device=device)
    expanded = torch.cat([problem.k, problem.k_rope[:, None].expand(-1, 3, -1)], -1)
    problem.check(problem.run(k=expanded, k_rope=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [(0, 70), (30, 64)])
def test_chunked_prefill_equals_one_call(backend, device, dtype, context):
    """Attend to the cached context, then causally to the chunk, then merge."""
    chunks = (20, 5)
    whole = make(
        [(chunk, past + chunk) for chunk, past in zip(chunks, context)], poison=False, dtype=dtype, device=device
    )
    past_rows, own_rows, start = [], [], 0
    for chunk, past in zip(chunks, context):
        past_rows += range(start, start + past)
        own_rows += range(start + past, start + past + chunk)
        start += past + chunk

    def part(rows, lengths, causal):
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        own = {name: getattr(whole, name)[rows] for name in ("k", "v", "k_rope")}
        queries = torch.tensor([0, *chunks], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        return whole.run(**own, cu_seqlens_q=queries, cu_seqlens_k=bounds, max_seqlen_k=max(lengths), causal=causal)

    parts = part(past_rows, context, False), part(own_rows, chunks, True)
    merged = merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    whole.check(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(backend, device, dtype):
    problem = make([(70, 100), (130, 65), (0, 5), (3, 70), (9, 0)], heads=1, dtype=dtype, device=device)
    together = problem.run()
    for index in range(problem.cu_seqlens_q.numel() - 1):
        rows = slice(*problem.cu_seqlens_q[index : index + 2].tolist())
        for alone, joint in zip(problem.sequence(index).run(), together):
            assert torch.equal(alone, joint[rows])
    for wider, joint in zip(problem.run(max_seqlen_q=300, max_seqlen_k=1000), together):
        assert torch.equal(wider, joint)


def test_repeats_give_the_same_bits(backend, device):
    problem = make([(70, 100), (40, 40)], dtype=torch.bfloat16, device=device)
    first = problem.run()
    for _ in repeats(device):
        for got, want in zip(problem.run(), first):
            assert torch.equal(got, want)


def test_nan_in_a_sequence_stays_there(backend, device):
    problem = make([(20, 20), (5, 30), (70, 70)], device=device)
    first, last = problem.cu_seqlens_k[3:5].tolist()
    for tensor in (problem.k, problem.v):
        tensor[first:last] = float("nan")
    out, lse = problem.run()
    assert out[20:25].isnan().all() and lse[20:25].isnan().all()
    assert not out[:20].isnan().any() and not out[25:].isnan().any() and not lse[25:].isnan().any()


@pytest.mark.parametrize("causal", [True, False])
@not_on("has no tiles", "cpu")
def test_other_tiles(backend, device, causal, monkeypatch):
    tile_for = prefill.MLA_PREFILL.tile_for
    for block in ({"BLOCK_M": 16, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_N": 32}):
        monkeypatch.setattr(prefill.MLA_PREFILL, "tile_for", lambda *a: tile_for(*a) | block)  # noqa: B023
        problem = make([(70, 100), (100, 70), (1, 64)], causal=causal, device=device)
        problem.check(problem.run())


GARBAGE = {
    "beyond the tensors": ([0, 20, 500], [0, 70, 2**31 - 1]),
    "negative": ([-7, 20, 25], [-(2**31), 70, 75]),
    "falling": ([0, 25, 3], [0, 75, 2]),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_no_access_leaves_a_tensor(name):
    from mla_kernels.targets import emulator

    problem = make([(20, 70), (5, 5)], poison=False)
    queries, keys = (torch.tensor(values, dtype=torch.int32) for values in GARBAGE[name])
    problem.cu_seqlens_q, problem.cu_seqlens_k = queries, keys
    with launch.on_cpu("npu-emulated"), emulator.guarded():
        prefill.launch_prefill(*problem.arguments())


@not_on("values of CPU tensors are checked", "cpu")
def test_results_of_real_sequences_survive_garbage_in_others(backend, device):
    problem = make([(20, 70), (5, 5)], poison=False, device=device)
    bounds = torch.tensor([[0, 0, 20, 20, 25], [0, 0, 70, 70, 2**31 - 1]], dtype=torch.int32, device=device)
    good = problem.run()
    problem.cu_seqlens_q, problem.cu_seqlens_k = bounds
    for got, want in zip(prefill.launch_prefill(*problem.arguments()), good):
        assert torch.equal(got, want)


@not_on("the interpreter copies whole storages", "interpret")
def test_offsets_past_two_to_the_31(backend, device):
    small = make([(5, 70)], poison=False, heads=2, dtype=torch.bfloat16, device=device)
    stride = 1 << 22
    rows = 2**31 // stride + 80
    storage = torch.empty(rows * stride, dtype=torch.bfloat16, device=device)  # only the rows in use become real

    def far(tensor):
        wide = storage.as_strided((rows, *tensor.shape[1:]), (stride, *tensor.stride()[1:]), far.start)
        far.start += 1024
        wide[-tensor.shape[0] :] = tensor
        return wide

    far.start = 0
    q = far(small.q)[-5:]
    # the keys of a first, query-less sequence fill the rows before
    bounds_k = torch.tensor([0, rows - 70, rows], dtype=torch.int32, device=device)
    bounds_q = torch.tensor([0, 0, 5], dtype=torch.int32, device=device)
    large = Problem(
        q, far(small.k), far(small.v), bounds_q, bounds_k, 5, rows, small.softmax_scale, True, far(small.k_rope)
    )
    for got, want in zip(large.run(), small.run()):
        assert torch.equal(got, want)
